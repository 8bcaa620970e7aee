"""Objectives with interactions: what a plan loses beyond the sum of what its layers lose alone.

Two forms. `PairwiseObjective` is CLADO's (Deng et al. 2023, arXiv 2307.05657),

    f(c) = Σ_i loss[i, c_i] + Σ_{i<j} pair[i, c_i, j, c_j],

with every entry given. `GramObjective` is its low-rank form: the quadratic form of a Fisher matrix
in the errors of all layers, through what every sample's gradient says of every candidate's error,

    f(c) = Σ_i loss[i, c_i] + weight · Σ_s (Σ_i projections[s, i, c_i])²,      weight = 1/(2 n T)

for n samples and sums over T tokens each. It costs one number a sample and candidate, where all
pairs cost the square of layers times candidates, and it is positive semi-definite as it stands.

Both hand a search its `begin`: a state that knows the change of the objective of every single
exchange, and that of all pairs of exchanges of one item, and is updated by an exchange without
being formed again.

CLADO projects a noisy pair matrix onto the positive semi-definite cone (`project_psd`). That moves
the losses of single layers too: a solution found with it is to be measured again, never ranked by
the projected objective alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import Choice, Costs, Limits, Losses, Picks, chosen, totals
from quantforge.search.frontier import Frontier, additive_bound, sweep

# The convex bound's iterations end at this relative distance of bound and relaxation.
BOUND_TOLERANCE = 1e-4
BOUND_ITERATIONS = 300
# Products of samples that a Gram state keeps: enough for some 300 layers of 30 candidates.
KEPT_BYTES = 1 << 29


class State(Protocol):
    """Picks of all items and what exchanging them would change.

    Attributes:
        picks: [items].
        value: objective of the picks.
        changes: [items, candidates] of the objective when one item takes another candidate; +inf
            where there is none.
    """

    picks: Picks
    value: float
    changes: NDArray[np.float64]

    def joint(self, item: int) -> NDArray[np.float64]:
        """[candidates, later items, candidates] what exchanging `item` and one after it adds.

        It comes on top of the `changes` of both.
        """
        ...

    def move(self, item: int, candidate: int) -> None:
        """Let `item` take `candidate`."""
        ...


class Objective(Protocol):
    """What the pairwise solvers see."""

    @property
    def alone(self) -> Losses:
        """[items, candidates] objective of one item's candidate with nothing else lost."""
        ...

    def value(self, picks: Picks) -> float:
        """Objective of the picks [items], formed from scratch."""
        ...

    def begin(self, picks: Picks) -> State:
        """The state of a search at these picks."""
        ...

    def bound(self, costs: Costs, limits: Limits) -> float:
        """No picks within the limits have a lower objective."""
        ...

    def pairwise(self) -> PairwiseObjective:
        """The same objective with every pair written out."""
        ...


