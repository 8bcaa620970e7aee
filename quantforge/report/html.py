"""report.html: one file that needs nothing else, drawn from `Report` alone.

No script, no network, no font. The same run gives the same bytes wherever it is written, so timings
and the output folder are left out (they are in run.json). Every piece of text is escaped where it
enters the page.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from quantforge.outcomes import Report
from quantforge.report.figures import curve_figure, layers_figure
from quantforge.report.numbers import (
    NO_BREAK,
    against_uniform,
    bits_of,
    estimate,
    loss_of,
    percent,
    place,
    significant,
    size,
    total_loss,
    training_sentences,
    with_error,
)
from quantforge.results import AnyQuality, LayerReport, PooledQuality


def render(report: Report) -> str:
    """The whole page as text; write it as UTF-8."""
    title = f"{report.model} at {report.sizes.stored_bits:.2f} bits"
    body = "\n".join(
        (
            _header(report),
            warning_section(report.warnings),
            _headline(report),
            _decisions(report),
            _curve(report),
            _strip(report),
            _generations(report),
            _sizes(report),
            _layer_table(report.layers, report.quality.metric.scale),
            _run(report),
        )
    )
    return page(title, body)


def page(title: str, body: str) -> str:
    """A whole page in the house's style."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - quantforge</title>\n<style>\n{style()}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def style() -> str:
    """The style sheet of pages and of figures that stand alone."""
    return resources.files("quantforge.report").joinpath("report.css").read_text("utf-8")


def _header(report: Report) -> str:
    return (
        f"<header><h1>{escape(report.model)}, quantized to a budget of "
        f"{escape(report.plan.budget)}</h1>\n"
        f'<p class="soft source">{escape(report.source)}</p></header>'
    )


def warning_section(warnings: Sequence[str]) -> str:
    """The warnings as a list; nothing if there are none."""
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in warnings)
    return f'<section class="warnings" role="note"><h2>Warnings</h2><ul>{items}</ul></section>'


def _headline(report: Report) -> str:
    quality, sizes = report.quality, report.sizes
    ratio = sizes.reference_bytes / sizes.checkpoint_bytes if sizes.checkpoint_bytes else math.nan
    loss, _, error = loss_of(quality).partition(f"{NO_BREAK}±{NO_BREAK}")
    tiles = (
        (
            "Stored bits a weight",
            f"{sizes.stored_bits:.3f}",
            f"budget {report.plan.budget}; codes alone {sizes.code_bits:.3f}",
        ),
        (
            f"Held-out {quality.metric.name}" + (", nats" if quality.metric.unit else ""),
            loss,
            f"±{NO_BREAK}{error or 'unknown'}, one standard error ({quality.windows} windows)",
        ),
        *_further_tiles(quality),
        (
            "Checkpoint",
            size(sizes.checkpoint_bytes),
            f"{significant(ratio)} times smaller than {size(sizes.reference_bytes)} in 16 bits",
        ),
    )
    return tile_row(tiles, quality.text)


def tile_row(tiles: Iterable[tuple[str, str, str]], below: str) -> str:
    """Name, value and detail of every tile, and a line below them."""
    inside = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="detail">{escape(detail)}</dd></div>'
        for name, value, detail in tiles
    )
    return f'<dl class="tiles">{inside}</dl>\n<p class="soft">{escape(below)}</p>'


def _further_tiles(quality: AnyQuality) -> tuple[tuple[str, str, str], ...]:
    """Name, value and detail of what is measured beside the loss."""
    if isinstance(quality, PooledQuality):
        return (
            (
                "Relative MSE",
                significant(quality.mse),
                "squared error of the mean-pooled output over its squared length",
            ),
        )
    change = quality.perplexity / quality.reference_perplexity - 1
    return (
        (
            "Perplexity",
            significant(quality.perplexity, 4),
            f"float {significant(quality.reference_perplexity, 4)} "
            f"({100 * change:+.1f}{NO_BREAK}%)",
        ),
        ("Top-1 agreement", percent(quality.top1), "tokens with the same first choice as float"),
    )


def _decisions(report: Report) -> str:
    layers = report.layers
    metric = report.quality.metric
    sentences = [
        *_targets(report), *_refinement(report), *training_sentences(report.training, metric),
        *against_uniform(report), *_spread(layers),
    ]  # fmt: skip
    if report.plan.solver == "file":
        intro = (
            f"The widths and groupings of all {len(layers)} layers are those of a plan that was "
            "given; none was searched."
        )
    elif report.plan.predicted_loss is None:
        intro = (
            f"All {len(layers)} layers have the width and the grouping that the recipe asks for. "
            "There was nothing to search, so sensitivities were not measured, losses not "
            "predicted, and other networks not made for comparison."
        )
    else:
        intro = (
            f"{_chooser(report.plan.solver)} chose a width and a grouping for each of "
            f"{len(layers)} layers. It spends a bit where that lowers the predicted loss most for "
            "the bits it stores: a layer with many bits is one the loss is sensitive to for its "
            f"size. The plan's predicted loss is {significant(report.plan.predicted_loss)}"
            f"{report.quality.metric.each}."
        )
    items = "".join(f"<li>{escape(s)}</li>" for s in sentences)
    return (
        f"<section><h2>What was decided, and why</h2><p>{escape(intro)}</p><ul>{items}</ul>\n"
        f"{_kind_table(layers)}</section>"
    )


