"""The driver: one block at a time, each fed by the quantized blocks before it.

A block's inputs come from the quantized prefix, so that later blocks are fitted to what they will
really read. For every block: fold channel scales into it if asked, run it once to gather the grams
of its stages, factor each gram, quantize its layers, put the dequantized weights in, learn the
rounding if asked, and run it again for the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from math import ceil
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError, UsageError
from quantforge.format.store import CandidateStore, weight_from, weight_tensors
from quantforge.journal import NO_JOURNAL, Journal
from quantforge.memory import release_freed
from quantforge.methods.awq import ChosenScale
from quantforge.models import Model
from quantforge.numerics import output_error, relative, token_weights
from quantforge.parallel import Share
from quantforge.progress import Monitor, resumed
from quantforge.quantize.config import QuantizeConfig, RoundingConfig
from quantforge.quantize.layer import Compensated, Outputs, Stage, quantize_layer
from quantforge.quantize.refine import refine_block
from quantforge.quantize.resume import BLOCK, FinishedBlock, read_block, write_block
from quantforge.quantize.scale import refold, rescale_outputs, scale_block
from quantforge.quantize.streams import StageMoments, Streams
from quantforge.results import LayerReport
from quantforge.types import BitPlan, CalibrationSet, LayerInfo, QuantizedWeight, QuantSpec

# By whether the layer is outside the blocks.
_ONE_PASS = {
    False: "one-pass compensation on the float network's inputs",
    True: "rounded or compensated, whichever lost less on held-out tokens",
}
# Of a note, by which starved experts are known.
FEW_TOKENS = "calibration tokens reached it"
# Layer name → diagonal blocks of its output gram, which cover its rows in order.
OutputGrams = Callable[[str], Sequence[Tensor]]
# Is told a layer's name and its [out, in] float32 weight before it is replaced; may keep it.
KeepFloat = Callable[[str, Tensor], None]
# Layer name → [fitting sequences, length] how much the loss feels its outputs, mean 1.
TokenSquares = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayer:
    """One finished layer.

    Attributes:
        layer: which.
        weight: its integers and scales; None where the plan keeps it.
        report: what happened to it.
    """

    layer: LayerInfo
    weight: QuantizedWeight | None
    report: LayerReport


def put_weight(model: Model, name: str, weight: Tensor) -> None:
    """Write `weight` [out, in] into the named layer, in place."""
    parameter: Any = model.module.get_submodule(name).weight
    with torch.no_grad():
        parameter.copy_(weight)


def kept_report(layer: LayerInfo) -> LayerReport:
    """The report of a layer the plan leaves alone."""
    return LayerReport(
        name=layer.name,
        spec="kept",
        predicted_loss=0.0,
        weight_error=0.0,
        output_error=0.0,
        rtn_output_error=0.0,
        damping=0.0,
        dead_columns=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A compensated layer whose block is not finished; `made` is None if by another process."""

    layer: LayerInfo
    weight: Tensor
    quantized: QuantizedWeight
    made: Compensated | None
    fitting: StageMoments

    def report(
        self, quantized: QuantizedWeight, predicted: float | None, config: QuantizeConfig
    ) -> LayerReport | None:
        """What happened to the layer, whose weight became `quantized`; None as `made`."""
        if self.made is None:
            return None
        difference = quantized.dequantize() - self.weight
        rounding = self.made.rounded.dequantize() - self.weight
        gram = self.fitting.gram
        reference = output_error(self.weight, gram)
        factor, choice = self.made.factor, self.made.choice
        asked = config.damping[0] if choice is None else choice.damping
        notes = _gram_notes(factor.fallback, factor.damping, asked, self.fitting.starved)
        if choice is not None and config.chooses:
            notes.append(f"chosen: {choice}")
        return LayerReport(
            name=self.layer.name,
            spec=str(quantized.spec),
            predicted_loss=predicted,
            weight_error=relative(difference.square(), self.weight.square()),
            output_error=relative(output_error(difference, gram), reference),
            rtn_output_error=relative(output_error(rounding, gram), reference),
            damping=factor.damping,
            dead_columns=int(factor.dead.sum()),
            note="; ".join(notes),
        )


