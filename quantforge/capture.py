"""Running a decoder one block at a time, and looking at what its layers read.

A decoder is a pipeline of blocks that share everything but the hidden state (mask, positions,
rotary tables). `BlockWalk` records that shared part once and then carries the hidden states of all
calibration batches from block to block, so that one block's weights and statistics are all that
is ever needed at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantforge.models import Architecture
from quantforge.numerics import GramAccumulator

Precision = Literal["float32", "bfloat16"]


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Context in which matrix products run in `precision`; weights and residuals stay float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook to leave a forward pass early."""


def _first_block_call(
    module: nn.Module, block: nn.Module, tokens: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states and keyword arguments that `block` receives for `tokens`."""
    seen: dict[str, Any] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["hidden"] = args[0] if args else kwargs.pop("hidden_states")
        seen["kwargs"] = {k: v for k, v in kwargs.items() if "past_key_value" not in k}
        raise _StopForward

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        module(input_ids=tokens, use_cache=False)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return seen["hidden"], seen["kwargs"]


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Output hidden states [batch, length, hidden] of one block."""
    output = block(hidden, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


class BlockWalk:
    """Hidden states of fixed batches at one block's entrance, moved on block by block.

    Attributes:
        blocks: the decoder's blocks.
        hidden: per batch [batch, length, hidden] float32.
        kwargs: per batch, what every block gets beside the hidden states.
        precision: of the matrix products in `outputs`.
    """

    def __init__(
        self,
        module: nn.Module,
        architecture: Architecture,
        tokens: Tensor,
        *,
        batch_size: int | list[int] = 4,
        precision: Precision = "bfloat16",
    ) -> None:
        self.blocks = architecture.block_list(module)
        self.precision = precision
        self.hidden: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []
        device = next(module.parameters()).device
        shared: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for batch in torch.split(tokens, batch_size):
                hidden, kwargs = _first_block_call(module, self.blocks[0], batch.to(device))
                self.hidden.append(hidden.float())
                # Equal shapes share one mask and one pair of rotary tables.
                self.kwargs.append(shared.setdefault(len(batch), kwargs))

    def outputs(self, block: nn.Module) -> Iterator[Tensor]:
        """Output of `block` for every batch, [batch, length, hidden] float32, without gradients."""
        for hidden, kwargs in zip(self.hidden, self.kwargs, strict=True):
            with torch.no_grad(), compute_in(self.precision, hidden.device):
                yield run_block(block, hidden, kwargs).float()

    def advance(self, block: nn.Module) -> None:
        """Replace the inputs by the block's outputs."""
        for index, output in enumerate(self.outputs(block)):
            self.hidden[index] = output


@contextmanager
def input_hooks(
    block: nn.Module, names: list[str], on_input: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While active, call `on_input(name, input)` whenever a named submodule of `block` runs."""
    handles: list[RemovableHandle] = []

    def watch(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            on_input(name, args[0].detach())

        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))

    try:
        for name in names:
            watch(name)
        yield
    finally:
        for handle in handles:
            handle.remove()


def stage_grams(
    walk: BlockWalk,
    block: nn.Module,
    architecture: Architecture,
    *,
    advance: bool = False,
    batches: int | None = None,
) -> list[Tensor]:
    """Mean x xᵀ of every stage's input over the batches; a stage's layers read the same input.

    Args:
        walk: stands at the block's entrance.
        block: the block to run.
        architecture: names the stages.
        advance: also move the walk to the block's exit.
        batches: only the first so many; None takes all.
    """
    readers = [stage[0] for stage in architecture.stages]
    grams: dict[str, GramAccumulator] = {}
    for name in readers:
        features = block.get_submodule(name).in_features
        grams[name] = GramAccumulator(int(features), walk.hidden[0].device)  # type: ignore[arg-type]
    with input_hooks(block, readers, lambda name, inputs: grams[name].add(inputs)):
        for index, output in enumerate(islice(walk.outputs(block), batches)):
            if advance:
                walk.hidden[index] = output
    return [grams[name].mean() for name in readers]
