"""HAWQ-V2's Pareto frontier (Dong et al. 2020, arXiv 1911.03852), exactly where it stays small.

The paper enumerates bit vectors and keeps, for every size, the one of least Ω. Cost and loss both
add up over layers, so the vectors need not be enumerated: partial plans of the first layers that
are dominated (another is as cheap and loses no more) stay dominated whatever follows, and are
dropped before the next layer joins (Nemhauser and Ullmann 1969). Every plan that no other dominates
is found, also off the convex hull, where a Lagrangian sweep sees nothing.

Where more partial plans survive than `most`, they are thinned evenly over the range of costs, and
the front says how many were dropped; then it is an upper bound of the true one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import (
    Choice,
    Costs,
    Losses,
    Picks,
    additive_choice,
    single_exchanges,
)
from quantforge.search.frontier import sweep


@dataclass(frozen=True, slots=True, eq=False)
class ParetoFront:
    """All plans that no other plan dominates, by rising cost.

    Attributes:
        cost: [plans] total costs, rising.
        loss: [plans] total losses, falling.
        dropped: partial plans that were thinned out; 0 says the front is exact.
        parents: per item, [states] the partial plan each partial plan extends.
        taken: per item, [states] the candidate it extends it by.
    """

    cost: Costs
    loss: NDArray[np.float64]
    dropped: int
    parents: tuple[Picks, ...]
    taken: tuple[Picks, ...]

    def picks(self, plan: int) -> Picks:
        """[items] candidates of a plan of the front."""
        picks: Picks = np.zeros(len(self.taken), dtype=np.intp)
        for item in range(len(self.taken) - 1, -1, -1):
            picks[item] = self.taken[item][plan]
            plan = int(self.parents[item][plan])
        return picks


def pareto_front(
    loss: Losses,
    cost: Costs,
    *,
    budget: float = np.inf,
    most: int | None = None,
    price: float = 0.0,
    slack: float = np.inf,
) -> ParetoFront:
    """Merge items one by one, dropping dominated partial plans.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate.
        cost: [items, candidates], non-negative.
        budget: partial plans that cannot end within it are left out.
        most: partial plans kept an item; None keeps all, which can be `candidates**items`.
        price: of a unit of cost, for `slack` and for which plans survive thinning.
        slack: partial plans whose loss + price · cost is further than this above the least that
            their items can have are left out; the front is then one of the others.

    Returns:
        The front; it has no plans where none is within the budget.
    """
    feasible = np.isfinite(loss)
    cheapest = np.where(feasible, cost, np.inf).min(axis=1)
    rest = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0)
    least = np.cumsum((loss + price * np.where(feasible, cost, 0)).min(axis=1))
    paid: NDArray[Any] = np.zeros(1, dtype=cost.dtype)
    lost = np.zeros(1)
    parents, taken, dropped = [], [], 0
    for item in range(len(loss)):
        candidates = np.flatnonzero(feasible[item])
        paid = np.add.outer(paid, cost[item, candidates]).ravel()
        lost = np.add.outer(lost, loss[item, candidates]).ravel()
        priced = lost + price * paid
        within = np.flatnonzero((paid + rest[item] <= budget) & (priced - least[item] <= slack))
        order = within[np.lexsort((lost[within], paid[within]))]
        lowest = np.minimum.accumulate(lost[order])
        order = order[lost[order] < np.concatenate([[np.inf], lowest[:-1]])[: len(order)]]
        if most is not None and len(order) > most:
            dropped += len(order) - most
            order = order[_thin(paid[order], priced[order], most)]
        parents.append(order // max(1, len(candidates)))
        taken.append(candidates[order % max(1, len(candidates))])
        paid, lost = paid[order], lost[order]
    return ParetoFront(paid, lost, dropped, tuple(parents), tuple(taken))


def _thin(cost: Costs, priced: NDArray[np.float64], most: int) -> Picks:
    """Rising indices of at most `most` plans, given by rising cost.

    The cheapest is kept, and of even stretches of the range the one that is least at the price
    (without a price the costliest of them: it loses least).
    """
    stretch = np.minimum(
        ((cost - cost[0]) * ((most - 1) / max(cost[-1] - cost[0], 1e-300))).astype(np.int64),
        most - 2,
    )
    order = np.lexsort((priced, stretch))
    first = np.flatnonzero(np.diff(stretch[order], prepend=-1))
    return np.union1d([0], order[first])


def cheapest_loss(
    loss: Losses, cost: Costs, budget: float, *, most: int | None = None
) -> Choice | None:
    """The plan of least loss of the Pareto front within a budget.

    Args:
        loss: [items, candidates].
        cost: [items, candidates].
        budget: limit on the total cost.
        most: as for `pareto_front`.

    Returns:
        The choice; where plans were thinned out it is improved by single exchanges and comes with
        the Lagrangian bound. None if nothing fits.
    """
    frontier = sweep(loss, cost)
    if frontier is None or frontier.corner(budget) < 0:
        return None
    # Where plans are thinned, those survive that are good at the budget's price.
    front = pareto_front(loss, cost, budget=budget, most=most, price=frontier.price(budget))
    if not len(front.cost):
        return None
    picks = front.picks(len(front.cost) - 1)
    if not front.dropped:
        return additive_choice(loss, cost[None], picks)
    picks = single_exchanges(loss, cost[None], [budget], picks)
    return additive_choice(loss, cost[None], picks, bound=frontier.bound(budget))