def _gram_notes(fallback: bool, damping: float, asked: float, starved: int | None) -> list[str]:
    """What a user should know of a layer's gram."""
    if starved is not None:
        return [f"rounded by its weights alone: {starved} {FEW_TOKENS}"]
    if fallback:
        return ["rounded to nearest: its inputs' gram could not be factored"]
    return [f"gram needed damping {damping:g}"] if damping > asked else []


def _compensate_block(
    model: Model,
    index: int,
    plan: BitPlan,
    streams: Streams,
    config: QuantizeConfig,
    output_grams: OutputGrams | None,
    token_squares: TokenSquares | None,
    scaled: Mapping[str, ChosenScale],
    *,
    keep_float: KeepFloat | None,
) -> list[_Pending]:
    """Quantize a block's layers stage by stage and put the results into the network.

    Moves the float stream to the block's exit.
    """
    block = streams.quantized.blocks[index]
    prefix = f"{model.architecture.blocks}.{index}."
    count = len(model.architecture.stages)
    steps = [[stage] for stage in range(count)] if config.true_sequential else [list(range(count))]
    done: list[_Pending] = []
    floats: dict[str, Tensor] = {}
    for step in steps:
        layers = [
            (layer, spec)
            for layer in model.layers
            if layer.block == index and layer.stage in step
            if (spec := plan.assignment[layer.name]) is not None
        ]
        if not layers:
            continue
        weights = [_stage_weights(model, index, stage, config, token_squares) for stage in step]
        fitting, held_out = streams.moments(block, step, floats, weights)
        stages = {s: Stage(*pair) for s, *pair in zip_longest(step, fitting, held_out)}
        copies = {layer.name: _float_copy(model, layer.name) for layer, _ in layers}
        mine: dict[str, Compensated] = {}
        for layer, spec in _shared_out(layers, model.share):
            weight = copies[layer.name]
            path = layer.name.removeprefix(prefix)
            try:
                outputs = Outputs()
                if output_grams is not None and config.needs_output_grams:
                    grams = [gram.to(weight.device) for gram in output_grams(layer.name)]
                    if path in scaled:
                        grams = rescale_outputs(grams, scaled[path].scale)
                    outputs = Outputs.of(grams, config.output_damping)
                made = quantize_layer(weight, stages[layer.stage], spec, config, outputs)
            except InputError as error:
                raise InputError(f"{layer.name}: {error}") from error
            mine[layer.name] = made
        every = _of_all(mine, layers, model)
        for layer, _ in layers:
            weight = copies[layer.name]
            if keep_float is not None:
                keep_float(layer.name, weight)
            pending = _Pending(
                layer=layer,
                weight=weight,
                quantized=every[layer.name],
                made=mine.get(layer.name),
                fitting=stages[layer.stage].fitting,
            )
            done.append(pending)
            floats[f"{layer.name.removeprefix(prefix)}.weight"] = weight
            put_weight(model, layer.name, pending.quantized.dequantize())
    streams.advance_native(block, floats)
    return done


def _float_copy(model: Model, name: str) -> Tensor:
    """[out, in] float32 weight of a layer, to be kept."""
    parameter: Any = model.module.get_submodule(name).weight
    copy: Tensor = parameter.detach().float().clone()
    return copy


def _shared_out(
    layers: Sequence[tuple[LayerInfo, QuantSpec]], share: Share
) -> list[tuple[LayerInfo, QuantSpec]]:
    """This process's layers: costly ones first, each to the process that has least to do."""
    costs = {x.name: x.numel * (x.in_features + x.out_features) for x, _ in layers}
    loads, owner = [0] * share.count, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += costs[name]
    return [pair for pair in layers if owner[pair[0].name] == share.rank]


def _of_all(
    mine: Mapping[str, Compensated], layers: Sequence[tuple[LayerInfo, QuantSpec]], model: Model
) -> dict[str, QuantizedWeight]:
    """Layer name → integers and scales, of all processes' layers."""
    found = {name: made.quantized for name, made in mine.items()}
    if model.share.count == 1:
        return found
    tensors: dict[str, Tensor] = {}
    for name, weight in found.items():
        tensors |= weight_tensors(weight, name)
    whole = model.share.joined(tensors)
    for layer, spec in layers:
        if layer.name not in found:
            found[layer.name] = weight_from(
                whole.__getitem__, layer.name, spec, layer.in_features, model.device
            )
    return found


