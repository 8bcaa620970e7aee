"""What commands print that know both kinds of network: language models and convolutional ones."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from quantforge.cli.drawing import add_row, pairs, print_table, table_of, warn
from quantforge.cli.losses import target_rows
from quantforge.cli.render import show_evaluation, show_inspection, show_plan, show_quantized
from quantforge.cli.render_machine import show_check
from quantforge.cli.text import number, one_line, size, with_error
from quantforge.outcomes import CheckReport, EvaluationReport, InspectReport, PlanReport, Report
from quantforge.vision.outcome import (
    VisionCheck,
    VisionDifference,
    VisionEvaluation,
    VisionInspection,
    VisionReport,
)
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


def show_measured(report: EvaluationReport | VisionEvaluation, out: Console) -> None:
    """What `eval` found."""
    if isinstance(report, EvaluationReport):
        show_evaluation(report, out)
    else:
        show_vision_evaluation(report, out)


def show_inspected(report: InspectReport | VisionInspection, out: Console, *, layers: bool) -> None:
    """What a folder holds."""
    if isinstance(report, InspectReport):
        show_inspection(report, out, layers=layers)
    else:
        show_vision_inspection(report, out)


def show_checked(report: CheckReport | VisionCheck, out: Console) -> None:
    """Whether a server loads a folder, or whether it is whole."""
    if isinstance(report, CheckReport):
        show_check(report, out)
        return
    layers = f"{report.quantized} quantized, {report.kept} in float32; {report.tensors} tensors"
    pairs(
        [
            ("folder", report.path),
            ("covers", report.covers),
            *([("layers", layers)] if report.loads else []),
            ("loads", "yes" if report.loads else f"no: {'; '.join(report.problems)}"),
        ],
        out,
    )


def show_vision_evaluation(report: VisionEvaluation, out: Console) -> None:
    """A measurement on pictures, and the comparison with a second folder if there is one."""
    quality, other = report.quality, report.against_quality
    rows = [
        ("model", report.model),
        ("reference", report.reference),
        ("weights", _weights(report.weight_bytes, report.float_bytes)),
        ("measured on", quality.pictures),
        (
            "KL to the float model",
            f"{with_error(quality.kl, quality.kl_stderr)} nats a picture",
        ),
        *_share_rows(quality),
    ]
    if other is not None:
        rows += [
            ("against", report.against),
            ("  KL", f"{with_error(other.kl, other.kl_stderr)} nats a picture"),
            *((f"  {name}", value) for name, value in _share_rows(other)),
        ]
    if report.difference is not None:
        rows.append(("KL difference", _difference(report.difference)))
    pairs(rows, out)
    warn(report.warnings, out)


def show_vision_inspection(report: VisionInspection, out: Console) -> None:
    """What a folder of a convolutional network holds, layer by layer."""
    kept = sum(layer.spec == "kept" for layer in report.layers)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    channels, height, width = report.input_size
    pairs(
        [
            ("folder", report.path),
            ("model", f"{report.model}, pictures of {channels} x {height} x {width}"),
            ("format", report.format),
            *([("budget", report.budget)] if report.budget else []),
            ("plan", f"{report.stored_bits:.3f} stored bits a weight of quantized layers "
             f"({report.code_bits:.3f} of them codes)"),
            ("weights", _weights(report.weight_bytes, report.float_bytes)),
            ("layers", f"{len(report.layers) - kept} quantized, {kept} in float32"),
            ("activations", f"{report.rounded} tensors between layers are rounded"),
            ("written with", versions or "unknown"),
        ],
        out,
    )  # fmt: skip
    heads = ("kind", "bits", "group", "input bits", "weights", "stored bits", "bytes")
    table = table_of("layer", *heads)
    for one in report.layers:
        read = "float" if one.activation_bits is None else str(one.activation_bits)
        kind = "float32" if one.spec == "kept" else one.spec
        add_row(
            table, one.name, one.kind, kind, str(one.group), read, f"{one.weights:,}",
            f"{one.stored_bits:.3f}", f"{one.size_bytes:,}",
        )  # fmt: skip
    weights = sum(one.weights for one in report.layers)
    held = sum(one.size_bytes for one in report.layers)
    add_row(table, "all", "", "", "", "", f"{weights:,}", "", f"{held:,}")
    print_table(table, out)


def _weights(stored: int, floating: int) -> str:
    """Bytes of the file of weights beside the float network's."""
    return f"{size(stored)}, {floating / max(stored, 1):.2f} times smaller than float32"


def _share_rows(quality: VisionQuality) -> list[tuple[str, str]]:
    """Shares of pictures, with their standard errors."""

    def told(share: float) -> str:
        error = (share * (1 - share) / max(quality.count, 1)) ** 0.5
        return f"{100 * share:.1f} % ± {100 * error:.1f}"

    rows = [("same class as float", f"{told(quality.agreement)} of {quality.count} pictures")]
    if quality.accuracy is not None and quality.reference_accuracy is not None:
        own = told(quality.accuracy)
        rows.append(("accuracy", f"{own} (float model {100 * quality.reference_accuracy:.1f} %)"))
    return rows


def _difference(gap: VisionDifference) -> str:
    bound = 2 * gap.kl_stderr
    side = "clearly lower" if gap.kl < -bound else "clearly higher" if gap.kl > bound else ""
    verdict = side or "equal within two standard errors"
    return f"{with_error(gap.kl, gap.kl_stderr)} nats: {verdict}"


def _time_rows(seconds: float | None) -> list[tuple[str, str]]:
    """Where the budget limits time."""
    return [] if seconds is None else [("layers", f"{1e3 * seconds:.3g} ms for a batch, as timed")]


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
        *_time_rows(report.seconds),
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
