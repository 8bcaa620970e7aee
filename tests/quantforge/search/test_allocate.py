"""Budgets, plans and the uniform hull on a table made by hand."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from quantforge.errors import BudgetError, UsageError
from quantforge.search.allocate import (
    block_candidate_bytes,
    candidate_bytes,
    make_plan,
    reachable_bits,
    search,
    stored_cost,
    uniform_plans,
)
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SPECS = (QuantSpec(2, 64), QuantSpec(3, -1), QuantSpec(4, 64))


def table(seed=0, blocks=2):
    layers = []
    for block in range(blocks):
        for stage, (name, out, group) in enumerate(
            [("q", 64, "qk"), ("k", 32, "qk"), ("o", 64, "o"), ("down", 48, "down")]
        ):
            layers.append(
                LayerInfo(
                    name=f"{block}.{name}", out_features=out, in_features=192, block=block,
                    stage=stage, fused_group=f"{block}.{group}",
                )
            )  # fmt: skip
    loss = torch.rand(len(layers), 3, generator=torch.Generator().manual_seed(seed)).double()
    loss *= torch.tensor([1.0, 0.3, 0.08])
    return Sensitivity(
        layers=tuple(layers), specs=SPECS, loss=loss, error=loss, estimator="made", fingerprint=""
    )


def cost(layer, spec):
    if spec is None:
        return 16 * layer.numel
    groups = 1 if spec.group_size == -1 else 192 // spec.group_size
    return layer.out_features * (192 * spec.bits + 16 * groups)


@pytest.mark.parametrize("bits", ["2.3bit", "3bit", "3.5bpw", "5 bits", "16bit"])
@pytest.mark.parametrize("independent", [False, True])
def test_equals_exhaustive_search_over_whole_assignments(bits, independent):
    sensitivity = table(blocks=1)
    layers = sensitivity.layers
    budget = Budget.parse(bits)
    plan = search(sensitivity, budget, SearchConfig(independent=independent))
    best = math.inf
    for picks in itertools.product([*range(3), None], repeat=4):
        if not independent and picks[0] != picks[1]:
            continue
        specs = [None if p is None else SPECS[p] for p in picks]
        total = sum(cost(layer, s) for layer, s in zip(layers, specs, strict=True))
        if Fraction(total, sum(layer.numel for layer in layers)) > budget.bits:
            continue
        value = sum(float(sensitivity.loss[i, p]) for i, p in enumerate(picks) if p is not None)
        best = min(best, value)
    assert plan.predicted_loss == pytest.approx(best)
    stored = sum(cost(layer, plan.assignment[layer.name]) for layer in layers)
    assert plan.stored_bits == pytest.approx(stored / sum(layer.numel for layer in layers))
    assert Fraction(stored, sum(layer.numel for layer in layers)) <= budget.bits
    if not independent:
        assert plan.assignment["0.q"] == plan.assignment["0.k"]


@pytest.mark.parametrize("solver", ["integer-program", "lagrangian", "pareto"])
def test_other_solvers_plan_from_the_same_table(solver):
    sensitivity = table(blocks=3)
    for bits in ("2.3bit", "3bit", "5bit"):
        budget = Budget.parse(bits)
        exact = search(sensitivity, budget, SearchConfig())
        plan = search(sensitivity, budget, SearchConfig(solver=solver))
        assert plan.solver == solver
        assert plan.stored_bits <= budget.bits
        assert plan.assignment["0.q"] == plan.assignment["0.k"]
        if solver == "lagrangian":
            assert exact.predicted_loss <= plan.predicted_loss <= 1.2 * exact.predicted_loss
        else:
            assert plan.predicted_loss == pytest.approx(exact.predicted_loss)
    with pytest.raises(BudgetError, match=r"plans reach 2\.250"):
        search(sensitivity, Budget.parse("2.2bit"), SearchConfig(solver=solver))


def test_a_budget_below_the_floor_names_the_floor():
    with pytest.raises(BudgetError, match=r"at least 2\.250bit") as caught:
        search(table(), Budget.parse("2.2bit"), SearchConfig())
    assert caught.value.exit_code == 4
    plan = search(table(), Budget.parse("2.25bit"), SearchConfig())
    assert set(plan.assignment.values()) == {QuantSpec(2, 64)}


def test_the_uniform_solver_names_the_range_of_uniform_plans():
    sensitivity, config = table(), SearchConfig(solver="uniform")
    sensitivity.loss[0, 0] = torch.inf  # 2 bits do not fit everywhere: no uniform plan of them
    low, high = reachable_bits(sensitivity, config)
    assert (low, high) == (pytest.approx(3 + 16 / 192), 16.0)
    with pytest.raises(BudgetError, match=r"uniform plans reach 3\.084 to 16\.000 .* 3\.084bit"):
        search(sensitivity, Budget.parse("3bit"), config)
    found = search(sensitivity, Budget.parse("3.084bit"), config)
    assert set(found.assignment.values()) == {QuantSpec(3, -1)}
    assert reachable_bits(sensitivity, SearchConfig())[0] < 3


@pytest.mark.parametrize("text", ["", "3", "bit", "3 bananas", "-3bit", "0bit", "17bit", "nanbit"])
def test_wrong_budgets_are_refused(text):
    with pytest.raises(UsageError, match="budget"):
        Budget.parse(text)


def test_a_budget_is_exact():
    assert Budget.parse("3.1bit").bits == Fraction(31, 10)
    assert Budget.parse("3.1bit").total_bits(10) == 31


def test_uniform_plans_and_the_uniform_solver():
    sensitivity = table()
    plans = uniform_plans(sensitivity)
    assert [p.budget for p in plans] == ["uniform 2b-g64", "uniform 3b-pc", "uniform 4b-g64"]
    assert [p.stored_bits for p in plans] == pytest.approx([2.25, 3 + 16 / 192, 4.25])
    assert plans[1].predicted_loss == pytest.approx(float(sensitivity.loss[:, 1].sum()))
    best = search(sensitivity, Budget.parse("3.2bit"), SearchConfig(solver="uniform"))
    assert set(best.assignment.values()) == {QuantSpec(3, -1)}
    exact = search(sensitivity, Budget.parse("3.2bit"), SearchConfig())
    assert exact.predicted_loss <= best.predicted_loss


def test_candidates_that_do_not_fit_are_never_chosen():
    sensitivity = table()
    sensitivity.loss[:, 1] = torch.inf
    plan = search(sensitivity, Budget.parse("4.25bit"), SearchConfig())
    assert QuantSpec(3, -1) not in plan.assignment.values()
    assert [p.budget for p in uniform_plans(sensitivity)] == ["uniform 2b-g64", "uniform 4b-g64"]


def test_reachable_range():
    low, high = reachable_bits(table(), SearchConfig())
    assert low == pytest.approx(2.25)
    assert high == 16.0


def test_disk_of_all_candidates_is_the_sum_over_those_that_fit():
    sensitivity = table()
    total = sum(cost(layer, spec) for layer in sensitivity.layers for spec in SPECS)
    assert candidate_bytes(sensitivity) == total / 8
    assert block_candidate_bytes(sensitivity.layers, SPECS) == total / 8
    sensitivity.loss[0, 1] = torch.inf
    assert candidate_bytes(sensitivity) == (total - cost(sensitivity.layers[0], SPECS[1])) / 8


def test_candidates_keep_only_group_sizes_that_divide_some_row():
    config = SearchConfig(bits=(2, 3), group_sizes=(64, 128, 192, -1))
    specs = config.candidates({576, 1536})
    assert {s.group_size for s in specs} == {64, 128, 192, -1}
    assert {s.group_size for s in config.candidates({576})} == {64, 192, -1}


def test_asymmetric_candidates_come_beside_the_symmetric_ones_when_asked_for():
    config = SearchConfig(bits=(2, 3), group_sizes=(64, -1))
    plain = config.candidates({192})
    assert all(spec.symmetric for spec in plain)
    both = config.model_copy(update={"asymmetric": True}).candidates({192})
    assert set(both) == {QuantSpec(s.bits, s.group_size, k) for s in plain for k in (True, False)}
    assert both == tuple(sorted(both))
    layer = table(blocks=1).layers[0]
    zero_points = 3 * 3 * layer.out_features  # bits · groups · rows
    plain_cost, asym_cost = (stored_cost(layer, QuantSpec(3, 64, k)) for k in (True, False))
    assert asym_cost - plain_cost == zero_points


def test_plan_accounts_for_kept_layers():
    sensitivity = table(blocks=1)
    assignment = {layer.name: None for layer in sensitivity.layers}
    plan = make_plan(sensitivity, assignment, budget="16bit", solver="file")
    assert (plan.stored_bits, plan.code_bits, plan.predicted_loss) == (16.0, 16.0, 0.0)
