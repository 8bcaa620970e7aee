"""What the commands about machines, servers and curvature found, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from quantforge.cli.drawing import add_row, pairs, print_table, table_of, warn
from quantforge.cli.text import one_line, size, with_error

if TYPE_CHECKING:
    from rich.console import Console

    from quantforge.landscape import CurvatureReport
    from quantforge.latency import ProfileReport
    from quantforge.outcomes import (
        BenchReport,
        CheckReport,
        ConvertReport,
        DoctorReport,
        TasksReport,
    )


def show_bench(report: BenchReport, out: Console) -> None:
    """Speeds, one row a way to run the checkpoint."""
    rows = [
        ("folder", report.model),
        ("kernels", f"{report.instructions}, {report.threads} threads"),
        ("memory reads", f"{size(report.read_bandwidth)}/s"),
        ("tokens", f"{report.prompt_tokens} of prompt, {report.new_tokens} decoded"),
    ]
    pairs(rows, out)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "prefill tok/s", "decode tok/s", "resident", "a token", "of the memory"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in report.rows:
        share = row.share_of_bandwidth
        table.add_row(
            one_line(row.name),
            f"{row.prefill_tokens_a_second:.1f}",
            f"{row.decode_tokens_a_second:.1f}",
            "" if row.resident_bytes is None else size(row.resident_bytes),
            "" if row.bytes_a_token is None else size(row.bytes_a_token),
            "" if share is None else f"{share:.0%}",
        )
    out.print(table)


def show_check(report: CheckReport, out: Console) -> None:
    """Whether a server loads a checkpoint."""
    parts = "" if report.tensor_parallel == 1 else f", split among {report.tensor_parallel}"
    pairs(
        [
            ("folder", report.path),
            ("matrices", f"{report.quantized} quantized, {report.kept} in 16 bits"),
            ("server", f"{report.server}{parts}"),
            ("loads", "yes" if report.loads else f"no, {len(report.problems)} problems"),
        ],
        out,
    )
    for problem in report.problems:
        out.print(f"  {one_line(problem)}", soft_wrap=True)


def show_convert(report: ConvertReport, out: Console) -> None:
    """What was written in another layout."""
    file = bool(report.types) or report.layout == "onnx"
    pairs(
        [
            ("layout", report.layout),
            ("layers", f"{report.layers}, {'of' if file else 'all'} {report.spec}"),
            ("file" if file else "folder", f"{report.output}, {size(report.size_bytes)}"),
        ],
        out,
    )
    if not report.types:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("type", "of", "tensors", "bytes", "largest difference"):
        table.add_column(heading, justify="left" if heading in ("type", "of") else "right")
    for one in report.types:
        lost = "none" if one.difference == 0 else f"{one.difference:.2g}"
        table.add_row(one.name, one.held, str(one.tensors), size(one.size_bytes), lost)
    out.print(table)
    if report.size_bytes > report.source_bytes:
        out.print(
            f"The file is larger than the {size(report.source_bytes)} of the folder's safetensors: "
            "the smallest types that hold these weights exactly have more bits.",
            soft_wrap=True,
        )
    warn(report.warnings, out)


def show_doctor(report: DoctorReport, out: Console) -> None:
    """What a machine offers."""
    free = report.memory_free_bytes
    rows = [(name, version) for name, version in report.versions.items()]
    rows += [
        ("devices", f"{', '.join(report.devices)}; {report.threads} threads"),
        ("processor", report.instruction_set),
        ("compiler", report.compiler),
        *((f"kernel {name}", state) for name, state in report.kernels.items()),
        ("cache", f"{report.cache}, {size(report.cache_bytes)}"),
        ("free disk", size(report.disk_free_bytes)),
        ("free memory", "unknown" if free is None else size(free)),
        ("usable", "yes" if report.usable else "no"),
    ]
    pairs(rows, out)
    for kind, lines in (("problem", report.problems), ("note", report.notes)):
        for line in lines:
            out.print(f"{kind}: {one_line(line)}", soft_wrap=True)


def show_profile(report: ProfileReport, out: Console) -> None:
    """Times of this machine."""
    rows = [
        ("model", report.model),
        ("machine", ", ".join(report.machine)),
        ("kernels", f"{report.backend}, {report.dtype}, {report.threads} threads"),
        ("batch", f"{report.batch}; medians of {report.repeats} rounds"),
    ]
    pairs(rows, out)
    table = table_of("layer", "spec", "median (us)", "20 to 80 %", "of 16 bits")
    kept = {(x.out_features, x.in_features): x.median for x in report.rows if x.spec == "kept"}
    for row in report.rows:
        shape = (row.out_features, row.in_features)
        spread = f"{1e6 * row.p20:.1f} to {1e6 * row.p80:.1f}"
        share = f"{row.median / kept[shape]:.0%}"
        add_row(table, "{} x {}".format(*shape), row.spec, f"{1e6 * row.median:.1f}", spread, share)
    print_table(table, out)
    out.print(f"written to {one_line(report.output)}: give it to --latency-device")


def show_curvature(report: CurvatureReport, out: Console) -> None:
    """Curvature of the layers, the most curved first."""
    rows = [
        ("model", report.model),
        ("text", f"{report.sequences} x {report.length} tokens of {report.text}"),
        ("labels", report.labels),
        ("products", f"{report.products}: {report.starts} starts of {report.steps} steps a layer"),
    ]
    pairs(rows, out)
    names = ["layer", "trace / n", "trace", "highest / n", "highest", "lowest", "r_e", "K_hn"]
    ranked = report.ranked()
    order = {name: place for place, name in enumerate(report.fine_tuning_order(), 1)}
    if report.spec is not None:
        names += [f"omega {report.spec}", "order"]
    activations = any(layer.input_trace is not None for layer in ranked)
    table = table_of(*names, *(["input trace / n"] if activations else []))
    for layer in ranked:
        trace = with_error(layer.trace, layer.trace_error)
        ends = [f"{x:.3g}" for x in (layer.mean_highest, layer.highest, layer.lowest)]
        shares = ["", ""]
        if layer.extreme_ratio is not None:
            shares[0] = f"{layer.extreme_ratio:.2g}"
        if layer.negative_weight is not None and layer.negative_weight_error is not None:
            shares[1] = with_error(layer.negative_weight, layer.negative_weight_error)
        more = []
        if report.spec is not None:
            omega = layer.fine_tuning
            more += ["", ""] if omega is None else [f"{omega:.3g}", str(order[layer.name])]
        if layer.input_trace is not None and layer.input_trace_error is not None:
            more.append(with_error(layer.input_trace, layer.input_trace_error))
        add_row(table, layer.name, f"{layer.mean_trace:.3g}", trace, *ends, *shares, *more)
    print_table(table, out)
    headed = [layer for layer in report.layers if layer.heads]
    if headed:
        heads = table_of("share of heads in the trace", "largest", "head", "smallest", "head")
        for layer in headed:
            most, least = max(layer.heads), min(layer.heads)
            cells = []
            for place in (layer.heads.index(most), layer.heads.index(least)):
                cells += [with_error(layer.heads[place], layer.head_errors[place]), str(place)]
            add_row(heads, layer.name, *cells)
        print_table(heads, out)
    if report.output:
        out.print(f"written to {one_line(report.output)}")


def show_tasks(report: TasksReport, out: Console) -> None:
    """Scores, and beside them those of a second network on the same questions."""
    pairs([("model", report.model)] + [("against", report.against)] * bool(report.against), out)
    columns = ("against", "difference") if report.against else ()
    table = table_of("task", "metric", "questions", "score", *columns)
    others = {(one.task, one.metric): one for one in report.against_scores}
    gaps = {(one.task, one.metric): one for one in report.differences}
    for score in report.scores:
        key = (score.task, score.metric)
        cells = [score.metric, str(score.questions), with_error(score.value, score.stderr)]
        if report.against:
            cells.append(with_error(others[key].value, others[key].stderr))
            cells.append(with_error(gaps[key].value, gaps[key].stderr))
        add_row(table, score.task, *cells)
    print_table(table, out)
