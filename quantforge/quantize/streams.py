"""The hidden states a block is fitted on: behind the quantized prefix, and in the float network.

A block's layers are quantized on the inputs x̃ they will really get. What the float network had
there, x, is needed by every method that repairs the earlier layers' errors too (GPTAQ, QEP, Qronos)
and by learned rounding, whose target is the float block's output. Both streams walk through the
network together, a batch at a time, and what a layer reads in one is compared with what it reads
in the other while the batch is at hand. Where the driver quantizes a block stage by stage ("true
sequential" in GPTQ's terms), a stage is looked at when those before it are quantized, so that it is
fitted to their errors too.

The held-out sequences walk behind the fitting ones where something is chosen on them.

Tokens count in the moments as much as the loss feels them (`numerics.token_weights`), where that is
known; it is of fitting tokens, so on held-out ones all count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantforge.capture import (
    BlockWalk,
    StageGram,
    product_dtype,
    stage_accumulators,
    stage_readers,
)
from quantforge.models import Architecture, Model
from quantforge.numerics import CrossAccumulator, GramAccumulator
from quantforge.parallel import summed
from quantforge.quantize.config import CROSS_METHODS, QuantizeConfig
from quantforge.quantize.refine import BlockTask
from quantforge.types import CalibrationSet


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMoments:
    """Second moments of one stage's inputs, in which tokens may count differently.

    Attributes:
        gram: [in, in] mean x̃ x̃ᵀ.
        cross: [in, in] mean (x − x̃) x̃ᵀ; None where the method does not use it.
        starved: tokens that reached an expert, where they were too few: the gram is the identity
            and the cross moment zero, so that nothing is compensated. None otherwise.
    """

    gram: Tensor
    cross: Tensor | None
    starved: int | None = None


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over batches of what one stage reads, and of how that misses the float network's."""

    gram: StageGram
    cross: CrossAccumulator | None

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [*self.gram.sums(), *(self.cross.sums() if self.cross else [])]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        count = len(self.gram.sums())
        self.gram.replace_sums(sums[:count])
        if self.cross:
            self.cross.replace_sums(sums[count:])

    def means(self) -> StageMoments:
        """What was gathered of the stage."""
        moment = None if self.cross is None else self.cross.mean()
        if moment is not None and self.gram.starved is not None:
            moment = torch.zeros_like(moment)
        return StageMoments(gram=self.gram.mean(), cross=moment, starved=self.gram.starved)


