"""The `cpu` backend: which of the C++ kernels runs what.

Few rows of x are multiplied by the kernels, which read the packed weight once for every four rows
and form each weight in registers. Many rows in bfloat16 or float32 pay for unpacking a block of the
weight, which torch then multiplies; the 8-bit products stay with the kernels at any count.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from quantforge_kernels import cpu_library
from quantforge_kernels.cpu_library import LANES, Weight
from quantforge_kernels.geometry import Geometry
from quantforge_kernels.native import BuildError

EXACT, QUANTIZED = "exact", "a8"

# Rows of x up to which streaming the packed weight beats unpacking it: torch multiplies bfloat16
# faster than these kernels form the weights again and again, and float32 slower.
_FEW_ROWS = {torch.float32: 64, torch.bfloat16: 8}
_BLOCK_BYTES = 1 << 22  # an unpacked block stays in the cache until it is multiplied


@cache
def unavailable() -> str:
    """Why the kernels cannot run on this machine, with one warning; empty if they can."""
    try:
        cpu_library.library()
    except BuildError as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"packed layers run in torch, many times slower: {reason}", RuntimeWarning, stacklevel=2
        )
        return reason
    return ""


def prepare(
    words: Tensor, scale: Tensor, zero: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero-points in the kernels' order."""
    weight = cpu_library.prepare(cpu_library.library(), words, scale, zero, geometry)
    return weight.codes, weight.scale, weight.zero


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: Geometry,
    bias: Tensor | None,
    mode: str,
) -> Tensor:
    """`x @ weight.T + bias`; see `backends.Prepared.linear`."""
    library = cpu_library.library()
    weight = Weight(codes, scale, zero, geometry)
    flat = x.reshape(-1, geometry.in_features).contiguous()
    bias = None if bias is None else bias.contiguous()
    shape = (*x.shape[:-1], geometry.out_features)
    if mode == QUANTIZED or flat.shape[0] <= _FEW_ROWS[x.dtype]:
        quantized = mode == QUANTIZED
        return cpu_library.multiply(library, flat, weight, bias, quantized=quantized).view(shape)
    y = x.new_empty(flat.shape[0], geometry.out_features)
    for first, last in _blocks(geometry, x.dtype):
        rows = slice(first * LANES, min(last * LANES, geometry.out_features))
        block = cpu_library.unpack(library, weight, first, last, x.dtype)
        part = block[:, : rows.stop - rows.start]
        y[:, rows] = flat @ part if bias is None else torch.addmm(bias[rows], flat, part)
    return y.view(shape)


def input_gradient(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, geometry: Geometry
) -> Tensor:
    """`gradient @ weight`, [..., out] → [..., in]."""
    library = cpu_library.library()
    weight = Weight(codes, scale, zero, geometry)
    flat = gradient.reshape(-1, geometry.out_features)
    result = flat.new_zeros(flat.shape[0], geometry.in_features)
    for first, last in _blocks(geometry, gradient.dtype):
        rows = slice(first * LANES, min(last * LANES, geometry.out_features))
        block = cpu_library.unpack(library, weight, first, last, gradient.dtype)
        result += flat[:, rows] @ block[:, : rows.stop - rows.start].t()
    return result.view(*gradient.shape[:-1], geometry.in_features)


def embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the weight, [...] ids → [..., in] in `dtype`.

    Raises:
        IndexError: an id is no row.
    """
    geometry.check_ids(ids)
    flat = ids.reshape(-1).long().contiguous()
    weight = Weight(codes, scale, zero, geometry)
    rows = cpu_library.rows(cpu_library.library(), weight, flat, dtype)
    return rows.view(*ids.shape, geometry.in_features)


def unprepared_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`reference.qlinear` for words in the order of the file, which are repacked at every call."""
    geometry = Geometry(
        out_features=words.shape[0], in_features=x.shape[-1], bits=bits, group_size=group_size
    )
    return linear(x, *prepare(words, scale, zero, geometry), geometry, bias, EXACT)


def _blocks(geometry: Geometry, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Ranges of tiles, an even number each, of about `_BLOCK_BYTES` when unpacked."""
    tiles = -(-geometry.out_features // LANES)
    step = max(2, _BLOCK_BYTES // (geometry.in_features * LANES * dtype.itemsize) // 2 * 2)
    return [(first, min(first + step, tiles)) for first in range(0, tiles, step)]
