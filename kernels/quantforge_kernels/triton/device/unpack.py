"""From packed words to operands of a matrix instruction, shared by all kernels.

A code c at bits [s, s + b) of a 16-bit half becomes a float by setting the exponent above a
mantissa that holds it: with m mantissa bits (7 in bfloat16, 10 in float16) and the exponent of
2**(m - s), bit s is worth 1, and the half reads 2**(m - s) + c. One shift serves every field that
lies in a window of m bits, and one and-or (a single LOP3 on NVIDIA) makes two floats: that is all.
The constants leave the sum again together with the zero-point:

    sum_k (2**(m - s_k) + c_k) x_k - sum_k (2**(m - s_k) + zero) x_k = sum_k (c_k - zero) x_k

where the second sum is the same for every row of the weight. No code is ever rounded. Eight bits do
not fit bfloat16's seven: there the two nibbles are two operands, and the upper one counts 16 times.

`words` is a tuple of [rows, 4] int32, one for each word of a lane; the layout is in `repack`.
"""

# Triton traces these bodies: constants are annotated, tensors are what they are.
import triton
import triton.language as tl


@triton.jit
def leftover(words, value, rest: tl.constexpr, bits: tl.constexpr):
    """Or the pieces of pair `bits * (16 // bits) + rest` into `value`."""
    if bits == 6:
        half: tl.constexpr = rest % 2
        value = ((words[rest] >> 12) & 0x000F000F) | value
        value = ((words[4 + rest // 2] >> (8 + 2 * half)) & 0x00300030) | value
    elif bits == 7:
        for i in tl.static_range(3):
            value = ((words[3 * rest + i] >> (14 - 2 * i)) & (0x00030003 << (2 * i))) | value
        value = ((words[6] >> (8 + rest)) & 0x00400040) | value
    else:
        for i in tl.static_range(bits):
            value = ((words[i] >> (15 - i)) & (0x00010001 << i)) | value
    return value


@triton.jit
def integer_pair(words, mask, pair: tl.constexpr, bits: tl.constexpr):
    """[rows, 4] int32 whose halves are the two codes of a pair."""
    fields: tl.constexpr = 16 // bits
    if pair < bits * fields:
        value = (words[pair // fields] >> (bits * (pair % fields))) & mask
    else:
        value = leftover(words, tl.zeros_like(words[0]), pair - bits * fields, bits)
    return value


@triton.constexpr_function
def exponent(place, mantissa):
    """Both halves hold the float 2**(mantissa - place), in which bit `place` is worth 1."""
    biased = (127 if mantissa == 7 else 15) + mantissa - place
    return (biased << mantissa) * 0x00010001


@triton.jit
def float_pair(
    words, mask, pair: tl.constexpr, bits: tl.constexpr, mantissa: tl.constexpr, part: tl.constexpr
):
    """[rows, 4] int32 whose halves are the floats 2**(m - s) + code; `part` is the nibble."""
    fields: tl.constexpr = 16 // bits
    if bits > mantissa:
        value = words[pair // 2] >> (8 * (pair % 2) + 4 * part)
        value = (value & mask) | exponent(0, mantissa)
    elif pair < bits * fields:
        window: tl.constexpr = mantissa // bits
        field: tl.constexpr = pair % fields
        place: tl.constexpr = bits * (field % window)
        value = words[pair // fields] >> (bits * window * (field // window))
        value = (value & (mask << place)) | exponent(place, mantissa)
    else:
        value = tl.full(words[0].shape, exponent(0, mantissa), tl.int32)
        value = leftover(words, value, pair - bits * fields, bits)
    return value


@triton.constexpr_function
def offset(pair, bits, mantissa):
    """The constant 2**(mantissa - s) in the floats of a pair; of both nibbles at 8 bits."""
    fields = 16 // bits
    if bits > mantissa:
        return 17 << mantissa
    if pair >= bits * fields:
        return 1 << mantissa
    return 1 << (mantissa - bits * (pair % fields % (mantissa // bits)))
