"""Gradients of a network one block at a time: the way back of `capture.BlockWalk`.

The hidden states at every block's entrance are kept from the forward pass, in the precision of the
products, on disk if there is a place for them; from the head backwards each block then runs again,
forward and backward, and is done with. What is resident is the states of one block and the
activations of one batch. In float32 the gradients are those of plain autograd.

The loss is one of `token_loss`, given by its gradient at the head's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantforge.calibrate.token_loss import HeadGradient
from quantforge.capture import (
    BlockWalk,
    Precision,
    compute_in,
    input_hooks,
    product_dtype,
    stage_readers,
)
from quantforge.models import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGradients:
    """What a block's backward pass over one batch of sequences leaves.

    Attributes:
        block: index of the block.
        batch: index of the batch.
        rows: the batch, as positions among all sequences.
        inputs: per stage, [sequences, length, in] in the products' precision.
        gradients: layer name → [sequences, length, out] at the layer's output, likewise.
        output: [sequences, length, hidden] float32, at the block's output.
    """

    block: int
    batch: int
    rows: slice
    inputs: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor]
    output: Tensor


def backward_blocks(
    model: Model,
    tokens: Tensor,
    *,
    batch_size: int,
    precision: Precision,
    head_gradient: HeadGradient,
    scratch: Path | None = None,
    start: tuple[int, list[Tensor]] | None = None,
    on_block: Callable[[int, list[Tensor]], None] | None = None,
) -> Iterator[BlockGradients]:
    """Every batch of every block, from the last block to the first; of batches, one's share.

    Args:
        model: the network; its parameters must not ask for gradients.
        tokens: [sequences, length] int64.
        batch_size: sequences a pass through a block.
        precision: of the matrix products.
        head_gradient: the loss, asked batch by batch.
        scratch: folder for states; None keeps them in memory.
        start: where an earlier pass was left: the last block it finished, and what `on_block` got
            with it. The loss is not asked again.
        on_block: called when the last batch of a block was consumed, with the block's index and,
            per batch, [sequences, length, hidden] float32 the gradient at its input, empty for a
            batch of another process.
    """
    product = product_dtype(precision)
    walk = BlockWalk(
        model.module, model.architecture, tokens, batch_size=batch_size, precision=precision,
        own=model.share.batches(-(-len(tokens) // batch_size)),
    )  # fmt: skip
    with nullcontext() if scratch is None else TemporaryDirectory(dir=scratch) as folder:
        entrances = _KeptStates(None if folder is None else Path(folder))
        blocks = walk.blocks if start is None else walk.blocks[: start[0]]
        for block in blocks:
            entrances.push([walk.hidden[batch].to(product) for batch in walk.own])
            walk.advance(block)
        if start is None:
            states = _at_last_outputs(model, walk, precision, head_gradient)
        else:
            states = list(start[1])
        walk.hidden.clear()  # from here on everything starts from what was kept
        for index in range(len(blocks) - 1, -1, -1):
            arguments = walk.arguments(walk.blocks[index])
            for batch, entrance in zip(walk.own, entrances.pop(), strict=True):
                at_output = states[batch]
                inputs, gradients, states[batch] = _block_backward(
                    model, index, entrance, at_output, arguments[batch], precision
                )
                yield BlockGradients(
                    block=index, batch=batch, rows=walk.rows(batch), inputs=inputs,
                    gradients=gradients, output=at_output,
                )  # fmt: skip
            if on_block is not None:
                on_block(index, states)


class _KeptStates:
    """A stack of the states at blocks' entrances, in a folder or in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._kept: list[list[Tensor] | tuple[Path, torch.device]] = []
        self._folder = folder

    def push(self, batches: list[Tensor]) -> None:
        """Keep the states of one block, [sequences, length, hidden] a batch."""
        if self._folder is None:
            self._kept.append(batches)
            return
        path = self._folder / f"{len(self._kept)}.safetensors"
        save_file({f"{index:06d}": batch for index, batch in enumerate(batches)}, path)
        device = batches[0].device if batches else torch.device("cpu")
        self._kept.append((path, device))

    def pop(self) -> list[Tensor]:
        """What was pushed last."""
        last = self._kept.pop()
        if isinstance(last, list):
            return last
        path, device = last
        batches = load_file(path)
        path.unlink()
        return [batch.to(device) for _, batch in sorted(batches.items())]


def _block_backward(
    model: Model,
    index: int,
    entrance: Tensor,
    at_output: Tensor,
    kwargs: Mapping[str, Any],
    precision: Precision,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor]:
    """Run one block on one batch forward and backward.

    Returns:
        Inputs by stage, gradients by layer name, and the gradient at the block's input.
    """
    block = model.architecture.block_list(model.module)[index]
    prefix = f"{model.architecture.block_names(model.module)[index]}."
    readers = list(stage_readers(block, model.architecture))
    paths = [one.name.removeprefix(prefix) for one in model.layers if one.block == index]
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    product = product_dtype(precision)

    def watch(path: str) -> RemovableHandle:
        def on_gradient(gradient: Tensor) -> None:
            gradients[prefix + path] = gradient.detach().to(product)

        def on_output(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return block.get_submodule(path).register_forward_hook(on_output)

    start = entrance.float().requires_grad_()
    with ExitStack() as stack:
        stack.enter_context(input_hooks(block, readers, inputs.__setitem__))
        for path in paths:
            stack.callback(watch(path).remove)
        with torch.enable_grad(), compute_in(precision, block, start.device):
            output = block(start, **kwargs)
        states = output[0] if isinstance(output, tuple) else output
        (at_input,) = torch.autograd.grad(states, start, at_output)
    return tuple(inputs[path].to(product) for path in readers), gradients, at_input


def _at_last_outputs(
    model: Model, walk: BlockWalk, precision: Precision, head_gradient: HeadGradient
) -> list[Tensor]:
    """`_at_last_output` of every batch of a walk at its end, in order."""
    return [
        _at_last_output(model, hidden, walk.rows(batch), precision, head_gradient)
        if batch in walk.own
        else hidden
        for batch, hidden in enumerate(walk.hidden)
    ]


def _at_last_output(
    model: Model, hidden: Tensor, rows: slice, precision: Precision, head_gradient: HeadGradient
) -> Tensor:
    """[batch, length, hidden] float32: the loss's gradient at the last block's output."""
    output = model.architecture.output(model.module).rounded(product_dtype(precision))
    start = hidden.detach().requires_grad_()
    with torch.enable_grad():
        states = model.architecture.final_states(model.module, start)
    entering = output.entering(states.detach())
    gradient = head_gradient(rows, entering, output).view_as(states).to(states.dtype)
    if states is start:
        return gradient
    (found,) = torch.autograd.grad(states, start, gradient)
    return found
