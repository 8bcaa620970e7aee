import dataclasses
import io
import json
from pathlib import Path

import pytest

from quantforge.cli import drawing, losses, render, render_machine, text
from quantforge.results import METRICS, PairedDifference, TrainingOutcome, TrainingPoint
from quantforge.types import QuantSpec


def drawn(show, *arguments, **options) -> list[str]:
    stream = io.StringIO()
    show(*arguments, drawing.console(stream), **options)
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_quantized_report_as_tables(reports) -> None:
    lines = drawn(render.show_quantized, reports.quantized_report())
    for expected in (
        "model SmolLM2, from a package",
        "budget 3bit",
        "plan 2.992 stored bits a weight (2.875 of them codes)",
        "checkpoint 874 kB, 5.594 bits a weight; 35.0% of 2.5 MB in 16 bits",
        "weights 1,000,000 planned, 250,000 outside the plan",
        "KL to the float model 0.250 ± 0.013 nats a token",
        "perplexity 31.5 (float model 21.25)",
        "same first token 75.0%",
        "uniform there KL 0.375 nats (lower hull)",
        "cheapest uniform KL 0.5 nats (uniform 3b-pc)",
        "2b-g64 1",
        "kept 1",
        "plan 2.992 0.250 ± 0.013 31.5",
        "uniform 3b-pc 3.020 0.500 ± 0.020 31.5",
        "prompt One [bold]two[/bold]",  # markup in foreign text is text
        "quantized th\ufffd[31mree",  # and so are terminal controls
        "warning: damping was raised",
        "written to out: see report.html there",
    ):
        assert expected in lines
    assert lines.index("plan 2.992 0.250 ± 0.013 31.5") < lines.index(
        "uniform 3b-pc 3.020 0.500 ± 0.020 31.5"
    )


def test_plan_report_as_tables(reports) -> None:
    lines = drawn(render.show_plan, reports.plan_report())
    for expected in (
        "reachable 2.030 to 8.500 stored bits a weight",
        "predicted loss +0.125 ± 0.013 nats a token",
        "target kl:0.2 measured 0.160 ± 0.020 nats before tuning, at most 0.1929 (95 %) of 0.2; "
        "predicted 0.15; 10 windows, 7 plans measured",
        "memory when run 1.23 GB with keys and values",
        "decoding step 1.5 ms in the planned weights, -25.0% against 16 bits "
        "(a100, roofline, batch 4)",
        "quantize takes at least 2:00 (6,000.0 G multiply-adds, 50.0 G a second)",
        "and memory about 2.5 GB",
        "refined 21 plans measured, 4 layers exchanged: KL 0.25 to 0.24 nats before tuning "
        "(-0.0100 ± 0.0020)",
        "refined 20 plans measured, the plan was kept: KL 0.24 to 0.24 nats before tuning (0)",
        "sensitivity hawq-v2: 32 products, about 1:01 where not in the cache",
        "vLLM no loads 4 bits, the plan has 2",
        "disk in the cache 4.53 GB",
        "2b-g64 1 60.0%",
        "4b-pc 1 30.0%",
        "kept 1 10.0%",
        "model.layers.0.self_attn.q_proj 2b-g64 600,000 2.250 0.100 ± 0.010",
        "model.layers.1.x kept 100,000 16.000",
        "3b-pc 3.020 0.5 no",
    ):
        assert expected in lines


def test_profile_as_a_table(reports) -> None:
    lines = drawn(render_machine.show_profile, reports.profile_report())
    assert "64 x 32 3b-g32 10.0 5.0 to 20.0 25%" in lines
    assert "kernels auto, bfloat16, 2 threads" in lines
    assert lines[-1] == "written to here.json: give it to --latency-device"


def test_tasks_as_a_table_beside_a_second_network(reports) -> None:
    lines = drawn(render_machine.show_tasks, reports.tasks_report())
    assert "task metric questions score against difference" in lines
    assert "copa acc 4 0.75 ± 0.25 1 -0.25 ± 0.25" in lines
    assert lines[-1] == "copa acc_norm 4 0.5 0.50 ± 0.25 0"


def test_curvature_as_tables_the_most_curved_layer_first(reports) -> None:
    lines = drawn(render_machine.show_curvature, reports.curvature_report())
    common = "0.00025 0.25 -0.125 0.5 0.375 ± 0.010"
    first = lines.index(f"a.k_proj 0.004 4.00 ± 0.40 {common} 0.500 ± 0.020")  # it has no Ω
    assert lines[first + 1] == f"a.q_proj 0.002 2.00 ± 0.20 {common} 1 1 0.500 ± 0.020"
    assert "highest lowest r_e K_hn omega 3b-g64 order input trace / n" in lines[first - 1]
    assert "a.q_proj 0.750 ± 0.010 1 0.250 ± 0.010 0" in lines
    assert "products 24: 2 starts of 6 steps a layer" in lines
    assert lines[-1] == "written to curvature.json"


def test_frontier_as_tables(reports) -> None:
    lines = drawn(render.show_frontier, reports.pareto_report())
    for expected in (
        "stored bits checkpoint of 16 bits predicted KL (nats) measured KL (nats)",
        "2.992 874 kB 35.0% 0.125 ± 0.013 0.250 ± 0.013",
        "4.000 1 MB 40.0% 0.03125",
        "uniform 3b-pc 3.020 0.500 ± 0.020",
        "warning: one thing",
    ):
        assert expected in lines
    document = json.loads(render.json_document("pareto", reports.pareto_report()))
    assert document["points"][0]["plan"]["assignment"]["model.layers.1.x"] is None


