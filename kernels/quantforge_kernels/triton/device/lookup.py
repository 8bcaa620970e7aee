"""Rows of a packed weight in floating point: the embedding, and the whole matrix.

Here nothing is multiplied with an input, so the weight is formed exactly as the reference forms it:
the integer difference times the scale, rounded once to the dtype of the result.
"""

import triton
import triton.language as tl

from quantforge_kernels.triton.device.operands import rounded, scale_values
from quantforge_kernels.triton.device.unpack import integer_pair


@triton.jit
def pair_codes(words, mask, pair: tl.constexpr, bits: tl.constexpr):
    """[rows, 4, 2] int32 codes of a pair."""
    value = integer_pair(words, mask, pair, bits)
    return tl.join(value & 0xFFFF, (value >> 16) & 0xFFFF)


@triton.jit
def four_codes(words, mask, first: tl.constexpr, bits: tl.constexpr):
    """[rows, 4, 2, 2, 2] (j, h, p bit 0, p bit 1)."""
    a = tl.join(pair_codes(words, mask, first, bits), pair_codes(words, mask, first + 1, bits))
    b = tl.join(pair_codes(words, mask, first + 2, bits), pair_codes(words, mask, first + 3, bits))
    return tl.join(a, b)


@triton.jit
def lookup(
    ids_ptr, words_ptr, scale_ptr, zero_ptr, out_ptr,
    count, n, k, units, padded_rows, mask,
    bits: tl.constexpr, group: tl.constexpr, asymmetric: tl.constexpr, has_ids: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """out[i] = weight[ids[i]], or weight[i]; grid (ceil(count / block), units).

    Args:
        ids_ptr: [count] integers if `has_ids`. One outside [0, n) fails an assertion if the kernel
            is compiled with `debug`; otherwise, as in the interpreter, its row is NaN.
        words_ptr: see `repack`; `units` tiles of columns.
        scale_ptr: [groups, padded_rows] floating point.
        zero_ptr: [groups, padded_rows] uint8 if `asymmetric`.
        out_ptr: [count, k] of the dtype that the weight is formed in.
        mask: `(2**bits - 1) * 0x10001`.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.program_id(0) * block + tl.arange(0, block)
    unit = tl.program_id(1)
    if has_ids:
        given = tl.load(ids_ptr + at, mask=at < count, other=0).to(tl.int64)
    else:
        given = at.to(tl.int64)
    known = (given >= 0) & (given < n)
    if has_ids:
        tl.device_assert(known | (at >= count), "an id is no row of the embedding")
    row = tl.where(known, given, 0)
    tile, inside = row // 32, (row % 32 // 4) * 16 + row % 4
    start = (tile * units + unit) * (bits * 128) + inside
    lane = start[:, None] + (tl.arange(0, 4) * 4)[None, :]
    words = ()
    for i in tl.static_range(bits):
        words = words + (tl.load(words_ptr + lane + i * 128),)
    a = tl.join(four_codes(words, mask, 0, bits), four_codes(words, mask, 4, bits))
    b = tl.join(four_codes(words, mask, 8, bits), four_codes(words, mask, 12, bits))
    codes = tl.join(a, b)  # row, j, h, p bits 0, 1, 2, 3
    codes = tl.reshape(tl.permute(codes, (0, 6, 5, 1, 4, 3, 2)), (block, 128))
    column = unit * 128 + tl.arange(0, 128)
    scale_at = (column // group)[None, :] * padded_rows + row[:, None]
    scale = scale_values(tl.load(scale_ptr + scale_at), dtype)
    if asymmetric:
        codes -= tl.load(zero_ptr + scale_at).to(tl.int32)
    else:
        codes -= 1 << (bits - 1)
    weight = tl.where(known[:, None], codes.to(tl.float32) * scale, float("nan"))
    keep = (at < count)[:, None] & (column < k)[None, :]
    where = at.to(tl.int64)[:, None] * k + column[None, :]
    tl.store(out_ptr + where, rounded(weight, dtype), mask=keep)
