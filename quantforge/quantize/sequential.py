"""The driver: one block at a time, each fed by the quantized blocks before it.

A block's inputs come from the quantized prefix, so that later blocks are fitted to what they will
really read. For every block: run it once to gather the grams of its stages, factor each gram,
quantize its layers, put the dequantized weights in, learn the rounding if asked, and run it again
for the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.capture import stage_grams
from quantforge.format.store import CandidateStore
from quantforge.methods.gptq import fit_scale, gptq
from quantforge.methods.rtn import round_to_nearest
from quantforge.models import Model
from quantforge.numerics import Factor, factorize, output_error, relative
from quantforge.progress import Monitor
from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.refine import refine_block
from quantforge.quantize.streams import Streams
from quantforge.results import LayerReport
from quantforge.types import BitPlan, CalibrationSet, LayerInfo, QuantizedWeight, QuantSpec


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


def quantize_weight(
    weight: Tensor, factor: Factor, spec: QuantSpec, config: QuantizeConfig
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """The layer by the configured method, and by rounding on the same kind of grid.

    Args:
        weight: [out, in] float32.
        factor: of the layer's gram.
        spec: width and grouping.
        config: method and grid.
    """
    scale = fit_scale(weight, factor, spec, config.grid)
    rounded = round_to_nearest(weight, scale, spec)
    if config.method == "rtn":
        return rounded, rounded
    return gptq(weight, factor, spec, grid=config.grid), rounded


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
    """A compensated layer whose block is not finished yet."""

    layer: LayerInfo
    weight: Tensor
    quantized: QuantizedWeight
    rounded: QuantizedWeight
    gram: Tensor
    factor: Factor

    def finish(
        self, quantized: QuantizedWeight, predicted: float, config: QuantizeConfig
    ) -> QuantizedLayer:
        difference = quantized.dequantize() - self.weight
        rounding = self.rounded.dequantize() - self.weight
        reference = output_error(self.weight, self.gram)
        raised = self.factor.damping > config.damping
        report = LayerReport(
            name=self.layer.name,
            spec=str(quantized.spec),
            predicted_loss=predicted,
            weight_error=relative(difference.square(), self.weight.square()),
            output_error=relative(output_error(difference, self.gram), reference),
            rtn_output_error=relative(output_error(rounding, self.gram), reference),
            damping=self.factor.damping,
            dead_columns=int(self.factor.dead.sum()),
            note=f"gram needed damping {self.factor.damping:g}" if raised else "",
        )
        return QuantizedLayer(layer=self.layer, weight=quantized, report=report)


def _compensate_block(
    model: Model,
    layers: list[LayerInfo],
    plan: BitPlan,
    grams: list[Tensor],
    config: QuantizeConfig,
) -> list[_Pending]:
    """Quantize a block's layers one by one and put the results into the network."""
    factors = [factorize(gram, damping=config.damping) for gram in grams]
    done = []
    for layer in layers:
        spec = plan.assignment[layer.name]
        if spec is None:
            continue
        parameter: Any = model.module.get_submodule(layer.name).weight
        weight = parameter.detach().float().clone()
        quantized, rounded = quantize_weight(weight, factors[layer.stage], spec, config)
        put_weight(model, layer.name, quantized.dequantize())
        done.append(
            _Pending(
                layer=layer,
                weight=weight,
                quantized=quantized,
                rounded=rounded,
                gram=grams[layer.stage],
                factor=factors[layer.stage],
            )
        )
    return done


def quantize_sequentially(
    model: Model,
    plan: BitPlan,
    calibration: CalibrationSet,
    predicted: Mapping[str, float],
    config: QuantizeConfig,
    *,
    channel_weights: Sequence[Tensor],
    generator: torch.Generator,
    monitor: Monitor,
) -> Iterator[QuantizedLayer]:
    """Quantize the network in place, block by block, yielding layers as they are finished.

    Args:
        model: the network; holds dequantized weights afterwards.
        plan: spec of every layer.
        calibration: fitting tokens, and held-out ones for the choices of learned rounding.
        predicted: layer name → predicted loss increase, for the report.
        config: method, grid, damping, learned rounding.
        channel_weights: per block [hidden], importance of its output's channels.
        generator: for the order of batches in learned rounding.
        monitor: progress and cancellation.
    """
    streams = Streams(model, calibration, config)
    blocks = streams.quantized.blocks
    for index, block in enumerate(blocks):
        targets = streams.targets(block)
        grams = stage_grams(
            streams.quantized, block, model.architecture, batches=streams.fitting_batches
        )
        layers = [layer for layer in model.layers if layer.block == index]
        pending = _compensate_block(model, layers, plan, grams, config)
        final = {one.layer.name: one.quantized for one in pending}
        if targets is not None and pending:
            prefix = f"{model.architecture.blocks}.{index}."
            refined = refine_block(
                streams.task(block, targets, channel_weights[index]),
                {one.layer.name.removeprefix(prefix): one.weight for one in pending},
                {name.removeprefix(prefix): weight for name, weight in final.items()},
                config.rounding,
                generator,
            )
            final = {prefix + name: weight for name, weight in refined.items()}
            for name, weight in final.items():
                put_weight(model, name, weight.dequantize())
        finished = {
            one.layer.name: one.finish(final[one.layer.name], predicted[one.layer.name], config)
            for one in pending
        }
        for layer in layers:
            kept = QuantizedLayer(layer=layer, weight=None, report=kept_report(layer))
            yield finished.get(layer.name, kept)
        if index + 1 < len(blocks):
            streams.advance(block, targets)
        monitor.step("quantize", index + 1, len(blocks))


def quantize_from_store(
    model: Model,
    plan: BitPlan,
    store: CandidateStore,
    predicted: Mapping[str, float],
    output_errors: Mapping[str, float],
    *,
    monitor: Monitor,
) -> Iterator[QuantizedLayer]:
    """Take the one-pass integers of the calibration, yielding layers in forward order.

    Args:
        model: the network; holds dequantized weights afterwards.
        plan: spec of every layer.
        store: integers of every candidate.
        predicted: layer name → predicted loss increase, for the report.
        output_errors: layer name → relative output error measured by the calibration.
        monitor: progress and cancellation.
    """
    for index, layer in enumerate(model.layers):
        spec = plan.assignment[layer.name]
        if spec is None:
            yield QuantizedLayer(layer=layer, weight=None, report=kept_report(layer))
            continue
        parameter: Any = model.module.get_submodule(layer.name).weight
        weight = parameter.detach().float().clone()
        quantized = store.get(layer.name, spec)
        difference = quantized.dequantize() - weight
        put_weight(model, layer.name, quantized.dequantize())
        report = LayerReport(
            name=layer.name,
            spec=str(spec),
            predicted_loss=predicted[layer.name],
            weight_error=relative(difference.square(), weight.square()),
            output_error=output_errors[layer.name],
            rtn_output_error=float("nan"),
            damping=float("nan"),
            dead_columns=0,
            note="one-pass compensation on the float network's inputs",
        )
        yield QuantizedLayer(layer=layer, weight=quantized, report=report)
        monitor.step("quantize", index + 1, len(model.layers))
