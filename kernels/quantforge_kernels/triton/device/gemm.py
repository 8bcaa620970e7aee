"""Prefill: many rows of input against a packed weight, on tensor cores.

A program multiplies `tiles * 32` rows of the weight with `columns` rows of the input. The weight is
the first operand: its words are unpacked into the registers the matrix instruction reads, whether
m16n8k16 or Hopper's warp-group instruction. The input, arranged once (`arrange.py`), is the second
and comes from shared memory. Each group's sum (float32; int32 for int8 inputs) is brought to its
zero and multiplied by its scale in registers, after which it joins the result.
"""

import triton
import triton.language as tl

from quantforge_kernels.triton.device.operands import (
    by_operand_row,
    float_operand,
    integer_operand,
    load_words,
    product,
    rounded,
    row_numbers,
    row_offsets,
    scale_values,
    word_offsets,
)


@triton.jit
def gemm(
    x_ptr, lead_ptr, total_ptr, token_scale_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    m, n, padded, units, padded_rows, split_units, mask,
    dtype: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, fold: tl.constexpr,
    asymmetric: tl.constexpr, integer: tl.constexpr, has_bias: tl.constexpr, split: tl.constexpr,
    columns: tl.constexpr, tiles: tl.constexpr, warps: tl.constexpr,
):  # fmt: skip
    """out[m, n] = x[m, k] @ weight[n, k].T, or partial sums [split, m, n] in float32.

    Grid: (rows of x / `columns`, tiles of rows of the weight, split).

    Args:
        x_ptr: [padded, units * 128] arranged input, 16-bit or int8.
        lead_ptr: [units * 128 / fold, padded] float32.
        total_ptr: [units * 128 / fold, padded] float32 if `asymmetric`.
        token_scale_ptr: [padded] float32 if `integer`.
        words_ptr: see `repack`; `units` tiles of columns.
        scale_ptr: [groups, padded_rows] floating point.
        zero_ptr: [groups, padded_rows] uint8 if `asymmetric`.
        bias_ptr: [n] if `has_bias`.
        out_ptr: [m, n] in `dtype`, or [split, m, n] float32 if `split`.
        split_units: tiles of columns that one program of the third axis adds up.
        mask: `(2**bits - 1) * 0x10001`, of a nibble where `bits` exceed the mantissa.
        dtype: of the computation.
    """
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    height: tl.constexpr = tiles * 32
    row_tile = tl.program_id(1) * tiles
    first = tl.program_id(2) * split_units
    last = tl.minimum(first + split_units, units)
    words_base = words_ptr + word_offsets(row_tile, padded_rows // 32, units, bits, tiles)
    weight_rows = row_offsets(row_tile, padded_rows // 32, tiles)
    x_row = tl.program_id(0) * columns + tl.arange(0, columns)
    x_start = x_ptr + x_row.to(tl.int64)[None, :] * (units * 128) + tl.arange(0, fold)[:, None]
    acc = tl.zeros((height, columns // 8, 4, 2), tl.float32)
    for unit in tl.range(first, last):
        words = load_words(words_base, unit * (bits * 128), bits, tiles, warps, "")
        for chunk in tl.static_range(128 // fold):
            column = unit * 128 + chunk * fold
            x = tl.load(x_start + column)
            scale_at = (column // group) * padded_rows
            scale = tl.load(scale_ptr + scale_at + weight_rows)
            scale = by_operand_row(scale_values(scale, dtype), tiles, warps, 4)
            lead = tl.load(lead_ptr + (column // fold) * padded + x_row)
            if integer:
                operand = integer_operand(words, mask, chunk * fold // 8, fold, bits)
                part = product(operand, x, tl.zeros((height, columns), tl.int32)).to(tl.float32)
            else:
                operand = float_operand(words, mask, chunk * fold // 8, fold, bits, dtype, 0)
                part = product(operand, x, tl.zeros((height, columns), tl.float32))
                if bits > mantissa:
                    high = float_operand(words, mask, chunk * fold // 8, fold, bits, dtype, 1)
                    part += 16.0 * product(high, x, tl.zeros((height, columns), tl.float32))
            part = tl.reshape(part + lead[None, :], (height, columns // 8, 4, 2))
            if asymmetric:
                zero = tl.load(zero_ptr + scale_at + weight_rows).to(tl.float32)
                zero = by_operand_row(zero, tiles, warps, 4)
                if integer and bits == 8:
                    zero -= 128.0
                total = tl.load(total_ptr + (column // fold) * padded + x_row)
                total = tl.reshape(total, (1, columns // 8, 4, 2))
                part -= zero[:, None, :, None] * total
            acc += part * scale[:, None, :, None]
    out = tl.reshape(acc, (height, columns))
    if integer:
        out *= tl.load(token_scale_ptr + x_row)[None, :]
    row = row_tile * 32 + row_numbers(tiles, warps)
    keep = (row < n)[:, None] & (x_row < m)[None, :]
    where = x_row.to(tl.int64)[None, :] * n + row[:, None]
    if split:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * m * n + where, out, mask=keep)
    else:
        if has_bias:
            out += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + where, rounded(out, dtype), mask=keep)
