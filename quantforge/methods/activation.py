"""Activations on a grid whose step is learned (LSQ, Esser et al., arXiv 1902.08153).

    x̂ = s (clamp(round(x / s) + zero, 0, top) − zero)

The gradient of x is passed straight through inside the grid and stopped outside. That of s is

    Σ g · (x̂ / s − x / s)   inside,      Σ g · x̂ / s   outside;

the zero stays, so both ends of the grid move along with s. Steps are learned relative to where they
start, by an optimiser that does not mind their gradients' size, so LSQ's factor 1/√(N top) is not
needed here. `dropped` is QDrop (Wei et al. 2022, arXiv 2203.05740): at random, values stay as they
are, so that what is learned beside it does not lean on one rounding error. Its draws are for a row
of a channel of a picture and not for a number: two hundred times fewer to make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rounded_to_step(x: Tensor, step: Tensor, zero: int, top: int) -> Tensor:
    """`x` on the grid, with gradients to `x` and the step.

    Args:
        x: any shape.
        step: [] positive.
        zero: the code that means 0.
        top: largest code.
    """
    made: Tensor = _Rounded.apply(x, step, zero, top)  # type: ignore[no-untyped-call]
    return made


def dropped(x: Tensor, rounded: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`rounded`, but for about `share` of the rows, which are those of `x`.

    Args:
        x: [batch, channels, ...].
        rounded: of the same shape.
        share: of the values that stay as they are.
        generator: draws for all dimensions but the last; for all if there are only two.
    """
    if share == 0.0:
        return rounded
    shape = (*x.shape[:-1], 1) if x.ndim > 2 else tuple(x.shape)
    keep = torch.rand(shape, generator=generator, device=x.device) < share
    return torch.where(keep, x, rounded)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: int, top: int) -> Tensor:
        position = x / step
        level = position.round().clamp_(-zero, top - zero)
        ctx.save_for_backward(position, level)
        ctx.ends = (-zero - 0.5, top - zero + 0.5)
        return level * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        position, level = ctx.saved_tensors
        gradient, (low, high) = gradients[0], ctx.ends
        inside = (position >= low) & (position <= high)
        moved = torch.where(inside, level - position, level)
        return gradient * inside, (gradient * moved).sum(), None, None
