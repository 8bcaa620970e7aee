"""The ablation on a tiny network: its rows are what it says they are, and none is lost."""

import json
import math

import ablate_search
import numpy as np
import pytest
import torch

from quantforge.evaluate.quality import paired
from quantforge.hull import read_hull
from quantforge.results import CurvePoint, Quality
from quantforge.testing import save_tiny_checkpoint
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SMALL = {
    "calibration.sequences": 16,
    "calibration.sequence_length": 32,
    "calibrate.gradient_sequences": 6,
    "search.bits": [2, 3, 4],
    "search.group_sizes": [32, -1],
    "evaluate.curve_windows": 2,
    "quantize.tuning.steps": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the ablation on a tiny checkpoint; gives the JSON."""
    folder = tmp_path_factory.mktemp("ablation")
    model = save_tiny_checkpoint(folder / "model", blocks=2)
    letters = torch.randint(97, 123, (4096,), generator=torch.Generator().manual_seed(0))
    text, numbers = folder / "text.txt", folder / "numbers.json"
    text.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")

    @torch.no_grad()
    def call(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUANTFORGE_CACHE", str(folder / "cache"))
            ablate_search.main(
                [
                    str(model), "--calibration", str(text), "--text", str(text), "--windows", "2",
                    "--window-length", "32", "--precision", "float32", "--settings",
                    json.dumps(SMALL), "--json", str(numbers), *arguments,
                ]
            )  # fmt: skip
        return json.loads(numbers.read_text())

    call.numbers, call.text = numbers, str(text)
    return call


def test_every_method_at_every_budget_beside_the_hull(run, capsys):
    methods = ["gram", "fisher", "fisher+sparse", "fisher+refined"]
    found = run(
        "--budgets", "2.6", "--methods", *methods, "--full", "--probes", "6",
        "--probe-specs", "2b-g32", "3b-pc",
    )  # fmt: skip
    rows = {(row["budget"], row["method"], row["stage"]): row for row in found["rows"]}
    assert set(rows) == {
        (2.6, method, stage)
        for method in ["uniform hull", *methods]
        for stage in ("one-pass", "full")
    }
    for (budget, method, _), row in rows.items():
        assert row["stored_bits"] <= budget
        assert set(row["qualities"]) == {"held-out", run.text}
        assert all(quality["kl"] > 0 for quality in row["qualities"].values())
        assert (row["predicted"] is None) == (method == "uniform hull")
    held_out = {key: row["qualities"]["held-out"]["kl"] for key, row in rows.items()}
    # refinement chose on the same windows, so that it cannot be worse there
    better = held_out[2.6, "fisher+refined", "one-pass"]
    assert better <= held_out[2.6, "fisher", "one-pass"] * (1 + 1e-6)
    assert held_out[2.6, "fisher", "full"] != held_out[2.6, "fisher", "one-pass"]
    assert len(found["probes"]) == 12
    assert len({probe["layer"] for probe in found["probes"]}) == 6
    assert set(found["correlations"]) == {"gram", "fisher"}
    for values in found["correlations"].values():
        assert all(-1 <= value <= 1 and spread >= 0 for value, spread in values.values())
    out = capsys.readouterr().out
    assert out.count("| one-pass |") == out.count("| full |") == 5
    # what is printed is what is written
    row, hull = rows[2.6, "fisher", "one-pass"], rows[2.6, "uniform hull", "one-pass"]
    pairs = zip(*(one["qualities"][run.text]["window_kl"] for one in (row, hull)), strict=True)
    gap = np.mean([a - b for a, b in pairs])
    (line,) = [x for x in out.splitlines() if x.startswith("| 2.6 | fisher | one-pass |")]
    assert line.split(" | ")[-1].startswith(f"{gap:+.4f} ± ")


def test_an_interrupted_run_keeps_its_rows(run, monkeypatch):
    real, calls = ablate_search.Maker.measured, []

    def interrupted(self, plan, measurement, stage):
        calls.append(stage)
        if len(calls) == 4:  # two networks of the hull, one plan, and then
            raise KeyboardInterrupt
        return real(self, plan, measurement, stage)

    monkeypatch.setattr(ablate_search.Maker, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--budgets", "3.2", "--methods", "gram", "fisher")
    found = json.loads(run.numbers.read_text())
    assert [row["method"] for row in found["rows"]] == ["uniform hull", "gram"]


def test_methods_are_spelled_out_and_others_refused(run):
    with pytest.raises(ValueError, match="fisher\\+guess: guess is neither"):
        run("--budgets", "3.2", "--methods", "fisher+guess")
    with pytest.raises(ValueError, match="5b-pc is no candidate"):
        run("--budgets", "3.2", "--methods", "gram", "--probes", "2", "--probe-specs", "5b-pc")


def quality(windows):
    return Quality(
        text="", windows=len(windows), window_length=4, perplexity=2.0, reference_perplexity=1.0,
        kl=float(np.mean(windows)), kl_stderr=0.0, top1=0.5, window_kl=tuple(windows),
        window_nll=(1.0,) * len(windows),
    )  # fmt: skip


def test_the_hull_is_read_between_its_two_networks_with_windows_that_pair():
    left, right = quality([0.4, 0.6, 0.5]), quality([0.1, 0.2, 0.3])
    points = [
        CurvePoint(name="a", stored_bits=2.0, quality=left),
        CurvePoint(name="c", stored_bits=2.5, quality=quality([0.6, 0.6, 0.6])),  # above the hull
        CurvePoint(name="b", stored_bits=3.0, quality=right),
    ]
    ends = ablate_search.hull_ends(points, 2.25)
    assert [one.name for one in ends] == ["a", "b"]
    assert ablate_search.hull_ends(points, 1.9) is None
    found = ablate_search.between(left, right, 0.25)
    expected = read_hull([(p.stored_bits, p.quality.kl) for p in points], 2.25)
    assert found.kl == pytest.approx(expected)
    assert np.mean(found.window_kl) == pytest.approx(expected)
    # the derivative by a window's KL: what moving one window would move the hull by
    moved = ablate_search.between(quality([0.4, 0.6, 0.5003]), right, 0.25)
    share = (found.window_kl[2] - 0.25 * expected * 0.3 / 0.2) / 0.5
    assert moved.kl - found.kl == pytest.approx(share * 0.0003 / 3, rel=1e-3)
    assert paired(found, found).kl_stderr == 0.0


def test_correlations_are_those_of_ranks_over_all_and_within_a_spec():
    layers = tuple(
        LayerInfo(name=n, out_features=1, in_features=4, block=0, stage=0, fused_group=n)
        for n in "abcd"
    )
    specs = (QuantSpec(2), QuantSpec(3))
    loss = torch.tensor([[8.0, 4.0], [7.0, 3.0], [6.0, 2.0], [5.0, 1.0]]).double()
    table = Sensitivity(
        layers=layers, specs=specs, loss=loss, error=loss, estimator="", fingerprint=""
    )
    measured = {"2b-pc": [80.0, 70.0, 60.0, 50.0], "3b-pc": [1.0, 2.0, 3.0, 4.0]}
    probes = [
        ablate_search.Probe(layer=layer.name, spec=spec, kl=kl[i], kl_stderr=0.0)
        for spec, kl in measured.items()
        for i, layer in enumerate(layers)
    ]
    found = ablate_search.agreement(probes, table)
    assert found["spearman of layers"][0] == pytest.approx(0.0)  # 1 and −1
    # of 28 pairs six within the second spec are the other way round
    assert found["kendall"][0] == pytest.approx((28 - 2 * 6) / 28)
    assert found["spearman"][0] == pytest.approx(1 - 6 * (9 + 1 + 1 + 9) / (8 * 63))
    assert all(math.isfinite(spread) for _, spread in found.values())
