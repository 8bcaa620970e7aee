"""Decoding: up to 16 rows of input against a packed weight, split along K.

Every warp works for itself: it streams its tiles of the weight, 128 bits a thread and load, takes
the input in the order the matrix instruction wants, and shares nothing with other warps. One
m16n8k16 instruction multiplies 256 weights with up to eight rows, so the multiplication is a ninth
of the instructions and the rows are free; what counts is the unpacking. The zero-points and the
constants of the unpacking are one more instruction a step, with an operand of constants
(`offset_operand`), which starts the sum.

Sums over a group are float32, multiplied by the scale once a group: weights are never rounded.
Split K writes float32 partial sums that `reduce` adds in a fixed order: results are reproducible.
"""

import triton
import triton.language as tl

from quantforge_kernels.triton.device.operands import (
    by_operand_row,
    float_operand,
    load_words,
    offset_operand,
    product,
    rounded,
    row_numbers,
    row_offsets,
    scale_values,
    word_offsets,
)


@triton.jit
def load_input(
    start, column, k, in_mask, even: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr
):
    """[columns, rows] of the input from column `column`, in the order of the operand."""
    parts = ()
    for quarter in tl.static_range(columns // 32):
        mask = in_mask
        if not even:
            lane = tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
            mask = mask & (column + 32 * quarter + lane < k)
        x = tl.load(start + (column + 32 * quarter), mask=mask, other=0.0)  # [rows, 4, 8]
        x = tl.reshape(x, (rows, 4, 4, 2))
        parts = parts + (tl.permute(x, (2, 1, 3, 0)),)  # p % 4, j, h, row
    x = parts[0]
    if columns == 64:
        x = tl.permute(tl.join(x, parts[1]), (4, 0, 1, 2, 3))
    elif columns == 128:
        x = tl.join(tl.join(x, parts[1]), tl.join(parts[2], parts[3]))
        x = tl.permute(x, (5, 4, 0, 1, 2, 3))
    return tl.reshape(x, (columns, rows))


@triton.jit
def gemv(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    m, n, k, x_stride, units, padded_rows, split_units, mask,
    bits: tl.constexpr, group: tl.constexpr, fold: tl.constexpr, asymmetric: tl.constexpr,
    has_bias: tl.constexpr, split: tl.constexpr, even: tl.constexpr,
    rows: tl.constexpr, tiles: tl.constexpr, warps: tl.constexpr, unroll: tl.constexpr,
):  # fmt: skip
    """out[m, n] = x[m, k] @ weight[n, k].T, or partial sums [split, m, n] in float32.

    Grid: (tiles of rows of the weight, rows of x / `rows`, split).

    Args:
        x_ptr: [m, k] bfloat16 or float16, `x_stride` elements a row.
        words_ptr: see `repack`; `units` tiles of columns.
        scale_ptr: [groups, padded_rows] floating point.
        zero_ptr: [groups, padded_rows] uint8 if `asymmetric`.
        bias_ptr: [n] if `has_bias`.
        out_ptr: [m, n] in the dtype of x, or [split, m, n] float32 if `split`.
        split_units: tiles of columns that one program of the third axis adds up.
        mask: `(2**bits - 1) * 0x10001`, of a nibble where `bits` exceed the mantissa. An argument
            since ptxas would otherwise load the constant again before each use.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    height: tl.constexpr = tiles * 32
    row_tile = tl.program_id(0) * tiles
    first = tl.program_id(2) * split_units
    last = tl.minimum(first + split_units, units)
    words_base = words_ptr + word_offsets(row_tile, padded_rows // 32, units, bits, tiles)
    weight_rows = row_offsets(row_tile, padded_rows // 32, tiles)
    x_row = tl.program_id(1) * rows + tl.arange(0, rows)
    in_mask = (
        (x_row < m)[:, None, None]
        & (tl.arange(0, 4) >= 0)[None, :, None]
        & (tl.arange(0, 8) >= 0)[None, None, :]
    )
    lane = tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x_start = x_ptr + x_row.to(tl.int64)[:, None, None] * x_stride + lane
    acc = tl.zeros((height, rows // 8, 4, 2), tl.float32)
    for unit in tl.range(first, last, loop_unroll_factor=unroll):
        at = unit * (bits * 128)
        words = load_words(words_base, at, bits, tiles, warps, "evict_first")  # read once
        for chunk in tl.static_range(128 // fold):
            column = unit * 128 + chunk * fold
            x = load_input(x_start, column, k, in_mask, even, fold, rows)
            scale_at = (column // group) * padded_rows
            scale = tl.load(scale_ptr + scale_at + weight_rows)
            scale = by_operand_row(scale_values(scale, dtype), tiles, warps, 4)
            offsets = offset_operand(height, chunk * fold // 8, fold, bits, dtype, not asymmetric)
            part = product(offsets, x, tl.zeros((height, rows), tl.float32))
            if bits > mantissa:
                high = float_operand(words, mask, chunk * fold // 8, fold, bits, dtype, 1)
                part += 16.0 * product(high, x, tl.zeros((height, rows), tl.float32))
            part = product(
                float_operand(words, mask, chunk * fold // 8, fold, bits, dtype, 0), x, part
            )
            part = tl.reshape(part, (height, rows // 8, 4, 2))
            if asymmetric:
                ones = tl.full((height, fold), 1.0, dtype)
                total = product(ones, x, tl.zeros((height, rows), tl.float32))
                total = tl.reshape(total, (height, rows // 8, 4, 2))
                zero = tl.load(zero_ptr + scale_at + weight_rows).to(tl.float32)
                zero = by_operand_row(zero, tiles, warps, 4)
                part = part - total * zero[:, None, :, None]
            acc += part * scale[:, None, :, None]
    out = tl.reshape(acc, (height, rows))
    row = row_tile * 32 + row_numbers(tiles, warps)
    keep = (row < n)[:, None] & (x_row < m)[None, :]
    where = x_row.to(tl.int64)[None, :] * n + row[:, None]
    if split:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * m * n + where, out, mask=keep)
    else:
        if has_bias:
            out += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + where, rounded(out, dtype), mask=keep)


@triton.jit
def reduce(
    partial_ptr, bias_ptr, out_ptr, size, n, split, has_bias: tl.constexpr, block: tl.constexpr
):
    """out[i] = sum over s of partial[s, i] (+ bias[i % n]), in the order of s; i < size = m * n."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    keep = at < size
    start = partial_ptr + at
    total = tl.zeros((block,), tl.float32)
    for _ in range(split):
        total += tl.load(start, mask=keep, other=0.0)
        start += size  # step by step: `part * size` may exceed 32 bits
    if has_bias:
        total += tl.load(bias_ptr + at % n, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=keep)
