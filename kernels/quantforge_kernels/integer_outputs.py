"""What integer sums become: numbers, codes through a float scale, or codes through integers alone.

A convolution on activation codes has the exact sums Σ (q − z)(c − z'), an integer for every output
and every group of a scale. `Floats` and `Codes` scale them in float32; `Dyadic` is HAWQ-V3's
integer-only form, in which the whole rescaling is a multiplier of at most 31 bits and a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SHIFT = 62
_MULTIPLIER_BITS = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats:
    """Float32 numbers, clamped.

    Attributes:
        low: least value.
        high: largest value.
    """

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Codes of a grid, `clamp(round(y / scale) + zero, least, most)`.

    Attributes:
        scale: step of the grid.
        zero: the code that means 0.
        least: smallest code; `zero` where negative numbers are cut off.
        most: largest code.
    """

    scale: float
    zero: int
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dyadic:
    """`clamp(((sum + offset) · multiplier + 2^(shift − 1)) >> shift + zero, least, most)`.

    Attributes:
        multiplier: [out] int32.
        shift: [out] int32, 1..62.
        offset: [out] int32: the bias in units of the sums.
        zero: the code that means 0.
        least: smallest code.
        most: largest code.
    """

    multiplier: Tensor
    shift: Tensor
    offset: Tensor
    zero: int
    least: int
    most: int


Output = Floats | Codes | Dyadic


def dyadic(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest multiplier / 2^shift to every ratio, the multiplier of 31 bits where that can be.

    Args:
        ratios: [n] float64, below 2^30 in size.

    Returns:
        [n] int32 multipliers, of the signs of the ratios, and [n] int32 shifts in 1..62.

    Raises:
        ValueError: a ratio is too large or not a number.
    """
    if not bool((ratios.abs() < 2.0 ** (_MULTIPLIER_BITS - 1)).all()):
        raise ValueError(f"a rescaling of {float(ratios.abs().max())} has no multiplier of 31 bits")
    mantissa, exponent = torch.frexp(ratios.double())  # |mantissa| in [1/2, 1)
    shift = (_MULTIPLIER_BITS - exponent).clamp(1, LARGEST_SHIFT)
    multiplier = torch.ldexp(mantissa, exponent + shift).round()
    carried = multiplier.abs() >= 2.0**_MULTIPLIER_BITS  # rounded up to 2^31
    multiplier = torch.where(carried & (shift > 1), multiplier / 2, multiplier)
    shift = torch.where(carried & (shift > 1), shift - 1, shift)
    return multiplier.to(torch.int32), shift.to(torch.int32)


def rescaled(sums: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """`floor(sums · multiplier / 2^shift + 1/2)` in int64, exact for sums of 32 bits."""
    half = torch.ones_like(shift, dtype=torch.int64) << (shift.long() - 1)
    return (sums * multiplier.long() + half) >> shift.long()


def finished(sums: Tensor, scale: Tensor, bias: Tensor, output: Output) -> Tensor:
    """The definition of every output.

    Args:
        sums: [batch, out, groups of a row, height, width] int64.
        scale: [out, groups of a row] float32, of weight and input together.
        bias: [out] float32; of no use to `Dyadic`, which has its own.
        output: what is wanted.

    Returns:
        [batch, out, height, width] float32 or uint8.
    """
    column = (1, -1, 1, 1)
    if isinstance(output, Dyadic):
        offset, multiplier, shift = (
            one.view(column) for one in (output.offset, output.multiplier, output.shift)
        )
        codes = rescaled(sums[:, :, 0] + offset.long(), multiplier, shift) + output.zero
        return codes.clamp(output.least, output.most).to(torch.uint8)
    total = sums[:, :, 0].float() * scale[:, 0].view(column)
    for group in range(1, scale.shape[1]):
        total += sums[:, :, group].float() * scale[:, group].view(column)
    total += bias.view(column)
    if isinstance(output, Floats):
        return total.clamp(output.low, output.high)
    codes = (total / output.scale).round() + output.zero
    return codes.clamp(output.least, output.most).to(torch.uint8)