def _reports(
    pending: Sequence[_Pending],
    final: Mapping[str, QuantizedWeight],
    predicted: Mapping[str, float | None],
    config: QuantizeConfig,
    share: Share,
) -> dict[str, LayerReport]:
    """Layer name → what happened to it, by who compensated it; in the order of `pending`."""
    mine = {
        one.layer.name: asdict(report)
        for one in pending
        if (report := one.report(final[one.layer.name], predicted[one.layer.name], config))
    }
    every = {
        name: facts for given in share.exchange(facts=mine) for name, facts in given.facts.items()
    }
    return {one.layer.name: LayerReport(**every[one.layer.name]) for one in pending}


def _stage_weights(
    model: Model, block: int, stage: int, config: QuantizeConfig, squares: TokenSquares | None
) -> Tensor | None:
    """[fitting sequences, length] how much tokens count for the layers that read one input."""
    if squares is None or not config.weighs_tokens:
        return None
    names = [one.name for one in model.layers if (one.block, one.stage) == (block, stage)]
    return token_weights([squares(name) for name in names], config.token_weighting)


def quantize_sequentially(
    model: Model,
    plan: BitPlan,
    calibration: CalibrationSet,
    predicted: Mapping[str, float | None],
    config: QuantizeConfig,
    *,
    channel_weights: Sequence[Tensor],
    generator: torch.Generator,
    monitor: Monitor,
    output_grams: OutputGrams | None = None,
    token_squares: TokenSquares | None = None,
    enter: Callable[[], None] | None = None,
    journal: Journal = NO_JOURNAL,
    keep_float: KeepFloat | None = None,
) -> Iterator[QuantizedLayer]:
    """Quantize the blocks in place, one by one, yielding layers as they are finished.

    Args:
        model: the network; holds dequantized weights afterwards.
        plan: spec of every layer.
        calibration: fitting tokens, and held-out ones for what is chosen on the way.
        predicted: layer name → predicted loss increase, for the report; None where unknown.
        config: method, its candidates, grid, learned rounding.
        channel_weights: per block [hidden], importance of its output's channels.
        generator: for the order of batches in learned rounding.
        monitor: progress and cancellation.
        output_grams: gives a layer's output gram, for `output_feedback`; None goes without.
        token_squares: gives how much the loss feels a layer's outputs token by token, for
            `token_weighting`; None goes without.
        enter: quantizes the embedding, before the first block is looked at; called by every run,
            resumed or not.
        journal: gets every block as it is finished; blocks it has already are taken from it, and
            what follows is the same to the bit.
        keep_float: gets every layer's float weight, as it was when it was rounded; None keeps none.
    """
    blocks = model.architecture.block_list(model.module)
    finished_blocks = journal.first_missing(BLOCK, len(blocks))
    streams = None
    if finished_blocks < len(blocks):
        streams = Streams(model, calibration, config, enter)
    elif enter is not None:  # nothing is left to quantize: nobody looks at the streams
        enter()
    if finished_blocks:
        monitor.step("quantize", 0, len(blocks), resumed("block", finished_blocks, len(blocks)))
    for index in range(finished_blocks):
        done = read_block(journal, index, model.layers, model.device)
        _put_back(model, index, done, streams, keep_float)
        generator.set_state(done.generator)
        yield from _in_order(model, index, done)
        monitor.step("quantize", index + 1, len(blocks))
    if streams is None:
        return
    learned = _learned_blocks(model.layers, predicted, config.rounding)
    for index in range(finished_blocks, len(blocks)):
        block = blocks[index]
        scaled = scale_block(model, index, plan, streams, config) if config.awq else {}
        pending = _compensate_block(
            model, index, plan, streams, config, output_grams, token_squares, scaled,
            keep_float=keep_float,
        )  # fmt: skip
        final = {one.layer.name: one.quantized for one in pending}
        if index in learned and pending:
            prefix = f"{model.architecture.blocks}.{index}."
            importance = channel_weights[index]
            if not config.rounding.weighted:
                importance = torch.ones_like(importance)
            refined = refine_block(
                streams.task(block, importance),
                {one.layer.name.removeprefix(prefix): one.weight for one in pending},
                {name.removeprefix(prefix): weight for name, weight in final.items()},
                config.rounding,
                generator,
            )
            final = {prefix + name: weight for name, weight in refined.items()}
            for name, weight in final.items():
                put_weight(model, name, weight.dequantize())
            release_freed()  # latents and activations of the block, before the next one's
        done = FinishedBlock(
            weights=final,
            reports=_reports(pending, final, predicted, config, model.share),
            scales={path: one.scale for path, one in scaled.items() if one.exponent > 0.0},
            generator=generator.get_state(),
        )
        write_block(journal, index, done)
        yield from _in_order(model, index, done)
        if index + 1 < len(blocks):
            streams.advance(block)
        model.scratch.trim()
        monitor.step("quantize", index + 1, len(blocks))