def test_evaluation_report_as_tables(reports) -> None:
    lines = drawn(render.show_evaluation, reports.evaluation_report())
    for expected in (
        "against other",
        "KL difference -0.250 ± 0.050 nats: clearly lower",
        "NLL difference -0.12 ± 0.25 nats",
    ):
        assert expected in lines


@pytest.mark.parametrize(
    ("kl", "verdict"),
    [
        (-0.11, "clearly lower"),
        (0.11, "clearly higher"),
        (0.09, "equal within two standard errors"),
    ],
)
def test_a_difference_counts_from_two_standard_errors(reports, kl: float, verdict: str) -> None:
    difference = PairedDifference(kl=kl, kl_stderr=0.05, nll=0.0, nll_stderr=0.0)
    report = dataclasses.replace(reports.evaluation_report(), difference=difference)
    line = next(x for x in drawn(render.show_evaluation, report) if x.startswith("KL difference"))
    assert line.endswith(f" nats: {verdict}")


def test_inspection_lists_layers_when_asked(reports) -> None:
    report = reports.inspect_report()
    row = "model.layers.0.mlp.down_proj 4b-pc 300,000 4.030 0.02"
    assert row in drawn(render.show_inspection, report, layers=True)
    short = drawn(render.show_inspection, report, layers=False)
    assert row not in short
    assert "written with quantforge 1, torch 2" in short


def test_json_document_is_valid_and_complete(reports) -> None:
    document = json.loads(
        render.json_document("quantize", reports.quantized_report()),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert document["command"] == "quantize"
    assert document["json_version"] == 1
    assert document["plan"]["assignment"] == {
        "model.layers.0.self_attn.q_proj": "2b-g64",
        "model.layers.0.mlp.down_proj": "4b-pc",
        "model.layers.1.x": None,
    }
    assert document["sizes"]["stored_bits"] == 2.9921875
    assert document["quality"]["window_kl"] == [0.2375, 0.2625]
    assert document["timings"] == {"search": None}  # infinity has no JSON form
    assert document["generations"][0]["quantized"] == "th\x1b[31mree"


def test_plain_values() -> None:
    value = {"a": (QuantSpec(3, 64, False), Path("x/y")), 1: [True, float("nan"), 0.1]}
    assert render.to_plain(value) == {"a": ["3b-g64-asym", "x/y"], "1": [True, None, 0.1]}
    with pytest.raises(TypeError, match="object has no JSON form"):
        render.to_plain(object())


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (67_890_000, "67.9 MB"),
        (4_529_848_320, "4.53 GB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes(count: float, shown: str) -> None:
    assert text.size(count) == shown


def test_durations() -> None:
    assert [text.duration(s) for s in (-1, 7.4, 59.6, 725, 3723)] == [
        "0:00",
        "0:07",
        "1:00",
        "12:05",
        "1:02:03",
    ]


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.123456, 0.00123, "0.1235 ± 0.0012"),
        (21.37, 0.5, "21.37 ± 0.50"),
        (123.4, 25.0, "123 ± 25"),
        (0.5, 0.0, "0.5"),
        (0.5, float("nan"), "0.5"),
    ],
)
def test_measurements_show_two_digits_of_their_error(value, error, shown) -> None:
    assert text.with_error(value, error) == shown


def test_foreign_text_is_one_harmless_line() -> None:
    assert text.one_line(" a\r\n\tb\x1b]0;x\x07 ü\u202e ") == "a b\ufffd]0;x\ufffd ü\ufffd"


def test_a_plan_that_was_not_searched_claims_no_loss(reports) -> None:
    report = reports.plan_report()
    given = dataclasses.replace(
        report,
        plan=dataclasses.replace(report.plan, predicted_loss=None),
        layers=tuple(dataclasses.replace(one, predicted_loss=None) for one in report.layers),
        reachable=(2.992, 2.992),
        uniform=(),
    )
    lines = drawn(render.show_plan, given)
    assert "predicted loss not estimated" in lines
    assert "layer spec weights stored bits" in lines
    assert not [line for line in lines if "reachable" in line]
    assert json.loads(render.json_document("plan", given))["plan"]["predicted_loss"] is None


def test_bench_shows_speeds_and_leaves_out_what_is_unknown(reports) -> None:
    lines = drawn(render_machine.show_bench, reports.bench_report())
    assert "kernels AVX2, 2 threads" in lines
    assert "memory reads 20.1 GB/s" in lines
    assert lines[-2:] == [
        "packed, exact 812.2 125.5 157 MB 99.9 MB 62%",
        "llama.cpp 400.0 90.0",
    ]


def test_training_in_one_row() -> None:
    points = tuple(
        TrainingPoint(step=step, loss=None, kl=kl, soft_kl=kl - 0.01)
        for step, kl in ((0, 0.5), (20, 0.3), (40, 0.31))
    )
    outcome = TrainingOutcome(tokens=81_920, steps=40, points=points, best=1)
    (row,) = losses.training_rows(outcome, METRICS["kl"])
    assert row == (
        "trained",
        "81,920 tokens in 40 steps, best after step 20: KL 0.5 to 0.3 nats on held-out tokens; "
        "rounding costs 0.01 at the end",
    )
    undone = dataclasses.replace(outcome, kept=False)
    assert "in 40 steps, undone: KL" in losses.training_rows(undone, METRICS["kl"])[0][1]
    assert losses.training_rows(None, METRICS["kl"]) == []
