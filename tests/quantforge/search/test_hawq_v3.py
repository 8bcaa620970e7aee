"""HAWQ-V3's ResNet-18 instance, whose optima were found by trying all 2**19 assignments.

Traces, squared errors at 8 and 4 bits, sizes, operations and latencies (ms on a T4) are those of
the authors' notebook; convolutions on shortcuts share their bits with the one they are added to.
"""

import numpy as np
import pytest

from quantforge.search.frontier import sweep
from quantforge.search.solvers import SOLVERS

TRACE = np.array(
    [.06857826, .03162379, .03298575, .01205663, .02222431, .00596336, .06931772, .00807129,
     .00372905, .00530698, .00209011, .00737569, .00210454, .00151197, .00158041, .00078146,
     .00451841, .00098745, .00072944]
)  # fmt: skip
ERROR8 = np.array(
    [.0235, .0125, .0102, .0082, .0145, .0344, .0023, .0287, .0148, .0333, .0682, .0027, .0448,
     .0336, .0576, .1130, .0102, .0947, .0532]
)  # fmt: skip
ERROR4 = np.array(
    [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, .6827, 9.0942, 4.8857, 10.7599, 21.7546,
     .8603, 14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016]
)  # fmt: skip
WEIGHTS = np.array(
    [36864] * 4 + [73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824,
     1179648, 2359296, 131072, 2359296, 2359296]
)  # fmt: skip
OPERATIONS = np.full(19, 115605504)
OPERATIONS[[4, 9, 14]] = 57802752
OPERATIONS[[6, 11, 16]] = 6422528
LATENCY4 = np.array(
    [.21094404, .21092674, .21104113, .21086851, .13642465, .19167506, .02532183, .19148203,
     .19142914, .11395316, .20556011, .01917474, .20566918, .20566509, .13185102, .22287786,
     .01790088, .22304611, .22286099]
)  # fmt: skip
LATENCY8 = np.array(
    [.36189111, .36211718, .31141909, .30454471, .19184896, .38948934, .0334169, .38904905,
     .3892859, .19134735, .34307431, .02802354, .34313329, .34310756, .21117103, .37376585,
     .02896843, .37398187, .37405185]
)  # fmt: skip
TIED = {4: 6, 9: 11, 14: 16}
ITEMS = [[i, TIED[i]] if i in TIED else [i] for i in range(19) if i not in TIED.values()]

# (cost at 4 bits, at 8 bits, unit of the table, limit, used, residual, layers at 8 bits)
CONSTRAINTS = {
    # half bytes, in MiB
    "size": (
        WEIGHTS, 2 * WEIGHTS, 2 * 2**20, 7.980469, 7.265625, 0.074506,
        set(range(19)) - {15, 17, 18},
    ),
    # /64 at 4 bits and /16 at 8, in millions
    "operations": (
        OPERATIONS, 4 * OPERATIONS, 64e6, 66.232320, 65.028096, 0.215689,
        {0, 1, 2, 4, 5, 6, 7, 9, 10, 11},
    ),
    "latency": (
        LATENCY4, LATENCY8, 1, 4.246180, 4.220095, 0.202674,
        {0, 1, 2, 3, 4, 6, 7, 9, 10, 11, 14, 16},
    ),
}  # fmt: skip


def merged(four, eight):
    """[items, 2] table with tied layers in one item."""
    return np.array([[t[item].sum() for t in (four, eight)] for item in ITEMS])


def halfway(cost):
    """HAWQ-V3's limit: half of the way from all in 4 bits to all in 8."""
    four, eight = cost.sum(axis=0)
    return (four + eight) // 2 if cost.dtype.kind == "i" else (four + eight) / 2


LOSS = merged(TRACE * ERROR4, TRACE * ERROR8)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("solver", ["dynamic-program", "integer-program", "pareto"])
def test_published_instance_has_the_optimum_of_all_assignments(constraint, solver):
    four, eight, unit, limit, used, residual, layers8 = CONSTRAINTS[constraint]
    cost = merged(four, eight)
    assert halfway(cost) / unit == pytest.approx(limit, abs=1e-6)
    choice = SOLVERS[solver](LOSS, cost[None], [halfway(cost)])
    assert choice.loss == pytest.approx(residual, abs=5e-7)
    assert choice.exact
    assert choice.cost / unit == pytest.approx(used, abs=5e-7)
    chosen = {i for item, pick in zip(ITEMS, choice.picks, strict=True) if pick for i in item}
    assert chosen == layers8


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_lagrangian_prices_bound_the_published_instance(constraint):
    four, eight, *_, residual, _ = CONSTRAINTS[constraint]
    cost = merged(four, eight)
    choice = SOLVERS["lagrangian"](LOSS, cost[None], [halfway(cost)])
    frontier = sweep(LOSS, cost)
    largest_step = -np.diff(frontier.loss).min()
    assert choice.bound == pytest.approx(frontier.bound(halfway(cost)))
    assert choice.bound <= residual <= choice.loss + 5e-7
    assert choice.loss - choice.bound <= largest_step


def test_all_three_limits_at_once_bind_together():
    costs = np.array([merged(*CONSTRAINTS[name][:2]) for name in CONSTRAINTS], dtype=float)
    limits = [halfway(cost) for cost in costs]
    choice = SOLVERS["integer-program"](LOSS, costs, limits)
    every = (np.arange(2 ** len(ITEMS))[:, None] >> np.arange(len(ITEMS))) & 1
    rows = np.arange(len(ITEMS))
    spent = costs[:, rows, every].sum(axis=2)
    values = LOSS[rows, every].sum(axis=1)
    values[(spent > np.array(limits)[:, None]).any(axis=0)] = np.inf
    assert choice.loss == pytest.approx(values.min(), rel=1e-9)
    assert choice.exact
    # harder than any of them alone
    assert choice.loss > max(residual for *_, residual, _ in CONSTRAINTS.values())


def test_the_removable_loss_is_the_notebooks():
    assert (TRACE * (ERROR4 - ERROR8)).sum() == pytest.approx(1.303455, abs=5e-7)