def _learned_blocks(
    layers: Sequence[LayerInfo], predicted: Mapping[str, float | None], config: RoundingConfig
) -> set[int]:
    """Blocks whose rounding is learned: those with the largest predicted losses.

    Raises:
        UsageError: not all blocks are to be taken, but nothing was predicted.
    """
    losses: dict[int, float] = {}
    for layer in layers:
        loss = predicted[layer.name]
        if loss is None and config.steps and config.share < 1.0:
            raise UsageError(
                f"quantize.rounding.share goes by predicted losses, and there is none for "
                f"{layer.name} in this plan: leave it at 1"
            )
        losses[layer.block] = losses.get(layer.block, 0.0) + (loss or 0.0)
    ranked = sorted(losses, key=lambda block: (-losses[block], block))
    return set(ranked[: ceil(config.share * len(ranked) - 1e-9)]) if config.steps else set()


def _put_back(
    model: Model,
    index: int,
    done: FinishedBlock,
    streams: Streams | None,
    keep_float: KeepFloat | None,
) -> None:
    """Bring the network and the streams to where they were when a block had been quantized."""
    refold(model, index, done.scales)
    block = model.architecture.block_list(model.module)[index]
    if streams is not None:
        streams.advance_native(block, {})  # while its weights are float
    for name, weight in done.weights.items():
        if keep_float is not None:
            keep_float(name, _float_copy(model, name))
        put_weight(model, name, weight.dequantize())
    if streams is not None:
        streams.advance(block)


def _in_order(model: Model, index: int, done: FinishedBlock) -> Iterator[QuantizedLayer]:
    """Layers of a finished block in forward order, kept ones included."""
    for layer in (one for one in model.layers if one.block == index):
        yield QuantizedLayer(
            layer=layer,
            weight=done.weights.get(layer.name),
            report=done.reports.get(layer.name) or kept_report(layer),
        )


def quantize_from_store(
    model: Model,
    plan: BitPlan,
    store: CandidateStore,
    predicted: Mapping[str, float | None],
    output_errors: Mapping[str, float],
    *,
    layers: Sequence[LayerInfo],
    monitor: Monitor,
    what: str = "quantize",
    keep_float: KeepFloat | None = None,
) -> Iterator[QuantizedLayer]:
    """Take the one-pass integers of the calibration, yielding layers in order.

    Args:
        model: the network; the layers hold dequantized weights afterwards.
        plan: spec of every layer.
        store: integers of every candidate.
        predicted: layer name → predicted loss increase, for the report; None where unknown.
        output_errors: layer name → relative output error measured by the calibration.
        layers: which ones.
        monitor: progress and cancellation.
        what: stage for the monitor.
        keep_float: gets every layer's float weight; None keeps none.
    """
    for index, layer in enumerate(layers):
        spec = plan.assignment[layer.name]
        if spec is None:
            yield QuantizedLayer(layer=layer, weight=None, report=kept_report(layer))
            continue
        weight = _float_copy(model, layer.name)
        quantized = store.get(layer.name, spec)
        difference = quantized.dequantize() - weight
        if keep_float is not None:
            keep_float(layer.name, weight)
        put_weight(model, layer.name, quantized.dequantize())
        made = store.circumstances(layer.name)
        notes = _gram_notes(made.fallback, made.damping, made.asked, made.starved)
        report = LayerReport(
            name=layer.name,
            spec=str(spec),
            predicted_loss=predicted[layer.name],
            weight_error=relative(difference.square(), weight.square()),
            output_error=output_errors[layer.name],
            rtn_output_error=float("nan"),
            damping=made.damping,
            dead_columns=made.dead,
            note="; ".join(notes if made.fallback else [_ONE_PASS[layer.outside], *notes]),
        )
        yield QuantizedLayer(layer=layer, weight=quantized, report=report)
        monitor.step(what, index + 1, len(layers))
