"""Solvers of objectives with interactions against exhaustive search."""

import numpy as np
import pytest

from quantforge.search.knapsack import solve
from quantforge.search.objective import GramObjective, PairwiseObjective
from quantforge.search.pairwise import EXACT_ITEMS, branch_and_bound, least, local_search


def pairwise(seed, items, candidates):
    generator = np.random.default_rng(seed)
    pair = generator.normal(0, 0.3, (items, candidates, items, candidates))
    pair = pair + pair.transpose(2, 3, 0, 1)
    pair[np.arange(items), :, np.arange(items)] = 0
    loss = generator.random((items, candidates))
    loss[0, 0] = np.inf
    return PairwiseObjective(loss=loss, pair=pair)


def gram(seed, items, candidates):
    generator = np.random.default_rng(seed)
    loss = np.zeros((items, candidates))
    loss[0, 0] = np.inf
    projections = generator.normal(0.3, 1, (8, items, candidates))
    return GramObjective(loss=loss, projections=projections, weight=1 / 16)


OBJECTIVES = {"pairwise": pairwise, "gram": gram}


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_branching_equals_brute_force(kind, resources, brute_force_objective):
    met = 0
    for seed in range(12):
        objective = OBJECTIVES[kind](seed, 5, 4)
        costs = np.random.default_rng(50 + seed).integers(0, 15, (resources, 5, 4))
        limits = (costs.mean(axis=2).sum(axis=1) * (0.6, 0.8, 1.0, 4.0)[seed % 4]).astype(int)
        best = brute_force_objective(objective, costs, limits)
        choice = branch_and_bound(objective, costs, limits)
        if best is None:
            assert choice is None
            continue
        met += 1
        assert choice.exact
        assert choice.loss == pytest.approx(best)
        assert choice.loss == pytest.approx(objective.value(np.array(choice.picks)))
        assert (np.array(choice.costs) <= limits).all()
    assert met >= 6


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_local_search_ends_where_no_two_exchanges_help(kind, brute_force_objective):
    found, starts = 0, 0
    for seed in range(15):
        objective = OBJECTIVES[kind](seed, 5, 4)
        costs = np.random.default_rng(seed).integers(0, 15, (1, 5, 4))
        limits = [int(costs.mean(axis=2).sum() * 0.8)]
        best = brute_force_objective(objective, costs, limits)
        if best is None:
            continue
        choice = local_search(objective, costs, limits)
        start = solve(objective.alone, costs[0], limits[0])
        assert choice.loss <= objective.value(np.array(start.picks)) + 1e-12
        assert choice.bound <= best + 1e-9
        assert best <= choice.loss + 1e-9
        assert choice.cost <= limits[0]
        for first in range(5):
            for second in range(5):
                for mine, theirs in np.ndindex(4, 4):
                    picks = np.array(choice.picks)
                    picks[first], picks[second] = mine, theirs
                    if costs[0][np.arange(5), picks].sum() <= limits[0]:
                        assert objective.value(picks) >= choice.loss - 1e-9
        found += choice.loss <= best + 1e-9
        starts += objective.value(np.array(start.picks)) <= best + 1e-9
    assert found >= 10
    assert found > starts  # exchanges do find what the additive optimum misses


def test_few_items_are_solved_exactly_and_many_by_exchanges(brute_force_objective):
    beaten = 0
    for seed in range(15):
        objective = pairwise(seed, 6, 4)
        costs = np.random.default_rng(seed).integers(0, 15, (1, 6, 4))
        limits = [int(costs.mean(axis=2).sum() * 0.8)]
        best = brute_force_objective(objective, costs, limits)
        choice = least(objective, costs, limits)
        assert choice.exact
        assert choice.loss == pytest.approx(best)
        beaten += choice.loss < local_search(objective, costs, limits).loss - 1e-9
    assert beaten > 0
    many = pairwise(0, EXACT_ITEMS + 1, 3)
    costs = np.random.default_rng(0).integers(1, 9, (1, EXACT_ITEMS + 1, 3))
    assert least(many, costs, [80]) == local_search(many, costs, [80])


