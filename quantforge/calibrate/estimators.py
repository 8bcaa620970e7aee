"""The estimators of candidates' losses by name: tables and a network in, nats a token out.

| name | a candidate's predicted loss increase | beside the passes that all share |
|---|---|---|
| fisher | the next two as one, see `sensitivity` | nothing |
| fisher-exact | ½ E[(Σ_t g_tᵀ D x_t)²], D as it really is | nothing |
| fisher-factored | ½ Σ_o E[g_o²] E[(D x)_o²]: outputs and tokens apart | nothing |
| fisher-trace | ½ (E‖G‖² / n) ‖D‖²: errors without a direction, drawn labels | nothing |
| gram | ½ ḡ² E‖D x‖²: output error, every output counting alike | nothing |
| empirical-fisher | ½ Σ_w E[G_w²] D_w²: every weight alone, true labels | a backward pass |
| hawq-v2 | ½ (tr H / n) ‖D‖² (Dong et al. 2020, arXiv 1911.03852) | products with the Hessian |
| hawq | ½ (λ / n) ‖D‖² (Dong et al. 2019, arXiv 1905.03696) | such products layer by layer |
| measured | KL of the network in which this layer alone is quantized | a network a layer |

D = Q(W) − W, g the gradient at the layer's output, G the weight's, H the Hessian of the layer's n
weights, λ its top eigenvalue, ḡ² the mean square of all gradients at all outputs. HAWQ's papers
score by Ω without the half; they compare layers, a half changes nothing. λ / n is far below the
loss of any real error, but a factor that all layers share is corrected by measured uniform networks
(`search.correction`), which applies to every estimator alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantforge.calibrate.config import CalibrateConfig
from quantforge.calibrate.curvature_scores import (
    CurvatureConfig,
    LayerCurvature,
    measure_curvature,
)
from quantforge.calibrate.evidence import Evidence
from quantforge.calibrate.fisher import diagonal_products
from quantforge.calibrate.sensitivity import combined_losses, exact_losses, standard_error
from quantforge.errors import InputError
from quantforge.methods.curvature.scores import Scores, cautious, mean_trace_scores
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.registry import Registry
from quantforge.results import AnyQuality
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

# A product with the Hessian of all layers in forward passes over the same tokens: 11.7 on
# SmolLM2-135M with 128 tokens, where vectors of all weights weigh in; fewer on longer texts.
PRODUCT_PASSES = 12.0
# With that of one layer, its gradient's graph at hand: 2.3 for the first layer there, 0.4 for the
# last one.
LAYER_PRODUCT_PASSES = 1.4
# A forward and a backward pass likewise.
BACKWARD_PASSES = 3.0
# Products with one layer's Hessian where `curvature.layer_products` says nothing: Lanczos finds a
# top eigenvalue in few, Hutch++ wants a sketch and probes that show their spread.
EIGENVALUE_PRODUCTS, TRACE_PRODUCTS = 6, 24
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What an estimator may run that needs passes of its own.

    Attributes:
        model: the float network; not changed.
        fitting: [sequences, length] int64 fitting tokens.
        config: of the calibration.
        errors: gives a layer's D of every candidate, [candidates, out, in].
        measure: held-out quality of networks in which the named layers are quantized.
        seed: of labels and probes.
        monitor: progress and cancellation.
        scratch: folder for hidden states on the way; None keeps them in memory.
    """

    model: Model
    fitting: Tensor
    config: CalibrateConfig
    errors: Callable[[LayerInfo], Tensor]
    measure: Callable[[Sequence[Mapping[str, QuantSpec]]], list[AnyQuality]]
    seed: int
    monitor: Monitor
    scratch: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The numbers that an estimator's cost depends on.

    Attributes:
        config: of the calibration.
        layers: how many.
        candidates: of all layers together.
        length: tokens a fitting sequence.
        held_out: held-out tokens on which a network is measured.
    """

    config: CalibrateConfig
    layers: int
    candidates: int
    length: int
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an estimator takes beside the passes that all share.

    Attributes:
        what: in words; empty for nothing.
        forward_tokens: tokens whose forward pass takes as long.
    """

    what: str = ""
    forward_tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One way to predict losses.

    Attributes:
        losses: [layers, specs] in nats a token with standard errors; what does not fit is not read.
        cost: of it.
    """

    losses: Callable[[Evidence, Network], Scores]
    cost: Callable[[Extent], Cost] = lambda _: Cost()


ESTIMATORS: Registry[Estimator] = Registry("estimator")


def estimate(name: str, evidence: Evidence, network: Network, fingerprint: str = "") -> Sensitivity:
    """The table of predicted losses by the named estimator.

    Args:
        name: of an estimator.
        evidence: tables of all candidates.
        network: for estimators that run it.
        fingerprint: of everything that determines the result.

    Raises:
        UsageError: there is no such estimator.
        InputError: the calibration text is too short for it.
    """
    scores = ESTIMATORS[name].losses(evidence, network)
    fits = evidence.fits
    return Sensitivity(
        layers=evidence.layers,
        specs=evidence.specs,
        loss=torch.where(fits, scores.values.double(), torch.inf),
        error=evidence.relative,
        estimator=name,
        fingerprint=fingerprint,
        stderr=torch.where(fits, scores.standard_errors.double(), torch.inf),
    )


def fisher(evidence: Evidence, _: Network) -> Scores:
    """See `sensitivity.combined_losses`."""
    loss, error = combined_losses(
        evidence.factored, evidence.products, evidence.length, evidence.kinds
    )
    return Scores(values=loss, standard_errors=error)


def fisher_exact(evidence: Evidence, _: Network) -> Scores:
    """See `sensitivity.exact_losses`."""
    loss, error = exact_losses(evidence.products, evidence.length)
    return Scores(values=loss, standard_errors=error)


def fisher_factored(evidence: Evidence, _: Network) -> Scores:
    """See `sensitivity.factored_losses`; the error is over sequences."""
    error = standard_error(evidence.energies / (2 * evidence.length))
    return Scores(values=evidence.factored, standard_errors=error)


def fisher_trace(evidence: Evidence, _: Network) -> Scores:
    """HAWQ-V2's score with the Fisher information in the Hessian's place; the error is over texts.

    E‖G‖² over labels drawn from the network is the trace of the Fisher information, which equals
    that of the Gauss–Newton matrix, and it takes no second derivative.
    """
    sizes = torch.tensor([layer.numel for layer in evidence.layers])
    samples = evidence.traces / evidence.length
    errors = standard_error(samples)
    return mean_trace_scores(samples.mean(0), errors, sizes, 0.5 * evidence.squared)


def gram(evidence: Evidence, _: Network) -> Scores:
    """½ ḡ² E‖D x‖²; the error is that of ḡ² over sequences, common to all layers."""
    outputs = sum(layer.out_features for layer in evidence.layers)
    samples = evidence.squares.sum(1) / (evidence.length * outputs)
    half = 0.5 * evidence.output
    return Scores(values=half * samples.mean(), standard_errors=half * standard_error(samples))


def empirical_fisher(evidence: Evidence, network: Network) -> Scores:
    """½ Σ_w E[G_w²] D_w² with the text's own next tokens; the error is over sequences."""
    if evidence.length < 2:
        raise InputError("sequences of one token predict nothing: give longer ones")
    options = network.config
    squares = diagonal_products(
        network.model,
        network.fitting[: options.gradient_sequences],
        batch_size=options.gradient_batch,
        precision=options.precision,
        monitor=network.monitor,
        errors=network.errors,
        scratch=network.scratch,
    )
    samples = squares / (2 * (evidence.length - 1))
    return Scores(values=samples.mean(0), standard_errors=standard_error(samples))


