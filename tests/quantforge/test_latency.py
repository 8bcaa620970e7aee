"""Tables of times on disk, built-in devices, and budgets of latency through whole calls."""

import json
import math

import pytest
import torch

import quantforge
from quantforge.errors import InputError, UsageError
from quantforge.latency import built_in_devices, latency_model, read_table
from quantforge.progress import Monitor
from quantforge.runtime.profile import time_layers
from quantforge.search.budget import Budget
from quantforge.testing import save_tiny_checkpoint
from quantforge.types import LayerInfo, QuantSpec

SETTINGS = {
    "calibration.sequences": 16, "calibration.sequence_length": 32, "search.bits": [2, 4],
    "search.group_sizes": [32, -1], "evaluate.curve_windows": 2, "quantize.tuning.steps": 0,
        "search.refine": 0,
    "evaluate.tokens": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", blocks=2)


@pytest.fixture(scope="module")
def profiled(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "here.json"
    report = quantforge.profile(source, output=path, repeats=3, settings=SETTINGS)
    return report, path


def test_a_device_is_its_published_numbers():
    devices = built_in_devices()
    assert set(devices) == {"a100", "h100", "mi300x", "4090", "cpu-avx512"}
    layer = LayerInfo(
        name="l", out_features=4096, in_features=4096, block=0, stage=0, fused_group="l"
    )
    expected = 3e-6 + 2 * 4096**2 / 2.039e12
    assert devices["a100"].seconds(layer, None, 1) == pytest.approx(expected)
    assert devices["h100"].seconds(layer, None, 1) < devices["4090"].seconds(layer, None, 1)


def test_a_profile_covers_every_shape_and_candidate(profiled, source):
    report, path = profiled
    table = read_table(path)
    blocks = {(64, 64), (32, 64), (128, 64), (64, 128)}
    specs = {QuantSpec(b, g) for b in (2, 4) for g in (32, -1)} | {None}
    assert {key[:3] for key in table.times if key[0] != 256} == {
        (*shape, spec) for shape in blocks for spec in specs
    }
    assert {key[2] for key in table.times if key[:2] == (256, 64)} == {
        None, *(QuantSpec(bits) for bits in (4, 5, 6, 8))
    }  # fmt: skip
    for row in report.rows:
        spec = None if row.spec == "kept" else QuantSpec.parse(row.spec)
        assert 0 < row.p20 <= row.median <= row.p80
        assert table.times[row.out_features, row.in_features, spec, 1] == row.median
    with pytest.raises(UsageError, match="exists; give another file"):
        quantforge.profile(source, output=path)
    with pytest.raises(UsageError, match=r"is no \.json file"):
        quantforge.profile(source, output=path.with_suffix(".txt"))
    with pytest.raises(UsageError, match="unknown backend"):
        quantforge.profile(source, output=path.with_name("b.json"), backend="none")


def by_bytes(path):
    """A table in which a layer takes a nanosecond a byte, and one microsecond to start."""
    rows = []
    specs = (None, *(QuantSpec(bits, size) for bits in (2, 4, 5, 6, 8) for size in (32, -1)))
    for out, columns in ((64, 64), (32, 64), (128, 64), (64, 128), (256, 64)):
        for spec in specs:
            bits = 16 * out * columns if spec is None else spec.stored_bits(out, columns)
            row = {"out_features": out, "in_features": columns, "spec": str(spec or "kept")}
            rows.append({**row, "median_s": 1e-6 + 1e-9 * bits / 8})
    path.write_text(json.dumps({"format_version": 1, "batch": 1, "rows": rows}))
    return str(path)


def test_plans_and_checkpoints_within_a_time(source, tmp_path):
    settings = {**SETTINGS, "device": by_bytes(tmp_path / "table.json")}

    def plan(budget):
        return quantforge.plan(source, budget=budget, calibration="pydoc", settings=settings)

    free = plan("16bit").latency[0]
    assert (free.device, free.batch) == ("table.json, measured", 1)
    assert free.reference == free.seconds > 14e-6
    faster = plan("latency:-70%")
    (found,) = faster.latency
    assert found.reference == pytest.approx(free.reference)
    assert 0.28 * found.reference < found.seconds <= 0.3 * found.reference
    less = plan("latency:-70%,2.5bit")
    assert less.plan.stored_bits <= 2.5 < faster.plan.stored_bits
    assert less.plan.predicted_loss > faster.plan.predicted_loss > 0
    whole = plan(f"latency:-70%,{faster.sizes.checkpoint_bytes / 1000}kB")
    assert whole.sizes.checkpoint_bytes <= faster.sizes.checkpoint_bytes
    assert whole.latency[0].seconds <= 0.3 * whole.latency[0].reference  # the head is planned too
    assert whole.latency[0].reference > found.reference
    assert all(u.predicted_loss >= faster.plan.predicted_loss for u in faster.uniform if u.fits)
    assert {u.fits for u in faster.uniform} == {True, False}
    report = quantforge.quantize(
        source, budget="latency:-70%", calibration="pydoc", output=tmp_path / "out",
        settings=settings,
    )  # fmt: skip
    assert report.plan.budget == "latency:-70%"
    assert report.plan.stored_bits <= faster.plan.stored_bits


def test_a_measured_table_decides(source, profiled, tmp_path):
    """Where 4 bits are measured faster than 2, the plan takes 4."""
    document = json.loads(profiled[1].read_text())
    for row in document["rows"]:
        width = row["spec"].partition("b")[0]
        row["median_s"] = {"2": 3e-5, "4": 1e-5}.get(width, 4e-5)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(document))
    settings = {**SETTINGS, "device": str(path)}
    planned = quantforge.plan(source, budget="latency:-70%", calibration="pydoc", settings=settings)
    assert {spec.bits for spec in planned.plan.assignment.values()} == {4}
    assert planned.latency[0].seconds == pytest.approx(14e-5)
    assert planned.latency[0].reference == pytest.approx(14 * 4e-5)
    document["rows"] = [r for r in document["rows"] if r["out_features"] != 32]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"odd.json has no time of 32 x 64 in .*k_proj"):
        quantforge.plan(source, budget="latency:-70%", calibration="pydoc", settings=settings)


