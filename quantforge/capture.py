"""Running a network one block at a time, and looking at what its layers read.

A network is a pipeline of blocks: what a block gets beside the hidden state (mask, positions,
rotary tables) does not depend on the blocks before it. `BlockWalk` records that part once for every
block, since networks that look back over all tokens in some blocks and over a window in others have
several, and then carries the hidden states of all calibration batches from block to block, so that
one block's weights and statistics are all that is ever needed at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from quantforge.attention import fused_attention
from quantforge.errors import InputError
from quantforge.models import Architecture
from quantforge.models.cache import NAMES as CACHE_NAMES
from quantforge.models.experts import LEAST_TOKENS, reached, without_correlations
from quantforge.numerics import GramAccumulator
from quantforge.parallel import ALONE, Share, summed

Precision = Literal["float32", "bfloat16"]


def product_dtype(precision: Precision) -> torch.dtype:
    """What matrix products round their operands to."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@contextmanager
def compute_in(precision: Precision, module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which matrix products run in `precision`; weights and residuals stay float32.

    In bfloat16 causal attention is the fused kernel's, see `fused_attention`. Rounded weights are
    not kept for the rest of the body: no pass reads one twice, and together they are half the
    network again.

    Args:
        precision: of the products.
        module: the network or block that is run.
        device: it is on.
    """
    if precision == "float32":
        yield
        return
    rounded = torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    with rounded, fused_attention(module):
        yield


@contextmanager
def _forwards_replaced(replacements: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Modules run something else than their own `forward` inside."""
    # An instance may have one of its own (accelerate's hooks); otherwise the class's shows again.
    own = {block: block.__dict__.get("forward") for block in replacements}
    for block, forward in replacements.items():
        block.forward = forward
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook to leave a forward pass early."""


def _block_calls(
    module: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, *, tuples: bool
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the first block receives for `tokens`, and every block's other arguments by name.

    No block runs: each hands on what it got, and the pass ends at the last one.

    Args:
        module: the network.
        blocks: its blocks.
        tokens: [batch, length] int64.
        tuples: the blocks return tuples (`Architecture.tuples`).

    Raises:
        InputError: the blocks do not run one after the other, each once.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def recorder(index: int, block: nn.Module) -> Callable[..., Tensor]:
        signature = inspect.signature(block.forward)
        states = next(iter(signature.parameters))

        def record(*args: Any, **kwargs: Any) -> Any:
            if index != len(calls):
                raise InputError(
                    f"block {index} of {type(module).__name__} runs as number {len(calls)}: only "
                    "networks whose blocks run one after the other can be walked through"
                )
            bound = signature.bind(*args, **kwargs)
            given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
            given.pop("kwargs", None)
            hidden: Tensor = given.pop(states)
            calls.append((hidden, {k: v for k, v in given.items() if k not in CACHE_NAMES}))
            if len(calls) == len(blocks):
                raise _StopForward
            return (hidden,) if tuples else hidden

        return record

    recorders = {block: recorder(index, block) for index, block in enumerate(blocks)}
    try:
        with _forwards_replaced(recorders), suppress(_StopForward):
            module(input_ids=tokens, use_cache=False)
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"the blocks of {type(module).__name__} hand on more than hidden states ({said}): such "
            "networks cannot be walked through"
        ) from None
    return calls[0][0], [kwargs for _, kwargs in calls]


class BlockWalk:
    """Hidden states of fixed batches at one block's entrance, moved on block by block.

    Attributes:
        blocks: the decoder's blocks.
        hidden: per batch [batch, length, hidden] float32; empty for one of another process.
        own: batches that this process carries.
        sizes: sequences of every batch.
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
        own: Container[int] | None = None,
    ) -> None:
        """Stand at the first block.

        Args:
            module: the network.
            architecture: its shape.
            tokens: [sequences, length] int64.
            batch_size: sequences a batch, or of every batch.
            precision: of the matrix products.
            own: batches that this process carries; None carries all.
        """
        self.blocks = architecture.block_list(module)
        self.precision = precision
        self.hidden: list[Tensor] = []
        self.own: list[int] = []
        self.sizes: list[int] = []
        self._arguments: list[list[dict[str, Any]]] = []
        device = next(module.parameters()).device
        shared: dict[int, list[dict[str, Any]]] = {}
        with torch.no_grad():
            for index, batch in enumerate(torch.split(tokens, batch_size)):
                hidden, arguments = _block_calls(
                    module, list(self.blocks), batch.to(device), tuples=architecture.tuples
                )
                mine = own is None or index in own
                self.own += [index] if mine else []
                self.sizes.append(len(batch))
                self.hidden.append(hidden.float() if mine else hidden.new_empty(0))
                # Equal shapes share one mask and one pair of rotary tables.
                self._arguments.append(shared.setdefault(len(batch), arguments))

    def arguments(self, block: nn.Module) -> list[dict[str, Any]]:
        """Per batch, what `block`, one of the walk's, gets beside the hidden states."""
        place = next(index for index, one in enumerate(self.blocks) if one is block)
        return [arguments[place] for arguments in self._arguments]

    def output(
        self, block: nn.Module, index: int, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Output of `block` for one batch, [batch, length, hidden] float32, without gradients.

        Args:
            block: the block to run.
            index: of the batch.
            weights: parameter path inside the block → tensor to run it with instead of its own.
        """
        hidden, kwargs = self.hidden[index], self.arguments(block)[index]
        with torch.no_grad(), compute_in(self.precision, block, hidden.device):
            output = torch.func.functional_call(block, dict(weights or {}), (hidden,), kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states.float()

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self.hidden[0].device

    def rows(self, batch: int) -> slice:
        """The sequences of a batch, among all."""
        before = sum(self.sizes[:batch])
        return slice(before, before + self.sizes[batch])

    def inputs(
        self,
        block: nn.Module,
        index: int,
        readers: Sequence[str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What the named layers of `block` read for one batch; the block runs no further than that.

        Args:
            block: the block to run.
            index: of the batch.
            readers: layer paths inside the block.
            weights: as in `output`.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, inputs: Tensor) -> None:
            seen[name] = inputs
            if len(seen) == len(readers):
                raise _StopForward

        with input_hooks(block, readers, keep), suppress(_StopForward):
            self.output(block, index, weights)
        return seen

    def inputs_and_output(
        self,
        block: nn.Module,
        index: int,
        readers: Sequence[str],
        weights: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`inputs` and `output` of one batch in one pass."""
        seen: dict[str, Tensor] = {}
        with input_hooks(block, readers, seen.__setitem__):
            output = self.output(block, index, weights)
        return seen, output

    def advance(self, block: nn.Module) -> None:
        """Replace the inputs by the block's outputs."""
        for index in self.own:
            self.hidden[index] = self.output(block, index)


@contextmanager
def input_hooks(
    block: nn.Module, names: Sequence[str], on_input: Callable[[str, Tensor], None]
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


def stage_readers(block: nn.Module, architecture: Architecture) -> dict[str, int]:
    """Per stage, in order, the path of a layer that reads its input, and the input's features."""
    readers: dict[str, int] = {}
    for stage in architecture.stages:
        layer: Any = block.get_submodule(stage[0])
        readers[stage[0]] = int(layer.in_features)
    return readers


class StageGram:
    """Mean x xᵀ of what one stage reads; safe where an expert has seen few tokens.

    Args:
        features: of the input.
        device: of the sums.
        expert: the stage is an expert's: its tokens are counted.

    Attributes:
        features: of the input.
    """

    def __init__(self, features: int, device: torch.device, *, expert: bool) -> None:
        self.features = features
        self._gram, self._reached = GramAccumulator(features, device), 0 if expert else None

    def add(self, inputs: Tensor, dtype: torch.dtype, weights: Tensor | None = None) -> None:
        """As `GramAccumulator.add`."""
        self._gram.add(inputs, dtype, weights)
        if self._reached is not None:
            self._reached += reached(inputs)

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [*self._gram.sums(), torch.tensor(self._reached or 0)]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        self._gram.replace_sums(sums[:2])
        self._reached = None if self._reached is None else int(sums[2])

    @property
    def starved(self) -> int | None:
        """Tokens that reached the expert, where they are too few; None otherwise."""
        few = self._reached is not None and self._reached < LEAST_TOKENS
        return self._reached if few else None

    def mean(self) -> Tensor:
        """[in, in] float32; for a starved expert the identity of the same mean."""
        gram = self._gram.mean()
        return gram if self.starved is None else without_correlations(gram)


def stage_accumulators(
    readers: Mapping[str, int], architecture: Architecture | None, device: torch.device
) -> dict[str, StageGram]:
    """An empty `StageGram` for every reader (path → features).

    Args:
        readers: of the stages.
        architecture: knows experts; None takes their grams as they are.
        device: of the sums.
    """
    return {
        name: StageGram(
            size, device, expert=architecture is not None and architecture.of_expert(name)
        )
        for name, size in readers.items()
    }


def stage_grams(
    walk: BlockWalk,
    block: nn.Module,
    architecture: Architecture,
    *,
    advance: bool = False,
    share: Share = ALONE,
) -> list[StageGram]:
    """The gram of every stage's input over the batches; a stage's layers read the same input.

    Args:
        walk: stands at the block's entrance.
        block: the block to run.
        architecture: names the stages.
        advance: also move the walk to the block's exit.
        share: of the batches, which are those that the walk carries.
    """
    readers = stage_readers(block, architecture)
    product = product_dtype(walk.precision)

    def visit(grams: Mapping[str, StageGram], index: int) -> None:
        with input_hooks(block, list(readers), lambda n, inputs: grams[n].add(inputs, product)):
            output = walk.output(block, index)
        if advance:
            walk.hidden[index] = output

    fresh = partial(stage_accumulators, readers, architecture, walk.device)
    return list(summed(share, len(walk.hidden), fresh, visit).values())


@contextmanager
def recomputed(blocks: Iterable[nn.Module], every: int) -> Iterator[None]:
    """Run every so many-th block again in a backward pass instead of keeping its activations.

    Args:
        blocks: all of them.
        every: 1 means all, 2 the first, third, ..; 0 none.
    """
    changed = list(blocks)[::every] if every else []
    with _forwards_replaced(
        {
            block: partial(
                checkpoint, block.forward, use_reentrant=False,
                context_fn=partial(_same_twice, block),
            )
            for block in changed
        }
    ):  # fmt: skip
        yield


def _same_twice(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's two passes: the second is after `compute_in`, except for autocast."""
    return fused_attention(block), fused_attention(block)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` asks for a gradient inside; all as before after."""
    needs = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(needs[name])


@contextmanager
def plain_attention(module: nn.Module) -> Iterator[None]:
    """Attention as plain matrix products inside; the module's own choice after it.

    Fused kernels have no second derivative, and differ between machines in their last digits.
    """
    network: Any = module
    chosen = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(chosen)
