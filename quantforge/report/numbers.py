"""How numbers are written in the report and the model card, and what is read off layer names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantforge.outcomes import Report
from quantforge.results import AnyQuality, CurvePoint, LayerReport, Metric, Quality, TrainingOutcome
from quantforge.types import KEPT_BITS, QuantSpec

KEPT = "kept"
NO_BREAK = "\u00a0"
"""A space that does not end a line, between a number and what belongs to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a layer sits, read off its module path.

    Attributes:
        block: number of its block, or None outside the blocks.
        kind: path inside the block ("self_attn.q_proj"), or the whole path outside.
    """

    block: int | None
    kind: str


def place(name: str) -> Place:
    """Split a module path at its first numbered part."""
    match = re.fullmatch(r".*?(?:^|\.)(\d+)\.(.+)", name)
    if match is None:
        return Place(block=None, kind=name)
    return Place(block=int(match[1]), kind=match[2])


def bits_of(layer: LayerReport) -> int:
    """Code bits of a layer, 16 where it was kept."""
    return KEPT_BITS if layer.spec == KEPT else QuantSpec.parse(layer.spec).bits


def is_uniform(name: str) -> bool:
    """Whether a curve point of that name is one of the measured uniform networks."""
    return name.startswith("uniform")


def plan_point(report: Report) -> CurvePoint | None:
    """The plan as measured beside the uniform networks, with the same one-pass compensation."""
    return next((point for point in report.curve if not is_uniform(point.name)), None)


def total_loss(layers: Iterable[LayerReport]) -> float | None:
    """Predicted loss of layers together; None where that of any was not estimated."""
    losses = [layer.predicted_loss for layer in layers]
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) if len(known) == len(losses) else None


def estimate(value: float | None) -> str:
    """A predicted loss that may not have been estimated."""
    return "not estimated" if value is None else significant(value)


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, plain between 1e-4 and 1e6."""
    if math.isnan(value):
        return "not measured"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -5 < exponent < 6:
        rounded = round(value, digits - 1 - exponent)
        return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits - 1}e}"


def with_error(value: float, error: float) -> str:
    """`value ± error`, both to the place of the error's second significant digit."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return significant(value)
    places = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{places}f}{NO_BREAK}±{NO_BREAK}{error:.{places}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f}{NO_BREAK}%" if math.isfinite(share) else "not measured"


def size(count: int) -> str:
    """Bytes in decimal units, as file managers show them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{NO_BREAK}{unit}"
    return f"{count} bytes"


def against_uniform(report: Report) -> list[str]:
    """Sentences that compare the plan with uniform networks of the same compensation."""
    point = plan_point(report)
    if point is None:
        return []
    loss, metric = point.quality.loss, point.quality.metric
    found = []
    if report.hull_kl is not None and report.hull_kl > 0:
        found.append(
            f"With the same one-pass compensation for all, the plan's held-out {metric.name} is "
            f"{significant(loss)}{metric.unit} at {point.stored_bits:.3f} stored bits; the hull of "
            f"the uniform networks reads {significant(report.hull_kl)} there, so the plan is "
            f"{_difference(loss, report.hull_kl)}."
        )
    if report.cheapest_uniform is not None and report.cheapest_uniform[1] > 0:
        name, other = report.cheapest_uniform
        found.append(
            f"Against {name} ({significant(other)}{metric.unit}) it is {_difference(loss, other)}."
        )
    return found


def _difference(value: float, base: float) -> str:
    change = value / base - 1
    if abs(change) < 0.0005:
        return "equal"
    return f"{percent(abs(change))} {'lower' if change < 0 else 'higher'}"


def training_sentences(training: TrainingOutcome | None, metric: Metric) -> Iterator[str]:
    """Sentences on what recovery by training did."""
    if training is None:
        return
    best = training.points[training.best]
    ended = (
        f"The best state, after step {best.step}, was taken"
        if training.kept
        else "The untrained weights were kept, because nothing better came"
    )
    yield (
        f"Training: {training.tokens:,} tokens in {training.steps} steps. {ended}; held-out "
        f"{metric.name} {significant(training.points[0].kl)} to {significant(best.kl)}, on the "
        f"windows it was chosen on. At the end rounding what was trained costs "
        f"{significant(training.gap)}{metric.unit}."
    )


def loss_of(quality: AnyQuality) -> str:
    """What a plan is chosen by, with its standard error."""
    return with_error(quality.loss, quality.loss_stderr)


def second_of(quality: AnyQuality | None) -> str:
    """What is told beside it: a decoder's perplexity, an encoder's relative squared error."""
    if quality is None:
        return ""
    if isinstance(quality, Quality):
        return significant(quality.perplexity, 4)
    return with_error(quality.mse, quality.mse_stderr)
