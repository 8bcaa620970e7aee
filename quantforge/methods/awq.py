"""AWQ (Lin et al. 2023, arXiv 2306.00978): scale input channels up before rounding, clip the rest.

A channel with large activations multiplies the rounding error of its weights. Its weights are
multiplied by s_j before they are rounded and its activations divided by s_j, which costs nothing
where the division folds into what produces them (a norm's weight, the rows of the linear before):

    s_j = m_j^r / √(max m^r · min m^r),   m_j = max(mean |x_j|, 1e-4)

The exponent r in [0, 1) is the one number that is searched; the caller says what it minimises,
usually the output error of everything that reads the scaled channels (`rounding_error`, summed over
the layers). Weights are then clipped, per group, at the share of their range that leaves the least
output error.

The other grids of `gptq.fit_grid` are searched over the range they cover with the same aim, so a
clip is for min-max grids alone (`quantize.clip`).

What differs from the authors' code: errors come from the gram, which holds all calibration tokens,
instead of from running a sample of tokens through an attention or MLP; for the clip, from the
gram's diagonal blocks. Channels that cross a repetition of heads (values into the output
projection, under grouped-query attention) cannot be scaled one by one; leave those out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.methods.gptq import Grid, fit_grid
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.numerics import Factor, output_error
from quantforge.types import QuantSpec

SMALLEST_MAGNITUDE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenScale:
    """The channel scale that a search chose.

    Attributes:
        exponent: r; 0 where no scaling helps.
        scale: [in] float32 s.
        loss: the caller's loss with it.
        unscaled_loss: the loss without scaling.
    """

    exponent: float
    scale: Tensor
    loss: float
    unscaled_loss: float


def channel_scale(magnitude: Tensor, exponent: float) -> Tensor:
    """[in] scale s of the module's header; its largest and smallest entry multiply to 1.

    Args:
        magnitude: [in] mean |x_j| over tokens.
        exponent: r; 0 gives ones.
    """
    powers = magnitude.clamp_min(SMALLEST_MAGNITUDE) ** exponent
    return powers / (powers.max() * powers.min()).sqrt()


def search_scale(
    magnitude: Tensor, loss: Callable[[Tensor], float], *, steps: int = 20
) -> ChosenScale:
    """The exponent among 0, 1/steps, .. (steps − 1)/steps whose scale has the least loss.

    Args:
        magnitude: [in] mean |x_j| over tokens.
        loss: of a scale [in]; a scale whose loss is not finite is passed over.
        steps: exponents tried.
    """
    losses = [loss(channel_scale(magnitude, step / steps)) for step in range(steps)]
    usable = [value if math.isfinite(value) else math.inf for value in losses]
    best = usable.index(min(usable))  # the first, so that equal losses mean less scaling
    return ChosenScale(
        exponent=best / steps,
        scale=channel_scale(magnitude, best / steps),
        loss=losses[best],
        unscaled_loss=losses[0],
    )


def rounding_error(
    weight: Tensor, gram: Tensor, factor: Factor, spec: QuantSpec, grid: Grid, scale: Tensor
) -> float:
    """Squared output error of a layer rounded to nearest after its inputs were divided by `scale`.

    Args:
        weight: [out, in] float32 weight for undivided inputs.
        gram: [in, in] mean of x xᵀ of undivided inputs.
        factor: of that gram; what the grid is fitted with.
        spec: width, grouping and symmetry.
        grid: how the grid is fitted.
        scale: [in], positive.
    """
    scaled = multiply_inputs(weight, scale)
    steps, zero = fit_grid(scaled, factor.rescaled(scale), spec, grid)
    rounded = round_to_nearest(scaled, steps, spec, zero).dequantize()
    difference = rounded / scale - weight
    return float(output_error(difference, gram).sum(dtype=torch.float64))


def multiply_inputs(weight: Tensor, scale: Tensor) -> Tensor:
    """[out, in] weight of a linear whose inputs were divided by `scale` [in]."""
    return weight * scale.to(weight.dtype)


def divide_outputs(parameter: Tensor, scale: Tensor) -> Tensor:
    """A norm's weight [n], a bias [n] or a linear's weight [n, in] whose n outputs are divided.

    A norm that multiplies by 1 + weight has to be given, and gives back, that sum.
    """
    divisor = scale.to(parameter.dtype)
    return parameter / divisor.view(-1, *[1] * (parameter.dim() - 1))


def search_clip(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, steps: int = 20, deepest: float = 0.5
) -> Tensor:
    """[out, groups] float32 magnitudes at which clipping before rounding costs least.

    The error is that of one group's part of the output, d H_gg dᵀ, on a min-max grid; costs about
    out · in · width multiply-adds a step.

    Args:
        weight: [out, in] float32.
        gram: [in, in] mean of x xᵀ over the layer's inputs.
        spec: width, grouping and symmetry.
        steps: the range shrinks by 1/steps from trial to trial.
        deepest: no trial shrinks it by this share or more.
    """
    shape = (len(weight), spec.groups(weight.shape[1]), -1)
    blocks = diagonal_blocks(gram, shape[1])
    groups = weight.view(shape)
    largest = groups.abs().amax(-1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(max(1, math.ceil(steps * deepest - 1e-9))):
        limit = largest * (1.0 - step / steps)
        clipped = clip_groups(weight, limit)
        scale, zero = minmax_grid(clipped, spec)
        rounded = round_to_nearest(clipped, scale, spec, zero).dequantize()
        difference = (rounded - weight).view(shape)
        seen = torch.bmm(difference.transpose(0, 1), blocks).transpose(0, 1)
        error = (seen * difference).sum(-1)
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return best


def clip_groups(weight: Tensor, limit: Tensor) -> Tensor:
    """[out, in] weight with every group clipped at ± its entry of `limit` [out, groups]."""
    groups = weight.view(*limit.shape, -1)
    bound = limit.unsqueeze(-1)
    return groups.clamp(-bound, bound).view_as(weight)


def diagonal_blocks(gram: Tensor, groups: int) -> Tensor:
    """[groups, width, width] blocks of a gram [in, in] along its diagonal."""
    width = len(gram) // groups
    blocks = gram.view(groups, width, groups, width).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()
