"""A linear layer whose integers are fixed and whose scales learn.

    y = x Ŵᵀ,  Ŵ = (code − zero) · scale,    ∂L/∂scale = Σ_group (code − zero) · (∂L/∂y)ᵀ x

with scale and zero of the weight's group; without a stored zero it is the middle code. Products
run in bfloat16; the weight is formed anew in each pass, so that beside the codes (one byte a
weight) only the layer's input is kept for the backward pass. Scales enter rounded to bfloat16, as
they will be stored, with the gradient passed straight through the rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.types import QuantizedWeight


class _ScaledProduct(torch.autograd.Function):
    """[..., out] bfloat16 product of x [..., in] with (code − centre) · scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, codes: Tensor, centre: Tensor) -> Tensor:
        low = x.bfloat16()
        ctx.save_for_backward(low, scale, codes, centre)
        return low @ _weight(codes, scale, centre).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, codes, centre = ctx.saved_tensors
        gradient = gradients[0].bfloat16()
        for_input = gradient @ _weight(codes, scale, centre)
        for_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        groups = for_weight.view(*scale.shape, -1).float()
        groups *= _centred(codes, scale, centre)
        return for_input, groups.sum(-1), None, None


def _centred(codes: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """[out, groups, width] bfloat16 code − centre; integers up to 255 are exact in bfloat16."""
    return codes.view(*scale.shape, -1).bfloat16().sub_(centre)


def _weight(codes: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """[out, in] bfloat16 (code − centre) · scale, from codes [out, in] and scale [out, groups]."""
    groups = _centred(codes, scale, centre)
    return groups.mul_(scale.bfloat16().unsqueeze(-1)).view_as(codes)


class ScaledLinear(nn.Module):
    """Stands in for a linear layer while scales are tuned.

    Attributes:
        quantized: the weight at the start; its codes are read in place, not copied.
        base: [out, groups] float32, the scales at the start; a buffer.
        centre: bfloat16, the codes that mean 0 (`QuantizedWeight.centre`); a buffer.
        change: [out, groups] float32 parameter; the scale is base · (1 + change).
        bias: [out] or None, as in the layer it stands in for.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.quantized = weight
        self.register_buffer("base", weight.scale.detach().float(), persistent=False)
        self.register_buffer("centre", weight.centre().bfloat16(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.base))
        self.bias = bias

    base: Tensor
    centre: Tensor

    def scale(self) -> Tensor:
        """[out, groups] float32 current scales."""
        return self.base * (1.0 + self.change)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] bfloat16."""
        made: Tensor = _ScaledProduct.apply(  # type: ignore[no-untyped-call]
            x, self.scale(), self.quantized.codes, self.centre
        )
        return made if self.bias is None else made + self.bias

    def finish(self) -> QuantizedWeight:
        """The same integers with the scales as they now are."""
        return replace(self.quantized, scale=stored_scale(self.scale(), self.quantized.scale))


@torch.no_grad()
def stored_scale(scale: Tensor, start: Tensor) -> Tensor:
    """[out, groups] bfloat16 scales as they are stored: `start`'s where 16 bits round them to 0."""
    stored = scale.bfloat16()
    return torch.where(stored == 0, start.to(stored.dtype), stored)
