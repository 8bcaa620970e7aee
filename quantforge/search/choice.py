"""What a search is given and what it returns: tables in, one candidate an item out.

A problem has `items` (layers that share a spec) and `candidates` (specs). `loss` [items,
candidates] is what a candidate loses, +inf where the item has no such candidate; `costs`
[resources, items, candidates] is what it takes of every resource (stored bits, bytes, bit
operations, microseconds), and `limits` [resources] is what there is. Costs of missing candidates
are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
Costs = NDArray[np.int64] | NDArray[np.float64]
Limits = Sequence[int] | Sequence[float] | NDArray[np.int64] | NDArray[np.float64]
Picks = NDArray[np.intp]
# A bound this near to a loss, relative to it, is equal but for the order of sums.
ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """A solution, and how far from the best one it can be.

    Attributes:
        picks: chosen candidate of every item.
        loss: objective of the picks.
        costs: total of the picks in every resource, in the caller's units.
        bound: no picks within the limits lose less; equal to `loss` where that is proved.
    """

    picks: tuple[int, ...]
    loss: float
    costs: tuple[float, ...]
    bound: float

    @property
    def cost(self) -> float:
        """Total of the first resource."""
        return self.costs[0]

    @property
    def gap(self) -> float:
        """At most so much is lost against the best picks."""
        return max(0.0, self.loss - self.bound)

    @property
    def exact(self) -> bool:
        """Whether no other picks within the limits lose less."""
        return self.bound >= self.loss


def chosen(table: Costs, picks: Picks) -> Costs:
    """[..., items] entries of `table` [..., items, candidates] that `picks` [items] select."""
    taken: Costs = table[..., np.arange(len(picks)), picks]
    return taken


def totals(costs: Costs, picks: Picks) -> Costs:
    """[resources] what `picks` [items] cost; whole numbers stay exact."""
    spent: Costs = chosen(costs, picks).sum(axis=-1)
    return spent


def additive_choice(
    loss: Losses, costs: Costs, picks: Picks, *, bound: float | None = None
) -> Choice:
    """The choice of these picks, losing the sum of their losses.

    Args:
        loss: [items, candidates].
        costs: [resources, items, candidates].
        picks: [items].
        bound: lower bound on the best loss; None says that the picks are best.
    """
    lost = float(chosen(loss, picks).sum())
    if bound is None or bound >= lost - ROUNDING * abs(lost):
        bound = lost
    return Choice(
        picks=tuple(picks.tolist()),
        loss=lost,
        costs=tuple(totals(costs, picks).tolist()),
        bound=bound,
    )


def require_problem(loss: Losses, costs: Costs, limits: Limits) -> None:
    """Refuse tables that do not belong together.

    Raises:
        ValueError: shapes differ, a loss is nan or -inf, or the cost of a candidate is negative.
    """
    if loss.ndim != 2 or costs.shape != (len(limits), *loss.shape):
        raise ValueError(
            f"costs must be [resources, items, candidates] = {(len(limits), *loss.shape)} for "
            f"losses {loss.shape} and {len(limits)} limits, got {costs.shape}"
        )
    if np.isnan(loss).any() or np.isneginf(loss).any():
        raise ValueError("losses must be numbers, or +inf where there is no candidate")
    present = np.isfinite(loss)
    if not bool((costs[:, present] >= 0).all()):
        raise ValueError("costs must be non-negative")


def single_exchanges(loss: Losses, costs: Costs, limits: Limits, picks: Picks) -> Picks:
    """Exchange one item's candidate at a time, the largest gain first, while one fits the limits.

    Args:
        loss: [items, candidates].
        costs: [resources, items, candidates].
        limits: [resources].
        picks: [items] within the limits.

    Returns:
        Picks [items] within the limits that no single exchange improves.
    """
    picks = picks.copy()
    bounds = np.asarray(limits)
    while True:
        spare = bounds - totals(costs, picks)
        gain = chosen(loss, picks)[:, None] - loss
        extra = costs - chosen(costs, picks)[..., None]
        gain[(extra > spare[:, None, None]).any(axis=0)] = -np.inf
        best = int(gain.argmax())
        if gain.flat[best] <= 0:
            return picks
        item, candidate = divmod(best, loss.shape[1])
        picks[item] = candidate
