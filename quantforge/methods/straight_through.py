"""Quantizers that round in the forward pass and pass gradients straight through: the baselines.

- LSQ (Esser et al., arXiv 1902.08153): the step size learns. With v = w / step, the gradient of the
  step is g (round(v) − v) inside the grid and g times the end level outside, divided by
  √(weights · Q), Q the largest level; inside, g passes to the weight.
- BitNet b1.58 (arXiv 2402.17764): {−1, 0, 1} times the mean |w|; g passes to every weight whole.
- ParetoQ (arXiv 2502.02631; facebookresearch/ParetoQ): "stretched elastic" levels, balanced and at
  2 bits without a 0: with n levels for half the range, n = K/2 of K levels,

      w_hat = (round(clamp(w/α, ±0.99) n − shift) + shift) α / n

  which is the uniform grid of step α / n, top K − 1 and zero (K − 1)/2, so that 2 bits are
  ±α/4, ±3α/4 and ternary weights 0, ±2α/3. Gradients as LSQ's, up to |w/α| = 0.99.

All run through `quantforge_kernels.soft_grid` at temperature 0, one pass each way, with scales
[out, groups]; view a weight as [1, out · in] for one scale in all.

What differs from the published code, and why:

- ParetoQ scales the step's gradient by the size of the whole matrix though a step serves one row.
  LSQ derives the factor from the weights whose gradients are summed, so the default is that;
  `whole_tensor` has ParetoQ's.
- ParetoQ cuts steps at 1e-5 and passes the gradient on as if it had not; steps here may have
  either sign, must not be 0, and are not cut. Its linear layer drops the bias; there is none here.
- ParetoQ's code takes ±1 for the end of its ternary grid in the gradient of α, whose end level is
  ±2/3; here it is the level, which is the derivative. At 2 bits both are 3/4.
- BitNet divides by mean |w| + ε or cuts the mean at 1e-5; here only a group of zeros is special.
- 0.99 leaves the outer levels of a balanced grid out from 50 levels a side on; such are refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from quantforge_kernels.soft_grid import SoftGrid, soft_grid
from torch import Tensor

from quantforge.methods.hestia import checked_centre, in_groups, mean_magnitude
from quantforge.types import PER_TENSOR, QuantSpec

STRETCH = 0.99  # of the range, where ParetoQ's clamp and gradient end
MAX_STRETCHED = 64


def learned_step(
    weight: Tensor,
    step: Tensor,
    spec: QuantSpec,
    *,
    zero: Tensor | None = None,
    whole_tensor: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LSQ on the grid that `spec` stores; ParetoQ's variant on ternary and balanced ones.

    Args:
        weight: [out, in], any float dtype.
        step: [out, groups] scales, not 0, of either sign.
        spec: width and grouping.
        zero: [out, groups] integer zero-points; exactly where the spec is asymmetric.
        whole_tensor: scale the step's gradient by the size of the matrix, not of a group.
        dtype: of what is made; the weight's if None.

    Returns:
        [out, in], with gradients to weight and step.

    Raises:
        ValueError: shapes do not fit the spec, or a zero is missing or not wanted.
    """
    centre = checked_centre(weight, step, spec, zero)
    largest, reach = spec.code_max if zero is None else spec.top, 0.0
    if spec.grid != "uniform":
        largest, reach = stretched_ends(spec.top + 1)
    whole = whole_tensor or spec.group_size == PER_TENSOR
    sharing = weight.numel() if whole else spec.width(weight.shape[1])
    factor = gradient_factor(sharing, largest)
    grid = SoftGrid(top=spec.top, reach=reach)
    return soft_grid(weight, scaled_gradient(step, factor), centre, grid, dtype)


def absmean_ternary(weight: Tensor, groups: int = 1, *, dtype: torch.dtype | None = None) -> Tensor:
    """BitNet b1.58: m · clamp(round(w / m), −1, 1) with m = mean |w|; the gradient is that of w.

    Args:
        weight: [out, in], any float dtype.
        groups: of a row; 1 is per channel.
        dtype: of what is made; the weight's if None.
    """
    made: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
        weight, groups, dtype or weight.dtype
    )
    return made


