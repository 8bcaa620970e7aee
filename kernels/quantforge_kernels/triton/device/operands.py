"""Operands of a matrix instruction, put together from unpacked words.

Nothing here moves data between threads: joining and permuting are names for registers as long as
the layout that Triton infers from the load is the one the matrix instruction wants, which is what
`repack` arranges (NVIDIA's m16n8k16; `scripts/inspect_kernels.py` shows that no conversion is
left). Columns are in the order of the operand: 8 * p + 2 * j + h for 16-bit operands, and
16 * (p // 2) + 4 * j + 2 * h + p % 2 for 8-bit ones.
"""

import triton
import triton.language as tl

from quantforge_kernels.triton.device.unpack import float_pair, integer_pair, offset

# The interpreter multiplies the bit patterns of bfloat16 operands; float32 holds them exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, acc):
    """`acc + a @ b`: float32 sums of 16-bit operands, or int32 sums of 8-bit ones."""
    if INTERPRETED and acc.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, out_dtype=acc.dtype)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to 16 bits, to nearest, ties to even; the interpreter truncates to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        raw = value.to(tl.int32, bitcast=True)
        raw = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        return raw.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def scale_values(scale, dtype: tl.constexpr):
    """Stored scales as float32, after the rounding to `dtype` that the definition asks for."""
    if scale.dtype == dtype or dtype == tl.float32:
        return scale.to(tl.float32)
    return rounded(scale.to(tl.float32), dtype).to(tl.float32)


@triton.jit
def by_operand_row(values, tiles: tl.constexpr, warps: tl.constexpr, width: tl.constexpr):
    """[tiles * 8, width, 4] as loaded (group, column, element) → [tiles * 32, width].

    A matrix instruction gives thread group g the rows g and g + 8 of 16, warps side by side: row
    of the operand = (tile // warps, element // 2, tile % warps, element % 2, g).
    """
    repeats: tl.constexpr = tiles // warps
    split = tl.reshape(values, (repeats, warps, 8, width, 2, 2))
    return tl.reshape(tl.permute(split, (0, 4, 1, 5, 2, 3)), (tiles * 32, width))


@triton.jit
def load_words(
    base, step, bits: tl.constexpr, tiles: tl.constexpr, warps: tl.constexpr, policy: tl.constexpr
):
    """The lane's words: `bits` loads of 128 bits a thread and tile; a tuple of [rows, 4] int32."""
    words = ()
    for i in tl.static_range(bits):
        loaded = tl.load(base + step + i * 128, eviction_policy=policy)
        words = words + (by_operand_row(loaded, tiles, warps, 4),)
    return words


