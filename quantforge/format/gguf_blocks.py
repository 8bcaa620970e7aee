"""GGUF's block types: which of them holds a quantized weight without a change, and its bytes.

A weight of ours is (code - zero) · scale, a scale for each group of a row. A block type of GGUF has
one float16 scale d for each 32 weights, n · d with signed integers n (Q4_0, Q5_0, Q8_0) or
q · d + m with unsigned q and a float16 m (Q4_1, Q5_1). The types of 256 weights (Q2_K, Q3_K, Q6_K)
have scales within scales, which hold ours only where all 256 share one: then d is it and the inner
scales are 1. gguf's own encoders look for new scales in float weights and lose ours, so the codes
are packed here; gguf's decoders say in the tests and after every conversion that the packing is
theirs. Of the types that hold a weight exactly the smallest is taken.
Where none does for a few scales that float16 lacks, these are rounded (`encode_rounded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantforge.types import PER_CHANNEL, QuantizedWeight, QuantSpec

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """A weight cut into blocks.

    Attributes:
        codes: [blocks, size] int16.
        zero: [blocks, 1] int16.
        scale: [blocks, 1] float32; 0 where all weights of the block are 0.
    """

    codes: NDArray[np.int16]
    zero: NDArray[np.int16]
    scale: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A type of GGUF.

    Attributes:
        name: in `gguf.GGMLQuantizationType`.
        size: weights a block.
        block_bytes: of one block.
        pack: the bytes [blocks, block_bytes], or None where the type does not hold the weight.
    """

    name: str
    size: int
    block_bytes: int
    pack: Callable[[_Blocks], Bytes | None]

    def encode(self, weight: QuantizedWeight) -> Bytes | None:
        """[out, bytes a row] of a weight; None where the type would change it."""
        out, columns = weight.codes.shape
        width = weight.spec.width(columns)
        if width % self.size:
            return None
        repeats = width // self.size
        scale = weight.scale.float().repeat_interleave(repeats, dim=1).reshape(-1, 1)
        centre = weight.centre()
        if centre.ndim:
            centre = centre.squeeze(-1).repeat_interleave(repeats, dim=1)
        codes = weight.codes.reshape(-1, self.size).numpy().astype(np.int16)
        zero = centre.expand(out, columns // self.size).reshape(-1, 1).numpy()
        used = (codes != zero).any(axis=1, keepdims=True)
        blocks = _Blocks(codes=codes, zero=zero, scale=np.where(used, scale.numpy(), 0))
        packed = self.pack(blocks)
        return None if packed is None else packed.reshape(out, -1)

    def holds(self, spec: QuantSpec, columns: int) -> bool:
        """Whether it holds every weight of this spec, if float16 holds its scales."""
        if spec.width(columns) % self.size:
            return False
        top = (1 << spec.bits) - 1
        low, high = (spec.code_min, spec.code_max) if spec.symmetric else (-top, top)
        if self.name == "Q2_K":
            return spec.bits == 2
        return self.name in _SIGNED and -_SIGNED[self.name] <= low and high < _SIGNED[self.name]


_HALF_STEP = 2.0**-12  # of float16, of a number
# Integers -n .. n - 1 that a block of signed ones holds.
_SIGNED = {"Q3_K": 4, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32, "Q8_0": 128}


def _float16(values: NDArray[np.float32]) -> Bytes | None:
    """[blocks, 2] bytes of float16 numbers; None where one is none."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return None
    return half.view(np.uint8)


def _signed(blocks: _Blocks, name: str) -> tuple[NDArray[np.uint8], Bytes] | None:
    """Integers n + 2**(b-1) and scales of n · d; None where the range or float16 is too small.

    Both change their sign where only -n fits: -8..7 holds 8 that way.
    """
    half = _SIGNED[name]
    numbers = blocks.codes - blocks.zero
    turned = numbers.max(axis=1, keepdims=True) >= half
    numbers = np.where(turned, -numbers, numbers)
    scale = _float16(np.where(turned, -blocks.scale, blocks.scale))
    if scale is None or numbers.min() < -half or numbers.max() >= half:
        return None
    return (numbers + half).astype(np.uint8), scale


def _with_minimum(blocks: _Blocks, top: int) -> tuple[Bytes, Bytes] | None:
    """Codes and the bytes of d and m in q · d + m; None where float16 does not hold both."""
    scale = _float16(blocks.scale)
    minimum = _float16(-blocks.zero.astype(np.float32) * blocks.scale)
    if scale is None or minimum is None or blocks.codes.max() > top:
        return None
    return blocks.codes.astype(np.uint8), np.concatenate([scale, minimum], axis=1)


def _nibbles(codes: NDArray[np.uint8]) -> Bytes:
    """[blocks, 16]: the low four bits of weights 0..15 below those of 16..31."""
    packed: Bytes = np.bitwise_or(codes[:, :16] & 15, codes[:, 16:] << 4, dtype=np.uint8)
    return packed


def _fifth_bits(codes: NDArray[np.uint8]) -> Bytes:
    """[blocks, 4]: bit 4 of every weight."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _pairs_of_bits(codes: NDArray[Any]) -> Bytes:
    """[blocks, 64]: of each 128 two-bit numbers, those of 0..31, 32..63, .. share bytes."""
    parts = codes.reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(codes), 64)
    return packed


