"""The whole frontier: which plans are worth having, at every size."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from quantforge.compilation import Job
from quantforge.decision import Measurement
from quantforge.files import write_json
from quantforge.format.manifest import plan_from_dict, plan_to_dict
from quantforge.outcomes import FrontierPoint, ParetoReport
from quantforge.planning import frontier
from quantforge.report.pareto import pareto_drawing, pareto_page
from quantforge.report.pareto_image import pareto_image


def frontier_report(job: Job, measured: Measurement, points: int, count: int) -> ParetoReport:
    """The plans worth having, from the smallest to about six bits.

    Args:
        job: the compilation.
        measured: what calibration left.
        points: budgets that are tried.
        count: how many of the plans are measured, spread evenly from the smallest to the largest.
    """
    sensitivity, store = measured.needed_for_search()
    plans = frontier(sensitivity, job.recipe.search, points=points)
    if job.model.share.count > 1:  # as in `PlanChooser.find`
        facts = {"plans": [plan_to_dict(plan) for plan in plans]}
        told = job.model.share.exchange(facts=facts)[0].facts["plans"]
        plans = [plan_from_dict(plan) for plan in told]
    picked = sorted(
        {round(i * (len(plans) - 1) / max(count - 1, 1)) for i in range(min(count, len(plans)))}
    )
    found = job.measure_plans([plans[i] for i in picked], store, "measure the frontier")
    qualities = dict(zip(picked, found, strict=True))
    return ParetoReport(
        model=job.model.source.name,
        source=job.model.source.description,
        points=tuple(
            FrontierPoint(
                plan=plan,
                predicted_error=measured.predicted_error(plan),
                checkpoint_bytes=job.footprint.checkpoint_bytes(plan.assignment),
                quality=qualities.get(index),
            )
            for index, plan in enumerate(plans)
        ),
        uniform=measured.uniform_kept,
        reference_bytes=job.footprint.reference_bytes,
        calibration=job.calibration.description,
        settings=job.recipe.model_dump(mode="json"),
        measure=job.model.architecture.measure,
    )


def write_frontier(report: ParetoReport, output: Path) -> None:
    """`pareto.json` with every plan, the figure alone (SVG and PNG), and a page that holds it."""
    output.mkdir(parents=True, exist_ok=True)
    points = [
        {
            "plan": plan_to_dict(point.plan),
            "predicted_error": point.predicted_error,
            "checkpoint_bytes": point.checkpoint_bytes,
            "quality": None if point.quality is None else asdict(point.quality),
        }
        for point in report.points
    ]
    document = {
        "model": report.model,
        "measure": report.measure,
        "calibration": report.calibration,
        "points": points,
        "reference_bytes": report.reference_bytes,
        "settings": report.settings,
        "uniform": [asdict(point) for point in report.uniform],
    }
    write_json(output / "pareto.json", document)
    (output / "pareto.svg").write_text(pareto_drawing(report), encoding="utf-8")
    (output / "pareto.png").write_bytes(pareto_image(report))
    (output / "pareto.html").write_text(pareto_page(report), encoding="utf-8")