def _targets(report: Report) -> Iterator[str]:
    """Sentences on how the budget's targets were met."""
    each = report.quality.metric.each
    for one in report.targets:
        yield (
            f"Target {one.text}: of {one.plans} plans measured, the one of fewest bits whose upper "
            f"95 % bound is within {significant(one.limit)}{each}. Put together without "
            f"tuning it measures {with_error(one.measured, one.stderr)}, at most "
            f"{significant(one.upper)} ({one.windows} held-out windows); predicted "
            f"{estimate(one.predicted)}."
        )


def _chooser(solver: str) -> str:
    """What found the plan, as the subject of a sentence."""
    if solver == "refined":
        return "A search that measured the plans around its own"
    return f"The {solver} solver"


def _refinement(report: Report) -> Iterator[str]:
    """Sentences on what looking around the plan found."""
    for one in report.refinement:
        yield (
            f"Refinement: {one.plans} plans around the one that was found were measured before "
            f"tuning; {one.layers} layers changed, held-out "
            f"{report.quality.metric.name} {significant(one.before)} to "
            f"{significant(one.after)}, a difference of "
            f"{with_error(one.after - one.before, one.stderr)} on the windows it was chosen on."
        )


def _spread(layers: Sequence[LayerReport]) -> Iterator[str]:
    """Sentences on who got what and where the predicted loss lies."""
    if not layers:
        return
    specs = Counter(layer.spec for layer in layers)
    common = ", ".join(f"{spec} ({count})" for spec, count in _most_common(specs)[:8])
    more = f", and {len(specs) - 8} others" if len(specs) > 8 else ""
    yield f"Specs by number of layers: {common}{more}."
    high = max(bits_of(layer) for layer in layers)
    low = min(bits_of(layer) for layer in layers)
    if high > low:
        most = [layer.name for layer in layers if bits_of(layer) == high]
        fewest = [layer.name for layer in layers if bits_of(layer) == low]
        yield f"Most bits ({high}): {_listed(most)}."
        yield f"Fewest bits ({low}): {_listed(fewest)}."
    total = total_loss(layers)
    if total is not None and total > 0:
        ranked = sorted(layers, key=lambda layer: (-(layer.predicted_loss or 0.0), layer.name))
        tenth = ranked[: max(1, len(ranked) // 10)]
        share = (total_loss(tenth) or 0.0) / total
        yield (
            f"{percent(share, 0)} of the predicted loss lies in {len(tenth)} of {len(layers)} "
            f"layers; most of it in {_listed([layer.name for layer in ranked[:3]])}."
        )
    ratios = [
        layer.output_error / layer.rtn_output_error
        for layer in layers
        if layer.rtn_output_error > 0 and math.isfinite(layer.output_error)
    ]
    if ratios:
        yield (
            "Compensation leaves a median of "
            f"{percent(statistics.median(ratios), 0)} of the output error of rounding to nearest."
        )


def _most_common(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _listed(names: Sequence[str], shown: int = 3) -> str:
    """Some names, or the kinds of many."""
    if len(names) <= shown:
        return ", ".join(names)
    kinds = _most_common(Counter(place(name).kind for name in names))
    text = ", ".join(f"{kind} ({count})" for kind, count in kinds[:6])
    return f"{len(names)} layers: {text}" + (", and others" if len(kinds) > 6 else "")


def _kind_table(layers: Sequence[LayerReport]) -> str:
    groups: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in layers:
        groups[place(layer.name).kind].append(layer)
    total = total_loss(layers)
    rows = []
    for kind, members in groups.items():
        bits = [bits_of(layer) for layer in members]
        row = [
            kind,
            str(len(members)),
            f"{statistics.fmean(bits):.2f}",
            f"{min(bits)} to {max(bits)}" if min(bits) < max(bits) else str(bits[0]),
        ]
        if total is not None:
            loss = total_loss(members) or 0.0
            row += [significant(loss), percent(loss / total) if total else "0 %"]
        rows.append(row)
    heads = ["layer type", "layers", "mean code bits", "range"]
    if total is not None:
        heads += ["predicted loss", "share of loss"]
    return html_table("by-kind", heads, rows, names=1, short=True)


def _curve(report: Report) -> str:
    figure = curve_figure(report) if report.curve else ""  # alone it would be compared with nothing
    if not figure:
        return ""
    caption = (
        "Circles: uniform networks, one width and grouping for all layers. Dashed: their lower "
        "hull. Open diamond: the plan with the same one-pass compensation, the fair comparison. "
        "Filled diamond: the finished network, after everything else this run did. Bars: one "
        "standard error. On the lower edge: no loss above the rounding of the arithmetic. Lower "
        "and further left is better."
    )
    return figure_section("Size and quality against uniform networks", figure, caption)


def _strip(report: Report) -> str:
    if total_loss(report.layers) is None:
        return ""  # no choice between layers was made: nothing to see
    figure = layers_figure(report.layers, unit=report.quality.metric.unit)
    outside = [layer for layer in report.layers if place(layer.name).block is None]
    note = "".join(f" {layer.name}: {layer.spec}." for layer in outside)
    if not figure:
        return ""
    caption = (
        "Each cell is a layer, its number the code bits; darker means more (lighter on a dark "
        "page). Grey bars: predicted loss added up over a block (above) or a layer type (right), "
        f"in {report.quality.metric.scale}." + (f" Outside the blocks:{note}" if note else "")
    )
    return figure_section("Bits by layer", figure, caption)


def figure_section(title: str, drawing: str, caption: str) -> str:
    """A section with a drawing and what it shows."""
    return (
        f'<section><h2>{escape(title)}</h2><figure><div class="drawing">{drawing}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def _generations(report: Report) -> str:
    if not report.generations:
        return ""
    rows = [(g.prompt, g.reference, g.quantized) for g in report.generations]
    table = html_table("generations", ("prompt", "float", "quantized"), rows, texts=3, short=True)
    return f"<section><h2>Short continuations, before and after</h2>{table}</section>"


def _sizes(report: Report) -> str:
    sizes = report.sizes
    rows = (
        ("planned weights", f"{sizes.planned_weights:,}"),
        ("code bits per planned weight", f"{sizes.code_bits:.4f}"),
        ("stored bits per planned weight", f"{sizes.stored_bits:.4f}"),
        (
            "weights outside the plan (norms; embedding and head unless planned)",
            f"{sizes.kept_weights:,}",
        ),
        ("checkpoint", f"{sizes.checkpoint_bytes:,} bytes"),
        ("checkpoint, bits over all weights", f"{sizes.checkpoint_bits:.4f}"),
        ("the same network in 16 bits", f"{sizes.reference_bytes:,} bytes"),
    )
    table = html_table("sizes", ("size", "value"), rows, numbers_from=1, short=True)
    return f"<section><h2>Sizes</h2><p>Counted from the written files.</p>{table}</section>"


def _layer_table(layers: Sequence[LayerReport], scale: str) -> str:
    """Every layer; `scale` is what its predicted loss is counted in."""
    losses = any(layer.predicted_loss is not None for layer in layers)
    heads = [
        "layer", "spec", *(["predicted loss"] if losses else []), "weight error", "output error",
        "RTN output error", "damping", "notes",
    ]  # fmt: skip
    rows = []
    for layer in layers:
        dead = f"{layer.dead_columns} dead inputs" if layer.dead_columns else ""
        rows.append(
            (
                layer.name,
                layer.spec,
                *([estimate(layer.predicted_loss)] if losses else []),
                significant(layer.weight_error),
                significant(layer.output_error),
                significant(layer.rtn_output_error),
                significant(layer.damping),
                "; ".join(note for note in (layer.note, dead) if note),
            )
        )
    units = f" Predicted loss is in {scale}." if losses else ""
    return (
        "<section><h2>Layers</h2><p>Errors are squared and relative; output errors are on the "
        "calibration inputs, as the method counts their tokens; RTN is rounding to nearest on the "
        "same kind of grid. A layer that "
        "makes up for the errors of earlier layers (QEP, GPTAQ) or of its own other rows as well "
        f"gives up some of this error for them, and may be above RTN by it.{units}</p>"
        f"{html_table('layers', heads, rows, names=2, numbers_from=2, numbers_to=len(heads) - 1)}"
        "</section>"
    )


def _run(report: Report) -> str:
    settings = list(_flatten(report.settings))
    versions = sorted(report.versions.items())
    return (
        "<section><h2>How it was made</h2>"
        f"<p>Calibrated on: {escape(report.calibration)}</p>\n"
        f"<h3>Settings</h3>{html_table('settings', ('key', 'value'), settings, names=1, texts=2)}\n"
        f"<h3>Versions</h3>{html_table('versions', ('library', 'version'), versions, short=True)}"
        "</section>"
    )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as sorted dotted keys, the spelling `--set` takes."""
    for key in sorted(settings):
        value = settings[key]
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", text


def html_table(
    name: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    names: int = 0,
    texts: int = 0,
    numbers_from: int | None = None,
    numbers_to: int | None = None,
    short: bool = False,
) -> str:
    """A table; the first columns may be names or free text, a range of others numbers."""
    first = names or texts or len(heads)
    start = min(first, len(heads)) if numbers_from is None else numbers_from
    stop = len(heads) if numbers_to is None else numbers_to

    def kind(index: int) -> str:
        if index < names:
            return ' class="name"'
        if index < texts:
            return ' class="text"'
        return ' class="number"' if start <= index < stop else ""

    def row(cells: Sequence[str], tag: str) -> str:
        classes = [kind(i) if tag == "td" or "number" in kind(i) else "" for i in range(len(cells))]
        pairs = zip(cells, classes, strict=True)
        return "<tr>" + "".join(f"<{tag}{c}>{escape(t)}</{tag}>" for t, c in pairs) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    scroll = "scroll short" if short else "scroll"
    return (
        f'<div class="{scroll}"><table id="{name}"><thead>{row(heads, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
