"""Round-to-nearest on a given grid: no compensation."""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.types import PER_TENSOR, QuantizedWeight, QuantSpec


def minmax_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[out, groups] float32 symmetric scales that put ±max|w| half a step outside the grid.

    GPTQ's convention: 2 max|w| / (2^bits − 1), so that nothing in a group is clipped by more than
    half a step; over one more on grids that reach as far up as down. Rounded to bfloat16; 1 for a
    group of zeros.
    """
    groups = weight.float().view(len(weight), spec.groups(weight.shape[1]), -1)
    largest = groups.abs().amax(-1)
    if spec.group_size == PER_TENSOR:
        largest = largest.amax().expand_as(largest)
    steps = (1 << spec.bits) - 1 if spec.grid == "uniform" else spec.top + 1
    scale = (2.0 * largest / steps).bfloat16().float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def minmax_grid(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """[out, groups] float32 scales, and integer zeros, of the grid that covers every group.

    A symmetric grid is `minmax_scale`'s, with None for the zeros. An asymmetric one goes from least
    to greatest weight, and from or to 0 where that is outside: 0 is always a grid point. Its scales
    are rounded to bfloat16; 1 for a group of zeros.
    """
    if spec.symmetric:
        return minmax_scale(weight, spec), None
    groups = weight.float().view(len(weight), spec.groups(weight.shape[1]), -1)
    low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
    top = float((1 << spec.bits) - 1)
    scale = ((high - low) / top).bfloat16().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).round().clamp(0.0, top)


def nearest_codes(
    weight: Tensor, scale: Tensor, zero: Tensor | float, bits: int, top: int | None = None
) -> Tensor:
    """[out, in] uint8 nearest codes of the grid (code − zero) · scale.

    Args:
        weight: [out, in], any float dtype.
        scale: [out, groups], non-zero.
        zero: [out, groups] zero-points, whole or not; or one for all.
        bits: width of the codes.
        top: the largest of them, where that is not 2^bits − 1.
    """
    largest = float((1 << bits) - 1 if top is None else top)
    groups = weight.float().view(*scale.shape, -1)
    shift = zero.unsqueeze(-1) if isinstance(zero, Tensor) else zero
    codes = (groups / scale.unsqueeze(-1) + shift).round().clamp(0.0, largest)
    return codes.to(torch.uint8).flatten(1)


def round_to_nearest(
    weight: Tensor, scale: Tensor, spec: QuantSpec, zero: Tensor | None = None
) -> QuantizedWeight:
    """The nearest code of every weight.

    Args:
        weight: [out, in], any float dtype.
        scale: [out, groups], bfloat16-representable and non-zero.
        spec: width and grouping.
        zero: [out, groups] integer zero-points of an asymmetric spec.
    """
    centre = spec.middle if zero is None else zero
    codes = nearest_codes(weight, scale, centre, spec.bits, spec.top)
    stored = None if zero is None else zero.to(torch.uint8)
    return QuantizedWeight(codes=codes, scale=scale.bfloat16(), zero=stored, spec=spec)
