"""Multiple-choice knapsack: one candidate an item, least loss within a cost. Pure arithmetic.

The additive objective makes HAWQ-V2's Pareto enumeration a multiple-choice knapsack, which a
dynamic program solves exactly: items join one by one, and of partial plans only those are kept that
no other one dominates. With one budget to meet and a good plan at hand, the Lagrangian bound keeps
that list short. At the price λ of the budget every candidate has a reduced cost r ≥ 0, by which
loss + λ cost exceeds the least of its item, and a plan loses at least the bound plus its sum of r.
So no plan with a larger sum of r than the plan at hand is above the bound can be better:

- candidates with a larger r drop out; of ten thousand layers a few dozen are left with more than
  one (Dembo and Hammer 1980; Pisinger 1995 calls these the core),
- and so do partial plans whose r add up to more.

If the list would still be too long it is thinned, which can only miss plans, never exceed the
budget; what a thinned pass gains shortens the list of the next one, and in the end the bound says
how much can have been lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import (
    Choice,
    Costs,
    Losses,
    additive_choice,
    chosen,
    single_exchanges,
)
from quantforge.search.frontier import sweep
from quantforge.search.pareto import pareto_front

# Partial plans that may be formed in all: some seconds.
MAX_PLANS = 20_000_000
MAX_PASSES = 4
# Rounding of sums of losses, relative to their size: what is this near to a threshold stays.
ROUNDING = 1e-12


def solve(loss: Losses, cost: Costs, budget: float, *, max_plans: int = MAX_PLANS) -> Choice | None:
    """Pick one candidate an item with the least total loss at total cost ≤ `budget`.

    Exact unless partial plans have to be thinned. Ties go to the cheaper total.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate.
        cost: [items, candidates], non-negative. Sums of whole numbers are exact.
        budget: limit on the total cost.
        max_plans: partial plans formed in a pass before they are thinned.

    Returns:
        The choice, or None if even the cheapest candidates exceed the budget.
    """
    frontier = sweep(loss, cost)
    if frontier is None or frontier.corner(budget) < 0:
        return None
    start = frontier.picks(frontier.corner(budget))
    if budget >= frontier.cost[-1]:
        return additive_choice(loss, cost[None], start)
    price, bound = frontier.price(budget), frontier.bound(budget)
    best = single_exchanges(loss, cost[None], [budget], start)
    reduced, rounding = _reduced(loss, cost, price)
    for _ in range(MAX_PASSES):
        reached = float(chosen(loss, best).sum())
        slack = max(0.0, reached - bound) + rounding
        core = reduced <= slack
        several = core.sum(axis=1) > 1
        picks = core.argmax(axis=1)
        settled = chosen(cost, picks)[~several].sum()
        front = pareto_front(
            np.where(core, loss, np.inf)[several],
            cost[several],
            budget=budget - settled,
            price=price,
            slack=slack,
            most=max(2, max_plans // max(1, int(core[several].sum()))),
        )
        if len(front.cost):
            picks[several] = front.picks(len(front.cost) - 1)
            if front.dropped == 0:
                return additive_choice(loss, cost[None], picks)
            picks = single_exchanges(loss, cost[None], [budget], picks)
        if not len(front.cost) or chosen(loss, picks).sum() >= reached:
            break
        best = picks
    return additive_choice(loss, cost[None], best, bound=bound)


def _reduced(loss: Losses, cost: Costs, price: float) -> tuple[NDArray[np.float64], float]:
    """[items, candidates] reduced costs, and what rounding can make of sums of them."""
    priced = loss + price * np.where(np.isfinite(loss), cost, 0)
    least = priced.min(axis=1)
    return priced - least[:, None], ROUNDING * float(np.abs(least).sum())
