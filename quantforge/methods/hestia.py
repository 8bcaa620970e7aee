"""Hestia's softly quantized weights, over any codebook, at any bits.

Hestia (hestia2026/Hestia, 2026) trains through a softmax instead of a rounding. With x = w / s the
weight in units of its group's scale and c_k the codewords,

    p_k = softmax_k( −(x − c_k)² / T ),    w_soft = s Σ p_k c_k,    w_used = (1 − ρ) w + ρ w_soft

the pressure ρ goes up first, and the temperature T down to 0 afterwards (`schedules`). The gradient
is exact, ∂w_soft/∂w = 2 Var_p(c) / T: every weight near a threshold feels its neighbours. At T = 0
the nearest codeword is taken and the gradient passed straight through.

What is made here, beside the published ternary weights: any uniform grid (code − zero) · scale of
2 to 8 bits in the groups of a `QuantSpec`, symmetric or with integer zeros, with scales of either
sign that learn as well; and codebooks of any other spacing. Uniform grids go through
`quantforge_kernels.soft_grid`, one pass each way that keeps only weight and scale.

What differs from the published code, and why:

- its softmax divides by T + 1e-6; here by T. T = 0 has a branch of its own in both.
- its T never gets to 0 in training, so that the network that is trained is not the one that is
  stored. Evaluate with temperature 0 and pressure 1 and report the difference.
- at T = 0 it passes the gradient through everywhere and lets the scale's gradient be Σ g c alone.
  Here both come from one formula, LSQ's: nothing passes to weights more than half a step outside
  the grid, and the scale gets Σ g (c − x) inside it.
- it keeps the mean magnitude of a group above 1e-5, which stops small groups from shrinking; here a
  group of zeros is one of zeros, and no other is touched.
- its linear layer drops the bias. There is no layer here: weights go in and come out.
- a large T gives every weight the codebook's mean, 0 for ternary: no signal is left. Start at
  `temperature.optimal_temperature`, not above.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from quantforge_kernels.soft_grid import SHARPEST, SoftGrid, soft_grid
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantforge.types import QuantSpec

TERNARY = (-1.0, 0.0, 1.0)
MAX_LEVELS = 256


def soft_weight(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    temperature: float,
    pressure: float = 1.0,
    zero: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight used in training on the grid that `spec` stores.

    Args:
        weight: [out, in], any float dtype; arithmetic is float32.
        scale: [out, groups], not 0, of either sign.
        spec: width and grouping.
        temperature: in squared steps of the grid; 0 rounds to nearest.
        pressure: 0 is the float weight exactly, 1 the quantized one.
        zero: [out, groups] integer zero-points; exactly where the spec is asymmetric.
        dtype: of what is made; the weight's if None.

    Returns:
        [out, in], with gradients to weight and scale. At temperature 0 and pressure 1 it is
        `round_to_nearest(...).dequantize()` if the scales are bfloat16 numbers.

    Raises:
        ValueError: shapes do not fit the spec, or a zero is missing or not wanted.
    """
    centre = checked_centre(weight, scale, spec, zero)
    grid = SoftGrid(top=spec.top, temperature=temperature, pressure=pressure)
    return soft_grid(weight, scale, centre, grid, dtype)


def checked_centre(weight: Tensor, scale: Tensor, spec: QuantSpec, zero: Tensor | None) -> Tensor:
    """The codes that mean 0: the zero-points, or [] the middle of a symmetric spec's.

    Args:
        weight: [out, in].
        scale: [out, groups].
        spec: width and grouping.
        zero: [out, groups], or None.

    Raises:
        ValueError: shapes do not fit the spec, or a zero is missing or not wanted.
    """
    wanted = (len(weight), spec.groups(weight.shape[1]))
    if tuple(scale.shape) != wanted:
        raise ValueError(f"scale must be {wanted} for {spec}, got {tuple(scale.shape)}")
    if zero is None and not spec.symmetric:
        raise ValueError(f"{spec} stores zero-points: give them")
    if zero is not None and spec.symmetric:
        raise ValueError(f"{spec} stores no zero-points: leave them out")
    return scale.new_tensor(spec.middle) if zero is None else zero


