"""HAWQ's and HAWQ-V2's sensitivities of a language model, as a table over layers and specs.

Losses are in nats a token: half of the methods' Ω, since ½ Dᵀ H D is what an error D costs. For
HAWQ-V2 that is ½ (tr H_ll / n_l) ‖D‖², the mean over errors of no preferred direction; for HAWQ
½ λ_l ‖D‖², the most that an error of that norm can cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from quantforge.calibrate.curvature import Labels, LossHessian
from quantforge.config import Config
from quantforge.methods.curvature.eigen import extreme_eigenvalues, top_by_power
from quantforge.methods.curvature.operator import Matvec
from quantforge.methods.curvature.scores import (
    Scores,
    cautious,
    fine_tuning_scores,
    mean_trace_scores,
)
from quantforge.methods.curvature.trace import balanced_hutchinson_blocks, hutch_plus_plus
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.types import LayerInfo, QuantSpec

# ‖Q(W) − W‖² of a layer at a spec; +inf where the spec does not fit the layer.
SquaredError = Callable[[LayerInfo, QuantSpec], float]


class CurvatureConfig(Config):
    """How curvature is measured.

    Attributes:
        method: "joint-trace" probes all layers at once (Hutchinson, with probes balanced between
            layers); "trace" takes each layer by itself (Hutch++), "power" and "lanczos" the top
            eigenvalue of each layer.
        labels: what the loss compares with (see `calibrate.curvature`).
        tolerance: relative error at which estimating stops.
        max_products: products with the Hessian at most: of all layers together for "joint-trace",
            of each layer for the others, twice that where power iteration meets a negative end.
        sketch: columns of Hutch++'s sketch; twice as many of its products go there.
        batch_size: sequences a pass.
    """

    method: Literal["joint-trace", "trace", "power", "lanczos"] = "joint-trace"
    labels: Labels = "expected"
    tolerance: float = Field(default=0.05, gt=0)
    max_products: int = Field(default=50, ge=2)
    sketch: int = Field(default=8, ge=0)
    batch_size: int = Field(default=1, ge=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurvature:
    """One number for the curvature of every layer.

    Attributes:
        layers: in the order of the values.
        kind: "trace" of the diagonal block, or its top "eigenvalue", the largest by sign.
        values: [layers] float64 in nats a token / weight².
        errors: [layers] float64 standard errors of traces, residuals of eigenvalues.
        products: products with the Hessian they took.
        converged: every layer reached the tolerance.
    """

    layers: tuple[LayerInfo, ...]
    kind: Literal["trace", "eigenvalue"]
    values: Tensor
    errors: Tensor
    products: int
    converged: bool

    def losses(self, specs: Sequence[QuantSpec], squared_error: SquaredError) -> Scores:
        """Predicted loss increase of every candidate, [layers, specs] in nats a token.

        A curvature below its own error counts as that error (see `cautious`).

        Args:
            specs: the candidates.
            squared_error: ‖Q(W) − W‖² of a layer at a spec; +inf where it does not fit.
        """
        halves = 0.5 * torch.tensor(
            [[squared_error(layer, spec) for spec in specs] for layer in self.layers],
            dtype=torch.float64,
        )
        values = cautious(self.values, self.errors)
        if self.kind == "eigenvalue":
            return fine_tuning_scores(values, self.errors, halves)
        sizes = torch.tensor([layer.numel for layer in self.layers])
        return mean_trace_scores(values, self.errors, sizes, halves)


def measure_curvature(
    model: Model,
    tokens: Tensor,
    config: CurvatureConfig,
    *,
    generator: torch.Generator,
    layers: Sequence[LayerInfo] | None = None,
    monitor: Monitor | None = None,
) -> LayerCurvature:
    """The curvature of every layer's weights.

    Args:
        model: the float network; not changed.
        tokens: [sequences, length] int64.
        config: what and how exactly.
        generator: draws probes and labels; of the network's device.
        layers: which; by default all planned ones.
        monitor: progress and cancellation.
    """
    monitor = monitor or Monitor()
    hessian = LossHessian.of(
        model,
        tokens,
        layers=layers,
        labels=config.labels,
        batch_size=config.batch_size,
        generator=generator,
        monitor=monitor,
    )
    if config.method == "joint-trace":
        traces = balanced_hutchinson_blocks(
            _reported(hessian.product, monitor, config.max_products),
            hessian.sizes,
            generator=generator,
            tolerance=config.tolerance,
            max_probes=config.max_products,
        )
        return LayerCurvature(
            layers=hessian.layers,
            kind="trace",
            values=traces.values,
            errors=traces.standard_errors,
            products=traces.products,
            converged=traces.converged,
        )
    results = []
    with hessian.layer_blocks() as blocks:
        for index, (layer, product) in enumerate(zip(hessian.layers, blocks, strict=True)):
            results.append(_of_layer(product, layer.numel, config, generator))
            monitor.step("curvature", index + 1, len(hessian.layers), layer.name)
    values, errors, products, converged = zip(*results, strict=True)
    return LayerCurvature(
        layers=hessian.layers,
        kind="trace" if config.method == "trace" else "eigenvalue",
        values=torch.tensor(values, dtype=torch.float64),
        errors=torch.tensor(errors, dtype=torch.float64),
        products=sum(products),
        converged=all(converged),
    )


def curvature_scores(
    model: Model,
    tokens: Tensor,
    specs: Sequence[QuantSpec],
    squared_error: SquaredError,
    config: CurvatureConfig,
    *,
    generator: torch.Generator,
    layers: Sequence[LayerInfo] | None = None,
    monitor: Monitor | None = None,
) -> Scores:
    """Predicted loss increases and standard errors, [layers, specs] in nats a token.

    Args:
        model: the float network; not changed.
        tokens: [sequences, length] int64.
        specs: the candidates.
        squared_error: ‖Q(W) − W‖² of a layer at a spec; +inf where it does not fit.
        config: what and how exactly.
        generator: draws probes and labels; of the network's device.
        layers: which; by default all planned ones.
        monitor: progress and cancellation.
    """
    curvature = measure_curvature(
        model, tokens, config, generator=generator, layers=layers, monitor=monitor
    )
    return curvature.losses(specs, squared_error)


def _of_layer(
    matvec: Matvec, dimension: int, config: CurvatureConfig, generator: torch.Generator
) -> tuple[float, float, int, bool]:
    """Value, error, products and convergence of one layer taken by itself."""
    if config.method == "trace":
        sketch = min(config.sketch, (config.max_products - 2) // 2)
        found = hutch_plus_plus(
            matvec,
            dimension,
            sketch=sketch,
            generator=generator,
            tolerance=config.tolerance,
            max_probes=config.max_products - 2 * sketch,
        )
        return found.value, found.standard_error, found.products, found.converged
    if config.method == "power":
        pairs = top_by_power(
            matvec,
            dimension,
            generator=generator,
            tolerance=config.tolerance,
            max_iterations=config.max_products,
        )
    else:
        pairs = extreme_eigenvalues(
            matvec,
            dimension,
            generator=generator,
            tolerance=config.tolerance,
            max_steps=config.max_products,
        )
    top = (float(pairs.values[-1]), float(pairs.residuals[-1]))
    return *top, pairs.products, pairs.converged


def _reported(matvec: Matvec, monitor: Monitor, most: int) -> Matvec:
    """The same products, each reported as a step."""
    done = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal done
        result = matvec(vector)
        done += 1
        monitor.step("curvature", done, most, "a probe of all layers")
        return result

    return product
