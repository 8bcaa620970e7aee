"""The linear layer that is trained: a float weight behind integers that are made of it anew.

The used weight is formed once a step, not once a pass: it is a leaf of the graph that collects the
gradients of all sequences of the step, and one pass takes them back to the float weight and to the
scales. What quantizing costs therefore does not grow with the batch, and beside the float weight
and its gradient only the used one is held, in the dtype of the products.

Scales are base · (1 + change), with the change trained: steps are relative to a scale's size.
They enter rounded to 16 bits, as they are stored, with the gradient passed straight through that
rounding. Between steps the layer is what will be stored: codes times scales, formed as it runs.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantforge.methods.level_scales import mean_scales
from quantforge.methods.rounding import within_cells
from quantforge.methods.rtn import round_to_nearest
from quantforge.methods.scaled_linear import stored_scale
from quantforge.methods.temperature import optimal_temperature, relative_spread
from quantforge.train.quantizers import HARD, Hardness, Quantizer
from quantforge.types import PER_TENSOR, QuantizedWeight

# Layers whose weights are as wide, to so many steps of the grid, start equally warm: finding a
# temperature takes tens of milliseconds.
SPREADS = 0.05

Start = Literal["compensated", "dequantized", "float"]


@cache
def _nearest_temperature(top: int, zero: float, spread: float) -> float:
    return optimal_temperature(top=top, zero=zero, spread=max(spread, SPREADS))


def first_weight(original: Tensor | None, quantized: QuantizedWeight, start: Start) -> Tensor:
    """[out, in] float32 weight that training starts from.

    Args:
        original: [out, in] float weight, before compensation; None where `start` does without.
        quantized: the compensated one.
        start: "compensated" rounds to the codes of `quantized` and is otherwise as near to the
            original as that allows; "dequantized" is `quantized` itself; "float" the original.
    """
    if start == "dequantized" or original is None:
        return quantized.dequantize()
    if start == "float":
        return original.to(torch.float32, copy=True)
    scale = quantized.scale.float()
    steps = within_cells(original, quantized).view(*scale.shape, -1) - quantized.centre()
    return steps.mul_(scale.unsqueeze(-1)).view_as(original)


class TrainedLinear(nn.Module):
    """Stands in for a linear layer while its weight and its scales are trained.

    Attributes:
        quantized: what it started from; gives grid and zero-points, which are fixed.
        quantizer: how its weight is quantized.
        weight: [out, in] float32 parameter.
        change: [out, groups] float32 parameter, [1, 1] of one scale in all; the scale is
            base · (1 + change).
        bias: [out] or None, as in the layer it stands in for; not trained.
        base: [out, groups] float32, the scales at the start; a buffer.
    """

    def __init__(
        self,
        quantized: QuantizedWeight,
        weight: Tensor,
        quantizer: Quantizer,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.quantized, self.quantizer = quantized, quantizer
        self.weight = nn.Parameter(weight)
        self.register_buffer("base", quantized.scale.detach().float(), persistent=False)
        whole = quantized.spec.group_size == PER_TENSOR
        self.change = nn.Parameter(torch.zeros_like(self.base[:1] if whole else self.base))
        self.bias = bias
        self._soft: Tensor | None = None
        self._used: Tensor | None = None

    base: Tensor

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """What is trained of it: the weight, and the scales where the quantizer learns them."""
        return (self.weight, self.change) if self.quantizer.learns_scales else (self.weight,)

    @property
    def step_size(self) -> float:
        """Mean size of its scales at the start: what a code is worth."""
        return float(self.base.abs().mean())

    def first_temperature(self) -> float:
        """The temperature at which soft weights are nearest to the float ones, in squared steps."""
        spec, zero = self.quantized.spec, self.quantized.zero
        centre = spec.middle if zero is None else round(float(zero.float().mean()))
        spread = relative_spread(self.weight, self.base)
        return _nearest_temperature(spec.top, centre, round(spread / SPREADS) * SPREADS)

    def prepare(self, hardness: Hardness, dtype: torch.dtype) -> None:
        """Form the weight for the passes that follow, until `collect` or `release`."""
        self._soft = self._quantized(hardness, dtype)
        self._used = self._soft.detach().requires_grad_(self._soft.requires_grad)

    @property
    def used(self) -> Tensor:
        """[out, in] the weight of the passes since `prepare`, a leaf; the stored one otherwise."""
        if self._used is not None:
            return self._used
        with torch.no_grad():
            return self._quantized(HARD, torch.float32)

    def collect(self) -> None:
        """Take the gradients of all passes since `prepare` to weight and scales, and let go."""
        soft, used = self._soft, self._used
        self.release()
        if soft is not None and used is not None and used.grad is not None:
            torch.autograd.backward(soft, used.grad)

    def release(self) -> None:
        """Be what is stored again."""
        self._soft = self._used = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., out], in the dtype of the products that surround it."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        weight = self._used
        if weight is None:
            with torch.no_grad():
                weight = self._quantized(HARD, dtype)
        # what is measured on the way may have other products than training
        return functional.linear(x, weight.to(dtype), self.bias)

    @torch.no_grad()
    def finish(self) -> QuantizedWeight:
        """The integers and 16-bit scales that are stored."""
        scale = stored_scale(self._scale(), self.quantized.scale)
        return round_to_nearest(
            self.weight, scale.float(), self.quantized.spec, self.quantized.zero
        )

    def _scale(self) -> Tensor:
        """[out, groups] float32 scales; where they are trained, not rounded."""
        if not self.quantizer.learns_scales:
            return mean_scales(self.weight.detach(), self.quantized.spec)
        return self.base * (1.0 + self.change)

    def _quantized(self, hardness: Hardness, dtype: torch.dtype) -> Tensor:
        """[out, in] used weight; its graph holds no more than weight and scale."""
        scale = self._scale()
        stored = stored_scale(scale, self.quantized.scale).float()
        rounded = scale + (stored - scale).detach()
        return self.quantizer.quantize(
            self.weight, rounded, self.quantized.spec, self.quantized.zero, hardness, dtype
        )