def test_two_exchanges_pay_for_each_other():
    # each alone is worse or too dear, both together are better: only a double exchange gets there
    pair = np.zeros((2, 2, 2, 2))
    pair[0, 1, 1, 1] = pair[1, 1, 0, 1] = -3.0
    objective = PairwiseObjective(loss=np.array([[0.0, 1.0], [0.0, 1.0]]), pair=pair)
    costs = np.array([[[2, 0], [0, 2]]])
    choice = local_search(objective, costs, [2])
    assert (choice.picks, choice.loss, choice.cost) == ((1, 1), -1.0, 2)
    assert choice.bound <= -1.0


def test_no_interaction_is_the_dynamic_program():
    generator = np.random.default_rng(8)
    loss, cost = generator.random((20, 5)), generator.integers(1, 50, (20, 5))
    budget = int(cost.mean(axis=1).sum() * 0.7)
    exact = solve(loss, cost, budget)
    nothing = PairwiseObjective(loss=loss, pair=np.zeros((20, 5, 20, 5)))
    choice = local_search(nothing, cost[None], [budget])
    assert choice.picks == exact.picks
    flat = GramObjective(loss=loss, projections=np.zeros((3, 20, 5)), weight=1.0)
    assert local_search(flat, cost[None], [budget]).loss == pytest.approx(exact.loss)


def test_a_start_is_taken_and_must_be_within_the_limits():
    objective = pairwise(1, 4, 3)
    costs = np.random.default_rng(1).integers(1, 9, (1, 4, 3))
    start = np.array([1, 2, 0, 1])
    limit = [int(costs[0][np.arange(4), start].sum())]
    stuck = local_search(objective, costs, limit, start=start, max_passes=0)
    assert stuck.picks == tuple(start)
    assert stuck.loss == pytest.approx(objective.value(start))
    assert local_search(objective, costs, limit, start=start).loss <= stuck.loss
    with pytest.raises(ValueError, match="start is not within the limits"):
        local_search(objective, costs, [limit[0] - 1], start=start)


def test_limits_that_cannot_be_met_have_no_choice():
    objective = pairwise(2, 3, 3)
    costs = np.full((2, 3, 3), 5)
    assert local_search(objective, costs, [15, 14]) is None
    assert branch_and_bound(objective, costs, [14, 15]) is None
    assert local_search(objective, costs[:1], [14]) is None


def test_branching_that_gives_up_still_bounds(brute_force_objective):
    objective = pairwise(3, 6, 4)
    costs = np.random.default_rng(3).integers(0, 15, (1, 6, 4))
    limits = [int(costs.mean(axis=2).sum() * 0.8)]
    best = brute_force_objective(objective, costs, limits)
    gaps = []
    for nodes in (1, 10, 100, 10_000):
        choice = branch_and_bound(objective, costs, limits, max_nodes=nodes)
        assert choice.bound <= best + 1e-9
        assert best <= choice.loss + 1e-9
        gaps.append(choice.gap)
    assert gaps[0] > 0 == gaps[-1]


def test_a_language_models_worth_of_layers_is_searched_incrementally():
    # every pair of 60 layers times 10 candidates, through 32 samples
    generator = np.random.default_rng(9)
    bits = np.array([2, 2.25, 2.5, 3, 3.25, 3.5, 4, 4.25, 5, 6])
    size = generator.integers(1, 9, (60, 1)) * 1000
    common = generator.normal(0, 1, (32, 1, 1))
    own = generator.normal(0, 1, (32, 60, 10))
    projections = (common + 2 * own) * np.sqrt(size) * 2.0**-bits
    objective = GramObjective(loss=np.zeros((60, 10)), projections=projections, weight=1 / 64)
    cost = (size * bits * 4).astype(np.int64)
    budget = int(3 * 4 * size.sum())
    choice = local_search(objective, cost[None], [budget])
    additive = solve(objective.alone, cost, budget)
    assert choice.cost <= budget
    assert choice.loss < 0.9 * objective.value(np.array(additive.picks))
    assert 0 < choice.bound < choice.loss
