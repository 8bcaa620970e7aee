"""Every operator in plain torch: the definition that a faster backend must equal.

A weight is `(code - zero) * scale`: the integer difference and the scale are converted to the
dtype of the computation and multiplied there, so that float32 gets the exact product and bfloat16
its rounding. A symmetric weight has the constant zero `2**(bits - 1)`. Rows are decoded a block at
a time, so that no more than `_BLOCK_WEIGHTS` weights exist in floating point at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantforge_kernels.layout import unpack

PER_CHANNEL = -1

_BLOCK_WEIGHTS = 1 << 22  # 16 MiB of float32


def group_width(group_size: int, in_features: int) -> int:
    """Weights of a row that share one scale; `PER_CHANNEL` means the whole row."""
    return in_features if group_size == PER_CHANNEL else group_size


def dequantize(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode a packed matrix.

    Args:
        words: [out, ceil(in * bits / 32)] int32.
        scale: [out, groups] floating point.
        zero: [out, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        shape: (out, in).
        dtype: of the result, and of the product that makes it.

    Returns:
        [out, in] weight in `dtype`.

    Raises:
        ValueError: `words` do not hold a matrix of this shape.
    """
    out_features, in_features = shape
    weight = torch.empty(shape, dtype=dtype, device=words.device)
    for rows in row_blocks(out_features, in_features):
        part = None if zero is None else zero[rows]
        weight[rows] = _decode(words[rows], scale[rows], part, bits, in_features, dtype)
    return weight


def qlinear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with the weight decoded in the dtype of `x`.

    Args:
        x: [..., in] floating point.
        words: [out, ceil(in * bits / 32)] int32.
        scale: [out, groups] floating point.
        zero: [out, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        bias: [out] in the dtype of `x`, or None.

    Returns:
        [..., out] in the dtype of `x`.
    """
    out_features, in_features = words.shape[0], x.shape[-1]
    blocks = row_blocks(out_features, in_features)
    if len(blocks) == 1:
        weight = _decode(words, scale, zero, bits, in_features, x.dtype)
        return functional.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], out_features)
    for rows in blocks:
        part = None if zero is None else zero[rows]
        weight = _decode(words[rows], scale[rows], part, bits, in_features, x.dtype)
        y[..., rows] = functional.linear(x, weight, None if bias is None else bias[rows])
    return y


def qlinear_input_gradient(
    gradient: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Gradient of `qlinear` to its input: `gradient @ weight`.

    Args:
        gradient: [..., out] floating point.
        words: [out, ceil(in * bits / 32)] int32.
        scale: [out, groups] floating point.
        zero: [out, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        in_features: columns of the weight.

    Returns:
        [..., in] in the dtype of `gradient`.
    """
    result = gradient.new_zeros(*gradient.shape[:-1], in_features)
    for rows in row_blocks(words.shape[0], in_features):
        part = None if zero is None else zero[rows]
        weight = _decode(words[rows], scale[rows], part, bits, in_features, gradient.dtype)
        result += gradient[..., rows] @ weight
    return result


def qembedding(
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Look up rows of a packed matrix; only the rows asked for are decoded.

    Args:
        ids: integer tensor of any shape, each in `[0, rows)`.
        words: [rows, ceil(width * bits / 32)] int32.
        scale: [rows, groups] floating point.
        zero: [rows, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        width: columns of the matrix.
        dtype: of the result.

    Returns:
        [*ids.shape, width] in `dtype`.
    """
    flat = ids.reshape(-1)
    rows = dequantize(
        words.index_select(0, flat),
        scale.index_select(0, flat),
        None if zero is None else zero.index_select(0, flat),
        bits,
        group_size,
        (flat.numel(), width),
        dtype,
    )
    return rows.view(*ids.shape, width)


def row_blocks(rows: int, width: int) -> list[slice]:
    """Slices of rows with at most `_BLOCK_WEIGHTS` weights each, or one row."""
    step = max(1, _BLOCK_WEIGHTS // max(width, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _decode(
    words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, width: int, dtype: torch.dtype
) -> Tensor:
    """[rows, width] weight in `dtype`; the number of groups is the number of scales a row."""
    codes = unpack(words, bits, width).view(*scale.shape, -1)
    # Integers up to 255 are exact in every floating dtype used here, and so is their difference.
    difference = codes.to(dtype)
    difference -= float(1 << (bits - 1)) if zero is None else zero.to(dtype).unsqueeze(-1)
    difference *= scale.to(dtype).unsqueeze(-1)
    return difference.view(-1, width)
