"""Round-to-nearest on a given grid: no compensation."""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.types import QuantizedWeight, QuantSpec


def minmax_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[out, groups] float32 symmetric scales that put ±max|w| half a step outside the grid.

    GPTQ's convention: 2 max|w| / (2^bits − 1), so that nothing in a group is clipped by more than
    half a step. Rounded to bfloat16; 1 for a group of zeros.
    """
    groups = weight.float().view(len(weight), spec.groups(weight.shape[1]), -1)
    largest = groups.abs().amax(-1)
    scale = (2.0 * largest / ((1 << spec.bits) - 1)).bfloat16().float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def round_to_nearest(weight: Tensor, scale: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """The nearest symmetric code of every weight.

    Args:
        weight: [out, in], any float dtype.
        scale: [out, groups], bfloat16-representable and non-zero.
        spec: width and grouping; symmetric.
    """
    groups = weight.float().view(len(weight), spec.groups(weight.shape[1]), -1)
    codes = (groups / scale.unsqueeze(-1)).round().clamp(spec.code_min, spec.code_max)
    codes = (codes - spec.code_min).to(torch.uint8).flatten(1)
    return QuantizedWeight(codes=codes, scale=scale.bfloat16(), zero=None, spec=spec)
