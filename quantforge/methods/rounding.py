"""Learned rounding: codes and scales as trainable tensors, with straight-through gradients.

A layer's weight is scale · (clamp(round(u), 0, 2^bits − 1) − zero), with a real-valued latent u a
weight, in units of the grid; zero-points stay as they are. Where SignRound (Cheng et al. 2023,
arXiv 2309.05516) learns an offset to the float weight that starts at plain rounding, u starts at
the compensated codes: inside each code's cell, on the side of the float weight. Training therefore
begins at the error-feedback solution and can only leave it where the block's output gains.

    d weight / d u = scale inside the grid, 0 outside   (straight through the rounding)
    d weight / d scale = code − zero
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantforge.types import QuantizedWeight

# How far inside its cell a latent may start: 0.5 would sit on the edge to the next code.
CELL = 0.45


class _RoundThrough(torch.autograd.Function):
    """[out, in] scale · (clamp(round(latent)) − centre); gradients as in the module's header."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, centre: Tensor, top: int) -> Tensor:
        integers = latent.round().clamp_(0, top).view(*scale.shape, -1) - centre
        ctx.save_for_backward(latent, scale, integers)
        ctx.top = top
        return (integers * scale.unsqueeze(-1)).view_as(latent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        latent, scale, integers = ctx.saved_tensors
        gradient = gradients[0].view(*scale.shape, -1)
        for_scale = (gradient * integers).sum(-1)
        for_latent = (gradient * scale.unsqueeze(-1)).view_as(latent)
        inside = (latent > -0.5) & (latent < ctx.top + 0.5)
        return for_latent.mul_(inside), for_scale, None, None


@dataclass(slots=True, kw_only=True)
class TrainableWeight:
    """One layer's weight while its rounding is learned.

    Attributes:
        latent: [out, in] float32 in codes, requires grad.
        scale: [out, groups] float32, requires grad.
        initial: what it starts from; its grid's width and its zero-points are kept.
        average: running means of both gradients, once a step has been taken.
    """

    latent: Tensor
    scale: Tensor
    initial: QuantizedWeight
    average: tuple[Tensor, Tensor] | None = None

    @classmethod
    def start(cls, weight: Tensor, quantized: QuantizedWeight) -> TrainableWeight:
        """From the float weight [out, in] and the codes it starts from."""
        scale, codes = quantized.scale.float(), quantized.codes.float()
        exact = weight.float().view(*scale.shape, -1) / scale.unsqueeze(-1) + quantized.centre()
        latent = codes + (exact.view_as(codes) - codes).clamp_(-CELL, CELL)
        return cls(latent=latent.requires_grad_(), scale=scale.requires_grad_(), initial=quantized)

    def weight(self) -> Tensor:
        """[out, in] float32 weight, differentiable in the latent and the scale."""
        made: Tensor = _RoundThrough.apply(  # type: ignore[no-untyped-call]
            self.latent, self.scale, self.initial.centre(), self._top
        )
        return made

    @property
    def _top(self) -> int:
        """The largest code."""
        return (1 << self.initial.spec.bits) - 1

    @torch.no_grad()
    def step(self, latent_step: float, scale_step: float, momentum: float = 0.0) -> None:
        """Signed descent: latents by `latent_step` codes, scales by `scale_step` of their size.

        The sign is that of a running mean of the gradients. Clears the gradients, which must be
        there.

        Args:
            latent_step: in codes.
            scale_step: relative to the scales.
            momentum: weight of the past in the running mean; 0 takes the last gradient alone.
        """
        latent, scale = self.latent.grad, self.scale.grad
        assert latent is not None and scale is not None
        if self.average is None:
            self.average = (latent, scale)
        else:
            self.average[0].lerp_(latent, 1.0 - momentum)
            self.average[1].lerp_(scale, 1.0 - momentum)
        self.latent.sub_(self.average[0].sign(), alpha=latent_step)
        self.scale.sub_(self.average[1].sign() * self.scale.abs(), alpha=scale_step)
        self.latent.grad = self.scale.grad = None

    def finish(self) -> QuantizedWeight:
        """The integers and 16-bit scales that were learned."""
        codes = self.latent.detach().round().clamp(0, self._top)
        scale = self.scale.detach().bfloat16()
        # A scale that vanished stores nothing; the smallest one keeps the format valid.
        scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).tiny, scale)
        return replace(self.initial, codes=codes.to(torch.uint8), scale=scale.to(torch.bfloat16))