def stretched_elastic(
    weight: Tensor,
    clip: Tensor,
    levels: int,
    *,
    whole_tensor: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """ParetoQ's balanced grid: 4 levels at 2 bits, none of them 0; 3 levels ternary.

    Args:
        weight: [out, in], any float dtype.
        clip: [out, groups] half ranges α, not 0.
        levels: how many, 3 to 64.
        whole_tensor: scale the gradient of `clip` by the size of the matrix, as published.
        dtype: of what is made; the weight's if None.

    Returns:
        [out, in], with gradients to weight and clip.

    Raises:
        ValueError: so many levels have no such grid, or the shapes do not fit each other.
    """
    if not 3 <= levels <= MAX_STRETCHED:
        raise ValueError(f"a stretched grid has 3 to {MAX_STRETCHED} levels, got {levels}")
    half, top = levels / 2, levels - 1
    largest, reach = stretched_ends(levels)
    if clip.ndim != 2 or len(in_groups(weight, clip.shape[1])) != len(clip):
        raise ValueError(f"weights {tuple(weight.shape)} have no half ranges {tuple(clip.shape)}")
    count = weight.numel() if whole_tensor else weight.shape[1] // clip.shape[1]
    factor = gradient_factor(count, largest)
    grid = SoftGrid(top=top, reach=reach)
    step = scaled_gradient(clip, factor) / half
    return soft_grid(weight, step, clip.new_tensor(top / 2), grid, dtype)


def stretched_ends(levels: int) -> tuple[int, float]:
    """ParetoQ's largest level, for the step's gradient, and how far beyond it gradients pass.

    Args:
        levels: of the grid.
    """
    return max(levels // 2 - 1, 1), STRETCH * levels / 2 - (levels - 1) / 2


def absmean_straight_through(
    weight: Tensor, scale: Tensor, spec: QuantSpec, *, dtype: torch.dtype | None = None
) -> Tensor:
    """BitNet b1.58 at scales that are stored: w rounds to them, the gradient is w's whole.

    `absmean_ternary` has the mean itself; here it comes rounded, as in the file.

    Args:
        weight: [out, in], any float dtype.
        scale: [out, groups], of `level_scales.mean_scales`; gets no gradient.
        spec: of a ternary grid.
        dtype: of what is made; the weight's if None.
    """
    centre = checked_centre(weight, scale, spec, None)
    grid = SoftGrid(top=spec.top, reach=math.inf)
    return soft_grid(weight, scale.detach(), centre, grid, dtype)


def first_step(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[out, groups] float32 LSQ's steps to start from: 2 mean |w| / √Q."""
    groups = spec.groups(weight.shape[1])
    return 2.0 * mean_magnitude(weight.detach().float(), groups) / math.sqrt(spec.code_max)


def first_clip(weight: Tensor, groups: int = 1) -> Tensor:
    """[out, groups] float32 ParetoQ's first half ranges: max |w|; 1 for a group of zeros.

    Raises:
        ValueError: so many groups do not divide the rows.
    """
    grouped = in_groups(weight.detach().float(), groups).abs()
    largest = grouped.amax(-1) if grouped.shape[-1] else grouped.new_zeros(grouped.shape[:-1])
    return torch.where(largest == 0, 1.0, largest)


def gradient_factor(weights: int, largest: int) -> float:
    """LSQ's factor of a step's gradient, 1 / √(weights · largest).

    Args:
        weights: how many share the step; none count as one.
        largest: level of the grid, in steps.
    """
    return 1.0 / math.sqrt(max(weights, 1) * largest)


def scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """`value` itself, with its gradient multiplied by `factor`."""
    made: Tensor = _ScaledGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return made


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _StraightThrough(torch.autograd.Function):
    """Ternary weights over their mean magnitude; the gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        scale = mean_magnitude(weight, groups)
        return soft_grid(weight, scale, scale.new_ones(()), SoftGrid(top=2), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].to(ctx.dtype), None, None
