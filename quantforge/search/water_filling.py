"""The continuous optimum: how many bits each layer would get if bits came in fractions.

With n_i weights and an error of c_i 4^(-b_i), the mean of the bits being given, errors a weight
c_i 4^(-b_i) / n_i are equal at the optimum, so

    b_i = μ + ½ log2(c_i / n_i),      μ = mean - Σ n_i ½ log2(c_i / n_i) / Σ n_i,

and where that leaves the widths there are, layers stay at the nearest and μ is raised or lowered
for the rest. It needs no table and says where any allocation should lie (methods: reverse
water-filling, Cover and Thomas, 10.3.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantforge.errors import BudgetError


def water_filling(
    error: NDArray[np.float64],
    weights: NDArray[np.float64] | NDArray[np.int64],
    mean_bits: float,
    *,
    lowest: float = -np.inf,
    highest: float = np.inf,
) -> NDArray[np.float64]:
    """[layers] bits of the least Σ error · 4^(-bits) with Σ weights · bits = mean_bits · Σ weights.

    Args:
        error: [layers] positive, the error at 0 bits, c_i.
        weights: [layers] positive, numbers of weights n_i.
        mean_bits: bits a weight on average.
        lowest: least bits of a layer.
        highest: most bits of a layer.

    Raises:
        BudgetError: the mean is not between the bounds.
        ValueError: an error or a number of weights is not positive.
    """
    if not ((error > 0).all() and (weights > 0).all()):
        raise ValueError("errors and numbers of weights must be positive")
    if not lowest <= mean_bits <= highest:
        raise BudgetError(
            f"a mean of {mean_bits:g} bits is not between {lowest:g} and {highest:g} bits a "
            "weight; change the budget or widen the range"
        )
    share = weights / weights.sum()
    wanted = 0.5 * np.log2(error / weights)
    level = mean_bits - float(share @ wanted)
    # The mean is piecewise linear in μ, with corners where a layer meets a bound.
    corners = np.concatenate([lowest - wanted, highest - wanted])
    corners = np.unique(np.append(corners[np.isfinite(corners)], level))
    # Beyond the outermost ones all layers of an open side move together, one bit a bit.
    first, last = (
        float(share @ np.clip(wanted + corners[end], lowest, highest)) for end in (0, -1)
    )
    below, above = max(0.0, first - mean_bits), max(0.0, mean_bits - last)
    corners = np.concatenate([[corners[0] - below], corners, [corners[-1] + above]])
    means = [float(share @ np.clip(wanted + corner, lowest, highest)) for corner in corners]
    level = float(np.interp(mean_bits, means, corners))
    return np.clip(wanted + level, lowest, highest)
