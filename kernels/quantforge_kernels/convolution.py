"""Convolution with a packed weight, as torch sees it: checked, differentiable, safe to compile.

A kernel of [out, in / groups, height, width] weights is packed as the matrix [out, in / groups ·
height · width] that it is when flattened, so that the groups of a scale run over neighbouring
places and then channels. The weight is decoded in the dtype of the input and torch convolves:
where an image has many places, forming the weight once costs little beside using it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input

from quantforge_kernels import reference
from quantforge_kernels.ops import check_device, check_weight


def qconv2d(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    kernel: tuple[int, int],
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with a packed weight.

    The weight is `(code - zero) * scale` formed in the dtype of `x`.

    Args:
        x: [batch, in, height, width] floating point.
        words: [out, ceil(in / groups * kernel size * bits / 32)] int32, contiguous.
        scale: [out, groups of a row] floating point.
        zero: [out, groups of a row] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        kernel: height and width of the kernel.
        bias: [out] in the dtype of `x`, or None.
        stride: of the output over the input, down and across.
        padding: zeros around the input, likewise.
        dilation: distance of the kernel's places, likewise.
        groups: parts of the channels that are convolved apart.

    Returns:
        [batch, out, height, width] in the dtype of `x`.

    Raises:
        ValueError: tensors or numbers that do not fit together.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating point [batch, in, height, width], got {x.dtype} {tuple(x.shape)}"
        )
    _check_numbers(kernel, stride, padding, dilation)
    if words.dim() != 2:
        raise ValueError(f"words must be int32 [out, n], got {words.dtype} {tuple(words.shape)}")
    if groups < 1 or x.shape[1] % groups or words.shape[0] % groups:
        raise ValueError(
            f"{groups} groups do not divide {x.shape[1]} channels in and {words.shape[0]} out"
        )
    check_weight(words, scale, zero, bits, group_size, x.shape[1] // groups * kernel[0] * kernel[1])
    check_device(x, words, "words")
    if bias is not None and (tuple(bias.shape) != (words.shape[0],) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be {x.dtype} of shape {(words.shape[0],)}, "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )
    if bias is not None:
        check_device(x, bias, "bias")
    for place in (0, 1):
        reach = dilation[place] * (kernel[place] - 1) + 1
        if x.shape[2 + place] + 2 * padding[place] < reach:
            raise ValueError(f"a kernel that reaches over {reach} places is larger than the input")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("qconv2d has no gradient to the scales; detach them")
    result: Tensor = _qconv2d(
        x, words, scale, zero, bias, [bits, group_size, *kernel],
        [*stride, *padding, *dilation, groups],
    )  # fmt: skip
    return result


def _check_numbers(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """Refuse what is no pair, or below its least."""
    named = {"kernel": (kernel, 1), "stride": (stride, 1), "dilation": (dilation, 1)}
    for name, (pair, least) in {**named, "padding": (padding, 0)}.items():
        whole = isinstance(pair, tuple | list) and all(type(one) is int for one in pair)
        if not whole or len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two whole numbers from {least} up, got {pair}")


# What an operator's schema can carry: `grid` is bits, group size and the kernel's height and width,
# `places` are stride, padding and dilation, two numbers each, and the groups of channels.
def _weight(
    like: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    grid: Sequence[int],
    channels: int,
) -> Tensor:
    """[out, channels, height, width] weight in the dtype of `like`."""
    bits, group_size, *kernel = grid
    shape = (words.shape[0], channels, *kernel)
    flat = (shape[0], channels * kernel[0] * kernel[1])
    return reference.dequantize(words, scale, zero, bits, group_size, flat, like.dtype).view(shape)


@torch.library.custom_op("quantforge::qconv2d", mutates_args=())
def _qconv2d(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    grid: list[int],
    places: list[int],
) -> Tensor:
    weight = _weight(x, words, scale, zero, grid, x.shape[1] // places[6])
    stride, padding, dilation = places[:2], places[2:4], places[4:6]
    return functional.conv2d(x, weight, bias, stride, padding, dilation, places[6]).contiguous()


@_qconv2d.register_fake
def _qconv2d_fake(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    grid: list[int],
    places: list[int],
) -> Tensor:
    sides = [
        (x.shape[2 + k] + 2 * places[2 + k] - places[4 + k] * (grid[2 + k] - 1) - 1) // places[k]
        + 1
        for k in (0, 1)
    ]
    return x.new_empty(x.shape[0], words.shape[0], *sides)


@torch.library.custom_op("quantforge::qconv2d_input_gradient", mutates_args=())
def _qconv2d_input_gradient(
    gradient: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    size: list[int],
    grid: list[int],
    places: list[int],
) -> Tensor:
    weight = _weight(gradient, words, scale, zero, grid, size[1] // places[6])
    stride, padding, dilation = places[:2], places[2:4], places[4:6]
    found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        size, weight, gradient, stride, padding, dilation, places[6]
    )
    return found.contiguous()


@_qconv2d_input_gradient.register_fake
def _qconv2d_input_gradient_fake(
    gradient: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    size: list[int],
    grid: list[int],
    places: list[int],
) -> Tensor:
    return gradient.new_empty(size)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, zero, _bias, grid, places = inputs
    ctx.numbers = (list(x.shape), grid, places)
    ctx.save_for_backward(words, scale, zero)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = _qconv2d_input_gradient(gradient, *ctx.saved_tensors, *ctx.numbers)
    if ctx.needs_input_grad[4]:
        to_bias = gradient.sum((0, 2, 3))
    return to_x, None, None, None, to_bias, None, None


_qconv2d.register_autograd(_backward, setup_context=_remember)
