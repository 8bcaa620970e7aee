"""Refinement: on a closed form where interactions mislead the search, and on a tiny network."""

import copy
import itertools
import threading
from dataclasses import replace

import pytest
import torch

import quantforge
from quantforge.assembling import StoredWeights, changed_weights, derivatives
from quantforge.errors import CancelledError, UsageError
from quantforge.opening import configure, limit_of, open_job
from quantforge.refinement import (
    MEASURED,
    Refined,
    Surroundings,
    refine,
    remembered,
    swap_curvature,
)
from quantforge.results import Quality, RefinementRound
from quantforge.search.allocate import make_plan, search, stored_cost
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SPECS = (QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(4, 64))
SETTINGS = {
    "search.bits": [2, 3, 4],
    "search.group_sizes": [32, -1],
    "evaluate.curve_windows": 4,
    "search.refine": 0,
    "evaluate.precision": "float32",
    "calibrate.precision": "float32",
    "calibrate.gradient_sequences": 12,
    "quantize.tuning.steps": 0,
}


class Quadratic:
    """A loss ½ |Σ_i A_i D_i|², whose exact derivatives and values are known; layers are vectors."""

    def __init__(self, seed, layers=6, samples=40):
        generator = torch.Generator().manual_seed(seed)
        size = torch.tensor([0.6, 0.3, 0.12, 0.0])
        own = torch.randn(samples, layers, 4, generator=generator).double()
        common = torch.randn(samples, 1, 1, generator=generator).double()
        # the first half of the layers make the same error, which adds up
        shared = (torch.arange(layers) < layers // 2).double()[None, :, None]
        self.along = size * (own * (1 - 0.6 * shared) + 0.8 * shared * common)
        self.layers = tuple(
            LayerInfo(
                name=f"{i}", out_features=4, in_features=192, block=i, stage=0, fused_group=f"{i}"
            )
            for i in range(layers)
        )
        alone = self.along[:, :, :3].square().mean(0)
        self.sensitivity = Sensitivity(
            layers=self.layers, specs=SPECS, loss=alone, error=alone, estimator="", fingerprint=""
        )
        self.column = {spec: i for i, spec in enumerate(SPECS)} | {None: 3}
        self.measured = 0

    def sums(self, plan):
        picked = [self.along[:, i, self.column[s]] for i, s in enumerate(plan.assignment.values())]
        return torch.stack(picked, 1)

    def loss(self, plan):
        return float(self.sums(plan).sum(1).square().mean())

    def derive(self, plan):
        taken = self.sums(plan)
        difference = self.along - taken[:, :, None]
        return 2 * (taken.sum(1)[:, None, None] * difference).mean(0)

    def measure(self, plans):
        self.measured += len(plans)
        found = []
        for plan in plans:
            window = self.sums(plan).sum(1).square().view(2, -1).mean(1).tolist()
            found.append(
                Quality(
                    text="", windows=2, window_length=1, perplexity=1.0, reference_perplexity=1.0,
                    kl=self.loss(plan), kl_stderr=0.0, top1=1.0, window_kl=tuple(window),
                    window_nll=(0.0, 0.0),
                )
            )  # fmt: skip
        return found

    def around(self, budget):
        weights = sum(layer.numel for layer in self.layers)
        return Surroundings(
            derive=self.derive, measure=self.measure, limit=budget.total_bits(weights),
            within=lambda plan: plan.stored_bits <= budget.bits,
        )  # fmt: skip

    def best(self, budget):
        """Least loss of all plans within a budget."""
        weights, best = sum(layer.numel for layer in self.layers), float("inf")
        for specs in itertools.product([*SPECS, None], repeat=len(self.layers)):
            named = {one.name: spec for one, spec in zip(self.layers, specs, strict=True)}
            if sum(stored_cost(x, named[x.name]) for x in self.layers) <= budget.bits * weights:
                plan = make_plan(self.sensitivity, named, budget="", solver="")
                best = min(best, self.loss(plan))
        return best


def test_changes_of_moves_are_exact_where_the_loss_is_quadratic():
    problem = Quadratic(0)
    plan = search(problem.sensitivity, Budget.parse("3bit"), SearchConfig())
    columns = [problem.column[spec] for spec in plan.assignment.values()]
    products = problem.along[:, :, :3]
    curvature = swap_curvature(problem.sensitivity.loss, products, columns)
    expected = (problem.along - problem.sums(plan)[:, :, None]).square().mean(0)
    torch.testing.assert_close(curvature, expected)
    first = problem.derive(plan)
    for index, candidate in ((0, 2), (3, 0), (5, 3)):
        changed = dict(plan.assignment)
        changed[str(index)] = [*SPECS, None][candidate]
        moved = make_plan(problem.sensitivity, changed, budget="", solver="")
        predicted = float(first[index, candidate] + curvature[index, candidate])
        assert problem.loss(moved) - problem.loss(plan) == pytest.approx(predicted)


@pytest.mark.parametrize("seed", range(4))
def test_refinement_finds_what_the_additive_search_misses(seed):
    problem, budget = Quadratic(seed), Budget.parse("3bit")
    plan = search(problem.sensitivity, budget, SearchConfig())
    start, best = problem.loss(plan), problem.best(budget)
    assert start > 1.1 * best
    config = SearchConfig(refine=4)
    products = problem.along[:, :, :3]
    found = refine(plan, problem.sensitivity, products, config, problem.around(budget))
    assert found.plan.stored_bits <= 3.0
    assert (found.plan.solver, found.plan.budget) == ("refined", plan.budget)
    assert problem.loss(found.plan) <= start - 0.7 * (start - best)
    assert found.rounds[0].before == pytest.approx(start)
    assert found.rounds[-1].after == pytest.approx(problem.loss(found.plan))
    for before, after in itertools.pairwise(found.rounds):
        assert after.before == before.after
        assert before.layers > 0
    assert problem.measured == 1 + sum(one.plans for one in found.rounds)
    assert max(one.plans for one in found.rounds) <= MEASURED + 1


def test_a_plan_that_nothing_near_betters_is_kept_and_ends_it():
    problem, budget = Quadratic(0), Budget.parse("3bit")
    plan = search(problem.sensitivity, budget, SearchConfig())
    around = problem.around(budget)
    worse = Surroundings(
        derive=around.derive, within=around.within, limit=around.limit,
        measure=lambda plans: around.measure([plan] * len(plans)),
    )  # fmt: skip
    products = problem.along[:, :, :3]
    found = refine(plan, problem.sensitivity, products, SearchConfig(refine=5), worse)
    assert found.plan is plan
    (only,) = found.rounds
    assert (only.layers, only.before, only.stderr) == (0, only.after, 0.0)
    nothing = Surroundings(
        derive=around.derive, measure=around.measure, within=lambda _: False, limit=around.limit
    )
    found = refine(plan, problem.sensitivity, products, SearchConfig(refine=1), nothing)
    assert (found.plan, found.rounds[0].plans) == (plan, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path_factory.getbasetemp() / "refinement"))


