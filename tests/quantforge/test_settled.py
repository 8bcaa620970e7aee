"""Published settings: nothing is searched, nothing is measured that no stage reads."""

import copy
import json
import math
import re

import pytest
import torch
from safetensors import safe_open

import quantforge
from quantforge import calibration
from quantforge.calibrate.fisher import gradient_statistics
from quantforge.calibrate.token_loss import sampled_labels
from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.opening import configure, open_job
from quantforge.progress import Monitor
from quantforge.testing import markov_tokens, save_tiny_checkpoint, tiny_llama, train

UNIFORM = {
    "search.solver": "uniform",
    "search.bits": [3],
    "search.group_sizes": [32],
    "evaluate.curve_windows": 2,
    "evaluate.tokens": 2,
}
PLAIN = UNIFORM | {
    "quantize.output_feedback": False,
    "quantize.rounding.steps": 0,
    "quantize.tuning.steps": 0,
}
SMALL = {"calibration.sequences": 16, "calibration.sequence_length": 32}
MEASURES = {"candidates", "measure uniform networks", "measure the plan"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def trained():
    return train(tiny_llama(blocks=2))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose rows divide into groups of 128."""
    folder = tmp_path_factory.mktemp("source") / "wide"
    return save_tiny_checkpoint(folder, blocks=1, hidden=256, intermediate=256)


def batches():
    return [markov_tokens(2, 24, seed=seed) for seed in range(8)]


def run(module, settings, **options):
    seen = []
    report = quantforge.quantize(
        module, calibration=batches(), settings=settings,
        progress=lambda event: seen.append(event.stage), **options,
    )  # fmt: skip
    return report, set(seen)


def job_of(module, settings, seed=0):
    recipe = configure(module, settings=settings)
    return open_job(module, recipe, calibration=batches(), seed=seed)


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({}, set()),
        ({"quantize.method": "rtn", "quantize.output_feedback": True}, set()),
        ({"quantize.output_feedback": True}, {"gradients"}),
        ({"quantize.token_weighting": 0.5}, {"gradients"}),
        (
            {"quantize.token_weighting": 0.5, "calibrate.gradient_sequences": 4},
            {"gradients", "token gradients"},
        ),
        ({"quantize.rounding.steps": 2}, {"gradients"}),
        ({"quantize.rounding.steps": 2, "quantize.rounding.weighted": False}, set()),
        ({"quantize.tuning.steps": 2}, {"float network", "tune scales"}),
    ],
)
def test_only_what_a_stage_reads_is_made(trained, cache, settings, made):
    report, seen = run(copy.deepcopy(trained), PLAIN | settings)
    assert seen - {"quantize", "reference"} == made
    assert (cache / "measurements").is_dir() == bool(made)
    assert set(map(str, report.plan.assignment.values())) == {"3b-g32"}
    assert (report.plan.predicted_loss, report.plan.budget) == (None, "3.5bit")
    assert all(row.predicted_loss is None for row in report.layers)
    assert (report.curve, report.hull_kl, report.cheapest_uniform) == ((), None, None)
    assert 0 < report.quality.kl < 1
    again, seen = run(copy.deepcopy(trained), PLAIN | settings)
    assert not seen & {"gradients", "float network"}  # from the cache
    assert again.quality == report.quality


def test_every_sequence_has_gradients_of_its_own(trained):
    changes = {
        "quantize.token_weighting": 0.5, "calibrate.gradient_sequences": 5,
        "calibrate.precision": "float32",
    }  # fmt: skip
    job = job_of(trained, PLAIN | changes, seed=3)
    fitting = job.calibration.fitting
    assert len(fitting) > 10
    found: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in job.model.layers}
    for first in range(0, len(fitting), 5):
        made = gradient_statistics(
            job.model, fitting[first : first + 5], batch_size=4, precision="float32",
            head_gradient=sampled_labels(torch.Generator().manual_seed(3 + first)),
            monitor=Monitor(),
        )  # fmt: skip
        for name, squares in made.tokens.items():
            found[name].append(squares)
    with job.measure(fresh=False) as needed:
        for name, parts in found.items():
            expected = torch.cat(parts) / torch.cat(parts).mean()
            torch.testing.assert_close(needed.token_squares(name), expected, rtol=1e-2, atol=1e-3)


def test_what_is_made_is_what_a_search_would_have_made(trained):
    changes = {
        "quantize.rounding.steps": 2, "quantize.tuning.steps": 2, "quantize.token_weighting": 0.5,
    }  # fmt: skip
    unsearched = job_of(trained, UNIFORM | changes)
    searched = job_of(trained, UNIFORM | changes | {"search.solver": "dynamic-program"})
    names = [layer.name for layer in searched.model.layers]
    with searched.measure(fresh=False) as all_of_it, unsearched.measure(fresh=False) as needed:
        assert torch.equal(needed.final_hidden, all_of_it.final_hidden)
        assert needed.final_hidden.abs().mean() > 0.1
        pairs = zip(needed.channel_weights, all_of_it.channel_weights, strict=True)
        assert all(torch.equal(*pair) and pair[0].std() > 0 for pair in pairs)
        assert needed.token_squares(names[0]).mean() == pytest.approx(1.0, rel=1e-2)
        for name in names:
            assert torch.equal(needed.token_squares(name), all_of_it.token_squares(name))
            grams = zip(needed.output_grams(name), all_of_it.output_grams(name), strict=True)
            assert all(torch.equal(*pair) for pair in grams)
        assert (needed.sensitivity, needed.store, needed.uniform) == (None, None, ())


def test_the_network_is_the_one_that_a_search_of_one_candidate_gives(trained):
    """The budget excludes 16 bits, so the dynamic program is left with the same plan."""
    changes = {"quantize.tuning.steps": 2}
    networks = [copy.deepcopy(trained) for _ in range(2)]
    run(networks[0], UNIFORM | changes)
    dynamic = {"search.solver": "dynamic-program"}
    report, seen = run(networks[1], UNIFORM | changes | dynamic, budget="3.5bit")
    assert seen > MEASURES
    assert report.plan.predicted_loss > 0
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(networks[1].state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"calibrate.gradient_sequences": 3}),
        ({}, {"calibrate.precision": "float32"}),
        ({"quantize.tuning.steps": 0}, {"quantize.tuning.steps": 2}),
        ({"quantize.rounding.steps": 0}, {"quantize.rounding.steps": 2}),
    ],
)
def test_whatever_decides_the_content_is_in_the_key(trained, cache, first, second):
    for settings in (first, second, second):
        with job_of(trained, UNIFORM | settings).measure(fresh=False):
            pass
    assert len(list((cache / "measurements").iterdir())) == 2
    with job_of(trained, UNIFORM | second, seed=1).measure(fresh=False):
        pass
    assert len(list((cache / "measurements").iterdir())) == 3


def test_what_only_candidates_depend_on_is_not_in_the_key(trained, cache):
    for settings in ({}, {"calibrate.grid": "mse", "search.bits": [2], "quantize.method": "foem"}):
        with job_of(trained, UNIFORM | settings).measure(fresh=False):
            pass
    assert len(list((cache / "measurements").iterdir())) == 1


def test_a_damaged_measurement_says_what_to_do(trained, cache):
    run(copy.deepcopy(trained), UNIFORM)
    (folder,) = (cache / "measurements").iterdir()
    gram, *_ = (folder / calibration.OUTPUT_GRAMS).iterdir()
    for path in (folder / calibration.TRACES, gram):
        whole = path.read_bytes()
        path.write_bytes(b"[")
        with pytest.raises(InputError, match="--fresh"):
            run(copy.deepcopy(trained), UNIFORM)
        path.write_bytes(whole)


def test_one_pass_integers_of_one_grid_need_no_budget_either(trained):
    settings = UNIFORM | {"quantize.sequential": False, "quantize.tuning.steps": 0}
    report, seen = run(copy.deepcopy(trained), settings)
    assert "candidates" in seen  # they are the result
    assert report.plan.budget == "3.5bit"
    assert report.plan.predicted_loss > 0


def test_continuations_are_those_of_the_float_network(wide, tmp_path):
    settings = PLAIN | SMALL | {"search.bits": [2], "evaluate.tokens": 8}
    report = quantforge.quantize(wide, settings=settings, output=tmp_path / "out")
    plain = open_job(str(wide), configure(str(wide), settings=settings)).float_continuations
    assert [one.reference for one in report.generations] == list(plain)
    assert any(one.reference != one.quantized for one in report.generations)


def test_a_budget_is_checked_and_asked_for(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = copy.deepcopy(trained)
    for call in (quantforge.quantize, quantforge.plan):
        with pytest.raises(UsageError, match="no budget is given"):
            call(module, calibration=batches())
        with pytest.raises(BudgetError, match=r"at least 3\.500bit, or leave it out"):
            call(module, calibration=batches(), settings=PLAIN, budget="3.4bit")
        with pytest.raises(InputError, match=r"groups of 128 do not divide .* 32, -1"):
            call(module, calibration=batches(), settings=PLAIN | {"search.group_sizes": [128]})
    seen = []
    with pytest.raises(InputError, match="groups of 128"):  # before gradients are taken
        quantforge.quantize(
            module, calibration=batches(), settings=UNIFORM | {"search.group_sizes": [128]},
            progress=seen.append,
        )  # fmt: skip
    assert seen == []
    report, _ = run(module, PLAIN, budget="4bit")
    assert report.plan.budget == "4bit"
    assert not list(tmp_path.glob("*quantized*"))


def test_a_recipe_brings_its_budget_and_names_its_output(wide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("budget: 5bit\nsearch: {bits: [4], group_sizes: [64]}\n")
    given = SMALL | {"model": str(wide), "evaluate.curve_windows": 2, "quantize.tuning.steps": 0}
    report = quantforge.quantize("mine.yaml", settings=given)
    assert (report.output, report.plan.budget) == ("mine-5bit", "5bit")
    assert report.plan.stored_bits <= 5
    again = quantforge.quantize("mine.yaml", settings=given, budget="4.25bit")
    assert (again.output, again.settings["budget"]) == ("mine-4.25bit", "4.25bit")


def test_plan_measures_nothing_and_says_what_it_costs(wide, tmp_path, cache):
    seen = []
    report = quantforge.plan(
        wide, settings=PLAIN | SMALL | {"quantize.output_feedback": True}, output=tmp_path / "p",
        progress=lambda event: seen.append(event.stage),
    )  # fmt: skip
    assert not set(seen) & (MEASURES | {"gradients"})
    assert not (cache / "measurements").exists()
    assert report.reachable == (3.5, 3.5)
    assert report.uniform == ()
    entrances, noted = 2 * 14 * 32 * 256, 4 * 14 * 32 * 256
    assert report.scratch_bytes == entrances + noted + 2 * (5 * 256**2 + 2 * 128**2)
    assert {layer.spec for layer in report.layers} == {"3b-g32"}
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "p" / "plan.json").read_text())["predicted_loss"] is None


NAMES = (
    "rtn-w4g128", "gptq-w4g128", "gptq-w3g128", "gptq-w3", "gptaq-w3g128", "foem-w3g128",
    "qep-w3g128", "awq-w4g128", "magr-w2", "uniform-w3g64",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_published_setting_is_one_call(name, wide, tmp_path):
    folder = tmp_path / "out"
    small = SMALL | {"model": str(wide), "evaluate.tokens": 2}
    if name == "uniform-w3g64":
        small["quantize.tuning.steps"] = 2
    report = quantforge.quantize(name, settings=small, output=folder)
    bits = int(name.partition("-w")[2][0])
    group = name.rpartition("g")[2] if "g" in name.partition("-w")[2] else "256"
    assert report.sizes.stored_bits == pytest.approx(bits + 16 / int(group), abs=1e-9)
    assert 0 < report.quality.kl < {2: 3.0, 3: 0.6, 4: 0.1}[bits]
    assert math.isfinite(report.quality.perplexity)
    written = json.loads((folder / "quantforge.json").read_text())
    assert written["stock_readable"] is True
    assert written["plan"]["predicted_loss"] is None
    assert not (folder / "sensitivity.json").exists()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        packed = [key for key in file.keys() if key.endswith("weight_packed")]  # noqa: SIM118
    assert len(packed) == len(report.layers) == 7
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    for text in (card, page.partition("</style>")[2]):
        assert not re.search(r"hull|uniform networks|\bnan\b|\bNone\b", text)
    assert "There was nothing to search" in page
    assert quantforge.inspect(folder).budget == report.plan.budget
