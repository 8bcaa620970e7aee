"""Repair of losses that rise with cost: isotonic regression, layer by layer.

A candidate that costs more than another should not lose more; where an estimate says so it is noise
(or a grid that the layer does not like), and a search that takes noise for a gain buys bits for
nothing. The repaired losses are the nearest ones, in weighted squares, that never rise with cost:
where losses rise, runs of neighbours take their weighted mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import Costs, Losses


def falling(
    loss: Losses, cost: Costs, weight: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Nearest losses that never rise with an item's cost.

    By the max-min formula of isotonic regression (Robertson, Wright and Dykstra 1988), in
    O(items · candidates²). Candidates of equal cost are ordered by falling loss, so they never
    contradict each other.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate, which stays.
        cost: [items, candidates].
        weight: [items, candidates] positive, one over the variance of each loss; equal if None.

    Raises:
        ValueError: shapes differ or a weight is not positive.
    """
    weight = np.ones_like(loss) if weight is None else weight
    if cost.shape != loss.shape or weight.shape != loss.shape:
        raise ValueError(f"costs {cost.shape} and weights {weight.shape} must be {loss.shape}")
    present = np.isfinite(loss)
    if not (weight[present] > 0).all() or not np.isfinite(weight[present]).all():
        raise ValueError("weights must be positive")
    order = np.lexsort((-loss, np.where(present, cost, np.inf)), axis=1)
    sorted_present = np.take_along_axis(present, order, 1)
    mass = np.where(sorted_present, np.take_along_axis(weight, order, 1), 0.0)
    mass_before = np.pad(np.cumsum(mass, 1), ((0, 0), (1, 0)))
    values = np.where(sorted_present, np.take_along_axis(loss, order, 1), 0.0)
    sums_before = np.pad(np.cumsum(mass * values, 1), ((0, 0), (1, 0)))
    # [items, first, last] mean of every run of neighbours
    total = mass_before[:, None, 1:] - mass_before[:, :-1, None]
    run = sums_before[:, None, 1:] - sums_before[:, :-1, None]
    first, last = np.indices(total.shape[1:])
    usable = (first <= last) & sorted_present[:, None, :]
    mean = np.divide(run, total, out=np.full_like(total, -np.inf), where=usable)
    # value k = min over first ≤ k of the max over last ≥ k
    highest = np.maximum.accumulate(mean[:, :, ::-1], axis=2)[:, :, ::-1]
    fitted = np.where(first <= last, highest, np.inf).min(axis=1)
    repaired = np.empty_like(loss)
    np.put_along_axis(repaired, order, np.where(sorted_present, fitted, np.inf), 1)
    return repaired