@pytest.fixture(scope="module")
def module():
    return train(tiny_llama(blocks=2), steps=100)


def batches():
    return [markov_tokens(4, 32, seed=seed) for seed in range(16)]


def test_derivatives_at_a_plan_are_those_of_its_measured_loss(module):
    job = open_job(module, configure(module, settings=SETTINGS), calibration=batches())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tokens = job.calibration.fitting[:5]
    with job.measure(fresh=False) as measured:
        sensitivity, store = measured.needed_for_search()
        plan = job.plans.find(sensitivity, Budget.parse("2.8bit"))
        found = derivatives(
            job.model, plan, sensitivity.specs, store, tokens, measured.final_hidden[:5],
            options=job.recipe.calibrate, monitor=job.monitor,
        ).mean(0)  # fmt: skip
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])
        with torch.no_grad():
            head = module.lm_head.weight
            target = (measured.final_hidden[:5].float() @ head.T).log_softmax(-1)

        @torch.no_grad()
        def loss(layer, difference, step):
            weight = module.get_submodule(layer.name).weight
            weight.add_(difference, alpha=step)
            logits = module(input_ids=tokens).logits.log_softmax(-1)
            weight.sub_(difference, alpha=step)
            return float((target.exp() * (target - logits)).sum(-1).mean())

        with changed_weights(job.model) as loan:
            loan.put(StoredWeights(plan, store))
            for row, column in ((0, 3), (4, len(sensitivity.specs)), (13, 0)):
                layer = sensitivity.layers[row]
                wanted = loan.own[layer.name]
                if column < len(sensitivity.specs):
                    wanted = store.get(layer.name, sensitivity.specs[column]).dequantize()
                difference = wanted - module.get_submodule(layer.name).weight.detach()
                slope = (loss(layer, difference, 0.05) - loss(layer, difference, -0.05)) / 0.1
                assert float(found[row, column]) == pytest.approx(slope, rel=0.05, abs=2e-5)


def test_a_run_refines_a_plan_of_a_poor_estimate_within_its_budget(module):
    poor = SETTINGS | {"calibrate.estimator": "gram", "search.correct": False}
    reports = {
        rounds: quantforge.plan(
            module, budget="2.6bit", calibration=batches(),
            settings=poor | {"search.refine": rounds},
        )
        for rounds in (0, 2)
    }  # fmt: skip
    plain, refined = reports[0], reports[2]
    assert plain.refinement == ()
    assert refined.plan.stored_bits <= 2.6
    assert refined.plan.assignment != plain.plan.assignment
    first = refined.refinement[0]
    assert first.layers > 0
    assert first.after < 0.95 * first.before
    job = open_job(module, configure(module, settings=poor), calibration=batches())
    with job.measure(fresh=False) as measured:
        qualities = job.measure_plans([plain.plan, refined.plan], measured.store, "again")
    assert qualities[0].kl == pytest.approx(first.before, rel=1e-6)
    assert qualities[1].kl == pytest.approx(refined.refinement[-1].after, rel=1e-6)
    assert qualities[1].kl < qualities[0].kl


