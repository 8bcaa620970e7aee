"""HAWQ-V2's enumeration: the whole front, and what thinning leaves of it."""

import itertools

import numpy as np
import pytest

from quantforge.search.pareto import cheapest_loss, pareto_front


@pytest.mark.parametrize("seed", range(15))
def test_the_front_is_every_plan_that_no_other_dominates(seed, tables):
    loss, costs = tables(seed, 5, 4)
    front = pareto_front(loss, costs[0])
    rows = np.arange(5)
    points = set()
    for picks in itertools.product(range(4), repeat=5):
        lost = loss[rows, picks].sum()
        if np.isfinite(lost):
            points.add((int(costs[0][rows, picks].sum()), lost))
    expected, lowest = [], np.inf
    for cost, lost in sorted(points):
        if lost < lowest - 1e-12:
            expected.append((cost, lost))
            lowest = lost
    assert front.dropped == 0
    assert front.cost.tolist() == [cost for cost, _ in expected]
    assert front.loss == pytest.approx([lost for _, lost in expected])
    for plan in range(len(front.cost)):
        picks = front.picks(plan)
        assert costs[0][rows, picks].sum() == front.cost[plan]
        assert loss[rows, picks].sum() == pytest.approx(front.loss[plan])


def test_a_budget_cuts_the_front(tables):
    loss, costs = tables(3, 6, 4)
    whole = pareto_front(loss, costs[0])
    budget = int(whole.cost[len(whole.cost) // 2])
    part = pareto_front(loss, costs[0], budget=budget)
    assert part.cost.tolist() == [c for c in whole.cost if c <= budget]
    assert pareto_front(loss, costs[0], budget=int(whole.cost[0]) - 1).cost.size == 0
    assert cheapest_loss(loss, costs[0], int(whole.cost[0]) - 1) is None


def test_slack_keeps_what_is_near_the_price(tables):
    loss, costs = tables(4, 6, 4, missing=0)
    whole, price = pareto_front(loss, costs[0]), 0.02
    excess = whole.loss + price * whole.cost - (loss + price * costs[0]).min(axis=1).sum()
    for slack in (0.05, 0.2):
        part = pareto_front(loss, costs[0], price=price, slack=slack)
        assert part.cost.tolist() == whole.cost[excess <= slack].tolist()


def test_thinning_keeps_the_cheapest_and_reports_itself():
    generator = np.random.default_rng(1)
    loss, cost = generator.random((30, 5)), generator.integers(0, 10**6, (30, 5))
    front = pareto_front(loss, cost, most=50)
    assert front.dropped > 50
    assert len(front.cost) <= 50
    assert front.cost[0] == cost.min(axis=1).sum()
    assert (np.diff(front.cost) > 0).all() and (np.diff(front.loss) < 0).all()
    budget = int(cost.mean(axis=1).sum() * 0.7)
    choice = cheapest_loss(loss, cost, budget, most=50)
    fine = cheapest_loss(loss, cost, budget, most=5_000)
    assert not choice.exact
    assert choice.cost <= budget
    assert choice.bound < fine.loss <= choice.loss < 1.2 * fine.loss
