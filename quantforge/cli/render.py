"""Results as tables for people, or as one JSON document for machines.

Everything a report holds may come from a stranger's file, so rich markup is off and text is
stripped of control characters; JSON has no NaN (a number that is not finite becomes null).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.table import Table

from quantforge.cli.drawing import add_row, pairs, print_table, table_of, warn
from quantforge.cli.losses import (
    difference_rows,
    loss_of,
    loss_text,
    predicted,
    predicted_head,
    quality_rows,
    refinement_rows,
    second_name,
    second_of,
    target_rows,
    training_rows,
)
from quantforge.cli.text import duration, estimate, number, one_line, size
from quantforge.results import METRICS

if TYPE_CHECKING:
    from rich.console import Console

    from quantforge.outcomes import (
        EvaluationReport,
        FrontierPoint,
        InspectReport,
        LatencyReport,
        ParetoReport,
        PlannedLayer,
        PlanReport,
        Report,
        ServerSupport,
        WorkEstimate,
    )
    from quantforge.results import EstimatorCost, LayerReport, Metric, SizeReport

JSON_VERSION = 1


def json_document(command: str, result: Any) -> str:
    """One JSON object: the command's name, the document's version and the result's fields."""
    fields = to_plain(result)
    if not isinstance(fields, dict):
        fields = {"result": fields}
    document = {"command": command, "json_version": JSON_VERSION, **fields}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and paths as what JSON has; a spec as its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, PurePath) or hasattr(type(value), "parse"):
        return str(value)  # a path, or a spec: its text is its form everywhere else
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Iterable):
        return [to_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def show_quantized(report: Report, out: Console) -> None:
    """What `quantize` made, how good it is, and how to use it."""
    metric = report.quality.metric
    rows = [
        ("model", report.source),
        ("calibration", report.calibration),
        *_plan_rows(report.plan.budget, report.plan.stored_bits, report.plan.code_bits),
        *_outside_rows(report.layers),
        *_size_rows(report.sizes),
        *quality_rows(report.quality),
        *target_rows(report.targets, metric),
        *refinement_rows(report.refinement, metric),
        *training_rows(report.training, metric),
    ]
    plan = next((point for point in report.curve if not point.name.startswith("uniform ")), None)
    if plan is not None:  # like the uniform networks: one-pass compensation, the same windows
        rows.append(("one-pass: the plan", loss_text(plan.quality.loss, metric)))
    if report.hull_kl is not None:
        rows.append(("  uniform there", f"{loss_text(report.hull_kl, metric)} (lower hull)"))
    if report.cheapest_uniform is not None:
        name, lowest = report.cheapest_uniform
        rows.append(("  cheapest uniform", f"{loss_text(lowest, metric)} ({name})"))
    pairs(rows, out)
    _specs([(layer.spec, None) for layer in report.layers], out)
    if report.curve:
        second = second_name(report.quality)
        table = table_of("network", "stored bits", f"held-out {metric.head}", second)
        for point in sorted(report.curve, key=lambda p: p.stored_bits):
            cells = loss_of(point.quality), second_of(point.quality)
            add_row(table, point.name, f"{point.stored_bits:.3f}", *cells)
        print_table(table, out)
    for generation in report.generations:
        out.line()
        pairs(
            [
                ("prompt", generation.prompt),
                ("  float model", generation.reference),
                ("  quantized", generation.quantized),
            ],
            out,
        )
    warn(report.warnings, out)
    if report.output:
        out.print(f"written to {one_line(report.output)}: see report.html there")


def show_plan(report: PlanReport, out: Console) -> None:
    """The plan, what it costs, and what uniform plans would cost."""
    low, high = report.reachable
    metric = METRICS[report.measure]
    rows = [
        ("model", report.source),
        ("calibration", report.calibration),
        *_plan_rows(report.plan.budget, report.plan.stored_bits, report.plan.code_bits),
        *([("reachable", f"{low:.3f} to {high:.3f} stored bits a weight")] if low < high else []),
        ("predicted loss", predicted(report.plan.predicted_loss, report.predicted_error, metric)),
        *(
            [("  the best", f"at most {number(gap)}{metric.unit} less")]
            if (gap := report.plan.gap)
            else []
        ),
        *target_rows(report.targets, metric),
        *refinement_rows(report.refinement, metric),
        *_outside_rows(report.layers),
        *_size_rows(report.sizes),
    ]
    rows += [_latency_row(one) for one in report.latency]
    if report.memory is not None:
        rows.append(("memory when run", f"{size(report.memory)} with keys and values"))
    if report.scratch_bytes:
        rows.append(("disk in the cache", size(report.scratch_bytes)))
    rows += [*_estimator_rows(report.sensitivity), *_work_rows(report.work)]
    pairs(rows, out)
    _specs([(layer.spec, layer.weights) for layer in report.layers], out)
    _layers(report.layers, metric, out)
    if report.uniform:
        table = table_of("uniform plan", "stored bits", predicted_head(metric), "fits")
        for plan in report.uniform:
            fits = "yes" if plan.fits else "no"
            add_row(
                table, plan.name, f"{plan.stored_bits:.3f}", estimate(plan.predicted_loss), fits
            )
        print_table(table, out)
    _servers(report.servers, out)
    warn(report.warnings, out)


def show_frontier(report: ParetoReport, out: Console) -> None:
    """The plans worth having, and the uniform networks beside them."""
    pairs([("model", report.source), ("calibration", report.calibration)], out)
    measured = any(point.quality is not None for point in report.points)
    metric = METRICS[report.measure]
    heads = ["checkpoint", "of 16 bits", f"predicted {metric.head}"]
    table = table_of("stored bits", *heads, *([f"measured {metric.head}"] if measured else []))
    for point in report.points:
        share = point.checkpoint_bytes / max(report.reference_bytes, 1)
        loss = predicted(point.plan.predicted_loss, point.predicted_error)
        cells = [size(point.checkpoint_bytes), f"{share:.1%}", loss]
        add_row(
            table,
            f"{point.plan.stored_bits:.3f}",
            *cells,
            *([_measured(point)] if measured else []),
        )
    print_table(table, out)
    if report.uniform:
        table = table_of("uniform network", "stored bits", f"measured {metric.head}")
        for one in report.uniform:
            add_row(table, one.name, f"{one.stored_bits:.3f}", loss_of(one.quality))
        print_table(table, out)
    warn(report.warnings, out)


def show_evaluation(report: EvaluationReport, out: Console) -> None:
    """A measurement, and the comparison with a second network if there is one."""
    quality, other = report.quality, report.against_quality
    rows = [
        ("model", report.model),
        ("reference", report.reference),
        ("precision", report.precision),
        *(_size_rows(report.sizes) if report.sizes else []),
        *quality_rows(quality),
    ]
    if other is not None:
        rows.append(("against", report.against))
        rows.append((f"  {second_name(other)}", second_of(other)))
        rows.append((f"  {other.metric.name}", f"{loss_of(other)}{other.metric.unit}"))
    if report.difference is not None:
        rows += difference_rows(report.difference)
    pairs(rows, out)
    warn(report.warnings, out)


def show_inspection(report: InspectReport, out: Console, *, layers: bool) -> None:
    """What a checkpoint holds."""
    rows = [("folder", report.path), ("model", report.model), ("format", report.format)]
    if report.budget:
        rows.append(("budget", report.budget))
    rows += _outside_rows(report.layers)
    rows += _size_rows(report.sizes)
    rows.append(("kept in 16 bits", f"{len(report.kept)} tensors"))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    rows.append(("written with", versions or "unknown"))
    pairs(rows, out)
    _specs([(layer.spec, layer.weights) for layer in report.layers], out)
    if layers:
        _layers(report.layers, METRICS["kl"], out)
    warn(report.warnings, out)


def _plan_rows(budget: str, stored: float, code: float) -> list[tuple[str, str]]:
    bits = f"{stored:.3f} stored bits a weight ({code:.3f} of them codes)"
    return [("budget", budget), ("plan", bits)]


def _outside_rows(layers: Sequence[PlannedLayer | LayerReport]) -> list[tuple[str, str]]:
    """Embedding and head where a plan covers them: the layers of no numbered block."""
    found = [
        f"{one.name} {one.spec}"
        for one in layers
        if not any(part.isdigit() for part in one.name.split("."))
    ]
    return [("embedding, head", ", ".join(found))] if found else []


def _size_rows(sizes: SizeReport) -> list[tuple[str, str]]:
    share = sizes.checkpoint_bytes / max(sizes.reference_bytes, 1)
    whole = (
        f"{size(sizes.checkpoint_bytes)}, {sizes.checkpoint_bits:.3f} bits a weight; "
        f"{share:.1%} of {size(sizes.reference_bytes)} in 16 bits"
    )
    counts = f"{sizes.planned_weights:,} planned, {sizes.kept_weights:,} outside the plan"
    return [("checkpoint", whole), ("weights", counts)]


def _measured(point: FrontierPoint) -> str:
    quality = point.quality
    return "" if quality is None else loss_of(quality)


def _estimator_rows(cost: EstimatorCost | None) -> list[tuple[str, str]]:
    if cost is None:
        return []
    taken = f": {cost.what}, about {duration(cost.seconds)} where not in the cache"
    return [("sensitivity", cost.name + (taken if cost.what else ""))]


def _latency_row(latency: LatencyReport) -> tuple[str, str]:
    change = latency.seconds / latency.reference - 1
    batch = "" if latency.batch == 1 else f", batch {latency.batch}"
    return (
        "decoding step",
        f"{1e3 * latency.seconds:.3g} ms in the planned weights, {change:+.1%} against 16 bits "
        f"({latency.device}{batch})",
    )


def _work_rows(work: WorkEstimate | None) -> list[tuple[str, str]]:
    if work is None:
        return []
    products = f"{work.multiply_adds / 1e9:,.1f} G multiply-adds, {work.rate / 1e9:,.1f} G a second"
    return [
        ("quantize takes", f"at least {duration(work.seconds)} ({products})"),
        ("  and memory", f"about {size(work.memory_bytes)}"),
    ]


def _servers(servers: Sequence[ServerSupport], out: Console) -> None:
    """Which programs load the checkpoint."""
    if not servers:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("loads in", "", "by its rules"):
        table.add_column(head, overflow="fold")
    for one in servers:
        add_row(table, one.name, "yes" if one.loads else "no", one.why)
    print_table(table, out)


def _specs(specs: Sequence[tuple[str, int | None]], out: Console) -> None:
    """How many layers, and what share of the weights where known, each spec has."""
    if not specs:
        return
    layers = Counter(spec for spec, _ in specs)
    weights: Counter[str] = Counter()
    for spec, count in specs:
        weights[spec] += count or 0
    total = sum(weights.values())
    table = table_of("spec", "layers", *(["share of weights"] if total else []))
    for spec in sorted(layers, key=_spec_order):
        share = [f"{weights[spec] / total:.1%}"] if total else []
        add_row(table, spec, str(layers[spec]), *share)
    print_table(table, out)


def _spec_order(spec: str) -> tuple[int, str]:
    digits = spec.partition("b")[0]
    return (int(digits) if digits.isdigit() else 16, spec)


def _layers(layers: Iterable[PlannedLayer], metric: Metric, out: Console) -> None:
    rows = list(layers)
    estimated = any(layer.predicted_loss is not None for layer in rows)
    heads = ["spec", "weights", "stored bits", *([predicted_head(metric)] if estimated else [])]
    table = table_of("layer", *heads)
    for layer in rows:
        cells = [layer.spec, f"{layer.weights:,}", f"{layer.stored_bits:.3f}"]
        if estimated:
            loss = layer.predicted_loss
            cells.append("" if loss is None else predicted(loss, layer.predicted_error))
        add_row(table, layer.name, *cells)
    print_table(table, out)