def test_a_refined_plan_keeps_its_embedding(module):
    settings = SETTINGS | {"calibrate.estimator": "gram", "search.correct": False}
    report = quantforge.plan(
        module, budget="2.6bit", calibration=batches(),
        settings=settings | {"search.refine": 1, "embeddings.include": "8bit"},
    )  # fmt: skip
    assert report.refinement[0].layers > 0  # something better was found and taken
    outside = {n: s for n, s in report.plan.assignment.items() if "layers" not in n}
    assert [spec.bits for spec in outside.values()] == [8] * len(outside) != []
    assert report.plan.stored_bits <= 2.6


@pytest.mark.parametrize("stage", ["gradients", "measure plans around it"])
def test_a_cancelled_refinement_leaves_the_network_as_it_was(module, stage):
    network = copy.deepcopy(module)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    settings = SETTINGS | {"search.refine": 1}
    quantforge.plan(network, budget="2.6bit", calibration=batches(), settings=SETTINGS)
    cancel, changed = threading.Event(), []

    def progress(event):
        if event.stage == stage and not changed:  # from the cache: only refinement runs now
            layer = "model.layers.0.mlp.down_proj.weight"
            changed.append(not torch.equal(network.state_dict()[layer], before[layer]))
            cancel.set()

    with pytest.raises(CancelledError, match="cancelled during"):
        quantforge.plan(
            network, budget="2.6bit", calibration=batches(), settings=settings, cancel=cancel,
            progress=progress,
        )  # fmt: skip
    assert changed == [True]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_refinement_does_not_go_with_is_said():
    recipe = configure("llama", budget="kl:0.1", settings={"search.refine": 2})
    with pytest.raises(UsageError, match=r"search.refine=2 does not go with kl:0.1"):
        limit_of(recipe, "kl:0.1", None)
    recipe = configure("llama", budget="3bit, latency:-25%", settings={"search.solver": "ordering"})
    with pytest.raises(UsageError, match=r"search.solver=ordering takes one limit, not 2"):
        limit_of(recipe, "3bit, latency:-25%", None)
    with pytest.raises(UsageError, match="refine exchanges the grids of layers"):
        configure("llama", settings={"search.refine": 1, "search.solver": "uniform"})


def test_what_was_found_is_read_back_and_a_broken_file_is_made_again(tmp_path):
    loss = Quadratic(0)
    plan = search(loss.sensitivity, Budget.parse("2.5bit"), SearchConfig())
    plan = replace(plan, assignment=dict(reversed(plan.assignment.items())))  # not by name
    one = RefinementRound(plans=3, layers=1, before=0.2, after=1 / 7, stderr=0.01)
    path, looks = tmp_path / "refined" / "a.json", []

    def look():
        looks.append(1)
        return Refined(plan=plan, rounds=(one,))

    assert remembered(path, look) == look()
    assert remembered(path, look) == Refined(plan=plan, rounds=(one,))
    assert len(looks) == 2  # one of them by the test itself
    path.write_text(path.read_text()[:-20])
    assert remembered(path, look).rounds == (one,)
    assert len(looks) == 3
    assert remembered(path, look).plan == plan
    assert list(remembered(path, look).plan.assignment) == list(plan.assignment)
    assert len(looks) == 3


def test_the_same_plan_is_refined_once(module, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    stages = []
    settings = SETTINGS | {"search.refine": 1}
    reports = []
    for _ in range(2):
        stages.append([])
        reports.append(
            quantforge.plan(
                module, budget="2.6bit", calibration=batches(), settings=settings,
                progress=lambda event: stages[-1].append(event.stage),
            )
        )  # fmt: skip
    assert reports[0].plan == reports[1].plan
    assert reports[0].refinement == reports[1].refinement
    assert "measure plans around it" in stages[0]
    assert "measure plans around it" not in stages[1]


def test_another_device_is_looked_around_for_again(module, tmp_path, monkeypatch):
    """What was found within one device's time may be too slow on another."""
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    looked = []
    for device in ("a100", "h100", "a100"):
        stages = []
        quantforge.plan(
            module, budget="2.6bit,latency:1s", calibration=batches(),
            settings=SETTINGS | {"search.refine": 1, "device": device},
            progress=lambda event, stages=stages: stages.append(event.stage),
        )  # fmt: skip
        looked.append("measure plans around it" in stages)
    assert looked == [True, True, False]
