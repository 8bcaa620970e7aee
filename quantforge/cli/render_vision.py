"""What `quantize` and `plan` print, of a language model or of a convolutional network."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from quantforge.cli.drawing import add_row, pairs, print_table, table_of, warn
from quantforge.cli.losses import target_rows
from quantforge.cli.render import show_plan, show_quantized
from quantforge.cli.text import number, one_line, size, with_error
from quantforge.outcomes import PlanReport, Report
from quantforge.vision.outcome import VisionReport
from quantforge.vision.quality import METRIC, VisionQuality


def show_made(report: Report | VisionReport, out: Console) -> None:
    """What `quantize` made."""
    if isinstance(report, Report):
        show_quantized(report, out)
    else:
        show_vision(report, out)


def show_planned(report: PlanReport | VisionReport, out: Console) -> None:
    """What `plan` found."""
    if isinstance(report, PlanReport):
        show_plan(report, out)
    else:
        show_vision(report, out)


def show_vision(report: VisionReport, out: Console) -> None:
    """What was made or planned, how good it is, and where it is."""
    share = report.operations / report.float_operations
    rows = [
        ("model", report.source),
        ("calibration", report.calibration),
        ("budget", report.budget),
        ("stored bits", f"{report.stored_bits:.3f} a weight ({report.code_bits:.3f} in codes)"),
        (
            "bit operations",
            f"{number(report.operations / 1e9)} G a picture, {100 * share:.0f} % of 8 x 8 bits",
        ),
        *_quality_rows(report.quality),
        *target_rows(report.targets, METRIC),
    ]
    if report.weight_bytes:
        ratio = report.float_bytes / report.weight_bytes
        rows.append(
            ("weights", f"{size(report.weight_bytes)}, {ratio:.2f} times smaller than float32")
        )
    better, blocks = report.blocks
    if blocks:
        rows.append(("learned rounding", f"kept in {better} of {blocks} blocks"))
    if report.training is not None:
        points, kept = report.training.points, report.training.kept
        best = points[report.training.best].kl
        told = (
            f"KL {number(points[0].kl)} to {number(best)}" if kept else "undone: it lowered nothing"
        )
        rows.append(("training", f"{report.training.steps} steps, {told}"))
    pairs(rows, out)
    specs = Counter((layer.spec, layer.activation_bits) for layer in report.layers)
    table = table_of("spec", "input bits", "layers", "weights")
    for (spec, bits), count in sorted(
        specs.items(), key=lambda item: (item[0][0], item[0][1] or 0)
    ):
        weights = sum(
            one.weights for one in report.layers if (one.spec, one.activation_bits) == (spec, bits)
        )
        add_row(table, spec, "float" if bits is None else str(bits), str(count), f"{weights:,}")
    print_table(table, out)
    if report.curve:
        table = table_of("network", "stored bits", "bit operations, G", "held-out KL", "agreement")
        for point in sorted(report.curve, key=lambda one: one.stored_bits):
            add_row(
                table, point.name, f"{point.stored_bits:.3f}", number(point.operations / 1e9),
                with_error(point.quality.kl, point.quality.kl_stderr),
                f"{100 * point.quality.agreement:.1f} %",
            )  # fmt: skip
        print_table(table, out)
    warn(report.warnings, out)
    if report.output:
        out.print(f"written to {one_line(report.output)}: see report.html there")


def _quality_rows(quality: VisionQuality) -> list[tuple[str, str]]:
    rows = [
        ("held-out KL", f"{with_error(quality.kl, quality.kl_stderr)} nats a picture"),
        ("agreement", f"{100 * quality.agreement:.1f} % of {quality.count} pictures"),
    ]
    if quality.accuracy is not None and quality.reference_accuracy is not None:
        rows.append(
            (
                "accuracy",
                f"{100 * quality.accuracy:.1f} %, float {100 * quality.reference_accuracy:.1f} %",
            )
        )
    return rows
