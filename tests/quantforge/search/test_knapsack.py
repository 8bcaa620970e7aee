"""The dynamic program against exhaustive search, when it is exact and when it is thinned."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.search.frontier import sweep
from quantforge.search.integer_program import integer_program
from quantforge.search.knapsack import solve


def least_loss(loss, cost, budget):
    rows = np.arange(len(loss))
    everything = np.array(list(itertools.product(range(loss.shape[1]), repeat=len(loss))))
    values = loss[rows, everything].sum(axis=1)
    values[cost[rows, everything].sum(axis=1) > budget] = np.inf
    return values.min()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000), st.integers(0, 60), st.booleans()
)
def test_equals_brute_force(items, candidates, seed, budget, whole):
    generator = np.random.default_rng(seed)
    loss = generator.random((items, candidates))
    loss[generator.random((items, candidates)) < 0.15] = np.inf
    cost = generator.integers(0, 15, (items, candidates))
    if not whole:
        cost = cost + generator.random((items, candidates))
    choice = solve(loss, cost, budget)
    expected = least_loss(loss, cost, budget)
    if np.isinf(expected):
        assert choice is None
        return
    assert choice is not None
    assert choice.loss == pytest.approx(expected)
    assert choice.exact and choice.gap == 0
    assert choice.cost <= budget
    rows = np.arange(items)
    assert choice.cost == cost[rows, list(choice.picks)].sum()
    assert choice.loss == loss[rows, list(choice.picks)].sum()


@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force_over_eight_layers_of_four_candidates(seed):
    """(identity 26) And the integer program, at several budgets."""
    generator = np.random.default_rng(seed)
    loss, cost = generator.random((8, 4)), generator.integers(1, 1000, (8, 4))
    low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum()
    for share in (0.1, 0.35, 0.8):
        budget = int(low + share * (high - low))
        expected = least_loss(loss, cost, budget)
        assert solve(loss, cost, budget).loss == pytest.approx(expected, rel=1e-12)
        program = integer_program(loss, cost[None], [budget])
        assert program.choice.loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_where_losses_and_costs_repeat(seed):
    # equal layers: many plans tie, and the bound tells few candidates apart
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 2, 7)
    loss = np.sort(generator.integers(0, 6, (2, 3)), axis=1)[kind, ::-1].astype(float)
    cost = np.sort(generator.integers(0, 5, (2, 3)), axis=1)[kind]
    for budget in range(int(cost.min(axis=1).sum()), int(cost.max(axis=1).sum()) + 2):
        assert solve(loss, cost, budget).loss == least_loss(loss, cost, budget)


def test_ties_go_to_the_cheaper_plan():
    loss = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    cost = np.array([[0, 5, 3], [0, 1, 9]])
    choice = solve(loss, cost, 11)
    assert (choice.loss, choice.cost, choice.picks) == (1.0, 3, (2, 0))


def test_negative_losses_and_free_candidates():
    loss = np.array([[-1.0, -2.0], [0.5, -0.25]])
    cost = np.array([[0, 4], [0, 0]])
    assert solve(loss, cost, 3).picks == (0, 1)
    assert solve(loss, cost, np.inf).picks == (1, 1)
    assert solve(loss, cost, -1) is None


def test_more_budget_never_costs_loss():
    generator = np.random.default_rng(3)
    loss, cost = generator.random((12, 5)), generator.integers(1, 30, (12, 5))
    losses = [c.loss for b in range(40, 360, 5) if (c := solve(loss, cost, b)) is not None]
    assert len(losses) > 30
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))


def test_a_thinned_list_stays_within_the_budget_and_says_how_far_off_it_can_be():
    generator = np.random.default_rng(4)
    cost = np.sort(generator.integers(1_000, 9_001, (30, 5)), axis=1)
    loss = (10_000.0 - cost) * (1 + 0.01 * generator.random(cost.shape))  # little drops out
    inexact = 0
    for budget in range(90_007, 200_000, 20_001):
        exact = solve(loss, cost, budget, max_plans=10**9)
        coarse = solve(loss, cost, budget, max_plans=500)
        assert exact.exact
        assert coarse.cost <= budget
        assert coarse.bound <= exact.loss <= coarse.loss <= exact.loss * 1.001
        assert coarse.bound == pytest.approx(sweep(loss, cost).bound(budget))
        inexact += not coarse.exact
    assert inexact >= 3


def test_thousands_of_layers_are_solved_to_the_bound():
    # small beside the bench script, large enough that a table over all costs would not do
    generator = np.random.default_rng(5)
    loss, cost = generator.random((2_000, 12)), generator.integers(1, 10**6, (2_000, 12))
    budget = int(0.8 * cost.min(axis=1).sum() + 0.2 * cost.max(axis=1).sum())
    choice, frontier = solve(loss, cost, budget), sweep(loss, cost)
    assert choice.exact
    assert choice.cost <= budget
    largest_step = -np.diff(frontier.loss).min()
    assert 0 <= choice.loss - frontier.bound(budget) <= 1e-2 * largest_step