def in_groups(weight: Tensor, groups: int) -> Tensor:
    """[out, groups, width] a weight [out, in] by its groups; of no rows, or rows of none, too.

    Raises:
        ValueError: it is no matrix, or so many groups do not divide its rows.
    """
    if weight.ndim != 2 or groups < 1 or weight.shape[1] % groups:
        raise ValueError(f"weights {tuple(weight.shape)} have no rows of {groups} groups")
    return weight.reshape(len(weight), groups, weight.shape[1] // groups)


def mean_magnitude(weight: Tensor, groups: int = 1) -> Tensor:
    """[out, groups] mean |w| of every group, differentiable: the scale of ternary weights.

    float32, of float64 weights float64; 1 for a group of zeros, which any scale serves.

    Args:
        weight: [out, in]; view it as [1, out · in] for one scale in all.
        groups: of a row; 1 is per channel.

    Raises:
        ValueError: so many groups do not divide its rows.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    grouped = in_groups(weight, groups)
    total = torch.linalg.vector_norm(grouped, 1, dim=-1, dtype=wide)
    mean = total / max(grouped.shape[-1], 1)
    return torch.where(mean == 0, 1.0, mean)


def soft_ternary(
    weight: Tensor,
    groups: int = 1,
    *,
    temperature: float,
    pressure: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Hestia as published: {−1, 0, 1} times the group's mean |w|, through which gradients flow.

    Args:
        weight: [out, in], any float dtype; arithmetic is float32.
        groups: of a row, which they divide; 1 is per channel.
        temperature: in squared mean magnitudes; 0 rounds to nearest.
        pressure: 0 is the float weight exactly, 1 the ternary one.
        dtype: of what is made; the weight's if None.

    Returns:
        [out, in].
    """
    scale = mean_magnitude(weight, groups)
    return soft_codebook(
        weight, scale, TERNARY, temperature=temperature, pressure=pressure, dtype=dtype
    )


def soft_codebook(
    weight: Tensor,
    scale: Tensor,
    levels: Sequence[float],
    *,
    temperature: float,
    pressure: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight used in training over codewords `scale · levels`.

    Args:
        weight: [out, in], any float dtype; arithmetic is float32, of float64 weights float64.
        scale: [out, groups], not 0, of either sign.
        levels: 2 to 256 codewords, increasing.
        temperature: in squared units of `levels`; 0 takes the nearest codeword.
        pressure: 0 is the float weight exactly, 1 the quantized one.
        dtype: of what is made; the weight's if None.

    Returns:
        [out, in], with gradients to weight and scale.

    Raises:
        ValueError: the levels are no codebook, or the shapes do not fit each other.
    """
    gaps = [high - low for low, high in pairwise(levels)]
    if not 2 <= len(levels) <= MAX_LEVELS or not min(gaps) > 0:
        raise ValueError(f"a codebook has 2 to {MAX_LEVELS} increasing levels, got {levels}")
    step = gaps[0]
    zero = -levels[0] / step
    if all((code - zero) * step == level for code, level in enumerate(levels)):
        grid = SoftGrid(top=len(gaps), temperature=temperature / (step * step), pressure=pressure)
        spread = scale if step == 1.0 else scale * step
        return soft_grid(weight, spread, scale.new_tensor(zero), grid, dtype)
    if scale.ndim != 2 or len(in_groups(weight, scale.shape[1])) != len(scale):
        raise ValueError(f"weights {tuple(weight.shape)} have no scales {tuple(scale.shape)}")
    if not temperature >= 0 or not 0 <= pressure <= 1:
        raise ValueError(f"no temperature and pressure: {temperature}, {pressure}")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    codewords = torch.tensor(levels, dtype=wide, device=weight.device)
    soft: Tensor = _SoftCodebook.apply(  # type: ignore[no-untyped-call]
        weight, scale, codewords, temperature, pressure
    )
    return soft.to(dtype or weight.dtype)


class _SoftCodebook(torch.autograd.Function):
    """`soft_codebook` over levels of any spacing, codeword after codeword in torch."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        levels: Tensor,
        temperature: float,
        pressure: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, levels)
        ctx.temperature, ctx.pressure = temperature, pressure
        wide = weight.to(levels.dtype)
        if pressure == 0.0:
            return wide.clone()
        mean, _, _ = _expected(wide, scale.to(wide.dtype), levels, temperature)
        soft = (mean * scale.to(wide.dtype).unsqueeze(-1)).view_as(wide)
        return soft if pressure == 1.0 else (1.0 - pressure) * wide + pressure * soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, levels = ctx.saved_tensors
        if ctx.pressure == 0.0:  # also where a scale is useless
            return gradient.to(weight.dtype), torch.zeros_like(scale), None, None, None
        wide = weight.to(levels.dtype)
        mean, position, slope = _expected(wide, scale.to(wide.dtype), levels, ctx.temperature)
        grouped = gradient.reshape(mean.shape)
        moved = torch.where(slope == 0.0, 0.0, position * slope)  # a position may be infinite
        for_scale = ctx.pressure * (grouped * (mean - moved)).sum(-1)
        for_weight = (grouped * (1.0 - ctx.pressure + ctx.pressure * slope)).view_as(weight)
        return for_weight.to(weight.dtype), for_scale.to(scale.dtype), None, None, None


def _expected(
    weight: Tensor, scale: Tensor, levels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Expected codeword, position x and its slope, [out, groups, width] each.

    Weights are taken relative to the nearest codeword's, so that none overflows. What is not a
    number stays so.
    """
    position = in_groups(weight, scale.shape[1]) / scale.unsqueeze(-1)
    nearest = levels[torch.bucketize(position, (levels[1:] + levels[:-1]) / 2)]
    nearest = torch.where(position.isnan(), position, nearest)
    if temperature == 0.0:
        low = levels[0] - (levels[1] - levels[0]) / 2
        high = levels[-1] + (levels[-1] - levels[-2]) / 2
        return nearest, position, ((position >= low) & (position <= high)).to(weight.dtype)
    sharpness = min(1.0 / temperature, SHARPEST)
    total, first, second = (torch.zeros_like(position) for _ in range(3))
    for level in levels:
        away = level - nearest
        exponent = away * (2.0 * position - level - nearest) * sharpness
        # 0 for the nearest codeword, wherever the weight is, and never more
        share = torch.exp(torch.where(away == 0.0, 0.0, exponent).clamp_max(0.0))
        total += share
        first += share.mul_(away)
        second += share.mul_(away)
    mean = first / total
    return nearest + mean, position, (second / total - mean * mean) * (2.0 * sharpness)
