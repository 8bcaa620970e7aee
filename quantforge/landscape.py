"""The curvature of the loss, layer by layer, for people who want to see what plans rest on.

Of every layer's diagonal block H of the Hessian, stochastic Lanczos quadrature gives a density of
its eigenvalues with few products, and out of that one measurement come

- the trace (HAWQ-V2, Dong et al. 2020) and its mean tr H / n, with a standard error over starts;
- the largest eigenvalue (HAWQ, Dong et al. 2019): the largest Ritz value, a bound from below that
  few steps reach because it stands far from the rest;
- how far from a minimum the layer is: r_e = |λ_min / λ_max| and K_hn, the weight of negative
  against positive curvature (Gabdullin's criteria, `methods.curvature.density`).

Query projections can be looked at head by head (HeSS, `methods.curvature.heads`). The network is
not quantized, so nothing here depends on candidates; `--sensitivity hawq` and `hawq-v2` predict
losses from eigenvalues and traces that they measure themselves, within their own limits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import torch

from quantforge.calibrate.curvature import Labels, LossHessian
from quantforge.errors import UsageError
from quantforge.files import write_json
from quantforge.load.text import calibration_set
from quantforge.loading import load_source
from quantforge.methods.curvature.density import SpectralDensity, spectral_density
from quantforge.methods.curvature.heads import head_scores, head_traces
from quantforge.methods.curvature.operator import Matvec
from quantforge.models import Model
from quantforge.opening import configure
from quantforge.progress import Monitor, ProgressEvent
from quantforge.types import LayerInfo
from quantforge.workspace import check_json_file

DOCUMENT_VERSION = 1
QUERIES = "q_proj"
Progress = Callable[[ProgressEvent], None]


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

    @property
    def mean_trace(self) -> float:
        """Tr H / n, what HAWQ-V2 ranks layers by."""
        return self.trace / self.weights

    @property
    def mean_highest(self) -> float:
        """λ_max / n, what HAWQ ranks layers by."""
        return self.highest / self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureReport:
    """The outcome of `curvature`.

    Attributes:
        model: whose curvature.
        text: where its tokens came from.
        sequences: sequences that were read.
        length: tokens of each.
        labels: what the loss compares with.
        steps: Lanczos steps a start.
        starts: random starts.
        products: products with the Hessian of a layer, of all layers together.
        layers: in forward order.
        output: the file that was written; None where none was.
    """

    model: str
    text: str
    sequences: int
    length: int
    labels: str
    steps: int
    starts: int
    products: int
    layers: tuple[LayerSpectrum, ...]
    output: str | None = None

    def ranked(self) -> list[LayerSpectrum]:
        """Layers by decreasing mean trace: HAWQ-V2's order."""
        return sorted(self.layers, key=lambda layer: -layer.mean_trace)


def curvature(
    model: str | Path,
    *,
    layers: str = "*",
    labels: Labels = "true",
    sequences: int = 1,
    tokens: int = 128,
    steps: int = 6,
    starts: int = 2,
    heads: bool = False,
    calibration: str | Path | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> CurvatureReport:
    """Measure spectra of layers' Hessians: traces, top eigenvalues, distance from a minimum.

    Args:
        model: recipe name, recipe file, folder, .gguf file or hub id.
        layers: module paths to look at, as a shell pattern ("*.5.mlp.*").
        labels: "true" for the text's next tokens, whose Hessian may be indefinite; "expected" for
            the network's own distribution (the Fisher information, never negative), or "sampled".
        sequences: of text; graphs of all of them are held at once.
        tokens: of each.
        steps: Lanczos steps a start, two at least.
        starts: random starts, two at least.
        heads: look at query projections head by head too, with as many products again; not with
            "true" labels, whose traces have no sign to share out.
        calibration: text to read, from its beginning; None takes the recipe's.
        output: .json file to write.
        seed: of starts, probes and sampled labels.
        device: where to compute.
        settings: recipe keys.
        force: replace the file.
        trust_remote_code: let a hub model bring its own code.
        progress: called after every layer.
        cancel: once set, stops with `CancelledError`.

    Raises:
        InputError: the model or the text is missing or broken.
        UsageError: a number is out of range, no layer has such a path, or the file is there.
    """
    path = None if output is None else Path(output)
    path = None if output is None else Path(output)
    _check(path, force, labels, heads, {"sequences": (sequences, 1), "tokens": (tokens, 2),
                                        "steps": (steps, 2), "starts": (starts, 2)})  # fmt: skip
    # No more text than is read: one may have to be sampled. An eighth of it is held out.
    enough = {"calibration.sequences": sequences + -(-sequences // 7)}
    enough["calibration.sequence_length"] = tokens
    recipe = configure(model, calibration=calibration, settings={**(settings or {}), **enough})
    monitor = Monitor(progress=progress, cancel=cancel)
    loaded = load_source(recipe, device, trust_remote_code=trust_remote_code, monitor=monitor)
    chosen = _chosen(loaded, layers, heads)
    data = calibration_set(recipe.calibration, loaded, seed=seed, monitor=monitor)
    text = data.fitting[:sequences]
    found, products = measure_layers(
        loaded, text, chosen, labels=labels, steps=steps, starts=starts, heads=heads,
        generator=torch.Generator(loaded.device).manual_seed(seed), monitor=monitor,
    )  # fmt: skip
    report = CurvatureReport(
        model=loaded.source.name, text=data.description, sequences=len(text),
        length=text.shape[1], labels=labels, steps=steps, starts=starts, products=products,
        layers=found, output=None if path is None else str(path),
    )  # fmt: skip
    if path is not None:
        rows = [{**asdict(layer), "mean_trace": layer.mean_trace} for layer in found]
        write_json(path, {"format_version": DOCUMENT_VERSION, **asdict(report), "layers": rows})
    return report


def _chosen(model: Model, pattern: str, heads: bool) -> list[LayerInfo]:
    """Layers that a pattern names.

    Raises:
        UsageError: there is none, or heads are asked for and none of them is a query projection
            that splits into heads.
    """
    chosen = [one for one in model.layers if fnmatchcase(one.name, pattern)]
    if not chosen:
        raise UsageError(f"no layer matches {pattern!r}; one is {model.layers[0].name}")
    config: Any = model.module.config
    queries = [one for one in chosen if _is_query(one)]
    if heads and (not queries or queries[0].out_features % int(config.num_attention_heads)):
        raise UsageError(f"no layer of {pattern!r} is a query projection, {QUERIES}, with heads")
    return chosen


def _is_query(layer: LayerInfo) -> bool:
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
            if heads and _is_query(layer):
                shares, spent = _heads(model, layer, product, steps * starts, generator)
                products += spent
            products += density.products
            found.append(_summary(layer, density, *shares))
            monitor.step("curvature", index + 1, len(layers), layer.name)
    return tuple(found), products


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


def _check(
    path: Path | None,
    force: bool,
    labels: str,
    heads: bool,
    numbers: Mapping[str, tuple[int, int]],
) -> None:
    """Refuse an unusable output file, unknown labels, and numbers below their least."""
    if labels not in get_args(Labels):
        raise UsageError(f"unknown labels {labels!r}; known: {', '.join(get_args(Labels))}")
    if heads and labels == "true":
        raise UsageError(
            "heads share a trace that is not negative: give --labels expected or sampled with them"
        )
    if path is not None:
        check_json_file(path, force=force)
    for name, (value, least) in numbers.items():
        if value < least:
            raise UsageError(f"{name} must be {least} or more, got {value}")
