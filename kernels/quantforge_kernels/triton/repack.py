"""The layout of a weight on a GPU, and the repacking into it, in plain torch.

On disk a row is one dense bit stream (`layout.py`). A tensor core wants something else: each
thread holds, for its rows, pairs of neighbouring columns in the two halves of a register, as 16-bit
floats. So the codes are laid out as the registers want them, and a kernel loads 128 bits a thread,
shifts, masks, sets an exponent, and has the operand: no shuffle and no conversion.

A *tile* is 32 rows of 128 columns. In it a *lane* is one row and one `j` of four: 32 codes in
`bits` int32 words, 16 *pairs* p whose halves h are columns

    32 * (p // 4) + 8 * j + 2 * (p % 4) + h

so that a lane's columns are four runs of eight, and 32 consecutive columns are four consecutive p.
Pair p has its two codes at the same bits of the two 16-bit halves of a word: `16 // bits` of them
in each word, from bit 0 up. What is left at the top of the halves (1 bit at widths 3 and 5, 4 at 6,
2 at 7) holds the remaining pairs, cut in pieces; `pieces` lists them. No bit is wasted.

Row `4 * g + r` of a tile is lane group g, element r; the words lie as

    [out / 32, in / 128, bits, g = 8, j = 4, r = 4] int32

and thread (g, j) of a warp fetches word i of its four rows with one 128-bit load, the warp 512
bytes on end. Rows and columns are padded with zero codes to whole tiles, scales with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from quantforge_kernels.layout import WIDTHS, unpack
from quantforge_kernels.reference import group_width

TILE_ROWS = 32
TILE_COLUMNS = 128
GROUP_STEP = 32  # group sizes are multiples of this, or the whole row
PAIRS = 16

_HALF = 16
_BLOCK_CODES = 1 << 22


class Piece(NamedTuple):
    """Bits of a code and where they lie in each half of a word.

    Attributes:
        word: which of the lane's words.
        position: lowest bit in the half.
        start: lowest bit of the code.
        width: how many bits.
    """

    word: int
    position: int
    start: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWeight:
    """One matrix in the layout of the GPU kernels.

    Attributes:
        words: [tiles of 32 rows, tiles of 128 columns, bits, 8, 4, 4] int32.
        scale: [padded groups, padded rows] floating point, zero where padded.
        zero: [padded groups, padded rows] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: columns that share a scale; a whole row is its padded length.
        out_features: rows.
        in_features: columns.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def fold(self) -> int:
        """Columns after which partial sums are scaled: the part of a group inside one tile."""
        return gcd(self.group_size, TILE_COLUMNS)


def pieces(bits: int, pair: int) -> tuple[Piece, ...]:
    """Where the codes of a pair lie in their lane.

    Args:
        bits: width of a code.
        pair: 0..15.

    Returns:
        One piece, or up to four for the pairs made of what the words have left.
    """
    fields = _HALF // bits
    if pair < bits * fields:
        return (Piece(pair // fields, bits * (pair % fields), 0, bits),)
    rest = pair - bits * fields
    if bits == 6:
        half = rest % 2
        return (Piece(rest, 12, 0, 4), Piece(4 + rest // 2, 12 + 2 * half, 4, 2))
    if bits == 7:
        whole = tuple(Piece(3 * rest + i, 14, 2 * i, 2) for i in range(3))
        return (*whole, Piece(6, 14 + rest, 6, 1))
    return tuple(Piece(i, 15, i, 1) for i in range(bits))


def padded_group(group_size: int, in_features: int) -> int:
    """Columns that share a scale in the layout: for a whole row, its padded length.

    Raises:
        ValueError: a group that is not a multiple of 32 columns, or does not divide the row.
    """
    group = group_width(group_size, in_features)
    if group == in_features:
        return -(-in_features // TILE_COLUMNS) * TILE_COLUMNS
    if group % GROUP_STEP or in_features % group:
        raise ValueError(
            f"groups of {group} in a row of {in_features}: the layout needs multiples of "
            f"{GROUP_STEP} that divide it"
        )
    return group


def repack(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> DeviceWeight:
    """Bring a packed matrix into the GPU layout, on its device.

    Args:
        words: [out, ceil(in * bits / 32)] int32; see `layout.pack`.
        scale: [out, groups] floating point.
        zero: [out, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: a multiple of 32 that divides the row, or -1 for the whole row.
        in_features: columns.

    Returns:
        The same weight; float64 scales become float32.

    Raises:
        ValueError: a width or group size that the layout does not have.
    """
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {WIDTHS}, got {bits}")
    group = padded_group(group_size, in_features)
    rows = words.shape[0]
    row_tiles, column_tiles = -(-rows // TILE_ROWS), -(-in_features // TILE_COLUMNS)
    result = words.new_zeros(row_tiles, column_tiles, bits, 8, 4, 4)
    step = max(1, _BLOCK_CODES // (column_tiles * TILE_COLUMNS * TILE_ROWS))
    for start in range(0, row_tiles, step):
        part = words[start * TILE_ROWS : (start + step) * TILE_ROWS]
        tiles = result[start : start + step]
        codes = unpack(part, bits, in_features)
        padded = codes.new_zeros(tiles.shape[0] * TILE_ROWS, column_tiles * TILE_COLUMNS)
        padded[: codes.shape[0], :in_features] = codes
        tiles.copy_(_arrange(padded, bits))
    groups = -(-column_tiles * TILE_COLUMNS // group)
    kind = torch.float32 if scale.dtype == torch.float64 else scale.dtype
    return DeviceWeight(
        words=result,
        scale=_by_group(scale.to(kind), groups, row_tiles * TILE_ROWS),
        zero=None if zero is None else _by_group(zero, groups, row_tiles * TILE_ROWS),
        bits=bits,
        group_size=group,
        out_features=rows,
        in_features=in_features,
    )


def _by_group(values: Tensor, groups: int, rows: int) -> Tensor:
    """[out, groups] → [padded groups, padded rows]: neighbouring rows are neighbours in memory."""
    result = values.new_zeros(groups, rows)
    result[: values.shape[1], : values.shape[0]] = values.T
    return result


def _arrange(codes: Tensor, bits: int) -> Tensor:
    """[tiles * 32, tiles * 128] uint8 → [row tiles, column tiles, bits, 8, 4, 4] int32."""
    rows, columns = codes.shape
    # row = (tile, g, r), column = (tile, p // 4, j, p % 4, h)
    split = codes.view(rows // TILE_ROWS, 8, 4, columns // TILE_COLUMNS, 4, 4, 4, 2)
    pairs = split.permute(0, 3, 4, 6, 7, 1, 5, 2)  # tile, tile, p // 4, p % 4, h, g, j, r
    pairs = pairs.reshape(*pairs.shape[:2], PAIRS, 2, 8, 4, 4).int()
    result = pairs.new_zeros(*pairs.shape[:2], bits, 8, 4, 4)
    for pair in range(PAIRS):
        low, high = pairs[:, :, pair, 0], pairs[:, :, pair, 1]
        for piece in pieces(bits, pair):
            mask = (1 << piece.width) - 1
            result[:, :, piece.word] |= ((low >> piece.start) & mask) << piece.position
            result[:, :, piece.word] |= ((high >> piece.start) & mask) << piece.position + _HALF
    return result
