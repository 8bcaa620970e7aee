"""The curvature of the loss, layer by layer, for people who want to see what plans rest on.

Of every layer's diagonal block H of the Hessian, stochastic Lanczos quadrature gives a density of
its eigenvalues with few products, and out of that one measurement come

- the trace (HAWQ-V2, Dong et al. 2020) and its mean tr H / n, with a standard error over starts;
- the largest eigenvalue (HAWQ, Dong et al. 2019): the largest Ritz value, a bound from below that
  few steps reach because it stands far from the rest;
- how far from a minimum the layer is: r_e = |λ_min / λ_max| and K_hn, the weight of negative
  against positive curvature (Gabdullin's criteria, `methods.curvature.density`).

Query projections can be looked at head by head (HeSS, `methods.curvature.heads`), and the tensors
that layers read by the trace of the Hessian over them (HAWQ-V2's activations). With a spec, layers
get HAWQ's Ω = λ_max ‖Q(W) − W‖², in whose order it quantizes and tunes them; Q rounds to the
nearest code between minimum and maximum, as HAWQ does. `--sensitivity hawq` and `hawq-v2` predict
losses from eigenvalues and traces that they measure themselves, within their own limits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import torch

from quantforge.calibrate.curvature import Labels
from quantforge.errors import UsageError
from quantforge.files import write_json
from quantforge.load.text import calibration_set
from quantforge.loading import load_source
from quantforge.models import Model
from quantforge.opening import configure
from quantforge.progress import Monitor, ProgressEvent
from quantforge.spectra import (
    QUERIES,
    LayerSpectrum,
    is_query,
    measure_layers,
    with_input_traces,
    with_squared_errors,
)
from quantforge.types import LayerInfo, QuantSpec
from quantforge.workspace import check_file

DOCUMENT_VERSION = 1
Progress = Callable[[ProgressEvent], None]


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
        spec: of every layer's Ω; None where none was given.
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
    spec: str | None = None
    output: str | None = None

    def fine_tuning_order(self) -> list[str]:
        """Names of the layers by decreasing Ω, those without one left out."""
        known = [layer for layer in self.layers if layer.fine_tuning is not None]
        return [one.name for one in sorted(known, key=lambda one: -(one.fine_tuning or 0.0))]

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
    activations: bool = False,
    spec: str | None = None,
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
        activations: look at what the layers read too; takes two sequences at least.
        spec: e.g. "3b-g64": give HAWQ's Ω for it.
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
    _check(path, force, labels, heads, {
        "sequences": (sequences, 2 if activations else 1), "tokens": (tokens, 2),
        "steps": (steps, 2), "starts": (starts, 2),
    })  # fmt: skip
    at = _parsed(spec)
    # No more text than is read: one may have to be sampled. An eighth of it is held out.
    enough = {"calibration.sequences": sequences + -(-sequences // 7)}
    enough["calibration.sequence_length"] = tokens
    recipe = configure(model, calibration=calibration, settings={**(settings or {}), **enough})
    monitor = Monitor(progress=progress, cancel=cancel)
    loaded = load_source(recipe, device, trust_remote_code=trust_remote_code, monitor=monitor)
    chosen = _chosen(loaded, layers, heads)
    if at is not None and not any(at.divides(one.in_features) for one in chosen):
        raise UsageError(f"{spec} divides no row of the chosen layers: give another --spec")
    data = calibration_set(recipe.calibration, loaded, seed=seed, monitor=monitor)
    text = data.fitting[:sequences]
    generator = torch.Generator(loaded.device).manual_seed(seed)
    found, products = measure_layers(
        loaded, text, chosen, labels=labels, steps=steps, starts=starts, heads=heads,
        generator=generator, monitor=monitor,
    )  # fmt: skip
    if at is not None:
        found = with_squared_errors(loaded, chosen, found, at)
    if activations:
        found = with_input_traces(loaded, chosen, found, text, labels, generator, monitor)
    report = CurvatureReport(
        model=loaded.source.name, text=data.description, sequences=len(text),
        length=text.shape[1], labels=labels, steps=steps, starts=starts, products=products,
        layers=found, spec=spec, output=None if path is None else str(path),
    )  # fmt: skip
    if path is not None:
        rows = [
            {**asdict(one), "mean_trace": one.mean_trace, "fine_tuning": one.fine_tuning}
            for one in found
        ]
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
    queries = [one for one in chosen if is_query(one)]
    if heads and (not queries or queries[0].out_features % int(config.num_attention_heads)):
        raise UsageError(f"no layer of {pattern!r} is a query projection, {QUERIES}, with heads")
    return chosen


def _parsed(spec: str | None) -> QuantSpec | None:
    """The spec that a text says.

    Raises:
        UsageError: it says none.
    """
    try:
        return None if spec is None else QuantSpec.parse(spec)
    except ValueError as error:
        raise UsageError(str(error)) from None


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
        check_file(path, force=force)
    for name, (value, least) in numbers.items():
        if value < least:
            why = " with activations" if name == "sequences" and least > 1 else ""
            raise UsageError(f"{name} must be {least} or more{why}, got {value}")
