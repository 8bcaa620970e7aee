"""The benchmark against peers: our own side of it for real, its checks and its arithmetic."""

import argparse
import json
import subprocess
import sys

import bench_peers
import pytest
import torch
from peers.results import Result, Row, Run, ratio_table, table
from peers.task import Answer, Task, parse
from peers.verify import BrokenRowError, check_weights, stored_bits
from safetensors.torch import load_file

from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.load.huggingface import from_module, load_model
from quantforge.load.source import resolve_source
from quantforge.load.text import evaluation_windows
from quantforge.results import Quality
from quantforge.testing import save_tiny_checkpoint, tiny_llama
from quantforge.types import QuantSpec

SPEC = QuantSpec(3, 32, symmetric=False)
BUSY = "import time\nwhile time.process_time() < 0.4: pass\n"


def made_run(cpu, wall=1.0, peak=10**9):
    return Run(
        cpu_seconds=cpu, wall_seconds=wall, peak_bytes=peak, load=0.5, sha256="", notes=(),
        weight_error=0.03, versions={},
    )  # fmt: skip


def made_result(name, runs, window_kl):
    mean = sum(window_kl) / len(window_kl)
    quality = Quality(
        text="t", windows=len(window_kl), window_length=8, perplexity=2.0,
        reference_perplexity=1.0, kl=mean, kl_stderr=0.25, top1=0.5,
        window_kl=tuple(window_kl), window_nll=tuple(window_kl),
    )  # fmt: skip
    row = Row.read(f"{name}=quantforge:gptq@3b-g64")
    return Result(row=row, stored_bits=3.25, runs=tuple(runs), qualities={"x/t.txt": quality})


def rounded(weight, spec):
    """Plain rounding between minimum and maximum, as codes, scales and minima."""
    groups = weight.view(len(weight), -1, spec.group_size)
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / (2**spec.bits - 1)
    return ((groups - low) / step).round(), step, low


def test_our_rows_run_and_are_measured(tmp_path, capsys):
    folder = save_tiny_checkpoint(tmp_path / "model", blocks=2)
    text = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4096,), generator=generator)
    text.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")
    kept, numbers = tmp_path / "kept", tmp_path / "rows.json"
    rows = ["quantforge:gptq@3b-g32"]
    rows.append('learned=quantforge:learned@3b-g32+{"quantize.rounding.steps": 20}')
    results = bench_peers.main(
        [
            *(str(folder), "--calibration", str(text), "--sequences", "16", "--length", "32"),
            *("--rows", *rows, "--ratio", "learned/quantforge:gptq@3b-g32<=0"),
            *("--rounds", "1", "--threads", "1", "--keep", str(kept), "--json", str(numbers)),
            *("--text", str(text), "--windows", "8", "--window-length", "32"),
            *("--precision", "float32"),
        ]
    )
    gptq, learned = results
    assert all(one.runs[0].cpu_seconds > 0 and one.runs[0].peak_bytes > 10**8 for one in results)
    assert gptq.runs[0].notes == ("16 sequences fitted on, 0 held out",)
    assert learned.runs[0].notes == ("14 sequences fitted on, 2 held out",)
    # Independently: the kept weights in a float network of our own.
    model = load_model(resolve_source(folder))
    windows = evaluation_windows(str(text), model.tokenizer, windows=8, length=32)
    reference = ReferenceOutputs.collect(
        model.module, model.architecture, windows, keep_head_copy=True
    )
    squared = energy = 0.0
    for name, weight in load_file(kept / "quantforge_gptq@3b-g32.safetensors").items():
        parameter = model.module.get_submodule(name).weight.detach()
        squared += float((weight - parameter).square().sum())
        energy += float(parameter.square().sum())
        parameter.copy_(weight)
    assert gptq.runs[0].weight_error == pytest.approx(squared / energy, rel=1e-4)
    expected = measure(model.module, model.architecture, windows, reference, text="")
    assert gptq.qualities[str(text)].kl == pytest.approx(expected.kl, rel=1e-4)
    assert expected.kl > 0
    written = json.loads(numbers.read_text(encoding="utf-8"))
    assert [one["row"]["name"] for one in written] == ["quantforge:gptq@3b-g32", "learned"]
    ratio = learned.median("cpu_seconds") / gptq.median("cpu_seconds")
    assert (
        f"| learned / quantforge:gptq@3b-g32 | {ratio:.2f} | 0: broken |" in capsys.readouterr().out
    )


def test_every_row_runs_once_a_round(monkeypatch):
    calls, model = [], from_module(tiny_llama(blocks=1))

    def run_once(row, *_):
        calls.append(row.name)
        return made_run(float(len(calls)))

    monkeypatch.setattr(bench_peers, "run_once", run_once)
    rows = [Row.read(f"{name}=quantforge:gptq@3b-g32") for name in "ab"]
    results = bench_peers.interleave(rows, None, model, argparse.Namespace(rounds=3))
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [[run.cpu_seconds for run in one.runs] for one in results] == [[1, 3, 5], [2, 4, 6]]


