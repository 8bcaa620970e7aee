"""The quality benchmark on a tiny network: every kind of row runs and changes what it should."""

import json
import re
import statistics

import bench_quality
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantforge
from quantforge.methods.rtn import minmax_scale, round_to_nearest
from quantforge.testing import save_tiny_checkpoint
from quantforge.types import QuantSpec

SMALL = {
    "calibration.sequences": 16,
    "calibration.sequence_length": 32,
    "search.bits": [3],
    "search.group_sizes": [32],
    "evaluate.curve_windows": 2,
    "search.refine": 0,
    "evaluate.tokens": 2,
    "quantize.tuning.steps": 8,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs rows on a tiny checkpoint; returns every row with its KL."""
    folder = tmp_path_factory.mktemp("bench")
    model = save_tiny_checkpoint(folder / "model", blocks=2)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4096,), generator=generator)
    text, numbers = folder / "text.txt", folder / "rows.json"
    text.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")

    @torch.no_grad()
    def call(*rows, seeds=(0,), settings=(), measured=str(text), extra=()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUANTFORGE_CACHE", str(folder / "cache"))
            bench_quality.main(
                [
                    str(model), "--calibration", str(text), "--text", measured, "--windows", "2",
                    "--window-length", "32", "--precision", "float32", "--settings",
                    json.dumps(SMALL | dict(settings)), "--json", str(numbers), "--rows", *rows,
                    "--seeds", *map(str, seeds), *extra,
                ]
            )  # fmt: skip
        found = json.loads(numbers.read_text())
        assert [(row["seed"], row["name"]) for row in found] == [
            (s, r) for s in seeds for r in rows
        ]
        return [(row, row["qualities"][measured]["kl"]) for row in found]

    call.folder = folder
    return call


@pytest.fixture(scope="module")
def measure(bench):
    """KL and stored bits of rows, by name."""

    def run(*rows):
        found = bench(*rows)
        kl = {row["name"]: value for row, value in found}
        return kl, {row["name"]: row["stored_bits"] for row, _ in found}

    return run


def test_asymmetric_rows_are_compensated_and_tuned(measure):
    names = ["rtn:3b-g32", "rtn:3b-g32-asym", "gptq:3b-g32-asym", "tuned:3b-g32-asym"]
    kl, bits = measure(*names)
    assert [bits[name] for name in names] == pytest.approx([3.5, 3.59375, 3.59375, 3.59375])
    assert all(value > 0 for value in kl.values())
    assert kl["gptq:3b-g32-asym"] < 0.7 * kl["rtn:3b-g32-asym"] < 0.7 * kl["rtn:3b-g32"]
    # tuning is undone where held-out tokens do not gain: then it is the row before it
    assert kl["tuned:3b-g32-asym"] < 0.7 * kl["rtn:3b-g32-asym"]


def test_options_change_the_network_and_not_its_size(measure):
    names = [
        "gptq:2b-g32", "gptq+magr:2b-g32", "gptq+awq:2b-g32", "rtn+magr+awq+diagonal:2b-g32-asym"
    ]  # fmt: skip
    kl, bits = measure(*names)
    assert [bits[name] for name in names] == pytest.approx([2.5, 2.5, 2.5, 2.5625])
    assert len(set(kl.values())) == len(names)
    assert all(0 < value < 2 for value in kl.values())


def test_what_is_not_asked_for_is_off_and_each_option_is_one_thing(measure, bench):
    names = [
        "gptq:2b-g32", "gptq+outputs:2b-g32", "gptq+learned:2b-g32", "gptq+tuned:2b-g32",
        "gptq+outputs+learned+tuned:2b-g32",
    ]  # fmt: skip
    kl, bits = measure(*names)
    assert set(bits.values()) == {2.5}
    assert len(set(kl.values())) == len(names)
    # Alone a row gives the same as beside those that read gradients.
    ((_, alone),) = bench(names[0])
    assert alone == kl[names[0]]
    # Whatever the recipe does of its own accord.
    ((_, same),) = bench(names[0], settings={"quantize.rounding.steps": 9})
    assert same == alone
    assert kl[names[4]] < kl[names[0]]


def test_rows_are_the_networks_of_a_compilation(bench):
    """`gptq+outputs+weighted+tuned` is what `quantize` makes of the same settings."""
    name, settings = "gptq+outputs+weighted+tuned:3b-g32", {"quantize.tuning.scale_step": 0.004}
    ((_, kl),) = bench(name, settings=settings)
    model, text = bench.folder / "model", bench.folder / "text.txt"
    one = {
        "search.solver": "uniform", "quantize.method": "gptq", "quantize.output_feedback": True,
        "quantize.rounding.steps": 0, "quantize.token_weighting": 0.5,
    }  # fmt: skip
    quantforge.quantize(
        model, calibration=text, settings=SMALL | settings | one, output=bench.folder / "out"
    )
    report = quantforge.evaluate(
        bench.folder / "out", reference=model, text=text, windows=2, window_length=32
    )
    # The file holds kept tensors in bfloat16, the benchmark's float ones are as they were.
    assert report.quality.kl == pytest.approx(kl, rel=0.02)


def test_held_out_tokens_are_a_text(bench):
    """Windows that calibration set aside: as many and as long as it has, scored like any text."""
    names = ["rtn:2b-g32", "gptq:2b-g32"]
    found = bench(*names, measured="held-out")
    for row, _ in found:
        quality = row["qualities"]["held-out"]
        assert (quality["windows"], quality["window_length"]) == (2, 32)  # 16 sequences, 7 to 1
    assert found[1][1] < found[0][1]


def test_gradients_are_taken_once_a_run_and_counted_apart(bench, capsys):
    rows = ["gptq+outputs:2b-g32", "gptq+learned:2b-g32", "gptq+outputs:3b-g32"]
    settings = {"calibrate.gradient_sequences": 5}  # nothing of another test is in the cache
    bench(*rows, settings=settings)
    first = capsys.readouterr()
    assert first.err.count("gradients 10/10") == 1
    assert len(re.findall(r"that read them \d+ CPU s$", first.out, re.MULTILINE)) == 1
    bench(*rows, settings=settings)
    assert "CPU s (from the cache)" in capsys.readouterr().out
    bench("gptq:2b-g32", "rtn:3b-g32")
    assert "gradients" not in capsys.readouterr().out


def test_seeds_move_rows_and_errors_are_over_seeds(bench, capsys):
    names = ["gptq:2b-g32", "gptq+outputs:2b-g32"]
    found = bench(*names, seeds=(3, 4, 5))
    out = capsys.readouterr().out
    assert out.count("12 fitting sequences") == 3  # 7/8 of 14
    kl = [[value for row, value in found if row["name"] == name] for name in names]
    assert len(set(kl[0])) == len(set(kl[1])) == 3
    table = [line.split(" | ") for line in out.splitlines()[-3:-1]]
    for cells, values in zip(table, kl, strict=True):
        assert cells[0].startswith("| gptq")
        error = statistics.stdev(values) / 3**0.5
        assert cells[4] == f"{statistics.fmean(values):.4f} ± {error:.4f}"
    gaps = [second - first for first, second in zip(*kl, strict=True)]
    error = statistics.stdev(gaps) / 3**0.5
    assert table[1][-1] == f"{statistics.fmean(gaps):+.4f} ± {error:.4f} |"
    assert all(row["peak_bytes"] > 100 * 2**20 for row, _ in found)
    # One seed's rows are the same whichever others there are.
    again = bench(names[0], seeds=(5, 6))
    assert again[0][1] == kl[0][2]


def test_weights_of_another_program_are_measured_like_ours(bench, tmp_path):
    """Plain rounding made outside is `rtn`'s row; a file of something else is refused."""
    spec = QuantSpec(bits=3, group_size=32)
    floats = load_file(bench.folder / "model" / "model.safetensors")
    rounded = {}
    for name, weight in floats.items():
        if name.endswith("_proj.weight"):
            made = round_to_nearest(weight, minmax_scale(weight, spec), spec)
            rounded[name.removesuffix(".weight")] = made.dequantize()
    file = tmp_path / "theirs.safetensors"
    save_file(rounded, file)
    ours, theirs = bench("rtn:3b-g32", f"weights:3b-g32@{file}")
    assert theirs[0]["stored_bits"] == ours[0]["stored_bits"] == 3.5
    assert theirs[1] == ours[1] > 0
    rounded.popitem()
    save_file(rounded, file)
    with pytest.raises(SystemExit, match=r"theirs\.safetensors: layers missing or too many"):
        bench(f"weights:3b-g32@{file}")


def test_a_format_without_a_grid_says_its_bits_and_cannot_be_worse_than_nothing(bench, tmp_path):
    floats = load_file(bench.folder / "model" / "model.safetensors")
    linears = {name: one for name, one in floats.items() if name.endswith("_proj.weight")}
    file = tmp_path / "theirs.safetensors"
    halved = {name.removesuffix(".weight"): one / 2 for name, one in linears.items()}
    save_file(halved, file)
    ((row, kl),) = bench(f"weights:2.625@{file}")
    assert row["stored_bits"] == 2.625
    assert kl > 0
    save_file({name: -one for name, one in halved.items()}, file)
    with pytest.raises(SystemExit, match="farther from the original ones than zeros"):
        bench(f"weights:2.625@{file}")


def test_any_two_rows_can_be_paired(bench, capsys):
    names = ["rtn:2b-g32", "rtn:3b-g32", "gptq:3b-g32"]
    found = bench(*names, extra=["--pair", names[2], names[1]])
    line = next(one for one in capsys.readouterr().out.splitlines() if " - " in one)
    gap = found[2][1] - found[1][1]
    assert line.startswith(f"gptq:3b-g32 - rtn:3b-g32 | {gap:+.4f} ± 0.0")
    with pytest.raises(SystemExit):
        bench(names[0], extra=["--pair", names[0], "other"])
    assert "--pair names 'other', which is no row" in capsys.readouterr().err


def test_a_target_is_met_by_the_integers_it_was_measured_with(bench):
    settings = {"search.bits": [2, 3, 4, 5], "evaluate.curve_windows": 2, "search.refine": 0}
    names = ["fast:kl:0.01", "fast:kl:0.04"]
    tight, loose = bench(*names, settings=settings, measured="held-out")
    assert 0.0 < tight[1] < 0.01 < loose[1] < 0.04
    assert loose[0]["stored_bits"] < tight[0]["stored_bits"] < 5.5
