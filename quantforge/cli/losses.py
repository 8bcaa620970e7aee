"""Losses and what is told beside them, as rows of tables: of decoders and of encoders."""

from __future__ import annotations

from collections.abc import Sequence

from quantforge.cli.text import estimate, number, with_error
from quantforge.results import (
    AnyDifference,
    AnyQuality,
    Metric,
    PairedDifference,
    PooledQuality,
    Quality,
    RefinementRound,
    TargetOutcome,
    TrainingOutcome,
)


def loss_of(quality: AnyQuality) -> str:
    """What plans are chosen by, with its standard error."""
    return with_error(quality.loss, quality.loss_stderr)


def second_of(quality: AnyQuality) -> str:
    """What is told beside it."""
    if isinstance(quality, Quality):
        return number(quality.perplexity)
    return with_error(quality.mse, quality.mse_stderr)


def second_name(quality: AnyQuality) -> str:
    """How that is called."""
    return "perplexity" if isinstance(quality, Quality) else "relative MSE"


def difference_rows(gap: AnyDifference) -> list[tuple[str, str]]:
    """Of a comparison with a second network."""
    if isinstance(gap, PairedDifference):
        loss, error, name, unit = gap.kl, gap.kl_stderr, "KL", " nats"
        second = ("NLL difference", f"{with_error(gap.nll, gap.nll_stderr)} nats")
    else:
        loss, error, name, unit = gap.distance, gap.distance_stderr, "1 - cosine", ""
        second = ("MSE difference", with_error(gap.mse, gap.mse_stderr))
    side = "lower" if gap.lower else "higher" if loss > 2 * error else "equal"
    verdict = f"{side} within two standard errors" if side == "equal" else f"clearly {side}"
    return [(f"{name} difference", f"{with_error(loss, error)}{unit}: {verdict}"), second]


def quality_rows(quality: AnyQuality) -> list[tuple[str, str]]:
    """Of a measurement."""
    if isinstance(quality, PooledQuality):
        return [
            ("measured on", quality.text),
            ("1 - cosine to the float model", f"{loss_of(quality)} (mean-pooled output)"),
            ("relative MSE", second_of(quality)),
        ]
    return [
        ("measured on", quality.text),
        ("KL to the float model", f"{with_error(quality.kl, quality.kl_stderr)} nats a token"),
        (
            "perplexity",
            f"{number(quality.perplexity)} (float model {number(quality.reference_perplexity)})",
        ),
        ("same first token", f"{quality.top1:.1%}"),
    ]


def loss_text(loss: float, metric: Metric) -> str:
    """A loss with its name and unit."""
    return f"{metric.name} {number(loss)}{metric.unit}"


def predicted_head(metric: Metric) -> str:
    """Of a column of predicted losses."""
    return f"predicted loss ({metric.unit.strip() or metric.name})"


def predicted(loss: float | None, error: float | None, metric: Metric | None = None) -> str:
    """A loss; with its sign and unit, or its name for want of one, where the metric is given."""
    if loss is None:
        return "not estimated"
    text = number(loss) if error is None else with_error(loss, error)
    if metric is None:
        return text
    return f"+{text}{metric.each}" if metric.each else f"{metric.name} {text}"


def target_rows(targets: Sequence[TargetOutcome], metric: Metric) -> list[tuple[str, str]]:
    """How the budget's targets were met."""
    return [
        (
            f"target {one.text}",
            f"measured {with_error(one.measured, one.stderr)}{metric.unit} before tuning, at most "
            f"{number(one.upper)} (95 %) of {number(one.limit)}; predicted "
            f"{estimate(one.predicted)}; {one.windows} windows, {one.plans} plans measured",
        )
        for one in targets
    ]


def refinement_rows(rounds: Sequence[RefinementRound], metric: Metric) -> list[tuple[str, str]]:
    """What looking around the plan found."""
    rows = []
    for one in rounds:
        moved = f"{one.layers} layers exchanged" if one.layers else "the plan was kept"
        gain = with_error(one.after - one.before, one.stderr)
        rows.append(
            (
                "refined",
                f"{one.plans} plans measured, {moved}: {metric.name} {number(one.before)} to "
                f"{number(one.after)}{metric.unit} before tuning ({gain})",
            )
        )
    return rows


def training_rows(training: TrainingOutcome | None, metric: Metric) -> list[tuple[str, str]]:
    """What recovery by training did."""
    if training is None:
        return []
    best = training.points[training.best]
    ended = f"best after step {best.step}" if training.kept else "undone"
    return [
        (
            "trained",
            f"{training.tokens:,} tokens in {training.steps} steps, {ended}: "
            f"{metric.name} {number(training.points[0].kl)} to {number(best.kl)}{metric.unit} "
            f"on held-out tokens; rounding costs {number(training.gap)} at the end",
        )
    ]