def choice_of(objective: Objective, costs: Costs, picks: Picks, bound: float) -> Choice:
    """The choice of these picks.

    Args:
        objective: says what they lose.
        costs: [resources, items, candidates].
        picks: [items].
        bound: no picks within the limits lose less, rounding aside.
    """
    value = objective.value(picks)
    return Choice(
        picks=tuple(picks.tolist()),
        loss=value,
        costs=tuple(totals(costs, picks).tolist()),
        bound=min(bound, value),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PairwiseObjective:
    """Losses of single layers and of pairs.

    Attributes:
        loss: [items, candidates]; +inf where an item has no such candidate.
        pair: [items, candidates, items, candidates], symmetric, zero within an item, finite (0
            at missing candidates).

    Raises:
        ValueError: shapes differ or `pair` is not as said.
    """

    loss: Losses
    pair: NDArray[np.float64]

    def __post_init__(self) -> None:
        rows = np.arange(len(self.loss))
        if self.pair.shape != (*self.loss.shape, *self.loss.shape):
            raise ValueError(f"pair must be {self.loss.shape * 2}, got {self.pair.shape}")
        if not np.isfinite(self.pair).all():
            raise ValueError("pair must be finite; give 0 for missing candidates")
        if self.pair[rows, :, rows].any():
            raise ValueError("pair must be zero within an item: that is its loss")
        size = self.pair.shape[0] * self.pair.shape[1]
        matrix = self.pair.reshape(size, size)
        if not np.allclose(matrix, matrix.T, rtol=1e-9, atol=1e-12 * np.abs(matrix).max(initial=0)):
            raise ValueError("pair must be symmetric")

    @property
    def alone(self) -> Losses:
        """[items, candidates] the losses of single layers."""
        return self.loss

    def value(self, picks: Picks) -> float:
        """Objective of the picks [items], formed from scratch."""
        rows = np.arange(len(picks))
        pairs = self.pair[rows[:, None], picks[:, None], rows, picks]
        return float(chosen(self.loss, picks).sum() + 0.5 * pairs.sum())

    def begin(self, picks: Picks) -> PairwiseState:
        """The state of a search at these picks, in O(items² · candidates)."""
        return PairwiseState(self, picks)

    def bound(self, costs: Costs, limits: Limits) -> float:
        """No picks within the limits have a lower objective.

        Every pair's table is bounded from below by a sum of two functions of one item each, half
        of it by row minima, the rest by column minima of what is left and again by rows; with
        these added to the losses the problem is additive (one step of the dual of the pairs' local
        relaxation). Tight where interactions are small against losses.
        """
        count, width = self.loss.shape
        share = np.zeros_like(self.loss)
        present = np.isfinite(self.loss)
        for item in range(count - 1):
            # [candidates, later items, candidates]; missing candidates never attain a minimum
            left = np.where(present[item + 1 :], self.pair[item, :, item + 1 :], np.inf)
            left[~present[item]] = np.inf
            mine = 0.5 * _finite(left.min(axis=2))
            left = left - mine[:, :, None]
            theirs = _finite(left.min(axis=0))
            left = left - theirs
            share[item] += (mine + _finite(left.min(axis=2))).sum(axis=1).reshape(width)
            share[item + 1 :] += theirs
        return additive_bound(self.loss + share, costs, limits)

    def pairwise(self) -> PairwiseObjective:
        """Itself."""
        return self


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values with 0 in place of infinities (minima over missing candidates)."""
    return np.where(np.isfinite(values), values, 0.0)


class PairwiseState:
    """See `State`: an exchange costs O(items · candidates)."""

    def __init__(self, objective: PairwiseObjective, picks: Picks) -> None:
        self._objective, self.picks = objective, picks.copy()
        rows = np.arange(len(picks))
        # What every candidate would lose among the others' picks.
        self._field = objective.loss + objective.pair[:, :, rows, picks].sum(axis=2)
        self.value = objective.value(picks)
        self.changes = self._field - chosen(self._field, self.picks)[:, None]

    def joint(self, item: int) -> NDArray[np.float64]:
        """[candidates, later items, candidates]; see `State`."""
        mine, later = self._objective.pair[item][:, item + 1 :], self.picks[item + 1 :]
        mine = mine - mine[self.picks[item]]
        at_picks = mine[:, np.arange(len(later)), later]
        joint: NDArray[np.float64] = mine - at_picks[:, :, None]
        return joint

    def move(self, item: int, candidate: int) -> None:
        """Let `item` take `candidate`."""
        self.value += float(self.changes[item, candidate])
        mine = self._objective.pair[item]
        self._field += mine[candidate] - mine[self.picks[item]]
        self.picks[item] = candidate
        self.changes = self._field - chosen(self._field, self.picks)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class GramObjective:
    """Losses of single layers and a quadratic form of low rank.

    Attributes:
        loss: [items, candidates] added to the form; 0, and +inf where an item has no such
            candidate, if the form says it all.
        projections: [samples, items, candidates], finite (0 at missing candidates).
        weight: of the sum of squares, non-negative.

    Raises:
        ValueError: shapes differ, or a value is not as said.
    """

    loss: Losses
    projections: NDArray[np.float64]
    weight: float

    def __post_init__(self) -> None:
        if self.projections.ndim != 3 or self.projections.shape[1:] != self.loss.shape:
            raise ValueError(
                f"projections must be [samples, {self.loss.shape[0]}, {self.loss.shape[1]}], got "
                f"{self.projections.shape}"
            )
        if not np.isfinite(self.projections).all():
            raise ValueError("projections must be finite; give 0 for missing candidates")
        if not 0 <= self.weight < np.inf:
            raise ValueError(f"weight must be non-negative, got {self.weight}")

    @property
    def alone(self) -> Losses:
        """[items, candidates] loss and the form's diagonal."""
        squares: NDArray[np.float64] = np.square(self.projections).sum(axis=0)
        return self.loss + self.weight * squares

    def value(self, picks: Picks) -> float:
        """Objective of the picks [items], formed from scratch."""
        sums = chosen(self.projections, picks).sum(axis=1)
        return float(chosen(self.loss, picks).sum() + self.weight * (sums @ sums))

    def begin(self, picks: Picks) -> GramState:
        """The state of a search at these picks."""
        return GramState(self, picks)

    def bound(self, costs: Costs, limits: Limits) -> float:
        """No picks within the limits have a lower objective: a convex relaxation, by Frank–Wolfe.

        Shares of candidates take the place of picks. The form is convex in them, so it lies above
        its tangent at any shares, and the least of a tangent is an additive problem, whose hull
        bounds it. The best over the iterations is returned, for several limits the best over them.
        """
        if np.isinf(additive_bound(self.alone, costs, limits)):
            return np.inf
        return max(
            _convex_bound(self, cost, float(limit))
            for cost, limit in zip(costs, limits, strict=True)
        )

    def pairwise(self) -> PairwiseObjective:
        """All pairs written out: (items · candidates)² numbers."""
        flat = self.projections.reshape(len(self.projections), self.loss.size)
        rows = np.arange(len(self.loss))
        pair = (2.0 * self.weight * (flat.T @ flat)).reshape(*self.loss.shape, *self.loss.shape)
        pair[rows, :, rows] = 0.0
        return PairwiseObjective(loss=self.alone, pair=pair)


class GramState:
    """See `State`: every change, single or joint, costs O(samples), a joint one only once."""

    def __init__(self, objective: GramObjective, picks: Picks) -> None:
        samples = len(objective.projections)
        self._objective, self.picks = objective, picks.copy()
        self._flat = np.ascontiguousarray(
            objective.projections.reshape(samples, objective.loss.size), np.float64
        )
        by_item = objective.projections.transpose(1, 2, 0)
        # [items, candidates, candidates] products of an item's own candidates
        self._within = by_item @ by_item.transpose(0, 2, 1)
        self._kept: dict[int, NDArray[np.float64]] = {}
        self._room = KEPT_BYTES
        self._sums = chosen(objective.projections, picks).sum(axis=1)
        self.value = objective.value(picks)
        self.changes = self._form_changes()

    def _form_changes(self) -> NDArray[np.float64]:
        loss, rows = self._objective.loss, np.arange(len(self.picks))
        products = (self._sums @ self._flat).reshape(loss.shape)
        squares = np.diagonal(self._within, axis1=1, axis2=2)
        mine = self._within[rows, self.picks]
        linear = products - chosen(products, self.picks)[:, None]
        moved = squares - 2.0 * mine + chosen(squares, self.picks)[:, None]
        form: NDArray[np.float64] = 2.0 * linear + moved
        return loss - chosen(loss, self.picks)[:, None] + self._objective.weight * form

    def joint(self, item: int) -> NDArray[np.float64]:
        """[candidates, later items, candidates]; see `State`."""
        products, later = self._with_later(item), self.picks[item + 1 :]
        mine = 2.0 * self._objective.weight * (products - products[self.picks[item]])
        at_picks = mine[:, np.arange(len(later)), later]
        joint: NDArray[np.float64] = mine - at_picks[:, :, None]
        return joint

    def _with_later(self, item: int) -> NDArray[np.float64]:
        """[candidates, later items, candidates] products; kept for later if there is room."""
        if item in self._kept:
            return self._kept[item]
        mine = self._objective.projections[:, item]
        width = mine.shape[1]
        products = (mine.T @ self._flat[:, (item + 1) * width :]).reshape(width, -1, width)
        if products.nbytes <= self._room:
            self._kept[item] = products
            self._room -= products.nbytes
        return products

    def move(self, item: int, candidate: int) -> None:
        """Let `item` take `candidate`."""
        self.value += float(self.changes[item, candidate])
        mine = self._objective.projections[:, item]
        self._sums += mine[:, candidate] - mine[:, self.picks[item]]
        self.picks[item] = candidate
        self.changes = self._form_changes()


def _convex_bound(objective: GramObjective, cost: Costs, limit: float) -> float:
    """Lower bound of a Gram objective within one limit that can be met."""
    present = np.isfinite(objective.loss)
    linear = np.where(present, objective.loss, 0.0)
    flat = objective.projections.reshape(len(objective.projections), objective.loss.size)
    shares = np.zeros(objective.loss.shape)
    sums, best = np.zeros(len(flat)), -np.inf
    for step in range(BOUND_ITERATIONS):
        slope = linear + 2.0 * objective.weight * (sums @ flat).reshape(linear.shape)
        frontier = sweep(np.where(present, slope, np.inf), cost)
        if frontier is None:
            return np.inf
        value = float((linear * shares).sum() + objective.weight * (sums @ sums))
        if step:
            best = max(best, value + frontier.bound(limit) - float((slope * shares).sum()))
            if value - best <= BOUND_TOLERANCE * abs(value):
                break
        target = _relaxed(frontier, shares.shape, limit)
        ahead = target - shares
        moved = flat @ ahead.ravel() if step else flat @ target.ravel()
        curvature = 2.0 * objective.weight * float(moved @ moved)
        fall = -float((slope * ahead).sum())
        # Exact along the line; the first step leaves the empty shares, which are no plan.
        length = 1.0 if not step else min(1.0, fall / curvature if curvature > 0 else 1.0)
        shares = shares + length * ahead
        sums = sums + length * moved
    return best


def _relaxed(frontier: Frontier, shape: tuple[int, ...], limit: float) -> NDArray[np.float64]:
    """[items, candidates] shares of the linear relaxation: a corner and part of the next step."""
    corner = frontier.corner(limit)
    shares = np.zeros(shape)
    picks = frontier.picks(corner)
    shares[np.arange(len(picks)), picks] = 1.0
    if corner < len(frontier.item):
        paid = frontier.cost[corner + 1] - frontier.cost[corner]
        part = float((limit - frontier.cost[corner]) / paid)
        item = frontier.item[corner]
        shares[item, picks[item]] -= part
        shares[item, frontier.pick[corner]] += part
    return shares


def project_psd(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearest positive semi-definite matrix [n, n] in the Frobenius norm: negative eigenvalues cut.

    Args:
        matrix: [n, n]; its symmetric part is taken.
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    projected = (vectors * np.clip(values, 0.0, None)) @ vectors.T
    symmetric: NDArray[np.float64] = (projected + projected.T) / 2
    return symmetric
