"""Estimators in the pipeline: what they share in the cache, and what corrects them."""

import json

import pytest

import quantforge
from quantforge.calibrate.estimators import ESTIMATORS
from quantforge.opening import configure, open_job
from quantforge.progress import Monitor
from quantforge.search.budget import Budget
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import QuantSpec

SETTINGS = {
    "search.bits": [2, 3],
    "search.group_sizes": [32, -1],
    "evaluate.curve_windows": 2,
    "search.refine": 0,
    "evaluate.precision": "float32",
    "calibrate.precision": "float32",
    "calibrate.gradient_sequences": 6,
    "calibrate.curvature": {"sequences": 1, "tokens": 8, "products": 4, "layer_products": 2},
    "quantize.tuning.steps": 0,
}
SHARED = {"candidates", "gradients", "measure uniform networks"}
OWN = {
    "hawq": {"curvature"},
    "hawq-v2": {"curvature"},
    "empirical-fisher": {"empirical gradients"},
    "measured": {"measure layers"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def module():
    return train(tiny_llama(blocks=2), steps=60)


def batches():
    return [markov_tokens(2, 24, seed=seed) for seed in range(8)]


def test_estimators_share_everything_but_their_tables_and_are_all_corrected(module, cache):
    tables, before = {}, {n: t.clone() for n, t in module.state_dict().items()}
    for name in ESTIMATORS:
        for again in (False, True):
            seen = set()
            recipe = configure(module, settings=SETTINGS | {"calibrate.estimator": name})
            monitor = Monitor(progress=lambda event, seen=seen: seen.add(event.stage))
            job = open_job(module, recipe, calibration=batches(), monitor=monitor)
            with job.measure(fresh=False) as measured:
                table = measured.sensitivity
            stages = set() if again else OWN.get(name, set())
            first = SHARED | {"reference"} if name == "fisher" and not again else set()
            assert seen & (SHARED | {"curvature", "empirical gradients", "measure layers"}) == (
                stages | first
            ) - {"reference"}
        tables[name] = float(table.loss[0, 0] / table.loss[3, 0])
        assert table.estimator == name
        assert (table.stderr > 0).all()
        known = {point.name: point.quality.kl for point in measured.uniform}
        for column, spec in enumerate(table.specs):  # every uniform network is predicted exactly
            total = float(table.loss[:, column].sum())
            assert total == pytest.approx(known[f"uniform {spec}"], rel=1e-9)
    assert len(set(tables.values())) == len(tables)
    (folder,) = (cache / "measurements").iterdir()
    assert len(list(folder.glob("sensitivity-*.json"))) == len(tables)
    for name, tensor in module.state_dict().items():
        assert (tensor == before[name]).all()


def test_a_plan_says_which_estimator_it_rests_on_and_what_that_cost(module, tmp_path):
    settings = SETTINGS | {"calibrate.estimator": "measured", "calibrate.probes": 1}
    report = quantforge.plan(
        module, budget="2.8bit", calibration=batches(), settings=settings, output=tmp_path / "out"
    )
    assert report.sensitivity.name == "measured"
    assert report.sensitivity.what.startswith("14 networks of one quantized layer on 48 held-out")
    assert report.sensitivity.seconds > 0
    written = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert written["estimator"] == "measured"
    assert QuantSpec.parse(written["specs"][0]) == QuantSpec(2)
    for row, layer in enumerate(report.layers):
        column = written["specs"].index(layer.spec)
        assert layer.predicted_loss == pytest.approx(written["loss_nats"][row][column])
        error = written["loss_stderr_nats"][row][column]
        assert layer.predicted_error == pytest.approx(error)


@pytest.mark.parametrize("kind", ["sparse", "full"])
def test_interactions_come_from_the_cache_and_are_part_of_every_prediction(module, kind):
    plans = {}
    for interactions in ("none", kind):
        seen = set()
        settings = SETTINGS | {"search.interactions": interactions}
        report = quantforge.plan(
            module, budget="2.8bit", calibration=batches(), settings=settings,
            progress=lambda event, seen=seen: seen.add(event.stage),
        )  # fmt: skip
        plans[interactions] = report.plan
        uniform = {one.name: one.predicted_loss for one in report.uniform}
    assert not seen & SHARED  # nothing is measured again
    assert (plans["none"].solver, plans[kind].solver) == ("dynamic-program", "pairwise")
    assert plans["none"].gap == 0.0
    assert plans[kind].gap >= 0.0
    assert plans[kind].predicted_loss != plans["none"].predicted_loss
    recipe = configure(module, settings=settings)
    job = open_job(module, recipe, calibration=batches())
    with job.measure(fresh=False) as measured:
        for point in measured.uniform:  # corrected with their pairs
            assert uniform[point.name] == pytest.approx(point.quality.kl, rel=1e-9)
        again = job.plans.find(measured.sensitivity, Budget.parse("2.8bit"))
    assert again.assignment == plans[kind].assignment
