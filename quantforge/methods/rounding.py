"""Learned rounding: codes and scales as tensors that follow straight-through gradients.

A layer's weight is scale · (clamp(round(u), 0, 2^bits − 1) − zero), with a real-valued latent u a
weight, in units of the grid; zero-points stay as they are. Where SignRound (Cheng et al. 2023,
arXiv 2309.05516) learns an offset to the float weight that starts at plain rounding, u starts at
the compensated codes: inside each code's cell, on the side of the float weight. Training therefore
begins at the error-feedback solution and can only leave it where the block's output gains.

The weight is a leaf of the graph, in what the products round it to anyway; everything from its
gradient to the next latents is one pass of `quantforge_kernels.rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from quantforge_kernels.rounding import Latents
from torch import Tensor

from quantforge.types import QuantizedWeight

# How far inside its cell a latent may start: 0.5 would sit on the edge to the next code.
CELL = 0.45


def within_cells(weight: Tensor, quantized: QuantizedWeight, cell: float = CELL) -> Tensor:
    """[out, in] float32 latents: the float weight in units of the grid, inside its code's cell.

    They round to the codes, whatever compensation has made of those, and are as near to the float
    weight as that allows.

    Args:
        weight: [out, in] float weight.
        quantized: codes and the grid.
        cell: how far from its code a latent may be; less makes codes harder to leave.
    """
    scale, codes = quantized.scale.float(), quantized.codes.float()
    exact = weight.float().view(*scale.shape, -1) / scale.unsqueeze(-1) + quantized.centre()
    return codes + (exact.view_as(codes) - codes).clamp_(-cell, cell)


@dataclass(slots=True, kw_only=True)
class TrainableWeight:
    """One layer's weight while its rounding is learned.

    Attributes:
        latents: codes and scales on the way, with the means of their gradients.
        initial: what it starts from; its grid's width and its zero-points are kept.
        steps: taken so far.
        leaf: the weight that the last `weight` made, which holds its gradient.
    """

    latents: Latents
    initial: QuantizedWeight
    steps: int = 0
    leaf: Tensor | None = None

    @classmethod
    def start(
        cls, weight: Tensor, quantized: QuantizedWeight, cell: float = CELL
    ) -> TrainableWeight:
        """From the float weight [out, in] and the codes it starts from, see `within_cells`."""
        latent, centre = within_cells(weight, quantized, cell), quantized.centre()
        top = quantized.spec.top
        # a copy of the scales, which `quantized` keeps as they are
        scale = quantized.scale.to(torch.float32, copy=True)
        made = Latents.start(latent, scale, centre.squeeze(-1) if centre.ndim else centre, top)
        return cls(latents=made, initial=quantized)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] weight in `dtype`, a leaf that collects the gradient for `step`."""
        self.leaf = self.latents.weight(dtype).requires_grad_()
        return self.leaf

    @torch.no_grad()
    def step(self, latent_step: float, scale_step: float, momentum: float = 0.0) -> None:
        """Signed descent: latents by `latent_step` codes, scales by `scale_step` of their size.

        The sign is that of a running mean of the gradients. The gradient of the last `weight` must
        be there; it is let go of.

        Args:
            latent_step: in codes.
            scale_step: relative to the scales.
            momentum: weight of the past in the running mean; 0 takes the last gradient alone.
        """
        assert self.leaf is not None and self.leaf.grad is not None
        keep, take = (momentum, 1.0 - momentum) if self.steps else (0.0, 1.0)
        self.latents.step(
            self.leaf.grad, latent_step=latent_step, scale_step=scale_step, keep=keep, take=take
        )
        self.steps, self.leaf = self.steps + 1, None

    def finish(self) -> QuantizedWeight:
        """The integers and 16-bit scales that were learned."""
        scale = self.latents.scale.bfloat16()
        # A scale that vanished stores nothing; the smallest one keeps the format valid.
        scale = torch.where(scale == 0, torch.finfo(torch.bfloat16).tiny, scale)
        codes = self.latents.codes().to(torch.uint8)
        return replace(self.initial, codes=codes, scale=scale.to(torch.bfloat16))
