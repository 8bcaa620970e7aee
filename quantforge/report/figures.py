"""The report's two figures as SVG text: the size-KL curve, and bits and predicted loss by layer.

Written by hand rather than drawn by a plotting library: the bytes depend on the numbers alone, the
colours come from the page's style (light, dark and print), every mark carries its numbers in
`data-` attributes and a tooltip, and no font is embedded.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from quantforge.hull import LEAST_KL, lower_hull
from quantforge.outcomes import Report
from quantforge.report.numbers import (
    KEPT,
    bits_of,
    is_uniform,
    place,
    significant,
    with_error,
)
from quantforge.results import CurvePoint, LayerReport, Loss, Metric

WIDTH = 820
_LABEL_WIDTH = 6.3
"""Mean width of a label's character at the figures' 11 px, in px."""


class Measured(Protocol):
    """A measured network, as `results.CurvePoint` is."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def stored_bits(self) -> float:
        """Average a weight."""

    @property
    def quality(self) -> Loss:
        """Held-out measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Maps (stored bits, KL) to figure coordinates; KL on a logarithmic scale.

    Attributes:
        bits: smallest and largest stored bits shown.
        kl: smallest and largest KL shown, in nats.
    """

    bits: tuple[float, float]
    kl: tuple[float, float]
    left: float = 62
    right: float = WIDTH - 20
    top: float = 14
    bottom: float = 366

    @classmethod
    def around(cls, bits: Sequence[float], kl: Sequence[float]) -> Axes:
        """Axes that hold all stored bits and all KLs, which are positive, with a margin."""
        logs = [math.log(value) for value in kl]
        pad_bits = max(0.1, 0.06 * (max(bits) - min(bits)))
        pad_log = max(0.2, 0.08 * (max(logs) - min(logs)))
        return cls(
            bits=(min(bits) - pad_bits, max(bits) + pad_bits),
            kl=(math.exp(min(logs) - pad_log), math.exp(max(logs) + pad_log)),
        )

    def x(self, bits: float) -> float:
        """Horizontal place of a number of stored bits."""
        low, high = self.bits
        return self.left + (bits - low) / (high - low) * (self.right - self.left)

    def y(self, kl: float) -> float:
        """Vertical place of a KL; values off the scale lie on its edge."""
        low, high = (math.log(v) for v in self.kl)
        share = (math.log(max(kl, self.kl[0])) - low) / (high - low)
        return self.bottom - min(share, 1.0) * (self.bottom - self.top)

    def bits_ticks(self) -> list[float]:
        """Round numbers of bits inside the axis, at most ten."""
        span = self.bits[1] - self.bits[0]
        step = next(s for s in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0) if span / s <= 10 or s == 4.0)
        first = math.ceil(self.bits[0] / step)
        return [i * step for i in range(first, math.floor(self.bits[1] / step) + 1)]

    def kl_ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten inside the axis; powers alone on a long one."""
        low, high = (math.floor(math.log10(v)) for v in self.kl)
        factors = (1, 2, 5) if high - low < 4 else (1,)
        ticks = [f * 10.0**e for e in range(low, high + 1) for f in factors]
        return [t for t in ticks if self.kl[0] <= t <= self.kl[1]]


def curve_figure(report: Report) -> str:
    """Stored bits against held-out KL: uniform networks, their lower hull, plan and result."""
    final = CurvePoint(
        name="finished network", stored_bits=report.sizes.stored_bits, quality=report.quality
    )
    return size_curve(report.curve, final, report.quality.metric)


def size_curve(curve: Sequence[Measured], final: Measured, metric: Metric) -> str:
    """`curve_figure` of any measured networks.

    A network with no measurable KL lies on the lower edge and is not part of the hull; one whose KL
    is not finite is left out. Empty text if no network has a KL that can be drawn.

    Args:
        curve: uniform networks, whose names begin with "uniform", and others before the last step.
        final: the finished network.
        metric: what is measured.
    """
    drawn = [p for p in (*curve, final) if math.isfinite(p.quality.loss)]
    on_scale = [p for p in drawn if p.quality.loss >= LEAST_KL]
    if not on_scale:
        return ""
    axes = Axes.around([p.stored_bits for p in drawn], [p.quality.loss for p in on_scale])
    uniform = [p for p in drawn if is_uniform(p.name)]
    hull = lower_hull((p.stored_bits, p.quality.loss) for p in uniform)
    parts = [grid(axes, metric)]
    if len(hull) > 1:
        path = " ".join(f"{axes.x(b):.2f},{axes.y(kl):.2f}" for b, kl in hull)
        parts.append(f'<polyline class="hull" points="{path}"/>')
    labels = Labels(axes)
    labels.keep_off_points([(p.stored_bits, p.quality.loss) for p in drawn])
    labels.keep_off_line(hull)
    parts.extend(uniform_mark(p, axes) for p in uniform)
    for point in (p for p in drawn if not is_uniform(p.name)):
        kind = "final" if point is final else "plan"
        parts.append(diamond(point, axes, kind))
        text = point.name if point is final else f"{point.name}, one pass"
        parts.append(labels.place(point, text, f"label {kind}"))
    on_hull = {b for b, _ in hull}
    ordered = sorted(uniform, key=lambda p: (p.stored_bits not in on_hull, p.stored_bits))
    parts.extend(labels.place(p, p.name.removeprefix("uniform").strip(), "label") for p in ordered)
    title = f"Stored bits per weight against held-out {metric.noun}"
    return svg("curve", title, axes.bottom + 42, parts)


def grid(axes: Axes, metric: Metric) -> str:
    """Axes, their ticks and titles."""
    left, right, bottom = axes.left, axes.right, axes.bottom
    parts = [_line("axis", left, bottom, right, bottom)]
    for kl in axes.kl_ticks():
        y = axes.y(kl)
        parts += [_line("grid", left, y, right, y), _text("tick end", left - 8, y + 4, f"{kl:g}")]
    for bits in axes.bits_ticks():
        x = axes.x(bits)
        parts += [_line("axis", x, bottom, x, bottom + 5)]
        parts += [_text("tick mid", x, bottom + 18, f"{bits:g}")]
    below = "stored bits per weight (codes, scales, zero-points)"
    beside = f"held-out {metric.axis} (log scale)"
    parts += [_text("title mid", (left + right) / 2, bottom + 36, below)]
    turned = _text("title mid", 0, 0, beside)
    middle = (axes.top + bottom) / 2
    parts += [f'<g transform="translate(14 {middle:.2f}) rotate(-90)">{turned}</g>']
    return "".join(parts)


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'


def _text(style: str, x: float, y: float, text: str) -> str:
    return f'<text class="{style}" x="{x:.2f}" y="{y:.2f}">{escape(text)}</text>'


def _numbers(point: Measured) -> str:
    """Data attributes of a mark."""
    return (
        f'data-name="{escape(point.name)}" data-bits="{point.stored_bits!r}" '
        f'data-kl="{point.quality.loss!r}"'
    )


def _tooltip(point: Measured) -> str:
    kl = with_error(point.quality.loss, point.quality.loss_stderr)
    text = f"{point.name}: {point.stored_bits:.3f} stored bits, {point.quality.metric.name} {kl}"
    return f"<title>{escape(text)}</title>"


def _error_bar(point: Measured, axes: Axes) -> str:
    """One standard error to either side, where there is one."""
    kl, error = point.quality.loss, point.quality.loss_stderr
    if not 0 < error < math.inf:
        return ""
    x = axes.x(point.stored_bits)
    return (
        f'<line class="error" x1="{x:.2f}" x2="{x:.2f}" y1="{axes.y(kl - error):.2f}" '
        f'y2="{axes.y(kl + error):.2f}"/>'
    )


def uniform_mark(point: Measured, axes: Axes) -> str:
    """A circle for a uniform network."""
    x, y = axes.x(point.stored_bits), axes.y(point.quality.loss)
    return (
        f'<g class="uniform" {_numbers(point)}>{_tooltip(point)}{_error_bar(point, axes)}'
        f'<circle cx="{x:.2f}" cy="{y:.2f}" r="4.5"/></g>'
    )


def diamond(point: Measured, axes: Axes, kind: str) -> str:
    """A diamond for a plan; `kind` is its style, "plan" or "final"."""
    x, y = axes.x(point.stored_bits), axes.y(point.quality.loss)
    corners = " ".join(
        f"{x + dx:.2f},{y + dy:.2f}" for dx, dy in ((0, -8), (8, 0), (0, 8), (-8, 0))
    )
    return (
        f'<g class="{kind}" {_numbers(point)}>{_tooltip(point)}{_error_bar(point, axes)}'
        f'<polygon points="{corners}" data-cx="{x:.2f}" data-cy="{y:.2f}"/></g>'
    )


class Labels:
    """Places labels beside their marks, first come first served; one that collides is left out."""

    _OFFSETS = (
        (12, 4, "start"),
        (-12, 4, "end"),
        (12, -7, "start"),
        (-12, 15, "end"),
        (6, 20, "start"),
        (-6, -13, "end"),
        (4, -16, "start"),
        (-10, 24, "end"),
    )

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.taken: list[tuple[float, float, float, float]] = []

    def keep_off_points(self, points: Sequence[tuple[float, float]]) -> None:
        """Keep labels off marks at (stored bits, KL)."""
        for bits, kl in points:
            x, y = self.axes.x(bits), self.axes.y(kl)
            self.taken.append((x - 8, y - 8, x + 8, y + 8))

    def keep_off_line(self, corners: Sequence[tuple[float, float]], steps: int = 40) -> None:
        """Keep labels off the straight pieces between corners (stored bits, KL)."""
        places = [(self.axes.x(bits), self.axes.y(kl)) for bits, kl in corners]
        for (x1, y1), (x2, y2) in itertools.pairwise(places):
            for step in range(steps + 1):
                x, y = x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps
                self.taken.append((x - 2, y - 2, x + 2, y + 2))

    def place(self, point: Measured, text: str, style: str) -> str:
        """SVG text at the first free place around the mark; nothing if all are taken."""
        x, y = self.axes.x(point.stored_bits), self.axes.y(point.quality.loss)
        width = _LABEL_WIDTH * len(text)
        for dx, dy, anchor in self._OFFSETS:
            left = x + dx - (width if anchor == "end" else 0)
            box = (left, y + dy - 10, left + width, y + dy + 3)
            inside = box[0] >= self.axes.left and box[2] <= self.axes.right
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return _text(f"{style} {anchor}", x + dx, y + dy, text)
        return ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def layers_figure(layers: Sequence[LayerReport], unit: str = " nats") -> str:
    """Bits of every layer, blocks across and kinds down, with the predicted loss on the margins.

    Bars above the strip add up a block's predicted loss, bars on its right a kind's. Layers outside
    the blocks have no place in it; empty text if there is no other.
    """
    places = [(place(layer.name), layer) for layer in layers]
    cells = [(p.block, p.kind, layer) for p, layer in places if p.block is not None]
    if not cells:
        return ""
    kinds = list(dict.fromkeys(kind for _, kind, _ in cells))
    blocks = sorted({block for block, _, _ in cells})
    left = 16 + _LABEL_WIDTH * max(len(k) for k in kinds)
    right_bars = 100.0
    cell_width = (WIDTH - left - right_bars - 56) / len(blocks)
    cell_width, cell_height, top = min(cell_width, 34.0), 22.0, 96.0
    column = {block: left + i * cell_width for i, block in enumerate(blocks)}
    row = {kind: top + i * cell_height for i, kind in enumerate(kinds)}
    parts = [
        _cell(layer, column[block], row[kind], cell_width, cell_height, unit)
        for block, kind, layer in cells
    ]
    by_block = _sums((block, layer) for block, _, layer in cells)
    by_kind = _sums((kind, layer) for _, kind, layer in cells)
    parts.append(_block_bars(by_block, column, cell_width, top - 6, unit))
    right = left + len(blocks) * cell_width + 8
    parts.append(_kind_bars(by_kind, row, right, cell_height, unit))
    parts.extend(_text("tick end", left - 8, row[kind] + 15, kind) for kind in kinds)
    bottom = top + cell_height * len(kinds)
    every = max(1, math.ceil(22 / cell_width))
    for index, block in enumerate(blocks):
        if index % every == 0:
            x = column[block] + cell_width / 2
            parts.append(_text("tick mid", x, bottom + 16, str(block)))
    middle = left + len(blocks) * cell_width / 2
    parts.append(_text("title mid", middle, bottom + 34, "block"))
    return svg("strip", "Bits and predicted loss by block and layer", bottom + 42, parts)


def _sums(pairs: Iterable[tuple[int | str, LayerReport]]) -> dict[int | str, float]:
    """Predicted loss added up by key; one that is no positive number has no bar."""
    total: dict[int | str, float] = defaultdict(float)
    for key, layer in pairs:
        loss = layer.predicted_loss or 0.0
        total[key] += loss if 0 < loss < math.inf else 0.0
    return total


def _cell(layer: LayerReport, x: float, y: float, width: float, height: float, unit: str) -> str:
    bits = bits_of(layer)
    loss = layer.predicted_loss
    known = "not estimated" if loss is None else f"{significant(loss)}{unit}"
    text = f"{layer.name}: {layer.spec}, predicted loss {known}"
    number = ""
    if width >= 8.5 * len(str(bits)):
        number = _text(f"mid n{bits}", x + width / 2, y + 15, str(bits))
    kept = ' data-kept="yes"' if layer.spec == KEPT else ""
    return (
        f'<g class="cell" data-layer="{escape(layer.name)}" data-bits="{bits}"{kept}>'
        f"<title>{escape(text)}</title>"
        f'<rect class="b{bits}" x="{x + 0.5:.2f}" y="{y + 0.5:.2f}" '
        f'width="{width - 1:.2f}" height="{height - 1:.2f}"/>{number}</g>'
    )


def _block_bars(
    sums: dict[int | str, float], column: dict[int, float], width: float, bottom: float, unit: str
) -> str:
    largest = max(sums.values()) or 1.0
    height = 62.0
    first = min(column.values())
    title = f"predicted loss by block (highest {significant(largest)}{unit})"
    parts = [_text("title", first, 14, title)]
    for block, x in column.items():
        bar = sums[block] / largest * height
        tooltip = f"<title>block {block}: {significant(sums[block])}{unit}</title>"
        parts.append(
            f'<rect class="loss" data-block="{block}" data-loss="{sums[block]!r}" '
            f'x="{x + 1:.2f}" y="{bottom - bar:.2f}" width="{max(width - 2, 1):.2f}" '
            f'height="{bar:.2f}">{tooltip}</rect>'
        )
    return "".join(parts)


def _kind_bars(
    sums: dict[int | str, float], row: dict[str, float], left: float, height: float, unit: str
) -> str:
    largest = max(sums.values()) or 1.0
    total = sum(sums.values()) or 1.0
    parts = [_text("title", left, min(row.values()) - 8, "by layer type")]
    for kind, y in row.items():
        bar = sums[kind] / largest * 84
        parts.append(
            f'<rect class="loss" data-kind="{escape(kind)}" data-loss="{sums[kind]!r}" '
            f'x="{left:.2f}" y="{y + 4:.2f}" width="{bar:.2f}" height="{height - 8:.2f}">'
            f"<title>{escape(kind)}: {significant(sums[kind])}{unit}</title></rect>"
        )
        share = f"{100 * sums[kind] / total:.0f} %"
        parts.append(_text("tick", left + bar + 5, y + 15, share))
    return "".join(parts)


def svg(name: str, title: str, height: float, parts: Sequence[str]) -> str:
    """A figure put together from its parts."""
    return (
        f'<svg class="figure {name}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