def test_tables_hold_medians_and_their_ratios():
    ours = made_result("ours", [made_run(3.0), made_run(1.0), made_run(2.0)], [0.1, 0.2, 0.3])
    peer = made_result(
        "peer",
        [made_run(10.0, 2.0, 4 * 10**9), made_run(90.0, 8.0), made_run(20.0, 4.0, 2 * 10**9)],
        [0.4, 0.6, 0.5],
    )
    lines = table([ours, peer], ["x/t.txt"]).splitlines()
    assert lines[2] == (
        "| ours | 3.250 | 2.0 (1.0 to 3.0) | 1.0 (1.0 to 1.0) | 1.00 | 0.5 | 0.0300 "
        "| 0.2000 ± 0.2500 | 2.00 | 0.500 |"
    )
    assert "| 20.0 (10.0 to 90.0) | 4.0 (2.0 to 8.0) | 2.00 |" in lines[3]
    ratios = [("ours", "peer", 0.6), ("peer", "ours", 0.6), ("ours", "peer", None)]
    lines = ratio_table([ours, peer], ratios, ["x/t.txt"]).splitlines()
    # Differences of KL −0.3, −0.4, −0.2: mean −0.3, standard error 0.1/√3.
    assert lines[2] == (
        "| ours / peer | 0.10 | 0.6: kept | 0.25 | 0.50 | -0.3000 ± 0.0577 (lower) |"
    )
    assert lines[3].startswith("| peer / ours | 10.00 | 0.6: broken | 4.00 | 2.00 | +0.3000")
    assert lines[4].startswith("| ours / peer | 0.10 |  | 0.25 |")


def test_weights_that_no_quantization_can_give_are_refused():
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    codes, step, low = rounded(weight, SPEC)

    def error_of(weights, spec=SPEC):
        return check_weights("row", weights, {"a": weight}, spec)

    good = (codes * step + low).view_as(weight)
    expected = float((good - weight).square().sum() / weight.square().sum())
    assert error_of({"a": good}) == pytest.approx(expected, rel=1e-5)
    for bad, message in (
        ({"a": weight.clone()}, "holds the original weights"),
        ({"a": weight.bfloat16().float()}, "distinct values, 3b-g32-asym has 24"),
        ({"a": ((codes - 1) * step + low).view_as(weight)}, "were they dequantized"),
        ({"a": good.T.contiguous()}, "another shape"),
        ({"a": good / 0}, "not finite"),
        ({}, "missing or too many: a"),
        ({"a": good, "b": good}, "missing or too many: b"),
    ):
        with pytest.raises(BrokenRowError, match=message):
            error_of(bad)
    with pytest.raises(BrokenRowError, match="distinct values, 2b-g32 has 12"):
        error_of({"a": good}, QuantSpec(2, 32))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("3b-g128-asym", 3 + 5 * 19 / 576),  # four groups of 128 and one of 64
        ("3b-g64", 3 + 16 / 64),
        ("4b-pc", 4 + 16 / 576),
    ],
)
def test_stored_bits_count_the_shorter_last_group(spec, expected):
    assert stored_bits([(7, 576), (2, 576)], QuantSpec.parse(spec)) == pytest.approx(expected)


def test_rows_and_tasks_are_read_back():
    row = Row.read('eager=autoround:light@3b-g128-asym+{"enable_torch_compile": false}')
    assert (row.name, row.who, row.method) == ("eager", "autoround", "light")
    assert row.spec == QuantSpec(3, 128, symmetric=False)
    assert row.settings == {"enable_torch_compile": False}
    assert Row.read('gptqmodel:gptq@3b-pc+{"mse": 2.0}').name == "gptqmodel:gptq@3b-pc"
    for wrong in ("gptq@3b-g64", "nobody:gptq@3b-g64"):
        with pytest.raises(SystemExit):
            Row.read(wrong)
    task = Task(
        model="m", tokens="t", output="o", method="gptq", bits=3, group_size=-1, symmetric=True,
        batch=4, dtype="auto", threads=2, settings={"a": [1]},
    )  # fmt: skip
    assert parse(task.arguments()) == task
    assert bench_peers.ratio("a:b@3b-pc/c<=0.6") == ("a:b@3b-pc", "c", 0.6)
    assert bench_peers.ratio("a/c") == ("a", "c", None)


def test_cpu_seconds_count_finished_and_living_processes():
    answer = Answer()
    with answer.timed():
        subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert 0.3 < answer.cpu_seconds < 3.0
    waiting = BUSY + "print(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", waiting], **pipes) as living:
        with answer.timed():
            living.stdout.readline()
        assert 0.3 < answer.cpu_seconds < 3.0
        assert living.poll() is None
        living.communicate(b"\n")
