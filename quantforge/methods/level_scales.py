"""Scales of ternary and balanced grids, of groups, rows or a whole matrix.

Both have few levels, as many above 0 as below, so that a scale's sign is of no use and its best
size is found by trying: shares of the range, for the codes that each of them gives the scale with
the least error, and from the best of all on likewise. BitNet b1.58 (arXiv 2402.17764) takes the
mean |w| of the matrix instead, 0.798 standard deviations of Gaussian weights, which lose 0.263 of
their square to it and 0.190 at the best scale, 1.224.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.methods.hestia import mean_magnitude
from quantforge.types import PER_TENSOR, QuantSpec

SMALLEST = 0.05  # share of max |w| that is tried first: the mean |w| of whole matrices is there
SHARES = 40
REFITS = 4


def level_scales(weight: Tensor, importance: Tensor, spec: QuantSpec) -> Tensor:
    """Scales that minimise Σ importance (w − scale · level)² over each group.

    Args:
        weight: [out, in] float32.
        importance: [in] float32, non-negative.
        spec: of a ternary or balanced grid.

    Returns:
        [out, groups] float32, bfloat16-representable; 1 for a group of zeros.
    """
    shape = (len(weight), spec.groups(weight.shape[1]))
    whole = spec.group_size == PER_TENSOR
    counts = importance.expand_as(weight)
    grouped, counts = (
        x.reshape(1, 1, -1) if whole else x.reshape(*shape, -1) for x in (weight, counts)
    )

    def levels(scale: Tensor) -> Tensor:
        codes = (grouped / scale.unsqueeze(-1) + spec.middle).round_().clamp_(0.0, spec.top)
        return codes.sub_(spec.middle)

    def error(scale: Tensor) -> Tensor:
        off = torch.addcmul(grouped, levels(scale), scale.unsqueeze(-1), value=-1.0)
        return off.square_().mul_(counts).sum(-1)

    largest = grouped.abs().amax(-1)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)

    def refitted(scale: Tensor) -> Tensor:
        level = levels(scale)
        return (level * grouped * counts).sum(-1) / (level.square() * counts).sum(-1)

    def take(trial: Tensor) -> None:
        nonlocal best, least
        trial = trial.bfloat16().float()
        usable = torch.isfinite(trial) & (trial > 0)
        found = error(torch.where(usable, trial, 1.0))
        better = usable & (found < least)
        best, least = torch.where(better, trial, best), torch.where(better, found, least)

    for index in range(SHARES):
        trial = largest * SMALLEST ** (1.0 - index / (SHARES - 1))
        take(trial)
        take(refitted(torch.where(largest > 0, trial, 1.0)))
    for _ in range(REFITS):
        take(refitted(best))
    return torch.where(largest > 0, best, 1.0).expand(shape).contiguous()


def mean_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """BitNet's scales: the mean |w| of every group.

    Args:
        weight: [out, in], any float dtype.
        spec: of a ternary grid.

    Returns:
        [out, groups] float32, bfloat16-representable; 1 for a group of zeros.
    """
    shape = (len(weight), spec.groups(weight.shape[1]))
    if spec.group_size == PER_TENSOR:
        mean = mean_magnitude(weight.reshape(1, -1))
    else:
        mean = mean_magnitude(weight, shape[1])
    mean = mean.float().bfloat16().float()
    return torch.where(mean == 0, 1.0, mean).expand(shape).contiguous()
