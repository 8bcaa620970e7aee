"""Shapley values: how much of the whole loss each layer answers for, interactions included.

A layer's loss depends on which others are quantized. Its Shapley value is the mean of what it adds
over all orders in which layers can be quantized, and sampled orders estimate it (IMPQ, arXiv
2509.15455, walks them from high to low precision). In every order the additions telescope, so the
estimates always sum to v(all) - v(none) exactly.

Orders are drawn in pairs, each with its reverse: with interactions of pairs only, the second half
of a pair sees exactly the partners that the first did not, and one pair is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SetFunction = Callable[[NDArray[np.bool_]], float]


@dataclass(frozen=True, slots=True, eq=False)
class ShapleyValues:
    """Estimates with their standard errors.

    Attributes:
        values: [players]; they sum to v(all) - v(none).
        stderr: [players] standard error over pairs of orders; nan with a single pair.
        evaluations: of the set function.
    """

    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    evaluations: int


def shapley(
    value: SetFunction, players: int, *, pairs: int, generator: np.random.Generator
) -> ShapleyValues:
    """Estimate Shapley values from random orders and their reverses.

    Takes 2 · pairs · (players - 1) + 2 evaluations; v(none) and v(all) serve all orders.

    Args:
        value: of a set, given as [players] booleans; must not keep or change what it is given.
        players: number of players.
        pairs: orders to draw, each walked in both directions.
        generator: of the orders.

    Raises:
        ValueError: there is no player or no pair.
    """
    if players < 1 or pairs < 1:
        raise ValueError(f"needs at least one player and one pair, got {players} and {pairs}")
    none, everyone = np.zeros(players, dtype=bool), np.ones(players, dtype=bool)
    lowest, highest = value(none), value(everyone)
    samples = np.empty((pairs, players))
    for pair in range(pairs):
        order = generator.permutation(players)
        walks = [_walk(value, direction, lowest, highest) for direction in (order, order[::-1])]
        samples[pair] = (walks[0] + walks[1]) / 2
    spread = samples.std(axis=0, ddof=1) if pairs > 1 else np.full(players, np.nan)
    return ShapleyValues(
        values=samples.mean(axis=0),
        stderr=spread / np.sqrt(pairs),
        evaluations=2 * pairs * (players - 1) + 2,
    )


def _walk(
    value: SetFunction, order: NDArray[np.intp], lowest: float, highest: float
) -> NDArray[np.float64]:
    """[players] what each adds when they join in this order."""
    members = np.zeros(len(order), dtype=bool)
    added, before = np.empty(len(order)), lowest
    for player in order[:-1]:
        members[player] = True
        reached = value(members.copy())
        added[player], before = reached - before, reached
    added[order[-1]] = highest - before
    return added
