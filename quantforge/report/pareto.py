"""The frontier as a figure and as a page, in the style of the report.

The figure is drawn like the report's size-KL curve: the same axes, uniform networks and hull, the
plans as a line. Alone in a file it brings its style sheet with it, so it follows the reader's theme
as the page does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from html import escape

from quantforge.hull import LEAST_KL, lower_hull
from quantforge.outcomes import FrontierPoint, ParetoReport
from quantforge.report.figures import Axes, Labels, diamond, grid, svg, uniform_mark
from quantforge.report.html import figure_section, html_table, page, style
from quantforge.report.numbers import estimate, loss_of, second_of, significant, size, with_error
from quantforge.results import METRICS, CurvePoint

_FONT = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
_CAPTION = (
    "Line and dots: plans, each the one of least predicted loss for its bits. Diamonds: plans that "
    "were put together and measured. Circles: uniform networks, one width and grouping for all "
    "layers. Dashed: their lower hull. All with the same one-pass compensation, before any tuning. "
    "Bars: one standard error over windows. Lower and further left is better."
)


def pareto_figure(report: ParetoReport) -> str:
    """Stored bits against loss: predicted and measured plans, uniform networks and their hull.

    Predictions below what a measurement can show, such as a network kept whole, are left out. Empty
    text if nothing can be drawn.
    """
    drawn = [p for p in report.points if LEAST_KL <= (p.plan.predicted_loss or 0.0) < math.inf]
    uniform = [p for p in report.uniform if LEAST_KL <= p.quality.loss < math.inf]
    measured = [
        CurvePoint(name=p.plan.budget, stored_bits=p.plan.stored_bits, quality=p.quality)
        for p in report.points
        if p.quality is not None and LEAST_KL <= p.quality.loss < math.inf
    ]
    line = [(p.plan.stored_bits, p.plan.predicted_loss or 0.0) for p in drawn]
    marks = [*uniform, *measured]
    if not line and not marks:
        return ""
    axes = Axes.around(
        [*(bits for bits, _ in line), *(p.stored_bits for p in marks)],
        [*(loss for _, loss in line), *(p.quality.loss for p in marks)],
    )
    axes = replace(axes, left=78)  # room for the ticks of small losses, "0.0001"
    hull = lower_hull((p.stored_bits, p.quality.loss) for p in uniform)
    metric = METRICS[report.measure]
    parts = [grid(axes, metric)]
    if len(hull) > 1:
        parts.append(_path("hull", axes, hull))
    if len(line) > 1:
        parts.append(_path("frontier", axes, line))
    labels = Labels(axes)
    labels.keep_off_points([(p.stored_bits, p.quality.loss) for p in marks])
    labels.keep_off_line(hull)
    labels.keep_off_line(line)
    parts.extend(_dot(point, axes, metric.unit) for point in drawn)
    parts.extend(uniform_mark(p, axes) for p in uniform)
    parts.extend(diamond(p, axes, "plan") for p in measured)
    on_hull = {bits for bits, _ in hull}
    ordered = sorted(uniform, key=lambda p: (p.stored_bits not in on_hull, p.stored_bits))
    parts.extend(labels.place(p, p.name.removeprefix("uniform").strip(), "label") for p in ordered)
    return svg(
        "pareto",
        f"Stored bits per weight against {metric.noun}",
        axes.bottom + 42,
        parts,
    )


def _path(kind: str, axes: Axes, corners: list[tuple[float, float]]) -> str:
    points = " ".join(f"{axes.x(bits):.2f},{axes.y(kl):.2f}" for bits, kl in corners)
    return f'<polyline class="{kind}" points="{points}"/>'


def _dot(point: FrontierPoint, axes: Axes, unit: str) -> str:
    bits, loss = point.plan.stored_bits, point.plan.predicted_loss or 0.0
    text = f"{bits:.3f} stored bits, predicted {significant(loss)}{unit}"
    return (
        f'<g class="predicted" data-bits="{bits!r}" data-kl="{loss!r}">'
        f"<title>{escape(text)}</title>"
        f'<circle cx="{axes.x(bits):.2f}" cy="{axes.y(loss):.2f}" r="2.5"/></g>'
    )


def pareto_drawing(report: ParetoReport) -> str:
    """The figure as an SVG file of its own, light or dark as its reader prefers."""
    figure = pareto_figure(report) or svg("pareto", "Nothing to draw", 40, [])
    opening, closed, rest = figure.partition(">")
    return (
        f'{opening} xmlns="http://www.w3.org/2000/svg" font-family="{_FONT}"{closed}'
        f"<style><![CDATA[\n{style()}]]></style>"
        f'<rect width="100%" height="100%" fill="var(--page)"/>{rest}\n'
    )


def pareto_page(report: ParetoReport) -> str:
    """The frontier as one page that needs nothing else."""
    rows = [
        (
            f"{point.plan.stored_bits:.3f}",
            size(point.checkpoint_bytes),
            predicted(point),
            "" if point.quality is None else loss_of(point.quality),
            second_of(point.quality),
        )
        for point in report.points
    ]
    metric, second = METRICS[report.measure], "perplexity"
    if report.measure == "cosine":
        second = "relative MSE"
    heads = (
        "stored bits",
        "checkpoint",
        f"predicted {metric.name}",
        f"measured {metric.name}",
        second,
    )
    notes = "".join(f"<li>{escape(line)}</li>" for line in report.warnings)
    body = (
        f"<header><h1>{escape(report.model)}: quality at every size</h1>\n"
        f'<p class="soft source">{escape(report.source)}</p></header>\n'
        f"{f'<ul>{notes}</ul>' if notes else ''}"
        f"{figure_section('Frontier', pareto_figure(report), _CAPTION)}\n"
        f"<section><h2>Plans</h2><p>{escape(metric.axis)}; checkpoints with everything in "
        f"them, of {size(report.reference_bytes)} in 16 bits. Every plan is in pareto.json.</p>"
        f"{html_table('frontier', heads, rows, numbers_from=0, short=True)}</section>\n"
        f"<p>Calibrated on: {escape(report.calibration)}</p>"
    )
    return page(f"{report.model}: frontier", body)


def predicted(point: FrontierPoint) -> str:
    """A plan's predicted loss with its standard error, where there is one."""
    loss = point.plan.predicted_loss
    if loss is None or point.predicted_error is None:
        return estimate(loss)
    return with_error(loss, point.predicted_error)