def hawq_v2(evidence: Evidence, network: Network) -> Scores:
    """½ (tr H / n) ‖D‖², the traces of all layers from the same probes or of each by Hutch++."""
    limits = network.config.curvature
    joint = limits.trace == "joint"
    config = CurvatureConfig(
        method="joint-trace" if joint else "trace",
        tolerance=limits.tolerance,
        max_products=limits.products if joint else limits.layer_products or TRACE_PRODUCTS,
    )
    return _by_size(_curvature(network, config), evidence)


def hawq(evidence: Evidence, network: Network) -> Scores:
    """½ (λ / n) ‖D‖², λ of each layer by Lanczos or power iteration; the error is its residual."""
    limits = network.config.curvature
    config = CurvatureConfig(
        method=limits.eigenvalue,
        tolerance=limits.tolerance,
        max_products=limits.layer_products or EIGENVALUE_PRODUCTS,
    )
    return _by_size(_curvature(network, config), evidence)


def measured(evidence: Evidence, network: Network) -> Scores:
    """KL on held-out tokens of networks in which one layer is quantized, in the float context.

    Every candidate of every layer where that makes few networks (`calibrate.probes`). Otherwise one
    of each layer, the finest of its fewest bits, whose effect is large against the noise of the
    arithmetic; the other candidates take that KL times the ratio of their output errors. A KL below
    its own standard error over windows counts as that error.
    """
    fits, relative = evidence.fits, evidence.relative
    probes = probed(evidence, network.config.probes)
    qualities = network.measure(
        [{evidence.layers[row].name: evidence.specs[column]} for row, column in probes]
    )
    found = torch.tensor([[q.loss, q.loss_stderr] for q in qualities], dtype=torch.float64)
    kl, error = cautious(found[:, 0], found[:, 1]), found[:, 1]
    values, errors = torch.full_like(relative, torch.inf), torch.full_like(relative, torch.inf)
    for (row, column), one, spread in zip(probes, kl, error, strict=True):
        if len(probes) == int(fits.sum()):
            values[row, column], errors[row, column] = one, spread
        else:
            ratio = relative[row] / relative[row, column].clamp_min(torch.finfo(torch.float64).tiny)
            values[row], errors[row] = ratio * one, ratio * spread
    return Scores(values=values, standard_errors=errors)


