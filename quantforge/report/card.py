"""README.md of a checkpoint: what it is, how to load it, how good and how big it is."""

from __future__ import annotations

import json
from collections.abc import Iterator

from quantforge.outcomes import Report
from quantforge.report.numbers import (
    KEPT,
    against_uniform,
    loss_of,
    percent,
    place,
    second_of,
    significant,
    size,
)
from quantforge.results import AnyQuality, PooledQuality
from quantforge.types import QuantSpec


def model_card(report: Report, *, obstacle: str | None = None) -> str:
    """The model card as Markdown with YAML front matter.

    Args:
        report: of the run.
        obstacle: why stock transformers does not load the network's class, whatever the plan.
    """
    obstacle = obstacle or stock_obstacle(report)
    loading = _loading(obstacle, "AutoModel" if _encodes(report) else "AutoModelForCausalLM")
    sections = (_front_matter(report), _intro(report), loading, _quality(report))
    made = f"## Calibration\n\n{_inline(report.calibration)}\n"
    return "\n".join((*sections, made, _limits(report, obstacle)))


def _front_matter(report: Report) -> str:
    mixed = "- mixed-precision\n" if _mixed(report) else ""
    task = "feature-extraction" if _encodes(report) else "text-generation"
    # a JSON string is a YAML string: quotes, colons and line breaks in a name stay data
    return (
        "---\n"
        f"base_model: {json.dumps(report.model)}\n"
        "base_model_relation: quantized\n"
        "library_name: transformers\n"
        f"pipeline_tag: {task}\n"
        f"tags:\n- quantforge\n- compressed-tensors\n{mixed}- quantized\n"
        "---\n"
    )


def _intro(report: Report) -> str:
    kind = "Mixed-precision quantization" if _mixed(report) else "Quantization"
    how = f"for a budget of {_inline(report.plan.budget)}"
    if report.plan.solver == "file":
        how = f"after a given plan of {report.plan.stored_bits:.2f} bits a weight"
    elif report.plan.predicted_loss is None and report.layers:  # nothing was searched
        how = f"with {_inline(report.layers[0].spec)} for all layers"
    compared = " and the comparison with uniform networks" if report.curve else ""
    lines = [
        f"# {_inline(report.model)}, {report.sizes.stored_bits:.2f} bits\n",
        f"{kind} of {_inline(report.model)} "
        f"({_inline(report.source)}), made with quantforge {how}. `report.html` shows every layer"
        f"{compared}; `plan.json` is the plan; `quantforge.json` holds versions and hashes.\n",
    ]
    if report.warnings:
        lines += ["Warnings of the run:\n", *(f"- {_inline(w)}" for w in report.warnings), ""]
    return "\n".join(lines)


def _encodes(report: Report) -> bool:
    """Whether the network is an encoder."""
    return isinstance(report.quality, PooledQuality)


def _mixed(report: Report) -> bool:
    """Whether layers differ in width or grouping."""
    return len({layer.spec for layer in report.layers}) > 1


def stock_obstacle(report: Report) -> str | None:
    """Why stock transformers cannot load what the plan makes, or None if it can."""
    specs = [layer for layer in report.layers if layer.spec != KEPT]
    grids = {QuantSpec.parse(layer.spec).grid for layer in specs} - {"uniform"}
    if grids:
        return f"its weights are {' and '.join(sorted(grids))}, in quantforge's own format"
    if any(layer.spec.endswith("-asym") for layer in specs):
        return "it holds asymmetric weights"
    if any("embed" in place(layer.name).kind.rpartition(".")[2] for layer in specs):
        return "its token embedding is quantized"
    return None


def _loading(obstacle: str | None, loader: str) -> str:
    own = (
        "With quantforge, which computes on the packed weights (install it from its source; the "
        "package of that name on PyPI is another project):\n\n"
        '```python\nimport quantforge\n\nmodel = quantforge.load("path/to/this/folder")\n```\n'
    )
    if obstacle is not None:
        return (
            f"## Loading\n\nStock transformers cannot load this checkpoint, because {obstacle} "
            f"(checked with transformers 5.23 and compressed-tensors 0.20).\n\n{own}"
        )
    return (
        "## Loading\n\nWith stock transformers, which needs `pip install compressed-tensors` "
        "(0.17 or later):\n\n"
        f"```python\nfrom transformers import {loader}, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        f'model = {loader}.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n\n"
        "The weights are then expanded to 16 bits in memory.\n\n" + own
    )


def _quality(report: Report) -> str:
    quality, sizes = report.quality, report.sizes
    rows = (
        ("", "float", "this checkpoint"),
        ("---", "---:", "---:"),
        *_quality_rows(quality),
        ("stored bits per planned weight", "16", f"{sizes.stored_bits:.3f}"),
        ("code bits per planned weight", "16", f"{sizes.code_bits:.3f}"),
        ("bits over all weights", "16", f"{sizes.checkpoint_bits:.3f}"),
        ("safetensors files", size(sizes.reference_bytes), size(sizes.checkpoint_bytes)),
    )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    lines = [
        "## Quality and size\n",
        table + "\n",
        f"Measured on {quality.windows} windows of {quality.window_length} tokens: "
        f"{_inline(quality.text)}. ± is one standard error over windows.\n",
        *(f"{sentence}\n" for sentence in against_uniform(report)),
    ]
    return "\n".join(lines)


def _quality_rows(quality: AnyQuality) -> tuple[tuple[str, str, str], ...]:
    """Measurements beside the float model's."""
    if isinstance(quality, PooledQuality):
        return (
            ("1 - cosine of the mean-pooled output to float", "0", loss_of(quality)),
            ("its relative squared error", "0", second_of(quality)),
        )
    return (
        (
            "perplexity",
            significant(quality.reference_perplexity, 4),
            significant(quality.perplexity, 4),
        ),
        ("KL from float, nats a token", "0", loss_of(quality)),
        ("same first choice as float", percent(1.0), percent(quality.top1)),
    )


def _limits(report: Report, obstacle: str | None) -> str:
    lines = _limit_lines(report, obstacle)
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _limit_lines(report: Report, obstacle: str | None) -> Iterator[str]:
    yield (
        "The figures are on text held out from calibration, of the same origin; no task was "
        "measured. Test on your own before use."
    )
    yield "What the float model gets wrong, says unfairly or may not be used for stays so."
    if obstacle is None and _mixed(report):
        yield (
            "Do not load it with `CompressedTensorsConfig(dequantize=True)`: with several widths "
            "in one file transformers 5.23 then decodes every layer with the first one's."
        )
    kept = sum(layer.spec == KEPT for layer in report.layers)
    weights = f"{report.sizes.kept_weights:,} weights (embeddings, head, norms)"
    if outside := [x for x in report.layers if place(x.name).block is None]:
        weights = "Norms"
        packed = [f"`{x.name}` is {x.spec}" for x in outside if x.spec != KEPT]
        if packed:
            yield f"{'; '.join(packed)}: budgets in bits {_counted(report)}."
    layers = f" and {kept} of {len(report.layers)} planned layers" if kept else ""
    yield f"{weights}{layers} are kept in 16 bits."


def _counted(report: Report) -> str:
    """Whether embedding and head are part of the stored bits that are told."""
    return "do not count it" if report.plan.fixed else "count it like any layer"


def _inline(text: str) -> str:
    """Text that stays one line of plain Markdown: no markup, no HTML, no table cell."""
    escaped = "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
    return escaped.replace("&", "&amp;")
