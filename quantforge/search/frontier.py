"""The whole frontier of the additive problem at once: a sweep over all Lagrange multipliers.

With a price λ on cost the items part: each takes its candidate of least loss + λ cost. As λ falls
from infinity to 0 an item moves along the lower convex hull of its (cost, loss) points, and the
steps of all items, sorted by the loss they save a unit of cost, are the corners of the lower hull
of all plans. Between corners the hull is the optimum of the linear relaxation, so it bounds every
plan within a budget from below, and the corner before it loses at most one step more.

Everett 1963 (generalized Lagrange multipliers); Sinha and Zoltners 1979 (multiple-choice knapsack).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import Costs, Limits, Losses, Picks, chosen


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """Corners of the lower hull of all plans, from the cheapest to the one of least loss.

    Attributes:
        start: [items] picks of the cheapest corner.
        item: [steps] whose candidate a step exchanges.
        pick: [steps] for which.
        slope: [steps] loss saved a unit of cost, never rising.
        cost: [steps + 1] total cost of the corners, rising.
        loss: [steps + 1] total loss of the corners, falling.
    """

    start: Picks
    item: Picks
    pick: Picks
    slope: NDArray[np.float64]
    cost: Costs
    loss: NDArray[np.float64]

    def corner(self, budget: float) -> int:
        """Index of the last corner that costs at most `budget`; -1 where none does."""
        return int(np.searchsorted(self.cost, budget, side="right")) - 1

    def picks(self, corner: int) -> Picks:
        """[items] candidates of a corner."""
        picks = self.start.copy()
        # An item's later steps come later, and the last assignment to an index holds.
        picks[self.item[:corner]] = self.pick[:corner]
        return picks

    def price(self, budget: float) -> float:
        """λ ≥ 0, loss a unit of cost, at which the bound of this budget is reached."""
        corner = max(self.corner(budget), 0)
        return float(self.slope[corner]) if corner < len(self.slope) else 0.0

    def bound(self, budget: float) -> float:
        """No plan of cost at most `budget` loses less; +inf where there is none."""
        corner = self.corner(budget)
        if corner < 0:
            return np.inf
        if corner == len(self.slope):
            return float(self.loss[corner])
        return float(self.loss[corner] - self.slope[corner] * (budget - self.cost[corner]))


def sweep(loss: Losses, cost: Costs) -> Frontier | None:
    """All corners of the lower hull of total cost and total loss.

    Takes O(items · candidates²) operations on whole columns.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate.
        cost: [items, candidates], non-negative.

    Returns:
        The frontier, or None if an item has no candidate at all.
    """
    feasible = np.isfinite(loss)
    if not feasible.any(axis=1).all():
        return None
    priced = np.where(feasible, cost, np.inf)
    cheapest = priced == priced.min(axis=1, keepdims=True)
    start: Picks = np.where(cheapest, loss, np.inf).argmin(axis=1)
    items, picks, slopes, saved, paid = _steps(loss, cost, start)
    order = np.argsort(-slopes, kind="stable")
    first_cost, first_loss = chosen(cost, start).sum(), chosen(loss, start).sum()
    return Frontier(
        start=start,
        item=items[order],
        pick=picks[order],
        slope=slopes[order],
        cost=first_cost + np.concatenate([[0], np.cumsum(paid[order])]).astype(cost.dtype),
        loss=first_loss - np.concatenate([[0.0], np.cumsum(saved[order])]),
    )


def _steps(
    loss: Losses, cost: Costs, start: Picks
) -> tuple[Picks, Picks, NDArray[np.float64], NDArray[np.float64], Costs]:
    """Hull steps of all items, an item's own in order: item, pick, slope, saved loss, paid cost."""
    rows, current = np.arange(len(loss)), start.copy()
    steepest = np.full(len(loss), np.inf)
    found: list[tuple[Picks, Picks, NDArray[np.float64], NDArray[np.float64], Costs]] = []
    while True:
        saved = loss[rows, current[rows]][:, None] - loss[rows]
        paid = cost[rows] - cost[rows, current[rows]][:, None]
        useful = (saved > 0) & (paid > 0)
        slope = np.divide(saved, paid, out=np.zeros_like(saved), where=useful)
        best = slope.max(axis=1)
        # Of points on one line the furthest: those between are no corners.
        pick = np.where(useful & (slope == best[:, None]), paid, -1).argmax(axis=1)
        live = best > 0
        rows, pick = rows[live], pick[live]
        # A hull's slopes fall; where rounding says otherwise two steps lie on one line.
        steepest[rows] = np.minimum(steepest[rows], best[live])
        gains, prices = saved[live, pick], paid[live, pick]
        found.append((rows, pick, steepest[rows], gains, prices))
        if not len(rows):
            parts = list(zip(*found, strict=True))
            return (
                np.concatenate(parts[0]),
                np.concatenate(parts[1]),
                np.concatenate(parts[2]),
                np.concatenate(parts[3]),
                np.concatenate(parts[4]),
            )
        current[rows] = pick


def additive_bound(loss: Losses, costs: Costs, limits: Limits) -> float:
    """No picks within all limits lose less: the best of the bounds of the single resources.

    Args:
        loss: [items, candidates].
        costs: [resources, items, candidates].
        limits: [resources].

    Returns:
        The bound; +inf where a single limit cannot be met.
    """
    best = float(loss.min(axis=1).sum())
    for cost, limit in zip(costs, limits, strict=True):
        frontier = sweep(loss, cost)
        best = max(best, np.inf if frontier is None else frontier.bound(limit))
    return best