@triton.jit
def word_offsets(row_tile, row_tiles, units, bits: tl.constexpr, tiles: tl.constexpr):
    """[tiles * 8, 4, 4] offsets of a lane's first word, from the weight's first one.

    A program that reaches beyond the last tile reads that one again and stores nothing of it.
    """
    group = tl.arange(0, tiles * 8)
    inner = tl.arange(0, 4)
    tile = tl.minimum(row_tile + group // 8, row_tiles - 1).to(tl.int64)
    tile = tile * units * (bits * 128)
    start = tile[:, None, None] + (group % 8 * 16)[:, None, None]
    return start + (inner * 4)[None, :, None] + inner[None, None, :]


@triton.jit
def row_offsets(row_tile, row_tiles, tiles: tl.constexpr):
    """[tiles * 8, 4, 4] row of the weight, the same for the four lanes of a row."""
    group = tl.arange(0, tiles * 8)
    inner = tl.arange(0, 4)
    group = tl.minimum(row_tile + group // 8, row_tiles - 1) * 8 + group % 8
    return group[:, None, None] * 4 + (inner * 0)[None, :, None] + inner[None, None, :]


@triton.jit
def row_numbers(tiles: tl.constexpr, warps: tl.constexpr):
    """[tiles * 32] row within the program's tiles of each row of the operand."""
    group = tl.arange(0, tiles * 8)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    numbers = tl.broadcast_to(group, (tiles * 8, 4, 4))
    return tl.max(by_operand_row(numbers, tiles, warps, 4), 1)


@triton.jit
def halves(value, dtype: tl.constexpr):
    """[rows, 4] int32 → [rows, 4, 2] of its 16-bit halves, as `dtype`."""
    low = value.to(tl.int16).to(dtype, bitcast=True)
    high = (value >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def four_pairs(
    words, mask, first: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr, part: tl.constexpr
):
    """[rows, 4, 2, 2, 2] (j, h, p bit 0, p bit 1): 32 columns."""
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    a = halves(float_pair(words, mask, first, bits, mantissa, part), dtype)
    b = halves(float_pair(words, mask, first + 1, bits, mantissa, part), dtype)
    c = halves(float_pair(words, mask, first + 2, bits, mantissa, part), dtype)
    d = halves(float_pair(words, mask, first + 3, bits, mantissa, part), dtype)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def in_columns(a, rows: tl.constexpr, columns: tl.constexpr):
    """(row, j, h, bits of p upwards) → [rows, columns], column = 8 * p + 2 * j + h."""
    if columns == 32:
        a = tl.permute(a, (0, 4, 3, 1, 2))
    elif columns == 64:
        a = tl.permute(a, (0, 5, 4, 3, 1, 2))
    else:
        a = tl.permute(a, (0, 6, 5, 4, 3, 1, 2))
    return tl.reshape(a, (rows, columns))


@triton.jit
def float_operand(
    words, mask, first: tl.constexpr, columns: tl.constexpr, bits: tl.constexpr,
    dtype: tl.constexpr, part: tl.constexpr,
):  # fmt: skip
    """[rows, columns] of floats 2**(m - s) + code; `first` is the first pair."""
    rows: tl.constexpr = words[0].shape[0]
    a = four_pairs(words, mask, first, bits, dtype, part)
    if columns > 32:
        a = tl.join(a, four_pairs(words, mask, first + 4, bits, dtype, part))
    if columns > 64:
        b = tl.join(
            four_pairs(words, mask, first + 8, bits, dtype, part),
            four_pairs(words, mask, first + 12, bits, dtype, part),
        )
        a = tl.join(a, b)
    return in_columns(a, rows, columns)


@triton.jit
def offset_columns(
    rows: tl.constexpr, first: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr,
    with_zero: tl.constexpr,
):  # fmt: skip
    """[rows, 4, 2, 2, 2] of minus the constants of four pairs, in the order of `four_pairs`."""
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    zero: tl.constexpr = 1 << (bits - 1) if with_zero else 0
    a = tl.full((rows, 4, 2), -(offset(first, bits, mantissa) + zero), dtype)
    b = tl.full((rows, 4, 2), -(offset(first + 1, bits, mantissa) + zero), dtype)
    c = tl.full((rows, 4, 2), -(offset(first + 2, bits, mantissa) + zero), dtype)
    d = tl.full((rows, 4, 2), -(offset(first + 3, bits, mantissa) + zero), dtype)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def offset_operand(
    rows: tl.constexpr, first: tl.constexpr, columns: tl.constexpr, bits: tl.constexpr,
    dtype: tl.constexpr, with_zero: tl.constexpr,
):  # fmt: skip
    """[rows, columns] that takes the constants, and the symmetric zero, out of `float_operand`."""
    a = offset_columns(rows, first, bits, dtype, with_zero)
    if columns > 32:
        a = tl.join(a, offset_columns(rows, first + 4, bits, dtype, with_zero))
    if columns > 64:
        b = tl.join(
            offset_columns(rows, first + 8, bits, dtype, with_zero),
            offset_columns(rows, first + 12, bits, dtype, with_zero),
        )
        a = tl.join(a, b)
    return in_columns(a, rows, columns)


@triton.jit
def quad(words, mask, first: tl.constexpr, bits: tl.constexpr):
    """[rows, 4, 2, 2] (j, p % 2, h) int8: two pairs as the bytes of one word; 8 bits minus 128."""
    value = integer_pair(words, mask, first, bits) | (
        integer_pair(words, mask, first + 1, bits) << 8
    )
    if bits == 8:
        value = value ^ -0x7F7F7F80  # 0x80808080: from 0..255 to -128..127
    low = tl.join(value.to(tl.int8), (value >> 8).to(tl.int8))
    high = tl.join((value >> 16).to(tl.int8), (value >> 24).to(tl.int8))
    return tl.join(low, high)


@triton.jit
def integer_operand(words, mask, first: tl.constexpr, columns: tl.constexpr, bits: tl.constexpr):
    """[rows, columns] int8 codes; `first` is the first pair."""
    rows: tl.constexpr = words[0].shape[0]
    a = tl.join(quad(words, mask, first, bits), quad(words, mask, first + 2, bits))
    if columns > 32:
        b = tl.join(quad(words, mask, first + 4, bits), quad(words, mask, first + 6, bits))
        a = tl.join(a, b)
    if columns > 64:
        b = tl.join(quad(words, mask, first + 8, bits), quad(words, mask, first + 10, bits))
        c = tl.join(quad(words, mask, first + 12, bits), quad(words, mask, first + 14, bits))
        a = tl.join(a, tl.join(b, c))
    if columns == 32:  # row, j, p % 2, h, and the bits of p // 2
        a = tl.permute(a, (0, 4, 1, 3, 2))
    elif columns == 64:
        a = tl.permute(a, (0, 5, 4, 1, 3, 2))
    else:
        a = tl.permute(a, (0, 6, 5, 4, 1, 3, 2))
    return tl.reshape(a, (rows, columns))
