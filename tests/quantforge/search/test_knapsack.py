"""The dynamic program against brute force, and HAWQ-V3's published instance."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge.search.knapsack import solve


def brute_force(loss, cost, budget):
    best = None
    for picks in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        rows = range(len(loss))
        total = sum(cost[i, p] for i, p in zip(rows, picks, strict=True))
        value = sum(loss[i, p] for i, p in zip(rows, picks, strict=True))
        if total <= budget and np.isfinite(value) and (best is None or value < best):
            best = value
    return best


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000), st.integers(0, 60))
def test_equals_brute_force(items, candidates, seed, budget):
    generator = np.random.default_rng(seed)
    loss = generator.random((items, candidates))
    loss[generator.random((items, candidates)) < 0.15] = np.inf
    cost = generator.integers(0, 15, (items, candidates))
    choice = solve(loss, cost, budget)
    expected = brute_force(loss, cost, budget)
    if expected is None:
        assert choice is None
        return
    assert choice is not None
    assert choice.loss == pytest.approx(expected)
    assert choice.cost <= budget
    assert choice.exact
    picked = [cost[i, p] for i, p in enumerate(choice.picks)]
    assert choice.cost == sum(picked)


def test_more_budget_never_costs_loss():
    generator = np.random.default_rng(3)
    loss, cost = generator.random((12, 5)), generator.integers(1, 30, (12, 5))
    losses = [c.loss for b in range(40, 360, 5) if (c := solve(loss, cost, b)) is not None]
    assert len(losses) > 30
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))


def test_rounded_costs_stay_within_the_budget_and_near_the_optimum():
    generator = np.random.default_rng(4)
    loss, cost = generator.random((30, 6)), generator.integers(1_000, 90_001, (30, 6))
    budget = 900_007
    exact = solve(loss, cost, budget, max_states=10_000_000)
    coarse = solve(loss, cost, budget, max_states=3_000)
    assert exact is not None and coarse is not None
    assert exact.exact and not coarse.exact
    assert coarse.cost <= budget
    assert exact.loss <= coarse.loss <= exact.loss * 1.05


def test_hawq_v3_resnet18_by_size_and_by_operations():
    trace = "06857826 03162379 03298575 01205663 02222431 00596336 06931772 00807129 00372905"
    trace += " 00530698 00209011 00737569 00210454 00151197 00158041 00078146 00451841 00098745"
    trace += " 00072944"
    trace = np.array([float("." + t) for t in trace.split()])
    int8 = np.array(
        [.0235, .0125, .0102, .0082, .0145, .0344, .0023, .0287, .0148, .0333, .0682, .0027,
         .0448, .0336, .0576, .1130, .0102, .0947, .0532]
    )  # fmt: skip
    int4 = np.array(
        [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, .6827, 9.0942, 4.8857, 10.7599,
         21.7546, .8603, 14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016]
    )  # fmt: skip
    weights = np.array(
        [36864] * 4 + [73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824,
         589824, 1179648, 2359296, 131072, 2359296, 2359296]
    )  # fmt: skip
    operations = np.full(19, 115605504)
    operations[[4, 9, 14]] = 57802752
    operations[[6, 11, 16]] = 6422528
    tied = {4: 6, 9: 11, 14: 16}
    items = [[i, tied[i]] if i in tied else [i] for i in range(19) if i not in tied.values()]
    loss4, loss8 = trace * int4, trace * int8

    def residual(cost4, cost8, limit):
        loss = np.array([[sum(t[i] for i in item) for t in (loss4, loss8)] for item in items])
        cost = np.array([[sum(c[i] for i in item) for c in (cost4, cost8)] for item in items])
        choice = solve(loss, cost, limit)
        low = {i for item, p in zip(items, choice.picks, strict=True) if p == 0 for i in item}
        return choice.loss, low, choice.cost

    # half of the way from all-INT4 to all-INT8, in half bytes
    size4, size8 = weights, 2 * weights
    limit = (size4.sum() + size8.sum()) // 2
    loss, low, used = residual(size4, size8, limit)
    assert loss == pytest.approx(0.074506, abs=1e-6)
    assert low == {15, 17, 18}
    assert used / 2 / 2**20 == pytest.approx(7.265625)

    bops4, bops8 = operations, 4 * operations  # /64 against /16
    limit = (bops4.sum() + bops8.sum()) // 2
    loss, low, used = residual(bops4, bops8, limit)
    assert set(range(19)) - low == {0, 1, 2, 4, 5, 6, 7, 9, 10, 11}
    assert used / 64 / 1e6 == pytest.approx(65.028096, abs=1e-4)
    assert loss == pytest.approx(0.215689, abs=1e-6)
