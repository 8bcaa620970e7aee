"""The augmented ordering of layers and the bisection over it (Schaefer et al. 2023, 2306.04879).

The paper orders layers by a sensitivity augmented with dependencies between layers, and bisects
over how many of the list can be quantized within a tolerance of the accuracy. It publishes neither
its estimator nor the construction of the list. The definition here: with a_i what layer i loses
alone and c_ij what i and j lose together beyond that, restoring layer i out of the quantized set S
saves m_i(S) = a_i + Σ_{j ∈ S, j ≠ i} c_ij. Backward greedy: from all layers quantized, the layer
that saves most for what restoring it costs goes first, marginals are updated, and so on; the list
is the reverse. Its prefixes are nested sets S_0 ⊂ S_1 ⊂ …, each the likely best of its size.

For several precisions (`augmented_choice`) the list is one of steps: everything begins at its
cheapest candidate, and the step of one item to a dearer one that saves most for what it costs comes
next. With two candidates that is the list above. `bisect_prefix` is the paper's search over one
list, its neighbours verified; targets of quality (`quantforge.targets`) bisect over budgets, so
that any solver's plans, these too, can be theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import Choice, Costs, Losses, Picks, chosen
from quantforge.search.objective import Objective, choice_of


@dataclass(frozen=True, slots=True, eq=False)
class Ordering:
    """Layers in the order in which they are quantized.

    Attributes:
        layers: [layers] indices; the first k of them are S_k.
        loss: [layers + 1] predicted loss of S_0 = {} to all layers.
        saving: [layers + 1] cost saved by each.
    """

    layers: NDArray[np.intp]
    loss: NDArray[np.float64]
    saving: NDArray[np.float64]


def augmented_order(
    loss: NDArray[np.float64], interaction: NDArray[np.float64], saving: NDArray[np.float64]
) -> Ordering:
    """Order layers by what quantizing them loses for what it saves, with dependencies.

    Ties go to the earlier layer. Takes O(layers²).

    Args:
        loss: [layers] what a layer loses alone, a_i.
        interaction: [layers, layers] symmetric, what two lose beyond that, c_ij; the diagonal is
            not read.
        saving: [layers] positive, the cost a layer saves when quantized.

    Raises:
        ValueError: shapes differ, a saving is not positive, or `interaction` is not symmetric.
    """
    count = len(loss)
    if interaction.shape != (count, count) or saving.shape != (count,):
        raise ValueError(
            f"for losses [{count}] interactions must be [{count}, {count}] and savings [{count}], "
            f"got {interaction.shape} and {saving.shape}"
        )
    if not np.allclose(interaction, interaction.T, rtol=1e-9, atol=0.0):
        raise ValueError("interactions must be symmetric")
    if not (saving > 0).all():
        raise ValueError("every layer must save something when it is quantized")
    pairs = np.where(np.eye(count, dtype=bool), 0.0, interaction)
    marginal = loss + pairs.sum(axis=1)
    quantized = np.ones(count, dtype=bool)
    backward, marginals = [], []
    for _ in range(count):
        rate = np.where(quantized, marginal / saving, -np.inf)
        # The last of equals is restored first, so that the earlier one comes first in the list.
        layer = count - 1 - int(rate[::-1].argmax())
        backward.append(layer)
        marginals.append(float(marginal[layer]))
        quantized[layer] = False
        marginal = marginal - pairs[layer]
    order = np.array(backward[::-1], dtype=np.intp)
    return Ordering(
        layers=order,
        loss=np.concatenate([[0.0], np.cumsum(marginals[::-1])]),
        saving=np.concatenate([[0.0], np.cumsum(saving[order])]),
    )


def augmented_choice(objective: Objective, cost: Costs, limit: float) -> Choice | None:
    """What the list of steps comes to within a limit.

    Steps that no longer fit are passed over, so that little of the limit is left. Ties go to the
    earlier item. A step takes O(items · candidates), and there are at most as many steps as
    candidates of all items; `additive_steps` is the faster form without interactions.

    Args:
        objective: what is lost, with interactions between items or without.
        cost: [items, candidates], non-negative.
        limit: on the sum of the picks' costs.

    Returns:
        The choice, with the objective's lower bound; None if the cheapest picks exceed the limit.
    """
    present = np.isfinite(objective.alone)
    least = np.where(present, cost, np.inf).min(axis=1, keepdims=True)
    cheapest = present & (cost == least)
    state = objective.begin(np.where(cheapest, objective.alone, np.inf).argmin(axis=1))
    while True:
        taken = chosen(cost, state.picks)
        spare = limit - taken.sum()
        if spare < 0:
            return None
        dearer = cost - taken[:, None]
        usable = (state.changes < 0) & (dearer > 0) & (dearer <= spare)
        rate = np.divide(-state.changes, dearer, out=np.full(cost.shape, -np.inf), where=usable)
        best = int(rate.argmax())
        if not usable.flat[best]:
            costs: Costs = cost[None]
            return choice_of(objective, costs, state.picks, objective.bound(costs, [limit]))
        state.move(*divmod(best, cost.shape[1]))


def additive_steps(loss: Losses, cost: Costs, limit: float) -> Picks | None:
    """[items] picks of `augmented_choice` where losses add up, in O(items + candidates) a step.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate.
        cost: [items, candidates], non-negative.
        limit: on the sum of the picks' costs.

    Returns:
        None if the cheapest picks exceed the limit.
    """
    present = np.isfinite(loss)
    least = np.where(present, cost, np.inf).min(axis=1, keepdims=True)
    picks: Picks = np.where(present & (cost == least), loss, np.inf).argmin(axis=1)
    spare = limit - chosen(cost, picks).sum()
    if spare < 0:
        return None

    def best_step(rows: Picks) -> tuple[NDArray[np.float64], Picks]:
        """Rate and candidate of the steepest step of some items that still fits; -inf for none."""
        taken = picks[rows]
        dearer = cost[rows] - cost[rows, taken][:, None]
        saved = loss[rows, taken][:, None] - loss[rows]
        usable = (saved > 0) & (dearer > 0) & (dearer <= spare)
        rate = np.divide(saved, dearer, out=np.full(saved.shape, -np.inf), where=usable)
        return rate.max(axis=1), rate.argmax(axis=1)

    rates, steps = best_step(np.arange(len(picks)))
    while len(picks) and rates[item := int(rates.argmax())] > -np.inf:
        step = cost[item, steps[item]] - cost[item, picks[item]]
        if step <= spare:
            picks[item] = steps[item]
            spare -= step
        # After a step, or because less is left than when it was found.
        rates[item : item + 1], steps[item : item + 1] = best_step(np.array([item]))
    return picks


@dataclass(frozen=True, slots=True)
class Bisection:
    """The longest prefix found to be within the target.

    Attributes:
        prefix: its length; None if no prefix that was tried is, not even the empty one.
        tried: prefix length → whether it is within the target, in the order tried.
        searched: evaluations of the bisection itself; those after it verified the neighbours.
    """

    prefix: int | None
    tried: Mapping[int, bool]
    searched: int

    @property
    def monotone(self) -> bool:
        """Whether nothing tried contradicts that shorter prefixes are safer."""
        good = [length for length, within in self.tried.items() if within]
        bad = [length for length, within in self.tried.items() if not within]
        return not good or not bad or max(good) < min(bad)


def bisect_prefix(length: int, within: Callable[[int], bool]) -> Bisection:
    """Find how long a prefix of a nested list can be, with ceil(log2(length + 1)) evaluations.

    Bisection trusts that a longer prefix is never better. Measurements are noisy, so at the end the
    found length k and its neighbours k - 1 and k + 1 are evaluated where they were not, and the
    longest prefix that was itself evaluated and found within the target is returned: never one
    that is only inferred.

    Args:
        length: of the list; prefixes have 0 to `length` members.
        within: whether the prefix of a length meets the target; called once a length at most.

    Raises:
        ValueError: `length` is negative.
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    tried: dict[int, bool] = {}
    low, high = 0, length  # low is thought to be within the target, high + 1 not to be
    while low < high:
        middle = (low + high + 1) // 2
        tried[middle] = within(middle)
        low, high = (middle, high) if tried[middle] else (low, middle - 1)
    searched = len(tried)
    for neighbour in (low, low + 1, low - 1):
        if 0 <= neighbour <= length and neighbour not in tried:
            tried[neighbour] = within(neighbour)
    found = [prefix for prefix, good in tried.items() if good]
    return Bisection(prefix=max(found, default=None), tried=tried, searched=searched)


def most_evaluations(length: int) -> int:
    """Evaluations of a bisection over a list of `length`, neighbours left out."""
    return math.ceil(math.log2(length + 1))
