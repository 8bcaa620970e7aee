"""report.html of a convolutional network: one file, drawn from the report alone."""

from __future__ import annotations

from collections import Counter
from html import escape

from quantforge.report.figures import size_curve
from quantforge.report.html import (
    figure_section,
    html_table,
    page,
    tile_row,
    warning_section,
)
from quantforge.report.numbers import percent, significant, size, with_error
from quantforge.vision.outcome import VisionPoint, VisionReport
from quantforge.vision.quality import METRIC, VisionQuality


def render(report: VisionReport) -> str:
    """The whole page as text; write it as UTF-8."""
    parts = (
        f"<header><h1>{escape(report.model)}, quantized to a budget of {escape(report.budget)}</h1>"
        f'\n<p class="soft source">{escape(report.source)}</p></header>',
        warning_section(report.warnings),
        _headline(report),
        _how(report),
        _curve(report),
        _networks(report),
        _layers(report),
    )
    return page(f"{report.model} at {report.stored_bits:.2f} bits", "\n".join(parts))


def _headline(report: VisionReport) -> str:
    quality = report.quality
    tiles = [
        (
            "Stored bits a weight",
            f"{report.stored_bits:.3f}",
            f"budget {report.budget}; codes alone {report.code_bits:.3f}",
        ),
        (
            "Held-out agreement",
            percent(quality.agreement),
            f"of {quality.count} pictures have the float network's likeliest class",
        ),
        (
            "Held-out KL, nats",
            with_error(quality.kl, quality.kl_stderr),
            "a picture, one deviation",
        ),
        (
            "Bit operations",
            f"{100 * report.operations / report.float_operations:.0f}%",
            f"of those of 8 x 8 bits; {report.operations / 1e9:.3g} G a picture",
        ),
    ]
    if quality.accuracy is not None and quality.reference_accuracy is not None:
        tiles.insert(
            2,
            (
                "Held-out accuracy",
                percent(quality.accuracy),
                f"float {percent(quality.reference_accuracy)}",
            ),
        )
    if report.weight_bytes:
        ratio = report.float_bytes / report.weight_bytes
        tiles.append(
            (
                "Weights on disk",
                size(report.weight_bytes),
                f"{significant(ratio)} times smaller than {size(report.float_bytes)} in float32",
            )
        )
    return tile_row(tiles, quality.pictures)


def _how(report: VisionReport) -> str:
    """What was done, in sentences."""
    specs = Counter(layer.spec for layer in report.layers)
    widths = Counter(layer.activation_bits for layer in report.layers)
    said = [
        f"Calibration: {report.calibration}.",
        f"The plan was found by {report.solver}: "
        + ", ".join(f"{count} layers {spec}" for spec, count in sorted(specs.items()))
        + "; they read activations of "
        + ", ".join(
            f"{'32 (float)' if bits is None else bits} bits ({count})"
            for bits, count in sorted(widths.items(), key=lambda item: item[0] or 32)
        )
        + ".",
    ]
    better, blocks = report.blocks
    if blocks:
        said.append(
            f"Learned rounding brought {better} of {blocks} blocks nearer to the float ones."
        )
    if report.training is not None:
        points = report.training.points
        said.append(
            f"Training end to end, {report.training.steps} steps: held-out KL "
            f"{significant(points[0].kl)} to {significant(points[report.training.best].kl)}"
            + ("." if report.training.kept else "; it was undone.")
        )
    said += [
        f"{target.text}: measured {significant(target.measured)}, with 95 % confidence at most "
        f"{significant(target.upper)} ({target.windows} pictures, {target.plans} plans measured)."
        for target in report.targets
    ]
    items = "".join(f"<li>{escape(one)}</li>" for one in said)
    return f"<section><h2>How it was made</h2><ul>{items}</ul></section>"


def _curve(report: VisionReport) -> str:
    final = VisionPoint(
        name="finished network", stored_bits=report.stored_bits, operations=report.operations,
        quality=report.quality,
    )  # fmt: skip
    drawing = size_curve(report.curve, final, METRIC)
    if not drawing or not report.curve:
        return ""
    return figure_section(
        "Size against loss", drawing,
        "Circles are uniform networks, compensated and with corrected biases; the finished network "
        "is reconstructed block by block too.",
    )  # fmt: skip


def _networks(report: VisionReport) -> str:
    if not report.curve:
        return ""
    heads = ("network", "stored bits", "bit operations, G", "KL, nats", "agreement", "accuracy")
    final = VisionPoint(
        name="finished network", stored_bits=report.stored_bits, operations=report.operations,
        quality=report.quality,
    )  # fmt: skip
    rows = [
        (
            point.name,
            f"{point.stored_bits:.3f}",
            f"{point.operations / 1e9:.3g}",
            with_error(point.quality.kl, point.quality.kl_stderr),
            percent(point.quality.agreement),
            accuracy_of(point.quality),
        )
        for point in sorted((*report.curve, final), key=lambda one: one.stored_bits)
    ]
    return f"<section><h2>Networks</h2>{html_table('networks', heads, rows, names=1)}</section>"


def accuracy_of(quality: VisionQuality) -> str:
    """The accuracy as text, a dash where there are no labels."""
    return "-" if quality.accuracy is None else percent(quality.accuracy)


def _layers(report: VisionReport) -> str:
    heads = ("layer", "kind", "block", "spec", "input bits", "weights", "M MACs", "predicted nats")
    rows = [
        (
            layer.name,
            layer.kind,
            layer.block,
            layer.spec,
            "float" if layer.activation_bits is None else str(layer.activation_bits),
            str(layer.weights),
            f"{layer.macs / 1e6:.3g}",
            "-" if layer.predicted_loss is None else significant(layer.predicted_loss),
        )
        for layer in report.layers
    ]
    table = html_table("layers", heads, rows, names=3, numbers_from=4, short=True)
    return f"<section><h2>Layers</h2>{table}</section>"