def test_what_is_wrong_with_a_device_is_one_line(source, tmp_path):
    budget = Budget.parse("latency:-25%")
    with pytest.raises(UsageError, match=r"no device is given: say --latency-device a100"):
        quantforge.plan(source, budget="latency:-25%", settings=SETTINGS)
    with pytest.raises(UsageError, match="unknown device 'a1000'; known: a100"):
        latency_model("a1000", budget)
    with pytest.raises(InputError, match="cannot read the profile"):
        latency_model(str(tmp_path / "none.json"), budget)
    (tmp_path / "bad.json").write_text('{"format_version": 1, "batch": 1, "rows": [{}]}')
    with pytest.raises(InputError, match="is no table of quantforge profile"):
        latency_model(str(tmp_path / "bad.json"), budget)
    (tmp_path / "new.json").write_text('{"format_version": 9}')
    with pytest.raises(InputError, match="format 9 of a profile is unknown"):
        latency_model(str(tmp_path / "new.json"), budget)
    assert latency_model(None, None) is None
    assert math.isfinite(built_in_devices()["a100"].bandwidth)


def test_grids_of_our_own_are_timed_as_they_run():
    specs = [QuantSpec.parse(text) for text in ("ternary-g64", "balanced-pc", "ternary-pt")]
    found = time_layers(
        {(64, 128): specs}, batch=1, dtype=torch.float32, device=torch.device("cpu"),
        backend="auto", repeats=2, monitor=Monitor(),
    )  # fmt: skip
    assert set(found) == {((64, 128), spec) for spec in (None, *specs)}
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