def _constant(blocks: int, *values: int) -> Bytes:
    return np.tile(np.array(values, dtype=np.uint8), (blocks, 1))


def _q4_0(blocks: _Blocks) -> Bytes | None:
    if (found := _signed(blocks, "Q4_0")) is None:
        return None
    return np.concatenate([found[1], _nibbles(found[0])], axis=1)


def _q4_1(blocks: _Blocks) -> Bytes | None:
    if (found := _with_minimum(blocks, 15)) is None:
        return None
    return np.concatenate([found[1], _nibbles(found[0])], axis=1)


def _q5_0(blocks: _Blocks) -> Bytes | None:
    if (found := _signed(blocks, "Q5_0")) is None:
        return None
    return np.concatenate([found[1], _fifth_bits(found[0]), _nibbles(found[0])], axis=1)


def _q5_1(blocks: _Blocks) -> Bytes | None:
    if (found := _with_minimum(blocks, 31)) is None:
        return None
    return np.concatenate([found[1], _fifth_bits(found[0]), _nibbles(found[0])], axis=1)


def _q8_0(blocks: _Blocks) -> Bytes | None:
    if (found := _signed(blocks, "Q8_0")) is None:
        return None
    return np.concatenate([found[1], found[0] ^ 128], axis=1)  # two's complement


def _q2_k(blocks: _Blocks) -> Bytes | None:
    """Codes times d minus m times d: inner scales of 1, inner minima of the zero-point."""
    scale = _float16(blocks.scale)
    if scale is None or blocks.codes.max() > 3 or blocks.zero.max() > 15:
        return None
    inner = np.repeat((1 | blocks.zero << 4).astype(np.uint8), 16, axis=1)
    codes = blocks.codes.astype(np.uint8)
    return np.concatenate([inner, _pairs_of_bits(codes), scale, scale], axis=1)


