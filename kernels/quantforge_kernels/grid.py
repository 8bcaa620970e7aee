"""Search of asymmetric grids, (code − zero) · scale: definition in torch, and the C++ that runs.

The error of a group, Σ importance (w − ŵ)², jumps in scale and zero with every code that changes,
so no descent finds its minimum. The search goes from coarse to fine: scales in geometric steps
below the one that covers the range; for each, zeros from where the grid ends at the smallest weight
to where it ends at the largest; from the best zero of every scale a few least-squares steps, scale
and zero together for the codes as they are; and a pattern search around the best of all, because
least-squares steps creep where a group is large. Only values that 16 bits can store are tried.

With a zero among the codes the sign of a scale is free already: (q − z) s and (L − q) − (L − z)
times −s are the same grid. Scales found here are therefore positive.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Literal

import torch
from torch import Tensor

from quantforge_kernels import native
from quantforge_kernels.compensate import HIGHEST_FACTOR, LOWEST_FACTOR

Zero = Literal["integer", "float"]

GRID_FACTORS = 12
GRID_ZEROS = 12
GRID_REFITS = 2
POLISH_ROUNDS = 4
POLISH_SCALE = 0.04  # a quarter of a factor step at 2 bits; in the last round the step of bfloat16
POLISH_ZERO = 0.25  # in codes
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LARGEST_ZERO = 65000.0  # float16 ends at 65504
SINGULAR = 1e-6


def grid_factors(bits: int) -> list[float]:
    """Multiples of the covering scale that are tried, in geometric steps."""
    ratio = (LOWEST_FACTOR[bits] / HIGHEST_FACTOR) ** (1 / (GRID_FACTORS - 1))
    return [HIGHEST_FACTOR * ratio**step for step in range(GRID_FACTORS)]


def _library() -> ctypes.CDLL | None:
    """The native library, or None (with one warning) where it cannot be built."""
    return native.optional(
        "grid", "grids are searched in torch, many times slower", ("qf_search_grid",)
    )


def search_grid(
    weight: Tensor,
    importance: Tensor,
    *,
    bits: int,
    width: int,
    zero: Zero,
    native_code: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros that minimise Σ importance (w − (q − zero) scale)² in each group.

    Args:
        weight: [out, in] float32, finite.
        importance: [in] float32, non-negative.
        bits: width of the codes.
        width: weights that share a grid; divides `in`.
        zero: "integer" is a code, 0 .. 2^bits − 1, as a stored zero-point is; "float" is any
            float16 number, also beyond the codes, so that a group far from 0 is resolved too.
        native_code: use the C++ version where it can be built.

    Returns:
        scale and zero, [out, in / width] float32: scales positive and bfloat16-representable; 1 and
        0 for a group of zeros.
    """
    weight, importance = weight.float().contiguous(), importance.float().contiguous()
    library = _library() if native_code and weight.device.type == "cpu" else None
    if library is None:
        return search_grid_reference(weight, importance, bits=bits, width=width, zero=zero)
    rows, columns = weight.shape
    scales, zeros = torch.empty(2, rows, columns // width).unbind()
    factors = (ctypes.c_float * GRID_FACTORS)(*grid_factors(bits))
    library.qf_search_grid(
        native.pointer(weight),
        native.pointer(importance),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int64(width),
        ctypes.c_int(bits),
        ctypes.c_int(zero == "integer"),
        factors,
        ctypes.c_int(GRID_FACTORS),
        ctypes.c_int(GRID_ZEROS),
        ctypes.c_int(GRID_REFITS),
        ctypes.c_int(POLISH_ROUNDS),
        ctypes.c_float(POLISH_SCALE),
        ctypes.c_float(POLISH_ZERO),
        ctypes.c_int(torch.get_num_threads()),
        native.pointer(scales),
        native.pointer(zeros),
    )
    return scales, zeros


class _Groups:
    """All groups of a weight and what the search asks of them, in plain torch.

    Attributes:
        groups: [out, groups, width] float32 weights.
        importance: [groups, width] float32.
        top: largest code.
        whole: the zero is an integer code.
    """

    def __init__(self, weight: Tensor, importance: Tensor, width: int, bits: int, zero: Zero):
        self.groups = weight.view(len(weight), -1, width)
        self.importance = importance.view(-1, width)
        self.top = float((1 << bits) - 1)
        self.whole = zero == "integer"

    def storable(self, zero: Tensor) -> Tensor:
        """The nearest zeros that can be stored."""
        return zero.round().clamp(0.0, self.top) if self.whole else zero.half().float()

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """[out, groups, width] nearest codes."""
        inverse = (1.0 / scale).unsqueeze(-1)
        return (self.groups * inverse + zero.unsqueeze(-1)).round().clamp(0.0, self.top)

    def error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """[out, groups] errors; infinite where the grid cannot be stored."""
        code = self.codes(scale, zero)
        difference = self.groups - (code - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        error = (self.importance * difference * difference).sum(-1)
        usable = (scale >= SMALLEST_SCALE) & (zero.abs() <= LARGEST_ZERO)
        return torch.where(usable, error, torch.inf)

    def refit(self, scale: Tensor, zero: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
        """One least-squares step; the same grid where the codes do not determine one."""
        h, centre = self.importance, 0.5 * self.top
        u, w = self.codes(scale, zero) - centre, self.groups - middle.unsqueeze(-1)
        sums = [(h * part).sum(-1) for part in (torch.ones_like(u), u, u * u, w, u * w)]
        total, hu, huu, hw, huw = sums
        determinant = total * huu - hu * hu
        slope = (total * huw - hu * hw) / determinant.clamp_min(SMALLEST_SCALE)
        solvable = (determinant > SINGULAR * total * huu) & (slope >= SMALLEST_SCALE)
        offset = middle + (hw - slope * hu) / total
        stored = self.storable(centre - offset / slope)
        shift = centre - stored
        cross = huw + middle * hu + shift * (hw + middle * total)
        square = huu + 2.0 * shift * hu + shift * shift * total
        found = (cross / square).bfloat16().float()
        solvable &= square > 0
        return torch.where(solvable, found, scale), torch.where(solvable, stored, zero)

    def polish(self, scale: Tensor, zero: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pattern search: one step up and down in scale and zero, in steps that halve."""
        centre, steps = 0.5 * self.top, (-1.0, 0.0, 1.0)
        for halvings in range(POLISH_ROUNDS):
            shrink = 0.5**halvings
            start, start_zero = scale, zero
            for up, along in itertools.product(steps, steps):
                trial = (start * (1.0 + up * POLISH_SCALE * shrink)).bfloat16().float()
                kept = centre - (centre - start_zero) * (start / trial)
                move = along * (1.0 if self.whole else POLISH_ZERO * shrink)
                trial_zero = self.storable(kept + move)
                found = self.error(trial, trial_zero)
                scale = torch.where(found < error, trial, scale)
                zero = torch.where(found < error, trial_zero, zero)
                error = torch.minimum(found, error)
        return scale, zero, error


def search_grid_reference(
    weight: Tensor, importance: Tensor, *, bits: int, width: int, zero: Zero
) -> tuple[Tensor, Tensor]:
    """`search_grid` in plain torch: the definition."""
    grid = _Groups(weight, importance, width, bits, zero)
    low, high = grid.groups.amin(-1), grid.groups.amax(-1)
    below, above = low.clamp_max(0.0), high.clamp_min(0.0)
    if grid.whole:
        low, high = below, above
    middle = 0.5 * (low + high)
    best = ((above - below) / grid.top).bfloat16().float()
    best_zero = grid.storable(-below / best)
    best_error = grid.error(best, best_zero)
    for factor in grid_factors(bits):
        scale = (factor * (high - low) / grid.top).bfloat16().float()
        local_zero, local_error = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
        ends = torch.stack([-low / scale, grid.top - high / scale])
        first, last = ends.amin(0) - 0.5, ends.amax(0) + 0.5
        if grid.whole:
            first, last = first.clamp(0.0, grid.top), last.clamp(0.0, grid.top)
        for step in range(GRID_ZEROS):
            trial = grid.storable(first + step * (last - first) / (GRID_ZEROS - 1))
            error = grid.error(scale, trial)
            local_zero = torch.where(error < local_error, trial, local_zero)
            local_error = torch.minimum(error, local_error)
        for _ in range(GRID_REFITS):
            trial_scale, trial = grid.refit(scale, local_zero, middle)
            error = grid.error(trial_scale, trial)
            scale = torch.where(error < local_error, trial_scale, scale)
            local_zero = torch.where(error < local_error, trial, local_zero)
            local_error = torch.minimum(error, local_error)
        best = torch.where(local_error < best_error, scale, best)
        best_zero = torch.where(local_error < best_error, local_zero, best_zero)
        best_error = torch.minimum(local_error, best_error)
    best, best_zero, best_error = grid.polish(best, best_zero, best_error)
    found = torch.isfinite(best_error)
    return torch.where(found, best, 1.0), torch.where(found, best_zero, 0.0)
