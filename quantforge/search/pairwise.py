"""Solvers for objectives with interactions: exact for small cases, by exchanges for large ones.

`least` takes the one that fits the size.

`local_search` starts from the additive problem's optimum and exchanges one candidate, or two at
once (one item pays for what another gains), as long as one within the limits lowers the objective.
What it cannot know, how far the best plan is, the objective's own lower bound says.

`branch_and_bound` settles items one after the other and leaves a branch when even the least that
its open items can still add is no better than the best plan found. The least is taken with prices
on the resources too (Lagrangian), which is what the limits do to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import (
    Choice,
    Costs,
    Limits,
    Picks,
    chosen,
    require_problem,
    totals,
)
from quantforge.search.frontier import sweep
from quantforge.search.knapsack import solve
from quantforge.search.objective import Objective, PairwiseObjective, State, choice_of
from quantforge.search.solvers import mixed_integer_program

MAX_PASSES = 50
MAX_NODES = 200_000
# Items up to which all plans are branched over, and partial plans looked at then: about a second.
# Of twelve random problems with 12 to 20 items and 12 to 24 candidates a third got better plans.
EXACT_ITEMS, EXACT_NODES = 16, 20_000
# A change counts as lower when it is so by more than rounding, relative to the objective.
ROUNDING = 1e-12


def least(objective: Objective, costs: Costs, limits: Limits) -> Choice | None:
    """The choice of `branch_and_bound` where items are few, else of `local_search`.

    Args:
        objective: what is lost.
        costs: [resources, items, candidates], non-negative.
        limits: [resources].

    Raises:
        ValueError: tables do not belong together.
    """
    if len(objective.alone) > EXACT_ITEMS:
        return local_search(objective, costs, limits)
    return branch_and_bound(objective, costs, limits, max_nodes=EXACT_NODES)


def local_search(
    objective: Objective,
    costs: Costs,
    limits: Limits,
    *,
    start: Picks | None = None,
    max_passes: int = MAX_PASSES,
) -> Choice | None:
    """Exchange one and two candidates while that lowers the objective within the limits.

    A pass forms the changes of all pairs: (items · candidates)² numbers, for `GramObjective` times
    samples multiply-adds.

    Args:
        objective: what is lost.
        costs: [resources, items, candidates], non-negative.
        limits: [resources].
        start: [items] picks within the limits; the optimum of `objective.alone` if None.
        max_passes: over all pairs, at most.

    Returns:
        The choice, with the objective's lower bound; None if no picks are within the limits.

    Raises:
        ValueError: tables do not belong together, or `start` is not within the limits.
    """
    require_problem(objective.alone, costs, limits)
    picks = _additive_start(objective, costs, limits) if start is None else start
    if picks is None:
        return None
    if (totals(costs, picks) > np.asarray(limits)).any():
        raise ValueError("start is not within the limits")
    state = objective.begin(picks)
    bounds = np.asarray(limits)
    for _ in range(max_passes):
        before = state.value
        _descend(state, costs, bounds)
        for item in range(len(picks) - 1):
            if _exchange_pair(state, item, costs, bounds):
                _descend(state, costs, bounds)
        if before - state.value <= _least_gain(state):
            break
    return choice_of(objective, costs, state.picks, objective.bound(costs, limits))


def _additive_start(objective: Objective, costs: Costs, limits: Limits) -> Picks | None:
    """[items] optimum with nothing between the items."""
    if len(limits) == 1:
        found = solve(objective.alone, costs[0], limits[0])
    else:
        found = mixed_integer_program(objective.alone, costs, limits)
    return None if found is None else np.array(found.picks, dtype=np.intp)


def _least_gain(state: State) -> float:
    return ROUNDING * abs(state.value)


def _descend(state: State, costs: Costs, limits: Costs) -> None:
    """Make the best exchange of one candidate, as long as one lowers the objective."""
    while True:
        extra = costs - chosen(costs, state.picks)[..., None]
        spare = limits - totals(costs, state.picks)
        within = (extra <= spare[:, None, None]).all(axis=0)
        changes = np.where(within, state.changes, np.inf)
        best = int(changes.argmin())
        if not changes.flat[best] < -_least_gain(state):
            return
        state.move(*divmod(best, changes.shape[1]))


def _exchange_pair(state: State, item: int, costs: Costs, limits: Costs) -> bool:
    """Make the best exchange of `item` and a later item, if it lowers the objective."""
    extra = costs - chosen(costs, state.picks)[..., None]
    spare = limits - totals(costs, state.picks)
    changes = state.joint(item)
    changes += state.changes[item][:, None, None]
    changes += state.changes[item + 1 :]
    for paid, left in zip(extra, spare, strict=True):
        changes[paid[item][:, None, None] + paid[item + 1 :] > left] = np.inf
    best = int(changes.argmin())
    if not changes.flat[best] < -_least_gain(state):
        return False
    mine, other, theirs = (int(place) for place in np.unravel_index(best, changes.shape))
    state.move(item, mine)
    state.move(item + 1 + other, theirs)
    return True


def branch_and_bound(
    objective: Objective, costs: Costs, limits: Limits, *, max_nodes: int = MAX_NODES
) -> Choice | None:
    """The picks of the lowest objective within the limits.

    Args:
        objective: what is lost; every pair is written out.
        costs: [resources, items, candidates], non-negative.
        limits: [resources].
        max_nodes: partial plans looked at before giving up on a proof.

    Returns:
        The choice; exact, or with the least bound of what was not looked at. None if no picks are
        within the limits.

    Raises:
        ValueError: tables do not belong together.
    """
    first = local_search(objective, costs, limits)
    if first is None:
        return None
    pairs = objective.pairwise()
    search = _Branching(pairs, costs, limits, max_nodes, best=first.loss)
    search.visit(0, 0.0, pairs.loss.copy(), np.zeros(len(limits)))
    picks = np.array(first.picks, dtype=np.intp) if search.picks is None else search.picks
    # The objective summed in another order may round below what the branches were cut at.
    value = objective.value(picks)
    bound = value if search.exhausted else max(first.bound, search.unseen)
    return choice_of(objective, costs, picks, bound)


@dataclass(slots=True, eq=False)
class _Branching:
    """A depth-first search over items in the order of how much their choice can matter.

    Attributes:
        pairs: the objective.
        costs: [resources, items, candidates].
        limits: [resources].
        max_nodes: partial plans to look at.
        best: lowest objective so far.
        picks: where it was found; None while it is the caller's.
        unseen: least bound of the partial plans that were not looked at.
    """

    pairs: PairwiseObjective
    costs: Costs
    limits: Limits
    max_nodes: int
    best: float
    picks: Picks | None = None
    unseen: float = np.inf
    order: Picks = field(init=False)
    tails: NDArray[np.float64] = field(init=False)
    prices: list[NDArray[np.float64]] = field(init=False)
    cheapest: NDArray[np.float64] = field(init=False)
    trail: Picks = field(init=False)

    def __post_init__(self) -> None:
        loss, present = self.pairs.loss, np.isfinite(self.pairs.loss)
        least = np.where(present[None, None], self.pairs.pair, np.inf).min(axis=3)
        spread = np.where(present, loss, -np.inf).max(axis=1) - loss.min(axis=1)
        self.order = np.argsort(-spread, kind="stable")
        self.tails = np.zeros_like(loss)
        for place, item in enumerate(self.order):
            self.tails[item] = least[item][:, self.order[place + 1 :]].sum(axis=1)
        self.prices = self._all_prices(np.where(present, loss + self.tails, np.inf))
        self.cheapest = np.where(present, self.costs, np.inf).min(axis=2)
        self.trail = np.zeros(len(loss), dtype=np.intp)

    @property
    def exhausted(self) -> bool:
        """Whether everything was looked at or cut off."""
        return self.unseen == np.inf

    def _all_prices(self, optimistic: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Prices [resources] to bound with: none, and each resource's own."""
        found = [np.zeros(len(self.limits))]
        for resource, limit in enumerate(self.limits):
            frontier = sweep(optimistic, self.costs[resource])
            if frontier is not None and np.isfinite(limit):
                priced = np.zeros(len(self.limits))
                priced[resource] = frontier.price(limit)
                found.append(priced)
        return found

    def visit(
        self, place: int, value: float, fields: NDArray[np.float64], used: NDArray[np.float64]
    ) -> None:
        """Settle the item at `place` of the order in every way that can still be best.

        Args:
            place: items of the order that are settled.
            value: objective of the settled items.
            fields: [items, candidates] what a candidate adds to it.
            used: [resources] what the settled items cost.
        """
        if place == len(self.order):
            if value < self.best:
                self.best, self.picks = value, self.trail.copy()
            return
        item, rest = self.order[place], self.order[place + 1 :]
        least = self._least(fields, item, rest, used)
        for candidate in np.argsort(least, kind="stable"):
            bound = value + float(least[candidate])
            if not bound < self.best - ROUNDING * abs(self.best):
                return
            if self.max_nodes <= 0:
                self.unseen = min(self.unseen, bound)
                return
            self.max_nodes -= 1
            self.trail[item] = candidate
            self.visit(
                place + 1,
                value + float(fields[item, candidate]),
                fields + self.pairs.pair[item, candidate],
                used + self.costs[:, item, candidate],
            )

    def _least(
        self, fields: NDArray[np.float64], item: int, rest: Picks, used: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """[candidates of `item`] the least that it and the rest can add; +inf beyond the limits."""
        pair = self.pairs.pair[item][:, rest]
        spare = np.asarray(self.limits) - used
        open_costs = self.costs[:, rest]
        best = np.full(fields.shape[1], -np.inf)
        for prices in self.prices:
            priced = fields[rest] + self.tails[rest] + np.tensordot(prices, open_costs, 1)
            paid = np.tensordot(prices, self.costs[:, item], 1)
            # A price on a limit that is not finite is 0, and so is what it pays back.
            back = float(sum(p * s for p, s in zip(prices, spare, strict=True) if p))
            bound = fields[item] + paid + (priced + pair).min(axis=2).sum(axis=1) - back
            best = np.maximum(best, bound)
        floor = self.cheapest[:, rest].sum(axis=1)[:, None] + self.costs[:, item]
        best[(floor > spare[:, None]).any(axis=0)] = np.inf
        return best
