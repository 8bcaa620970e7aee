"""The frontier as a bitmap, for places that take no SVG.

The same marks as the SVG, in the colours of its light theme. The bytes depend on the numbers and
on matplotlib's version.
"""

from __future__ import annotations

import io
import math
from typing import Any

from quantforge.hull import LEAST_KL, lower_hull
from quantforge.outcomes import ParetoReport
from quantforge.results import METRICS

_PLAN, _UNIFORM = "#b9480e", "#55606e"
_INCHES, _DOTS = (8.2, 4.1), 150


def pareto_image(report: ParetoReport) -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    uniform = [p for p in report.uniform if LEAST_KL <= p.quality.loss < math.inf]
    line = [
        (p.plan.stored_bits, p.plan.predicted_loss)
        for p in report.points
        if LEAST_KL <= (p.plan.predicted_loss or 0.0) < math.inf
    ]
    measured = [
        (p.plan.stored_bits, p.quality.loss, p.quality.loss_stderr)
        for p in report.points
        if p.quality is not None and LEAST_KL <= p.quality.loss < math.inf
    ]
    if line:
        axes.plot(*zip(*line, strict=True), ".-", color=_PLAN, label="plans, predicted")
    if measured:
        bits, kl, error = zip(*measured, strict=True)
        axes.errorbar(
            bits, kl, yerr=error, fmt="D", mfc="white", ms=7, color=_PLAN, label="plans, measured"
        )
    if uniform:
        bits, kl, error = zip(
            *((p.stored_bits, p.quality.loss, p.quality.loss_stderr) for p in uniform), strict=True
        )
        axes.errorbar(
            bits, kl, yerr=error, fmt="o", mfc="white", color=_UNIFORM, label="uniform, measured"
        )
        hull = lower_hull((p.stored_bits, p.quality.loss) for p in uniform)
        axes.plot(*zip(*hull, strict=True), "--", color=_UNIFORM, label="uniform, lower hull")
        for point in uniform:
            axes.annotate(
                point.name.removeprefix("uniform "), (point.stored_bits, point.quality.loss),
                xytext=(6, 4), textcoords="offset points", fontsize=8, color=_UNIFORM,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight (codes, scales, zero-points)")
    axes.set_ylabel(METRICS[report.measure].axis)
    axes.set_title(report.model, fontsize=10, parse_math=False)
    axes.grid(visible=True, color="#dfe3e8")
    if line or measured or uniform:
        axes.legend(frameon=False, fontsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=_DOTS, metadata={"Software": None})
    return target.getvalue()
