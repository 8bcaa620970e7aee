"""Exchanges around a plan: which other picks are near it, by what each move is predicted to change.

A move gives one item another candidate. `changes` says what each move alone changes the loss by, so
it is 0 at the plan's own picks. A move that fits the limit is an exchange by itself; one that costs
too much is joined by the move of another item that pays for it and loses least. Many moves at once
come from solving the whole problem again with a charge on every move: the larger the charge, the
fewer the moves, so that a plan is proposed for every distance at which the changes may still hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import Costs, Losses, Picks, chosen
from quantforge.search.knapsack import solve

# Charges on a move, in the mean gain of a move when all are free.
CHARGES = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One move, or two of which one pays for the other.

    Attributes:
        moves: item → candidate.
        change: predicted change of the loss.
    """

    moves: dict[int, int]
    change: float


def nearest_exchanges(
    changes: Losses, cost: Costs, picks: Picks, limit: float, count: int
) -> list[Exchange]:
    """The exchanges of lowest predicted change that stay within the limit, best first.

    Args:
        changes: [items, candidates], 0 at the picks; +inf where an item has no such candidate.
        cost: [items, candidates].
        picks: [items] within the limit.
        limit: on the total cost.
        count: how many at most.
    """
    extra = (cost - chosen(cost, picks)[:, None]).astype(np.float64)
    spare = limit - float(chosen(cost, picks).sum())
    moving = np.isfinite(changes)
    moving[np.arange(len(picks)), picks] = False
    found = []
    for item, candidate in zip(*np.nonzero(moving), strict=True):
        moves = {int(item): int(candidate)}
        change, missing = float(changes[item, candidate]), extra[item, candidate] - spare
        if missing > 0:
            payer = _payer(changes, extra, moving, int(item), float(missing))
            if payer is None:
                continue
            moves[payer[0]] = payer[1]
            change += float(changes[payer])
        found.append(Exchange(moves, change))
    found.sort(key=lambda one: (one.change, sorted(one.moves.items())))
    return _distinct(found)[:count]


def _payer(
    changes: Losses, extra: Costs, moving: NDArray[np.bool_], item: int, missing: float
) -> tuple[int, int] | None:
    """The move of another item that frees at least `missing` and loses least."""
    usable = moving & (extra <= -missing)
    usable[item] = False
    losses = np.where(usable, changes, np.inf)
    best = int(losses.argmin())
    if not np.isfinite(losses.flat[best]):
        return None
    found, candidate = divmod(best, changes.shape[1])
    return found, candidate


def _distinct(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Every set of moves once, in order."""
    seen: dict[frozenset[tuple[int, int]], Exchange] = {}
    for one in exchanges:
        seen.setdefault(frozenset(one.moves.items()), one)
    return list(seen.values())


def solved_again(changes: Losses, cost: Costs, picks: Picks, limit: int) -> list[Picks]:
    """Best picks by the changes, for every charge on a move; those that differ, most moves first.

    Args:
        changes: [items, candidates], 0 at the picks; +inf where an item has no such candidate.
        cost: [items, candidates] whole numbers.
        picks: [items] within the limit.
        limit: on the total cost.
    """
    rows = np.arange(len(picks))
    free = solve(changes, cost, limit)
    if free is None:
        return []
    moved = int((np.array(free.picks) != picks).sum())
    if moved == 0 or not free.loss < 0:
        return []
    found: dict[tuple[int, ...], Picks] = {}
    for charge in CHARGES:
        charged = changes + charge * -free.loss / moved
        charged[rows, picks] = 0.0
        choice = solve(charged, cost, limit)
        if choice is not None and choice.picks != tuple(picks.tolist()):
            found.setdefault(choice.picks, np.array(choice.picks, dtype=np.intp))
    return list(found.values())


def joined(exchanges: Sequence[Exchange], cost: Costs, picks: Picks, limit: float) -> Picks:
    """Picks with as many of the exchanges as fit together, taken in order.

    An exchange is left out if an earlier one moves an item of it, or the limit has no room.

    Args:
        exchanges: best first.
        cost: [items, candidates].
        picks: [items] within the limit.
        limit: on the total cost.
    """
    result, taken = picks.copy(), set[int]()
    for one in exchanges:
        if taken & one.moves.keys():
            continue
        tried = result.copy()
        for item, candidate in one.moves.items():
            tried[item] = candidate
        if math.fsum(chosen(cost, tried).tolist()) <= limit:
            result = tried
            taken |= one.moves.keys()
    return result
