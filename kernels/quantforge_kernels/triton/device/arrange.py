"""Inputs for the matrix product: columns in the order of the operand, sums by group, int8 if asked.

A tensor core reads its second operand from shared memory in the order of the operand's columns, and
the codes lie so that the first one needs no reordering at all (`repack`). So the input, which is
used against every row of the weight, is put in order once: within each 32 columns, 8 j + 2 p + h
goes to 8 p + 2 j + h (16-bit operands). Rows and columns are padded with zeros to whole tiles, so
that the product needs no mask. On the way each group's sums are taken, which carry the constants of
the unpacking and the zero-points (`unpack.py`).

int8 inputs are rounded by token: the scale is the largest magnitude / 127, halves round up.
"""

import triton
import triton.language as tl


@triton.jit
def constants(column, bits: tl.constexpr, mantissa: tl.constexpr):
    """The constants 2**(m - s) of the columns' codes; see `unpack.offset`."""
    pair = column // 32 % 4 * 4 + column % 8 // 2
    if bits > mantissa:
        return (column * 0 + (17 << mantissa)).to(tl.float32)
    fields: tl.constexpr = 16 // bits
    place = bits * (pair % fields % (mantissa // bits))
    whole = pair < bits * fields
    return (1 << (mantissa - tl.where(whole, place, 0))).to(tl.float32)


@triton.jit
def arrange(
    x_ptr, out_ptr, lead_ptr, total_ptr, token_scale_ptr,
    m, k, x_stride, units, padded,
    bits: tl.constexpr, fold: tl.constexpr, asymmetric: tl.constexpr, integer: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Arrange one row of the input; the grid has `padded` programs, of which m have a row.

    Args:
        x_ptr: [m, k] bfloat16 or float16, `x_stride` elements a row.
        out_ptr: [padded, units * 128] of the same dtype, or int8 if `integer`.
        lead_ptr: [units * 128 / fold, padded] float32: minus the sum of (constant + symmetric zero)
            times the input, which starts a group's sum.
        total_ptr: [units * 128 / fold, padded] float32: sum of the input, if `asymmetric`.
        token_scale_ptr: [padded] float32, if `integer`.
        block: columns worked off at once, a multiple of 128.
    """
    row = tl.program_id(0).to(tl.int64)
    width = units * 128
    limit = tl.where(row < m, k, 0)
    x_row = x_ptr + row * x_stride
    inverse = 1.0
    if integer:
        largest = tl.zeros((block,), tl.float32)
        for start in range(0, width, block):
            column = start + tl.arange(0, block)
            x = tl.load(x_row + column, mask=column < limit, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
        peak = tl.max(largest, 0)
        tl.store(token_scale_ptr + row, peak / 127.0)
        inverse = tl.where(peak > 0.0, 127.0 / tl.where(peak > 0.0, peak, 1.0), 0.0)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        x = tl.load(x_row + column, mask=column < limit, other=0.0)
        j, pair, half = column % 32 // 8, column % 8 // 2, column % 2
        if integer:
            x = tl.floor(x.to(tl.float32) * inverse + 0.5)
            place = column // 32 * 32 + pair // 2 * 16 + j * 4 + half * 2 + pair % 2
            weight = tl.zeros((block,), tl.float32)
            zero: tl.constexpr = 0.0 if bits == 8 else 1.0 * (1 << (bits - 1))
        else:
            place = column // 32 * 32 + pair * 8 + j * 2 + half
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            weight = constants(column, bits, 7 if dtype == tl.bfloat16 else 10)
            zero: tl.constexpr = 1.0 * (1 << (bits - 1))
        inside = column < width
        tl.store(out_ptr + row * width + place, x.to(out_ptr.dtype.element_ty), mask=inside)
        x = x.to(tl.float32)
        if not asymmetric:
            weight += zero
        chunk = start // fold + tl.arange(0, block // fold)
        keep = chunk < width // fold
        lead = -tl.sum(tl.reshape(x * weight, (block // fold, fold)), 1)
        tl.store(lead_ptr + chunk * padded + row, lead, mask=keep)
        if asymmetric:
            total = tl.sum(tl.reshape(x, (block // fold, fold)), 1)
            tl.store(total_ptr + chunk * padded + row, total, mask=keep)
