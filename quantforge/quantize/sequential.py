"""The driver: one block at a time, each fed by the quantized blocks before it.

A block's inputs come from the quantized prefix, so that later blocks are fitted to what they will
really read. For every block: run it once to gather the grams of its stages, factor each gram,
quantize its layers, put the dequantized weights in, and run it again for the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.capture import BlockWalk, stage_grams
from quantforge.format.store import CandidateStore
from quantforge.methods.gptq import fit_scale, gptq
from quantforge.methods.rtn import round_to_nearest
from quantforge.models import Model
from quantforge.numerics import Factor, factorize, output_error, relative
from quantforge.progress import Monitor
from quantforge.quantize.config import QuantizeConfig
from quantforge.results import LayerReport
from quantforge.types import BitPlan, LayerInfo, QuantizedWeight, QuantSpec


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


def _quantize_layer(
    model: Model,
    layer: LayerInfo,
    spec: QuantSpec | None,
    predicted: float,
    gram: Tensor,
    factor: Factor,
    config: QuantizeConfig,
) -> QuantizedLayer:
    """Quantize one layer and put the result into the network."""
    if spec is None:
        return QuantizedLayer(layer=layer, weight=None, report=kept_report(layer))
    parameter: Any = model.module.get_submodule(layer.name).weight
    weight = parameter.detach().float().clone()
    quantized, rounded = quantize_weight(weight, factor, spec, config)
    difference = quantized.dequantize() - weight
    reference = output_error(weight, gram)
    put_weight(model, layer.name, quantized.dequantize())
    note = "" if factor.damping <= config.damping else f"gram needed damping {factor.damping:g}"
    report = LayerReport(
        name=layer.name,
        spec=str(spec),
        predicted_loss=predicted,
        weight_error=relative(difference.square(), weight.square()),
        output_error=relative(output_error(difference, gram), reference),
        rtn_output_error=relative(output_error(rounded.dequantize() - weight, gram), reference),
        damping=factor.damping,
        dead_columns=int(factor.dead.sum()),
        note=note,
    )
    return QuantizedLayer(layer=layer, weight=quantized, report=report)


def quantize_sequentially(
    model: Model,
    plan: BitPlan,
    tokens: Tensor,
    predicted: Mapping[str, float],
    config: QuantizeConfig,
    *,
    monitor: Monitor,
) -> Iterator[QuantizedLayer]:
    """Quantize the network in place, block by block, yielding layers as they are finished.

    Args:
        model: the network; holds dequantized weights afterwards.
        plan: spec of every layer.
        tokens: [sequences, length] fitting tokens.
        predicted: layer name → predicted loss increase, for the report.
        config: method, grid, damping.
        monitor: progress and cancellation.
    """
    walk = BlockWalk(
        model.module,
        model.architecture,
        tokens,
        batch_size=config.batch_size,
        precision=config.precision,
    )
    last = len(walk.blocks) - 1
    for index, block in enumerate(walk.blocks):
        grams = stage_grams(walk, block, model.architecture)
        factors = [factorize(gram, damping=config.damping) for gram in grams]
        for layer in (one for one in model.layers if one.block == index):
            yield _quantize_layer(
                model,
                layer,
                plan.assignment[layer.name],
                predicted[layer.name],
                grams[layer.stage],
                factors[layer.stage],
                config,
            )
        if index < last:
            walk.advance(block)
        monitor.step("quantize", index + 1, last + 1)


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