def probed(evidence: Evidence, most: int) -> list[tuple[int, int]]:
    """(row, column) of the candidates that `measured` measures.

    Args:
        evidence: of all candidates.
        most: all of them if they are no more than this, else one of each layer.
    """
    fits = evidence.fits
    if int(fits.sum()) <= most:
        return [(int(row), int(column)) for row, column in fits.nonzero()]
    picked = []
    for row in range(len(evidence.layers)):
        known = [column for column in range(len(evidence.specs)) if bool(fits[row, column])]
        if known:
            bits = min(evidence.specs[column].bits for column in known)
            widest = [column for column in known if evidence.specs[column].bits == bits]
            picked.append((row, min(widest, key=lambda c: float(evidence.relative[row, c]))))
    return picked


def _curvature(network: Network, config: CurvatureConfig) -> LayerCurvature:
    """Of all layers, over the little text that the limits allow."""
    limits, device = network.config.curvature, network.model.device
    found = measure_curvature(
        network.model,
        network.fitting[: limits.sequences, : limits.tokens],
        config,
        generator=torch.Generator(device).manual_seed(network.seed),
        monitor=network.monitor,
    )
    if not found.converged:
        logger.warning(
            "the curvature of some layers is not known to within %g after %d products: its errors "
            "are in sensitivity.json; calibrate.curvature gives it more products or text",
            limits.tolerance,
            config.max_products,
        )
    return found


def _by_size(curvature: LayerCurvature, evidence: Evidence) -> Scores:
    """½ (value / n) ‖D‖²; a value below its own error counts as that error."""
    sizes = torch.tensor([layer.numel for layer in evidence.layers])
    values = cautious(curvature.values, curvature.errors)
    return mean_trace_scores(values, curvature.errors, sizes, 0.5 * evidence.squared)


def _backward_cost(extent: Extent) -> Cost:
    sequences = extent.config.gradient_sequences
    return Cost(
        what=f"a second backward pass over {sequences} sequences",
        forward_tokens=BACKWARD_PASSES * sequences * extent.length,
    )


def _trace_cost(extent: Extent) -> Cost:
    limits = extent.config.curvature
    if limits.trace != "joint":
        return _layers_cost(limits.layer_products or TRACE_PRODUCTS, extent)
    tokens = limits.sequences * min(limits.tokens, extent.length)
    return Cost(
        what=f"at most {limits.products} products with the Hessian over {tokens} tokens",
        forward_tokens=PRODUCT_PASSES * limits.products * tokens,
    )


def _eigenvalue_cost(extent: Extent) -> Cost:
    return _layers_cost(extent.config.curvature.layer_products or EIGENVALUE_PRODUCTS, extent)


def _layers_cost(products: int, extent: Extent) -> Cost:
    limits = extent.config.curvature
    tokens = limits.sequences * min(limits.tokens, extent.length)
    return Cost(
        what=f"at most {products} products with the Hessian over {tokens} tokens for "
        f"each of {extent.layers} layers",
        forward_tokens=LAYER_PRODUCT_PASSES * products * extent.layers * tokens,
    )


def _networks_cost(extent: Extent) -> Cost:
    few = extent.candidates <= extent.config.probes
    count = extent.candidates if few else extent.layers
    return Cost(
        what=f"{count} networks of one quantized layer on {extent.held_out} held-out tokens each",
        forward_tokens=float(count * extent.held_out),
    )


ESTIMATORS.register("fisher")(Estimator(losses=fisher))
ESTIMATORS.register("fisher-exact")(Estimator(losses=fisher_exact))
ESTIMATORS.register("fisher-factored")(Estimator(losses=fisher_factored))
ESTIMATORS.register("fisher-trace")(Estimator(losses=fisher_trace))
ESTIMATORS.register("hawq")(Estimator(losses=hawq, cost=_eigenvalue_cost))
ESTIMATORS.register("hawq-v2")(Estimator(losses=hawq_v2, cost=_trace_cost))
ESTIMATORS.register("empirical-fisher")(Estimator(losses=empirical_fisher, cost=_backward_cost))
ESTIMATORS.register("gram")(Estimator(losses=gram))
ESTIMATORS.register("measured")(Estimator(losses=measured, cost=_networks_cost))
