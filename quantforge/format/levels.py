"""Codes of ternary and balanced grids as bytes, and the same weights on a uniform grid.

Ternary codes 0, 1 and 2 go five to a byte, Σ cᵢ 3ⁱ, balanced ones 0 to 3 four to a byte, Σ cᵢ 4ⁱ;
rows begin with a byte of their own and end with codes of 0. Kernels know uniform grids: there a
ternary weight is one of 2 bits whose lowest code is not used, and a balanced one is of 3 bits, odd
codes alone, at half the scale. Both give the same numbers, whatever they are multiplied in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantforge.types import PER_CHANNEL, PER_TENSOR, TERNARY_A_BYTE, QuantizedWeight, QuantSpec


def pack_levels(codes: Tensor, spec: QuantSpec) -> Tensor:
    """[out, bytes] uint8 from codes [out, in] uint8.

    Args:
        codes: 0 .. `spec.top`.
        spec: of a ternary or balanced grid.
    """
    base, count = _digits(spec)
    out, columns = codes.shape
    padded = codes.new_zeros(out, spec.row_bytes(columns) * count)
    padded[:, :columns] = codes
    digits = padded.view(out, -1, count)
    packed = torch.zeros_like(digits[..., 0])
    for index in reversed(range(count)):
        packed = packed * base + digits[..., index]
    return packed


def unpack_levels(packed: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """Inverse of `pack_levels`: [out, columns] uint8; what is no code comes out below 3 or 4."""
    base, count = _digits(spec)
    digits, rest = [], packed
    for _ in range(count):
        digits.append(rest % base)
        rest = rest // base
    return torch.stack(digits, -1).flatten(1)[:, :columns].contiguous()


def _digits(spec: QuantSpec) -> tuple[int, int]:
    """Base of a byte's digits, and how many it has."""
    return (3, TERNARY_A_BYTE) if spec.grid == "ternary" else (4, 4)


def uniform_spec(spec: QuantSpec) -> QuantSpec:
    """The uniform spec that holds the same weights; the spec itself where it is uniform."""
    if spec.grid == "uniform":
        return spec
    size = PER_CHANNEL if spec.group_size == PER_TENSOR else spec.group_size
    return QuantSpec(2 if spec.grid == "ternary" else 3, size)


def as_uniform(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers with the codes of a uniform grid; the weight itself where it is one."""
    spec = weight.spec
    if spec.grid == "uniform":
        return weight
    if spec.grid == "ternary":
        return replace(weight, codes=weight.codes + 1, spec=uniform_spec(spec))
    # (c − 3/2) s = (2 c − 3) s / 2; halving is exact above the smallest float
    return replace(
        weight, codes=weight.codes * 2 + 1, scale=weight.scale / 2, spec=uniform_spec(spec)
    )
