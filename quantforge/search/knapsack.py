"""Multiple-choice knapsack: one candidate an item, least loss within a cost. Pure arithmetic.

The additive objective makes HAWQ-V2's Pareto enumeration a multiple-choice knapsack, which a
dynamic program over integer costs solves exactly: best[c] is the least loss of the items so far
with total cost at most c. Costs share a large common divisor (whole rows of scales and codes), by
which they are divided first; if the table would still be too long, costs are rounded up to a
coarser unit, which can only leave budget unused, never exceed it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 400_000


@dataclass(frozen=True, slots=True)
class Choice:
    """A solution.

    Attributes:
        picks: chosen candidate of every item.
        loss: sum of the chosen losses.
        cost: sum of the chosen costs, in the caller's units.
        exact: whether no cost was rounded.
    """

    picks: tuple[int, ...]
    loss: float
    cost: int
    exact: bool


def solve(
    loss: NDArray[np.float64],
    cost: NDArray[np.int64],
    budget: int,
    *,
    max_states: int = MAX_STATES,
) -> Choice | None:
    """Pick one candidate an item with the least total loss at total cost ≤ `budget`.

    Ties go to the cheaper total, then to the earlier candidate.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate.
        cost: [items, candidates], non-negative.
        budget: limit on the total cost.
        max_states: longest table before costs are rounded up.

    Returns:
        The choice, or None if even the cheapest candidates exceed the budget.
    """
    feasible = np.isfinite(loss)
    if not feasible.any(axis=1).all():
        return None
    cheapest = np.where(feasible, cost, np.iinfo(np.int64).max).min(axis=1)
    spare = budget - int(cheapest.sum())
    if spare < 0:
        return None
    extra = np.where(feasible, cost - cheapest[:, None], 0)
    most = int(extra.max(axis=1).sum())
    spare = min(spare, most)
    unit = max(1, int(np.gcd.reduce(extra[feasible])))
    exact = True
    if spare // unit + 1 > max_states:
        unit, exact = -(-spare // (max_states - 1)), False
    steps = -(-extra // unit)
    states = spare // unit + 1
    best = np.zeros(states)
    picks = np.zeros((len(loss), states), dtype=np.int16)
    for item in range(len(loss)):
        updated = np.full(states, np.inf)
        for candidate in np.flatnonzero(feasible[item]):
            step = int(steps[item, candidate])
            if step >= states:
                continue
            trial = best[: states - step] + loss[item, candidate]
            better = trial < updated[step:]
            updated[step:][better] = trial[better]
            picks[item, step:][better] = candidate
        best = updated
    return _trace(best, picks, steps, loss, cost, exact=exact)


def _trace(
    best: NDArray[np.float64],
    picks: NDArray[np.int16],
    steps: NDArray[np.int64],
    loss: NDArray[np.float64],
    cost: NDArray[np.int64],
    *,
    exact: bool,
) -> Choice:
    """Walk the table back from the cheapest state that reaches the least loss."""
    state = int(np.flatnonzero(best == best.min())[0])
    chosen = []
    for item in range(len(picks) - 1, -1, -1):
        candidate = int(picks[item, state])
        chosen.append(candidate)
        state -= int(steps[item, candidate])
    chosen.reverse()
    rows = np.arange(len(chosen))
    return Choice(
        picks=tuple(chosen),
        loss=float(loss[rows, chosen].sum()),
        cost=int(cost[rows, chosen].sum()),
        exact=exact,
    )
