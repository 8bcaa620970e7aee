"""The bit layout: how unsigned codes of 2 to 8 bits lie in int32 words.

A row of K codes is one dense bit stream, least significant bit first: code i occupies the bits
`[i * bits, (i + 1) * bits)` of the row, bit j of the row is bit `j % 32` of word `j // 32`, and
each row starts a new word. No bit is wasted inside a row, whatever the width; the last word is
filled up with zeros. It is the `pack-quantized` layout of compressed-tensors >= 0.17, and at 3 bits
the classical GPTQ one.

The stream is made eight codes at a time: eight bytes are one 64-bit integer, and three shift-and-or
steps squeeze the gaps out of it (8-bit lanes to pairs, pairs to quads, quads to all eight), after
which its low `bits` bytes are the stream. Unpacking runs the steps backwards. Everything works on
blocks of rows, so temporaries stay bounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

LAYOUT_VERSION = 1
WIDTHS = (2, 3, 4, 5, 6, 7, 8)

_WORD_BITS = 32
_LANES = 8  # codes squeezed together: eight bytes fill one int64
_BLOCK_CODES = 1 << 17  # codes handled at once: temporaries stay in the cache


def packed_words(count: int, bits: int) -> int:
    """Words that a row of `count` codes needs: ceil(count * bits / 32)."""
    return -(-count * bits // _WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: [..., K] uint8, each below `2**bits`.
        bits: width of a code, 2..8.

    Returns:
        [..., ceil(K * bits / 32)] int32, contiguous, on the device of `codes`.

    Raises:
        ValueError: wrong dtype or width, no dimension, or a code that does not fit.
    """
    _check_width(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.dim() == 0:
        raise ValueError("codes need at least one dimension")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    count = codes.shape[-1]
    words = packed_words(count, bits)
    total = codes.shape[:-1].numel()
    packed = torch.empty(total, words, dtype=torch.int32, device=codes.device)
    rows = codes.reshape(total, count)
    for part in _row_blocks(total, count):
        packed[part] = _pack_rows(rows[part], bits, words)
    return packed.view(*codes.shape[:-1], words)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        words: [..., ceil(count * bits / 32)] int32.
        bits: width of a code, 2..8.
        count: codes a row.

    Returns:
        [..., count] uint8, contiguous, on the device of `words`.

    Raises:
        ValueError: wrong dtype or width, or a row whose length does not belong to `count` codes.
    """
    _check_width(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"packed words must be int32, got {words.dtype}")
    if words.dim() == 0 or words.shape[-1] != packed_words(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits are {packed_words(count, bits)} words a row, "
            f"got words of shape {tuple(words.shape)}"
        )
    total = words.shape[:-1].numel()
    rows = words.reshape(total, words.shape[-1])
    codes = torch.empty(total, count, dtype=torch.uint8, device=words.device)
    for part in _row_blocks(total, count):
        codes[part] = _unpack_rows(rows[part], bits, count)
    return codes.view(*words.shape[:-1], count)


def _pack_rows(codes: Tensor, bits: int, words: int) -> Tensor:
    """[rows, K] uint8 → [rows, words] int32."""
    rows, count = codes.shape
    lanes = -(-count // _LANES)
    padded = codes
    aligned = codes.is_contiguous() and codes.storage_offset() % _LANES == 0
    if count != lanes * _LANES or not aligned:
        padded = codes.new_zeros(rows, lanes * _LANES)
        padded[:, :count] = codes
    value = padded.view(torch.int64)
    for gap, field in _steps(bits):
        low, high = _masks(gap, field)
        value = (value & low) | ((value >> (gap - field)) & high)
    squeezed = value.view(torch.uint8).view(rows, lanes, _LANES)[..., :bits]
    stream = squeezed.reshape(rows, lanes * bits)
    width = words * _WORD_BITS // 8
    if stream.shape[1] != width:  # the last lane is padding, or the last word is not full
        fitted = codes.new_zeros(rows, width)
        keep = min(width, stream.shape[1])
        fitted[:, :keep] = stream[:, :keep]
        stream = fitted
    return stream.view(torch.int32)


def _unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """[rows, words] int32 → [rows, count] uint8."""
    rows = words.shape[0]
    lanes = -(-count // _LANES)
    stream = words.contiguous().view(torch.uint8)
    if stream.shape[1] < lanes * bits:  # the last lane reaches beyond the last word
        longer = stream.new_zeros(rows, lanes * bits)
        longer[:, : stream.shape[1]] = stream
        stream = longer
    spread = stream.new_zeros(rows, lanes, _LANES)
    spread[..., :bits] = stream[:, : lanes * bits].reshape(rows, lanes, bits)
    value = spread.view(torch.int64)
    for gap, field in reversed(_steps(bits)):
        low, high = _masks(gap, field)
        value = (value & low) | ((value & high) << (gap - field))
    return value.view(torch.uint8).view(rows, lanes * _LANES)[:, :count]


def _steps(bits: int) -> tuple[tuple[int, int], ...]:
    """(distance of two neighbouring fields, their width) before each squeeze; none at 8 bits."""
    return () if bits == _LANES else ((8, bits), (16, 2 * bits), (32, 4 * bits))


def _masks(gap: int, field: int) -> tuple[int, int]:
    """Masks of the even field in place, and of the odd field moved next to it, in 64 bits.

    Both are below 2**63 for widths under 8, so that they fit a signed 64-bit integer, and masking
    after the arithmetic shift drops whatever a set sign bit filled in.
    """
    low = sum(((1 << field) - 1) << start for start in range(0, 64, 2 * gap))
    return low, low << field


def _row_blocks(rows: int, count: int) -> Iterator[slice]:
    """Consecutive slices of rows, each of at most `_BLOCK_CODES` codes or one row."""
    step = max(1, _BLOCK_CODES // max(count, 1))
    if count == 0:
        return
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {WIDTHS}, got {bits}")
    if sys.byteorder != "little":
        raise ValueError("the layout is implemented for little-endian machines only")