class _Magnitudes:
    """Sums over batches of a stage's gram and of its inputs' magnitudes."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.gram = GramAccumulator(features, device)
        self.total = torch.zeros(features, device=device)

    def add(self, inputs: Tensor, product: torch.dtype) -> None:
        """Add inputs [..., in]."""
        self.gram.add(inputs, product)
        self.total += inputs.flatten(0, -2).float().abs().sum(0)

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [*self.gram.sums(), self.total]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        self.gram.replace_sums(sums[:-1])
        self.total = sums[-1]

    def means(self) -> tuple[Tensor, Tensor]:
        """[in, in] mean x xᵀ and [in] mean |x|."""
        return self.gram.mean(), self.total / self.gram.tokens


class Streams:
    """Both streams of hidden states, moved from block to block together.

    The float stream is only there when the method or learned rounding needs it, the held-out
    sequences only when something is chosen on them.

    Attributes:
        quantized: walks behind the quantized blocks.
        native: walks the float network, or None.
        fitting_batches: number of batches at the front that are fitted on.
    """

    def __init__(
        self,
        model: Model,
        calibration: CalibrationSet,
        config: QuantizeConfig,
        enter: Callable[[], None] | None = None,
    ) -> None:
        """Start both streams at the first block.

        Args:
            model: the network.
            calibration: fitting and held-out tokens.
            config: says which streams are needed.
            enter: quantizes the embedding, once the float stream has read the float one.
        """
        pieces = [calibration.fitting]
        if config.needs_held_out:
            pieces.append(calibration.held_out)
        # Batches must not mix fitting and held-out sequences.
        batches = [part for piece in pieces for part in torch.split(piece, config.batch_size)]
        lengths = [len(batch) for batch in batches]
        self.fitting_batches = -(-len(calibration.fitting) // config.batch_size)
        split, self._share = self.fitting_batches, model.share
        own = {
            *self._share.batches(split),
            *(split + index for index in self._share.batches(len(batches) - split)),
        }
        self._architecture = model.architecture
        self._compares, self._chooses = config.method in CROSS_METHODS, config.chooses

        def walk() -> BlockWalk:
            return BlockWalk(
                model.module,
                model.architecture,
                torch.cat(pieces),
                batch_size=lengths,
                precision=config.precision,
                own=own,
            )

        self.native = walk() if config.needs_float_stream else None
        if enter is not None:
            enter()
        self.quantized = walk()
        self._moved: set[int] = set()  # batches of the float stream that stand at the exit already

    def moments(
        self,
        block: nn.Module,
        stages: Sequence[int],
        floats: Mapping[str, Tensor],
        weights: Sequence[Tensor | None],
    ) -> tuple[list[StageMoments], list[StageMoments]]:
        """Moments of some stages over the fitting and over the held-out batches.

        Args:
            block: stands at the entrance of both streams; as far as it is quantized, the quantized
                stream sees that.
            stages: indices of the stages to look at.
            floats: parameter path inside the block → float weight of what is quantized already.
            weights: in the order of `stages`, [fitting sequences, length] how much each token
                counts; alike where None.

        Returns:
            In the order of `stages`; the second list is empty where layers have no choice.
        """
        sizes = list(stage_readers(block, self._architecture).items())
        readers = dict(sizes[index] for index in stages)
        split, count = self.fitting_batches, len(self.quantized.hidden)
        counted = dict(zip(readers, weights, strict=True))
        fresh = partial(self._fresh, readers, self._architecture)
        fitting = self._part(block, fresh, range(split), floats, counted)
        if not self._chooses:
            return fitting, []
        fresh = partial(self._fresh, readers, None)
        return fitting, self._part(block, fresh, range(split, count), floats, {})

    def statistics(self, block: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Of every stage's input x̃ over the fitting batches: [in, in] mean x̃ x̃ᵀ, [in] mean |x̃|.

        Args:
            block: stands at the entrance of the quantized stream.
        """
        sizes = stage_readers(block, self._architecture)
        product = product_dtype(self.quantized.precision)

        def visit(made: Mapping[str, _Magnitudes], index: int) -> None:
            for name, inputs in self.quantized.inputs(block, index, list(sizes)).items():
                made[name].add(inputs, product)

        def fresh() -> dict[str, _Magnitudes]:
            return {n: _Magnitudes(size, self.quantized.device) for n, size in sizes.items()}

        found = summed(self._share, self.fitting_batches, fresh, visit)
        return [one.means() for one in found.values()]

    def _fresh(
        self, readers: Mapping[str, int], architecture: Architecture | None
    ) -> dict[str, _Moments]:
        """Empty moments of some stages."""
        device = self.quantized.device
        return {
            name: _Moments(
                gram, CrossAccumulator(gram.features, device) if self._compares else None
            )
            for name, gram in stage_accumulators(readers, architecture, device).items()
        }

    def _part(
        self,
        block: nn.Module,
        fresh: Callable[[], Mapping[str, _Moments]],
        batches: range,
        floats: Mapping[str, Tensor],
        weights: Mapping[str, Tensor | None],
    ) -> list[StageMoments]:
        """Moments of what some layers read in some batches; `fresh` makes them, empty.

        Where these are all stages, the float stream moves on in the same pass.
        """

        def visit(made: Mapping[str, _Moments], place: int) -> None:
            self._add(block, made, batches[place], floats, weights)

        return [one.means() for one in summed(self._share, len(batches), fresh, visit).values()]

    def _add(
        self,
        block: nn.Module,
        made: Mapping[str, _Moments],
        index: int,
        floats: Mapping[str, Tensor],
        weights: Mapping[str, Tensor | None],
    ) -> None:
        """Add what the layers read in one batch to their moments."""
        product, names = product_dtype(self.quantized.precision), list(made)
        read = self.quantized.inputs(block, index, names)
        rows = self.quantized.rows(index)
        counts = {n: None if (one := weights.get(n)) is None else one[rows] for n in names}
        for name, inputs in read.items():
            made[name].gram.add(inputs, product, counts[name])
        if self.native is None or not self._compares:
            return
        if len(names) == len(self._architecture.stages):  # nothing else looks at this block
            meant, output = self.native.inputs_and_output(block, index, names, floats)
            self.native.hidden[index] = output
            self._moved.add(index)
        else:
            meant = self.native.inputs(block, index, names, floats)
        for name, inputs in read.items():
            native, cross = meant[name], made[name].cross
            if self._architecture.of_expert(name):  # tokens that went elsewhere there
                native = torch.where(native.any(-1, keepdim=True), native, inputs)
            if cross is not None:
                cross.add(native, inputs, product, counts[name])

    def advance_native(self, block: nn.Module, floats: Mapping[str, Tensor]) -> None:
        """Move the float stream, if there is one, to the exit of `block`.

        Args:
            block: whose weights may be quantized.
            floats: parameter path inside the block → float weight of what is quantized.
        """
        if self.native is not None:
            for index in set(self.native.own) - self._moved:
                self.native.hidden[index] = self.native.output(block, index, floats)
            self._moved.clear()

    def task(self, block: nn.Module, channel_weight: Tensor) -> BlockTask:
        """The block's inputs and its outputs in the float network, for learned rounding.

        The float stream must stand at the block's exit, the quantized one at its entrance.
        """
        if self.native is None:
            raise ValueError("learned rounding needs the float stream")
        return BlockTask(
            block,
            self.quantized.hidden,
            self.native.hidden,
            self.quantized.arguments(block),
            channel_weight=channel_weight,
            held_out=len(self.quantized.hidden) - self.fitting_batches,
            precision=self.quantized.precision,
            share=self._share,
            own=self.quantized.own,
            sizes=self.quantized.sizes,
        )

    def advance(self, block: nn.Module) -> None:
        """Move the quantized stream to the exit of `block`, whose weights are now quantized."""
        self.quantized.advance(block)
