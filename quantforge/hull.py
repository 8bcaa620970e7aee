"""The lower hull of measured (stored bits, KL) points: what uniform networks can reach in between.

KL falls about exponentially with bits, so the hull is taken, and read, in the logarithm of the KL.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

LEAST_KL = 1e-6
"""A KL below this, in nats, is rounding of the arithmetic (which can make it negative): it has no
place on a logarithmic scale."""


def lower_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull in (stored bits, log KL), by strictly increasing bits.

    Args:
        points: (stored bits, KL in nats) of networks; those without a measurable KL are left out.

    Returns:
        The corners, as (stored bits, KL in nats).
    """
    hull: list[tuple[float, float]] = []
    for bits, kl in sorted({p for p in points if LEAST_KL <= p[1] < math.inf}):
        if hull and hull[-1][0] == bits:
            continue  # sorting put the lower KL first
        while len(hull) > 1 and read_line(hull[-2], (bits, kl), hull[-1][0]) <= hull[-1][1]:
            hull.pop()
        hull.append((bits, kl))
    return hull


def read_line(left: tuple[float, float], right: tuple[float, float], bits: float) -> float:
    """KL at `bits` on the line through two (stored bits, KL) points, straight in log KL."""
    share = (bits - left[0]) / (right[0] - left[0])
    low, high = math.log(left[1]), math.log(right[1])
    return math.exp(low + share * (high - low))


def read_hull(points: Sequence[tuple[float, float]], stored_bits: float) -> float | None:
    """KL of the lower hull at `stored_bits`; None outside the measured range.

    Args:
        points: (stored bits, KL in nats) of uniform networks.
        stored_bits: where to read.
    """
    hull = lower_hull(points)
    if len(hull) == 1 and hull[0][0] == stored_bits:
        return hull[0][1]
    for left, right in itertools.pairwise(hull):
        if left[0] <= stored_bits <= right[0]:
            return read_line(left, right, stored_bits)
    return None