def _q3_k(blocks: _Blocks) -> Bytes | None:
    """The third bit of weight 32·i + j is bit i of byte j; an inner scale of 1 is stored as 33."""
    if (found := _signed(blocks, "Q3_K")) is None:
        return None
    codes, scale = found
    third = (codes >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    inner = _constant(len(codes), *(0x11,) * 8, *(0xAA,) * 4)
    low = _pairs_of_bits(codes & 3)
    return np.concatenate([np.bitwise_or.reduce(third, axis=1), low, inner, scale], axis=1)


def _q6_k(blocks: _Blocks) -> Bytes | None:
    """Of each 128 weights the low four bits of 0..63 lie below those of 64..127."""
    if (found := _signed(blocks, "Q6_K")) is None:
        return None
    codes, scale = found
    low = codes.reshape(-1, 2, 2, 64) & 15
    nibbles = (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128)
    inner = _constant(len(codes), *(1,) * 16)
    return np.concatenate([nibbles, _pairs_of_bits(codes >> 4), inner, scale], axis=1)


# Smallest first.
BLOCK_TYPES = (
    BlockType(name="Q2_K", size=256, block_bytes=84, pack=_q2_k),
    BlockType(name="Q3_K", size=256, block_bytes=110, pack=_q3_k),
    BlockType(name="Q4_0", size=32, block_bytes=18, pack=_q4_0),
    BlockType(name="Q4_1", size=32, block_bytes=20, pack=_q4_1),
    BlockType(name="Q5_0", size=32, block_bytes=22, pack=_q5_0),
    BlockType(name="Q5_1", size=32, block_bytes=24, pack=_q5_1),
    BlockType(name="Q6_K", size=256, block_bytes=210, pack=_q6_k),
    BlockType(name="Q8_0", size=32, block_bytes=34, pack=_q8_0),
)


def encode(weight: QuantizedWeight) -> tuple[str, Bytes] | None:
    """The smallest type that holds `weight` exactly, and its rows.

    Args:
        weight: [out, in] on the CPU.

    Returns:
        The type's name and uint8 [out, bytes a row]; None where no type holds it: its groups are no
        multiple of 32, float16 does not hold a scale, or integers reach beyond eight bits.
    """
    for kind in BLOCK_TYPES:
        rows = kind.encode(weight)
        if rows is not None:
            return kind.name, rows
    return None


def encode_float(tensor: torch.Tensor) -> tuple[str, NDArray[Any]]:
    """A kept tensor: vectors in float32, matrices as stored.

    Returns:
        The type's name and the array; bfloat16 as uint8 [.., 2 bytes a weight].
    """
    if tensor.ndim < 2 or tensor.dtype == torch.float32:
        return "F32", tensor.float().numpy()
    if tensor.dtype == torch.float16:
        return "F16", tensor.numpy()
    return "BF16", tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()


def encode_rounded(
    weight: QuantizedWeight,
) -> tuple[str, NDArray[Any], NDArray[np.float32]]:
    """A quantized weight that no block type holds exactly.

    Below 2**-17 float16 does not hold every scale of bfloat16. One such row would make the whole
    weight three times as large, so the block types are tried with scales rounded to float16. They
    are taken where no weight changes by more than float16 may change the largest one, by half a
    step. Otherwise the weights are float16, bfloat16 where that overflows.

    Returns:
        The type's name, the array, and [out] the largest change of a weight in every row.
    """
    values, scale = weight.dequantize(), weight.scale.half()
    if bool(scale.isfinite().all()):
        rounded = replace(weight, scale=scale)
        change = (rounded.dequantize() - values).abs().amax(dim=1)
        small = bool(change.max() <= _HALF_STEP * values.abs().max())
        if small and (found := encode(rounded)) is not None:
            return *found, change.numpy()
    half = values.half()
    kept = half if bool(half.isfinite().all()) else values.bfloat16()
    return *encode_float(kept), (kept.float() - values).abs().amax(dim=1).numpy()


def held_exactly(spec: QuantSpec, columns: int) -> bool:
    """Whether some block type holds every weight of this spec, if float16 holds its scales."""
    return any(kind.holds(spec, columns) for kind in BLOCK_TYPES)


def bits_a_weight(spec: QuantSpec, columns: int) -> float | None:
    """Bits of the smallest type that holds every weight of this spec; None where none does."""
    sizes = [8 * kind.block_bytes / kind.size for kind in BLOCK_TYPES if kind.holds(spec, columns)]
    return min(sizes, default=None)


def is_dominated(spec: QuantSpec, others: Iterable[QuantSpec], columns: int) -> bool:
    """Whether another spec has all of its grids and no more bits in GGUF.

    In blocks 2 and 3 bits may take the room of 4, which then are the better choice.

    Args:
        spec: that a block type holds.
        others: to compare it with; those that none holds, and itself, do not count.
        columns: weights a row.
    """
    bits = bits_a_weight(spec, columns)
    return bits is not None and any(
        other != spec
        and (size := bits_a_weight(other, columns)) is not None
        and size <= bits
        and _covers(other, spec, columns)
        for other in others
    )


def _covers(one: QuantSpec, other: QuantSpec, columns: int) -> bool:
    """Whether a group of `other` is some of whole groups of `one`, with all of its integers."""
    needed = other.bits + (one.symmetric and not other.symmetric)
    return one.bits >= needed and other.width(columns) % one.width(columns) == 0


def grouping(spec: QuantSpec, columns: int) -> str:
    """What of the groups stands in the way of a block type; empty where nothing does."""
    if spec.width(columns) % 32 == 0:
        return ""
    what = "rows" if spec.group_size == PER_CHANNEL else "groups"
    return f"{what} of {spec.width(columns)} are no multiple of 32"
