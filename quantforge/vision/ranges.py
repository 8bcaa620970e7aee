"""The grids of activations, from what calibration pictures make of them.

One histogram a grid, of fixed size whatever the number of pictures: bins between −R and R with R a
power of two that doubles when something lies beyond it, which merges bins in pairs and moves no
count to a wrong place. So the histogram, and everything made of it, does not depend on the order
of the pictures or how they are split. Least and greatest values are kept exactly.

- "minmax" covers everything.
- "percentile" leaves out the same share of the values on either side.
- "mse" clips where the squared error, of what is clipped and what is rounded, is least: from the
  whole range, the upper and the lower end are moved in turn over a fine row of candidates until
  neither gains. The error is that of the grid as it will be, its zero rounded to a code.

0 is always on the grid. What sites share, they share with all their values in one histogram.
Learned scales are `reconstruction`'s, and start from one of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.vision.network import ActivationGrid, VisionNetwork
from quantforge.vision.streams import Stream

RangeMethod = Literal["minmax", "percentile", "mse"]
METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse")

BINS = 1 << 14  # even a 64th of the range has a bin for half a step at 8 bits
PERCENTILE = 99.99
CANDIDATES = 96  # of an end, over the range in equal steps
ROUNDS = 4


class Histogram:
    """Counts of values between −R and R, and their exact least and greatest.

    Attributes:
        counts: [bins] float64.
        radius: R; 0 while there is nothing but zeros.
        low: least value, at most 0.
        high: greatest value, at least 0.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.radius = 0.0
        self.low = self.high = 0.0
        self.seen = 0

    def add(self, values: Tensor) -> None:
        """Count values of any shape.

        Raises:
            InputError: one of them is NaN or Inf.
        """
        least, greatest = (float(end) for end in torch.aminmax(values))
        if not (math.isfinite(least) and math.isfinite(greatest)):
            raise InputError("an activation is NaN or Inf: check the network and the pictures")
        self.low, self.high = min(self.low, least), max(self.high, greatest)
        self.seen += values.numel()
        self._widen(max(-least, greatest))
        bins = len(self.counts)
        if self.radius == 0.0:
            self.counts[bins // 2] += values.numel()
            return
        width = 2.0 * self.radius / bins  # a power of two: the division is exact
        index = (values.flatten() / width).floor_().add_(bins // 2).clamp_(0, bins - 1)
        self.counts += torch.bincount(index.int(), minlength=bins)

    def _widen(self, largest: float) -> None:
        """Make R exceed `largest`."""
        if largest == 0.0 or largest < self.radius:
            return
        wanted = 2.0 ** (math.frexp(largest)[1])
        if self.radius:
            while self.radius < wanted:
                half = len(self.counts) // 4
                merged = self.counts.view(-1, 2).sum(1)
                self.counts = torch.nn.functional.pad(merged, (half, half))
                self.radius *= 2.0
        self.radius = max(self.radius, wanted)

    def centres(self) -> Tensor:
        """[bins] float64 middle of each bin, moved into the range that was seen."""
        bins = len(self.counts)
        edges = (torch.arange(bins, dtype=torch.float64) - bins // 2 + 0.5) * 2.0 * self.radius
        return (edges / bins).clamp_(self.low, self.high)

    def quantile(self, share: float) -> float:
        """The value below which `share` of all values lie, to within a bin."""
        below = self.counts.cumsum(0)
        index = int(torch.searchsorted(below, share * float(below[-1])))
        return float(self.centres()[min(index, len(below) - 1)])


def grid_error(grid: ActivationGrid, histogram: Histogram) -> float:
    """Mean squared error of rounding the values of a histogram to a grid."""
    held = histogram.counts > 0
    return _error(grid, histogram.centres()[held], histogram.counts[held]) / max(histogram.seen, 1)


def _error(grid: ActivationGrid, values: Tensor, counts: Tensor) -> float:
    codes = (values / grid.scale).round_().add_(grid.zero).clamp_(0, grid.top)
    rounded = (codes - grid.zero) * grid.scale
    return float((counts * (rounded - values).square()).sum())


def fit_range(
    histogram: Histogram,
    bits: int,
    method: RangeMethod = "mse",
    *,
    percentile: float = PERCENTILE,
) -> ActivationGrid:
    """The grid of so many bits for the values of a histogram.

    Args:
        histogram: of them.
        bits: 2..8.
        method: see the module's header.
        percentile: above which values are left out, and below 100 − which; for "percentile".

    Raises:
        InputError: nothing was counted.
        ValueError: no such method or percentile.
    """
    if not histogram.seen:
        raise InputError("no calibration pictures reached this activation")
    low, high = histogram.low, histogram.high
    if method == "percentile":
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"a percentile lies in (50, 100], got {percentile}")
        if percentile < 100.0:
            low = histogram.quantile(1.0 - percentile / 100.0)
            high = histogram.quantile(percentile / 100.0)
    elif method == "mse":
        return _least_error(histogram, bits)
    elif method != "minmax":
        raise ValueError(f"a range is one of {METHODS}, got {method!r}")
    return ActivationGrid.covering(low, high, bits)


def _least_error(histogram: Histogram, bits: int) -> ActivationGrid:
    """The grid whose squared error is least among those tried."""
    held = histogram.counts > 0
    values, counts = histogram.centres()[held], histogram.counts[held]
    ends = [min(histogram.low, 0.0), max(histogram.high, 0.0)]
    best = ActivationGrid.covering(ends[0], ends[1], bits)
    error = _error(best, values, counts)
    whole = list(ends)
    for _ in range(ROUNDS):
        before = error
        for side in (1, 0):
            for step in range(1, CANDIDATES):
                trial = list(ends)
                trial[side] = whole[side] * step / CANDIDATES
                if trial[0] == trial[1]:
                    continue
                grid = ActivationGrid.covering(trial[0], trial[1], bits)
                found = _error(grid, values, counts)
                if found < error:
                    best, error, ends = grid, found, trial
        if error == before:
            break
    return best


@torch.no_grad()
def observe(network: VisionNetwork, batches: Iterable[Tensor]) -> dict[str, Histogram]:
    """`Site.grid` → histogram of what the float network has there.

    Args:
        network: the float network.
        batches: of calibration pictures; read once, one after the other.
    """
    found = {site.grid: Histogram() for site in network.sites}
    for pictures in batches:
        stream = Stream(network, [pictures])
        for site in network.sites:
            found[site.grid].add(stream.value(site.node)[0])
    return found


def activation_grids(
    histograms: Mapping[str, Histogram],
    bits: int | Mapping[str, int],
    method: RangeMethod = "mse",
    *,
    percentile: float = PERCENTILE,
) -> dict[str, ActivationGrid]:
    """`Site.grid` → grid.

    Args:
        histograms: from `observe`.
        bits: of all, or by grid; a grid that is not among them stays float.
        method: see the module's header.
        percentile: for "percentile".
    """
    widths = dict.fromkeys(histograms, bits) if isinstance(bits, int) else bits
    return {
        name: fit_range(histograms[name], width, method, percentile=percentile)
        for name, width in widths.items()
    }
