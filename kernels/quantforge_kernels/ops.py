"""The operators as torch sees them: checked, differentiable to the input, safe under torch.compile.

Each is a `torch.library` custom operator, opaque to the compiler: the fake implementation gives
the shape, the real one asks `backends` who computes it. Gradients flow to `x` and to the bias; the
codes have none, and asking for one to the scales is an error rather than silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantforge_kernels import reference
from quantforge_kernels.backends import AUTO, Request, choose_backend
from quantforge_kernels.layout import WIDTHS, packed_words


def qlinear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """`x @ weight.T + bias` with a packed weight.

    The weight is `(code - zero) * scale` formed in the dtype of `x`.

    Args:
        x: [..., in] floating point.
        words: [out, ceil(in * bits / 32)] int32, contiguous; see `layout.pack`.
        scale: [out, groups] floating point.
        zero: [out, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        bias: [out] in the dtype of `x`, or None.
        backend: name of a backend, or "auto".

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: tensors whose shape, dtype, device or layout do not fit together.
        BackendError: the backend is unknown or cannot run this.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point [..., in], got {x.dtype} {tuple(x.shape)}")
    check_weight(words, scale, zero, bits, group_size, x.shape[-1])
    check_device(x, words, "words")
    if bias is not None:
        if tuple(bias.shape) != (words.shape[0],) or bias.dtype != x.dtype:
            raise ValueError(
                f"bias must be {x.dtype} of shape {(words.shape[0],)}, "
                f"got {bias.dtype} {tuple(bias.shape)}"
            )
        check_device(x, bias, "bias")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("qlinear has no gradient to the scales; detach them")
    result: Tensor = _qlinear(x, words, scale, zero, bits, group_size, bias, backend)
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
    """Rows of a packed matrix, decoded in `dtype`.

    Args:
        ids: int32 or int64 of any shape, each in `[0, rows)`.
        words: [rows, ceil(width * bits / 32)] int32, contiguous.
        scale: [rows, groups] floating point.
        zero: [rows, groups] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        width: columns of the matrix.
        dtype: of the result.

    Returns:
        [*ids.shape, width] in `dtype`.

    Raises:
        ValueError: tensors whose shape, dtype, device or layout do not fit together.
        IndexError: an id is no row, on the CPU; a device-side assertion on a GPU, as in torch's
            embedding.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    check_weight(words, scale, zero, bits, group_size, width)
    check_device(ids, words, "words")
    result: Tensor = _qembedding(ids, words, scale, zero, bits, group_size, width, dtype)
    return result


def check_weight(
    words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, width: int
) -> None:
    """Check one packed matrix of `width` columns."""
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {WIDTHS}, got {bits}")
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"words must be int32 [out, n], got {words.dtype} {tuple(words.shape)}")
    if words.shape[1] != packed_words(width, bits):
        raise ValueError(
            f"rows of {width} codes of {bits} bits are {packed_words(width, bits)} words, "
            f"got {words.shape[1]}"
        )
    if not words.is_contiguous():
        raise ValueError("words must be contiguous; call .contiguous() once, when loading")
    if group_size != reference.PER_CHANNEL and (group_size < 1 or width % group_size):
        raise ValueError(f"groups of {group_size} do not divide a row of {width}")
    expected = (words.shape[0], width // reference.group_width(group_size, width))
    if tuple(scale.shape) != expected or not scale.is_floating_point():
        raise ValueError(
            f"scale must be floating point of shape {expected}, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    check_device(words, scale, "scale")
    if zero is not None:
        if tuple(zero.shape) != expected or zero.dtype != torch.uint8:
            raise ValueError(
                f"zero must be uint8 of shape {expected}, got {zero.dtype} {tuple(zero.shape)}"
            )
        check_device(words, zero, "zero")


def check_device(first: Tensor, other: Tensor, name: str) -> None:
    """Refuse tensors of two devices."""
    if first.device != other.device:
        raise ValueError(f"{name} is on {other.device}, the rest on {first.device}")


@torch.library.custom_op("quantforge::qlinear", mutates_args=())
def _qlinear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    request = Request(
        bits=bits,
        group_size=group_size,
        symmetric=zero is None,
        dtype=x.dtype,
        device=x.device.type,
    )
    chosen = choose_backend(backend, request)
    return chosen.linear(x, words, scale, zero, bits, group_size, bias)


@_qlinear.register_fake
def _qlinear_fake(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


@torch.library.custom_op("quantforge::qlinear_input_gradient", mutates_args=())
def _qlinear_input_gradient(
    gradient: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return reference.qlinear_input_gradient(
        gradient, words, scale, zero, bits, group_size, in_features
    )


@_qlinear_input_gradient.register_fake
def _qlinear_input_gradient_fake(
    gradient: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero, ctx.bits, ctx.group_size, _bias, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(words, scale, zero)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    words, scale, zero = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = _qlinear_input_gradient(
            gradient, words, scale, zero, ctx.bits, ctx.group_size, ctx.in_features
        )
    if ctx.needs_input_grad[6]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, None, None, None, None, None, to_bias, None


_qlinear.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("quantforge::qembedding", mutates_args=())
def _qembedding(
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return reference.qembedding(ids, words, scale, zero, bits, group_size, width, dtype)


@_qembedding.register_fake
def _qembedding_fake(
    ids: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty(*ids.shape, width, dtype=dtype)
