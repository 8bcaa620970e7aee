"""Spectra of single layers' Hessians, and what else their curvature is looked at by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantforge.calibrate.curvature import Labels, LossHessian, activation_traces
from quantforge.methods.curvature.density import SpectralDensity, spectral_density
from quantforge.methods.curvature.heads import head_scores, head_traces
from quantforge.methods.curvature.operator import Matvec
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.types import LayerInfo, QuantSpec

QUERIES = "q_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpectrum:
    """One layer's diagonal block, in nats a token / weight².

    Attributes:
        name: module path.
        weights: n.
        trace: tr H.
        trace_error: its standard error over starts.
        highest: largest Ritz value.
        lowest: smallest one; negative away from a minimum.
        extreme_ratio: r_e; 0 where no curvature is negative (the smallest Ritz value is then no
            estimate of λ_min), None where none is positive.
        negative_weight: K_hn; None likewise.
        negative_weight_error: its standard error over starts; None likewise.
        heads: share of every query head in the layer's trace; empty where heads were not asked for,
            or none of them has a positive trace.
        head_errors: their standard errors.
        squared_error: ‖Q(W) − W‖² at the report's spec; None where none is given or it does not
            fit.
        input_trace: mean of the diagonal of the Hessian over what the layer reads, which layers of
            one input share, in nats / (unit of the input)²; None where it was not asked for.
        input_trace_error: its standard error over sequences; None likewise.
    """

    name: str
    weights: int
    trace: float
    trace_error: float
    highest: float
    lowest: float
    extreme_ratio: float | None
    negative_weight: float | None
    negative_weight_error: float | None
    heads: tuple[float, ...] = ()
    head_errors: tuple[float, ...] = ()
    squared_error: float | None = None
    input_trace: float | None = None
    input_trace_error: float | None = None

    @property
    def mean_trace(self) -> float:
        """Tr H / n, what HAWQ-V2 ranks layers by."""
        return self.trace / self.weights

    @property
    def mean_highest(self) -> float:
        """λ_max / n, what HAWQ ranks layers by."""
        return self.highest / self.weights

    @property
    def fine_tuning(self) -> float | None:
        """Ω = λ_max ‖Q(W) − W‖²: HAWQ quantizes and tunes the layer where it is largest first."""
        return None if self.squared_error is None else self.highest * self.squared_error


def is_query(layer: LayerInfo) -> bool:
    """Whether a layer makes queries, whose outputs split into heads."""
    return layer.name.rpartition(".")[2] == QUERIES


def measure_layers(
    model: Model,
    tokens: torch.Tensor,
    layers: Sequence[LayerInfo],
    *,
    labels: Labels,
    steps: int,
    starts: int,
    heads: bool,
    generator: torch.Generator,
    monitor: Monitor,
) -> tuple[tuple[LayerSpectrum, ...], int]:
    """The curvature of some layers, and the products it took; arguments as for `curvature`."""
    hessian = LossHessian.of(
        model, tokens, layers=layers, labels=labels, generator=generator, monitor=monitor
    )
    found, products = [], 0
    with hessian.layer_blocks() as blocks:
        for index, (layer, product) in enumerate(zip(layers, blocks, strict=True)):
            density = spectral_density(
                product, layer.numel, generator=generator, steps=steps, starts=starts
            )
            shares: tuple[list[float], list[float]] = ([], [])
            if heads and is_query(layer):
                shares, spent = _heads(model, layer, product, steps * starts, generator)
                products += spent
            products += density.products
            found.append(_summary(layer, density, *shares))
            monitor.step("curvature", index + 1, len(layers), layer.name)
    return tuple(found), products


def with_squared_errors(
    model: Model, layers: Sequence[LayerInfo], found: Sequence[LayerSpectrum], spec: QuantSpec
) -> tuple[LayerSpectrum, ...]:
    """The same with ‖Q(W) − W‖² where the spec fits; Q rounds to the nearest code."""

    def squared(layer: LayerInfo) -> float | None:
        if not spec.divides(layer.in_features):
            return None
        linear: Any = model.module.get_submodule(layer.name)
        weight = linear.weight.detach()
        scale, zero = minmax_grid(weight, spec)
        rounded = round_to_nearest(weight, scale, spec, zero).dequantize()
        return float((rounded - weight.float()).double().square().sum())

    return tuple(
        replace(one, squared_error=squared(layer)) for layer, one in zip(layers, found, strict=True)
    )


def with_input_traces(
    model: Model,
    layers: Sequence[LayerInfo],
    found: Sequence[LayerSpectrum],
    tokens: torch.Tensor,
    labels: Labels,
    generator: torch.Generator,
    monitor: Monitor,
) -> tuple[LayerSpectrum, ...]:
    """The same with traces over what the layers read; one probe a sequence for all of them."""
    reader = {(one.block, one.stage): one for one in reversed(layers)}  # the first of each
    traces = activation_traces(
        model, [one.name for one in reader.values()], tokens,
        generator=generator, labels=labels, monitor=monitor,
    )  # fmt: skip
    known = {}
    for (place, one), value, error in zip(
        reader.items(), traces.values.tolist(), traces.standard_errors.tolist(), strict=True
    ):
        entries = tokens.shape[1] * one.in_features
        known[place] = {"input_trace": value / entries, "input_trace_error": error / entries}
    return tuple(
        replace(one, **known[layer.block, layer.stage])
        for layer, one in zip(layers, found, strict=True)
    )


def _heads(
    model: Model, layer: LayerInfo, product: Matvec, probes: int, generator: torch.Generator
) -> tuple[tuple[list[float], list[float]], int]:
    """Shares of the query heads with their errors, and the products it took."""
    config: Any = model.module.config
    traces = head_traces(
        product, int(config.num_attention_heads), layer.out_features, layer.in_features,
        generator=generator, max_probes=max(probes, 2),
    )  # fmt: skip
    if not (traces.values > 0).any():
        return ([], []), traces.products
    scores = head_scores(traces)
    return (scores.values.tolist(), scores.standard_errors.tolist()), traces.products


def _summary(
    layer: LayerInfo, density: SpectralDensity, heads: list[float], errors: list[float]
) -> LayerSpectrum:
    """What one density says."""
    trace, criteria = density.trace(), density.criteria()
    return LayerSpectrum(
        name=layer.name,
        weights=layer.numel,
        trace=trace.value,
        trace_error=trace.standard_error,
        highest=criteria.highest,
        lowest=criteria.lowest,
        extreme_ratio=_extreme_ratio(criteria.lowest, criteria.highest),
        negative_weight=_finite(criteria.negative_weight),
        negative_weight_error=_finite(criteria.negative_weight_error),
        heads=tuple(heads),
        head_errors=tuple(errors),
    )


def _extreme_ratio(lowest: float, highest: float) -> float | None:
    return max(-lowest, 0.0) / highest if highest > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
