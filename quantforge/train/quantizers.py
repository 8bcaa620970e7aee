"""How a weight is quantized while it is trained, on the grid that the plan stores.

    hestia            drawn to the levels by a softmax, which hardens in the course of training
    straight-through  rounded, with gradients to weight and scale as if it had not been, as far as
                      half a step outside the grid (Hestia at temperature 0; EfficientQAT)
    lsq               rounded; no gradient outside the grid, the scale's divided by √(weights · Q);
                      on ternary and balanced grids ParetoQ's "stretched elastic" ends
    absmean           BitNet b1.58, ternary grids alone: rounded at the mean |w|, which is found
                      anew in every step; the gradient passes to all weights, and to no scale

The first three round to the same integers in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.methods.hestia import soft_weight
from quantforge.methods.straight_through import absmean_straight_through, learned_step
from quantforge.types import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardness:
    """Where a layer is between float and integer.

    Attributes:
        temperature: of its soft weights, in squared steps of the grid; 0 rounds.
        pressure: share of the quantized weight in the one used; 0 is the float weight.
    """

    temperature: float = 0.0
    pressure: float = 1.0


HARD = Hardness()

# [out, in] weight, [out, groups] scale, spec, zero-points and hardness to the weight that is used,
# in a dtype and with gradients to weight and scale.
Quantize = Callable[[Tensor, Tensor, QuantSpec, Tensor | None, Hardness, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """One way to quantize in training.

    Attributes:
        quantize: makes the weight that is used.
        hardens: whether it looks at the hardness; otherwise it always rounds.
        learns_scales: whether scales are trained; otherwise they are the mean |w|.
    """

    quantize: Quantize
    hardens: bool = False
    learns_scales: bool = True


def _hestia(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero: Tensor | None,
    hardness: Hardness,
    dtype: torch.dtype,
) -> Tensor:
    return soft_weight(
        weight, scale, spec, zero=zero, dtype=dtype,
        temperature=hardness.temperature, pressure=hardness.pressure,
    )  # fmt: skip


def _straight_through(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero: Tensor | None,
    _: Hardness,
    dtype: torch.dtype,
) -> Tensor:
    return soft_weight(weight, scale, spec, zero=zero, dtype=dtype, temperature=0.0)


def _lsq(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero: Tensor | None,
    _: Hardness,
    dtype: torch.dtype,
) -> Tensor:
    return learned_step(weight, scale, spec, zero=zero, dtype=dtype)


def _absmean(
    weight: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    _zero: Tensor | None,
    _: Hardness,
    dtype: torch.dtype,
) -> Tensor:
    return absmean_straight_through(weight, scale, spec, dtype=dtype)


QUANTIZERS: Mapping[str, Quantizer] = {
    "hestia": Quantizer(quantize=_hestia, hardens=True),
    "straight-through": Quantizer(quantize=_straight_through),
    "lsq": Quantizer(quantize=_lsq),
    "absmean": Quantizer(quantize=_absmean, learns_scales=False),
}
