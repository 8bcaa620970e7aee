"""Budgets in bytes and in quality, plans from files, and the frontier, through real runs."""

import json

import pytest
import yaml
from scipy.special import stdtrit

import quantforge
from quantforge.errors import BudgetError, InputError
from quantforge.format.manifest import read_manifest
from quantforge.types import QuantSpec


@pytest.fixture(scope="module")
def settings(small):
    """The options of the command line's small runs, as settings."""
    pairs = (option.partition("=") for option in small if "=" in option)
    return {key: yaml.safe_load(value) for key, _, value in pairs} | {"quantize.tuning.steps": 2}


@pytest.fixture(scope="module")
def call(checkpoint, text, settings):
    """Calls a function on the tiny checkpoint."""

    def run(function, changes=(), **options):
        return function(
            checkpoint, calibration=text, settings={**settings, **dict(changes)}, **options
        )

    return run


def bytes_on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_the_command_predicts_the_bytes_it_writes(run, small, compiled, checkpoint, text):
    folder, report = compiled
    done = run(
        "plan", checkpoint, "--budget", "3.3bit", "--calibration", text, "--json", *small,
        cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["plan"]["assignment"] == report["plan"]["assignment"]
    assert planned["sizes"] == report["sizes"]
    assert planned["sizes"]["checkpoint_bytes"] == bytes_on_disk(folder)
    assert planned["predicted_error"] > 0
    assert planned["work"]["seconds"] > 0
    assert {s["name"].split()[0]: s["loads"] for s in planned["servers"]}["transformers"] is True


@pytest.mark.parametrize(
    "specs", [("2b-pc", "8b-g32"), ("kept", "5b-g16", "7b-pc"), ("3b-g32-asym", "4b-pc-asym")]
)
def test_bytes_of_any_plan_are_predicted(call, tmp_path, specs):
    names = call(quantforge.plan, budget="3bit").plan.assignment
    groups = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    plan = {name: specs[groups.index(name.rpartition(".")[0]) % len(specs)] for name in names}
    planned = call(quantforge.plan, plan=plan)
    report = call(quantforge.quantize, plan=plan, output=tmp_path / "out")
    assert planned.sizes == report.sizes
    assert planned.sizes.checkpoint_bytes == bytes_on_disk(tmp_path / "out")
    assert len({str(spec) for spec in report.plan.assignment.values()}) == len(specs)


def test_a_budget_in_bytes_is_the_size_of_the_folder(call, tmp_path):
    report = call(quantforge.quantize, budget="88kB", output=tmp_path / "out")
    assert 0.97 * 88_000 < bytes_on_disk(tmp_path / "out") <= 88_000
    assert report.plan.budget == "88kB"
    assert report.curve
    memory = call(quantforge.plan, budget="vram:150kB@128")  # 3 blocks, 2 heads of 16, k and v
    cache = 128 * 3 * 2 * 2 * 16 * 2
    assert 148_000 < memory.memory <= 150_000
    weights = memory.memory - cache
    assert memory.sizes.checkpoint_bytes - 10_000 < weights < memory.sizes.checkpoint_bytes
    both = call(quantforge.plan, budget="3bit,0.9x")
    assert both.plan.assignment == call(quantforge.plan, budget="3bit").plan.assignment


@pytest.mark.parametrize("budget", ["kl:0.01", "kl:0.01,100kB"])
def test_a_target_is_met_by_measurement(call, budget):
    planned = call(quantforge.plan, budget=budget)
    (outcome,) = planned.targets
    student = float(stdtrit(outcome.windows - 1, 0.95))
    assert outcome.upper == pytest.approx(outcome.measured + student * outcome.stderr)
    assert outcome.upper <= 0.01
    assert outcome.windows == 3
    assert outcome.predicted == planned.plan.predicted_loss
    inside = [u.stored_bits for u in planned.uniform if u.predicted_loss <= 0.005]
    assert planned.plan.stored_bits < min(inside)
    with pytest.raises(BudgetError, match=r"2\.3\d+, the upper bound for kl:0.0001"):
        call(quantforge.plan, budget="2.4bit,kl:0.0001")


def test_the_finished_network_is_better_than_the_target_asked_for(call, tmp_path):
    report = call(quantforge.quantize, budget="kl:0.02", output=tmp_path / "out")
    (outcome,) = report.targets
    assert outcome.upper <= 0.02
    assert report.quality.kl < outcome.measured  # compensated block by block, and tuned
    # whether two steps of tuning gain anything is chance, and then a note of its own
    assert not [line for line in report.warnings if "kl:0.02" in line]
    assert "Target kl:0.02: of" in (tmp_path / "out" / "report.html").read_text()
    floor = call(quantforge.plan, budget="ppl:+900%")
    assert floor.plan.stored_bits == pytest.approx(floor.reachable[0])


def test_an_edited_plan_comes_back_in(run, small, compiled, checkpoint, text, tmp_path):
    folder, report = compiled
    document = json.loads((folder / "plan.json").read_text())
    name = "model.layers.1.mlp.down_proj"
    document["assignment"][name] = "8b-g32"
    (tmp_path / "plan.json").write_text(json.dumps(document, indent=2))
    done = run(
        "quantize", checkpoint, "--plan", "plan.json", "--calibration", text, "-o", "out",
        "--json", *small, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    manifest = read_manifest(tmp_path / "out")
    wanted = {n: QuantSpec.parse(s) for n, s in document["assignment"].items()}
    assert manifest.plan.assignment == wanted
    assert (manifest.plan.solver, found["plan"]["solver"]) == ("file", "file")
    # 128 columns a row: 8 bits and 4 scales against what stood there
    before = QuantSpec.parse(report["plan"]["assignment"][name]).stored_bits(64, 128)
    weights = found["sizes"]["planned_weights"]
    more = (QuantSpec(8, 32).stored_bits(64, 128) - before) / weights
    assert found["plan"]["stored_bits"] == pytest.approx(report["plan"]["stored_bits"] + more)
    assert float(found["plan"]["budget"].removesuffix("bit")) == pytest.approx(
        found["plan"]["stored_bits"], abs=1e-3
    )
    assert found["curve"][0]["name"] == "plan"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "those of a plan that was given; none was searched" in page


def test_a_given_plan_is_kept_even_where_a_uniform_network_is_better(call, tmp_path):
    plan = dict.fromkeys(call(quantforge.plan, budget="3bit").plan.assignment, "2b-g32")
    report = call(quantforge.quantize, plan=plan, output=tmp_path / "out")
    assert set(map(str, report.plan.assignment.values())) == {"2b-g32"}
    assert report.plan.budget == "2.5bit"
    one_pass = {point.name: point.quality.kl for point in report.curve}
    assert one_pass["plan"] == pytest.approx(one_pass["uniform 2b-g32"], rel=1e-5)
    better = [u for u in ("uniform 2b-pc",) if one_pass[u] < one_pass["plan"]]
    assert any("the plan that was given" in w for w in report.warnings) == bool(better)


def test_without_compensation_a_given_plan_needs_candidates(call):
    names = call(quantforge.plan, budget="3bit").plan.assignment
    changes = {"quantize.sequential": False}
    with pytest.raises(InputError, match="q_proj is 7b-pc, which is no candidate"):
        call(quantforge.plan, changes, plan=dict.fromkeys(names, "7b-pc"))
    report = call(quantforge.plan, changes, plan=dict.fromkeys(names, "kept"))
    assert report.plan.stored_bits == 16


def test_the_frontier_as_files(run, small, compiled, checkpoint, text):
    folder, _ = compiled
    command = (
        "pareto", checkpoint, "--points", 9, "--measure", 3, "--calibration", text, "--json",
        "-o", "frontier", *small,
    )  # fmt: skip
    done = run(*command, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    names = {path.name for path in (folder.parent / "frontier").iterdir()}
    assert names == {"pareto.json", "pareto.svg", "pareto.png", "pareto.html"}
    points = json.loads((folder.parent / "frontier" / "pareto.json").read_text())["points"]
    assert points[0]["plan"]["stored_bits"] == printed["points"][0]["plan"]["stored_bits"]
    measured = [point["quality"]["kl"] for point in points if point["quality"]]
    assert len(measured) == 3
    assert measured[0] > measured[1] > measured[2] >= 0
    assert (points[0]["quality"] is None, points[-1]["quality"] is None) == (False, False)
    bits = [point["plan"]["stored_bits"] for point in points]
    losses = [point["plan"]["predicted_loss"] for point in points]
    sizes = [point["checkpoint_bytes"] for point in points]
    assert bits == sorted(bits)
    assert losses == sorted(losses, reverse=True)
    assert sizes == sorted(sizes)
    assert 5.5 < bits[-1] <= 6
    assert run(*command, cwd=folder.parent).returncode == 2  # it exists
    assert run(*command, "--force", cwd=folder.parent).returncode == 0
    uniform = ("--set", "search.solver=uniform", "--set", "search.bits=[3]")
    one = run("pareto", checkpoint, *uniform, "--set", "search.group_sizes=[32]", cwd=folder.parent)
    assert one.returncode == 2
    assert "no frontier" in one.stderr


def test_a_plan_whose_losses_are_guesses_says_that_a_uniform_network_may_be_taken(call):
    changes = {"search.correct": False, "calibrate.estimator": "gram"}
    (note,) = [
        line
        for line in call(quantforge.plan, changes, budget="3.4bit").warnings
        if "take the better of the two" in line
    ]
    assert note.startswith("uniform ")
    sure = call(quantforge.plan, budget="3.3bit").warnings
    assert not any("take the better of the two" in line for line in sure)
