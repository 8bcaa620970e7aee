"""The Lagrangian sweep: its corners, its lower bound and the duality gap."""

import numpy as np
import pytest

from quantforge.search.choice import chosen, totals
from quantforge.search.frontier import additive_bound, sweep
from quantforge.search.knapsack import solve


@pytest.mark.parametrize("seed", range(15))
def test_corners_are_what_prices_choose(seed, tables):
    loss, costs = tables(seed, 6, 5)
    frontier = sweep(loss, costs[0])
    assert (np.diff(frontier.cost) > 0).all()
    assert (np.diff(frontier.loss) < 0).all()
    assert (np.diff(frontier.slope) <= 0).all()
    for corner in range(len(frontier.cost)):
        picks = frontier.picks(corner)
        assert totals(costs, picks)[0] == frontier.cost[corner]
        assert chosen(loss, picks).sum() == pytest.approx(frontier.loss[corner])
    # between two slopes every item takes the candidate of least loss + price · cost
    ends = np.concatenate([[frontier.slope[0] * 2], frontier.slope, [0.0]])
    for corner, price in enumerate((ends[:-1] + ends[1:]) / 2):
        least = (loss + price * costs[0]).min(axis=1).sum()
        value = frontier.loss[corner] + price * frontier.cost[corner]
        assert value == pytest.approx(least)


@pytest.mark.parametrize("seed", range(10))
def test_bounds_every_budget_from_below_within_one_step(seed, tables, brute_force):
    loss, costs = tables(seed, 5, 4)
    frontier = sweep(loss, costs[0])
    for budget in range(int(frontier.cost[0]), int(frontier.cost[-1]) + 3):
        best = brute_force(loss, costs, [budget])
        bound = frontier.bound(budget)
        corner = frontier.corner(budget)
        step = frontier.loss[corner] - frontier.loss[min(corner + 1, len(frontier.loss) - 1)]
        assert bound <= best + 1e-12
        assert best - bound <= step + 1e-12  # the corner before loses at most one step more
        if budget in frontier.cost:
            assert best == pytest.approx(bound)
    assert frontier.bound(frontier.cost[0] - 1) == np.inf
    assert frontier.corner(frontier.cost[0] - 1) == -1


def test_the_bound_is_the_best_over_prices():
    generator = np.random.default_rng(0)
    loss, cost = generator.random((8, 5)), generator.integers(0, 40, (8, 5))
    frontier = sweep(loss, cost)
    for budget in (60, 100, 140):
        price = frontier.price(budget)
        duals = [
            (loss + p * cost).min(axis=1).sum() - p * budget
            for p in np.append(np.linspace(0, 4 * price + 0.1, 4001), price)
        ]
        assert max(duals) == pytest.approx(frontier.bound(budget))
        assert duals[-1] == pytest.approx(max(duals))


def test_points_on_a_line_and_above_it_are_no_corners():
    loss = np.array([[4.0, 3.0, 2.0, 2.5, 2.0, 1.9]])
    cost = np.array([[0, 1, 2, 3, 4, 12]])
    frontier = sweep(loss, cost)
    assert frontier.pick.tolist() == [2, 5]
    assert frontier.cost.tolist() == [0, 2, 12]
    assert frontier.slope == pytest.approx([1.0, 0.01])


def test_an_item_without_candidates_has_no_frontier():
    assert sweep(np.array([[np.inf, np.inf]]), np.array([[1, 2]])) is None


def test_several_limits_bound_by_the_tightest(tables, brute_force):
    tight = 0
    for seed in range(10):
        loss, costs = tables(seed, 5, 4, resources=2)
        limits = [int(c.mean(axis=1).sum() * 0.8) for c in costs]
        best, bound = brute_force(loss, costs, limits), additive_bound(loss, costs, limits)
        single = [solve(loss, c, limit) for c, limit in zip(costs, limits, strict=True)]
        if best is not None:
            assert bound <= best + 1e-12
            tight += all(s is not None and s.loss < best for s in single)
    assert tight >= 2  # both limits bind together in some of them
