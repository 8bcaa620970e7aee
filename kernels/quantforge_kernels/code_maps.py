"""What surrounds convolutions on activation codes, each with its definition in torch.

Codes are uint8 tensors that mean `(code − zero) · scale`. Images keep their channels last in
memory, so that a convolution reads them as they are; every function keeps the order of its input.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge_kernels import native
from quantforge_kernels.integer_layout import Places
from quantforge_kernels.integer_outputs import LARGEST_SHIFT

SOURCE = "code_maps"
OPTIONS = native.Options(math=native.IN_ORDER)
PROCEDURES = (
    "qf_to_codes", "qf_to_last", "qf_from_codes", "qf_add_codes", "qf_add_dyadic", "qf_largest",
)  # fmt: skip
_LEAST = 16  # numbers that the kernels take at once
_ADDED_BITS = 30  # of a multiplier: two products of nine more bits stay within 64


def library() -> ctypes.CDLL | None:
    """The native library, or None (with one warning) where it cannot be built."""
    return native.optional(SOURCE, "activation codes are made in torch", PROCEDURES, OPTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrid:
    """What codes mean: `(code − zero) · scale`, codes 0 .. `top`."""

    scale: float
    zero: int
    top: int


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """A tensor without gaps in memory, and whether its channels are last there."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), x.dim() != 4


def _native(x: Tensor, native_code: bool) -> ctypes.CDLL | None:
    usable = native_code and x.device.type == "cpu" and x.numel() >= _LEAST
    return library() if usable else None


def to_codes(x: Tensor, grid: CodeGrid, *, native_code: bool = True) -> Tensor:
    """Codes of numbers, `clamp(round(x / scale) + zero, 0, top)`; images get channels last."""
    kernel = _native(x, native_code)
    if kernel is None or x.dtype != torch.float32:
        codes = ((x / grid.scale).round() + grid.zero).clamp(0, grid.top).to(torch.uint8)
        return codes.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else codes
    x, last = _dense(x)
    numbers = (
        ctypes.c_float(1.0 / grid.scale), ctypes.c_int(grid.zero), ctypes.c_int(grid.top),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    if last:
        codes = torch.empty_like(x, dtype=torch.uint8)
        kernel.qf_to_codes(
            native.pointer(x), ctypes.c_int64(x.numel()), *numbers, native.pointer(codes)
        )
        return codes
    codes = torch.empty(x.shape, dtype=torch.uint8, memory_format=torch.channels_last)
    sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
    kernel.qf_to_last(
        native.pointer(x), *map(ctypes.c_int64, sizes), *numbers, native.pointer(codes)
    )
    return codes


def from_codes(codes: Tensor, grid: CodeGrid, *, native_code: bool = True) -> Tensor:
    """Float32 numbers of codes, in the order of the codes in memory."""
    kernel = _native(codes, native_code)
    if kernel is None:
        return (codes.to(torch.int16) - grid.zero).float() * grid.scale
    codes, _ = _dense(codes)
    x = torch.empty_like(codes, dtype=torch.float32)
    kernel.qf_from_codes(
        native.pointer(codes), ctypes.c_int64(codes.numel()), ctypes.c_float(grid.scale),
        ctypes.c_int(grid.zero), ctypes.c_int(torch.get_num_threads()), native.pointer(x),
    )  # fmt: skip
    return x


def dyadic_pair(first: float, second: float) -> tuple[int, int, int]:
    """Multipliers of at most 30 bits and the shift they share, for two positive ratios.

    Raises:
        ValueError: a ratio is not positive, or too large.
    """
    largest = max(first, second)
    if min(first, second) <= 0.0 or not largest < 2.0 ** (_ADDED_BITS - 1):
        raise ValueError(f"ratios {first} and {second} have no multipliers of {_ADDED_BITS} bits")
    shift = 1
    while shift < LARGEST_SHIFT - 8 and round(largest * 2.0 ** (shift + 1)) < 2**_ADDED_BITS:
        shift += 1
    return round(first * 2.0**shift), round(second * 2.0**shift), shift


def add_codes(
    a: Tensor,
    a_grid: CodeGrid,
    b: Tensor,
    b_grid: CodeGrid,
    grid: CodeGrid,
    *,
    least: int = 0,
    most: int | None = None,
    dyadic: bool = False,
    native_code: bool = True,
) -> Tensor:
    """Codes of the sum of two tensors of codes.

    Args:
        a: uint8.
        a_grid: what its codes mean.
        b: uint8 of the same shape.
        b_grid: what its codes mean.
        grid: of the result.
        least: smallest code of the result; `grid.zero` cuts negative numbers off.
        most: largest code; None for `grid.top`.
        dyadic: rescale by integers alone, `dyadic_pair` of the scales over that of the result.
        native_code: whether to use the C++.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"codes {tuple(a.shape)} and {tuple(b.shape)} are not of one shape")
    most = grid.top if most is None else most
    kernel = _native(a, native_code)
    ratios = (a_grid.scale / grid.scale, b_grid.scale / grid.scale)
    if kernel is None:
        first, second = a.long() - a_grid.zero, b.long() - b_grid.zero
        if dyadic:
            left, right, shift = dyadic_pair(*ratios)
            total = (first * left + second * right + (1 << (shift - 1))) >> shift
        else:
            exact = first.float() * a_grid.scale + second.float() * b_grid.scale
            total = (exact / grid.scale).round().long()
        return (total + grid.zero).clamp(least, most).to(torch.uint8)
    a, last = _dense(a)
    b = b.contiguous(memory_format=torch.channels_last) if last and b.dim() == 4 else b.contiguous()
    made = torch.empty_like(a)
    zeros = (ctypes.c_int32 * 3)(a_grid.zero, b_grid.zero, grid.zero)
    limits = (ctypes.c_int32 * 2)(least, most)
    both = (native.pointer(a), native.pointer(b), ctypes.c_int64(a.numel()))
    threads = ctypes.c_int(torch.get_num_threads())
    if dyadic:
        *multipliers, shift = dyadic_pair(*ratios)
        kernel.qf_add_dyadic(
            *both, (ctypes.c_int64 * 2)(*multipliers), zeros, limits, ctypes.c_int(shift), threads,
            native.pointer(made),
        )  # fmt: skip
    else:
        kernel.qf_add_codes(
            *both, (ctypes.c_float * 2)(*ratios), zeros, limits, threads, native.pointer(made)
        )
    return made


def largest_codes(x: Tensor, places: Places, *, native_code: bool = True) -> Tensor:
    """The largest code of every window of [batch, channels, height, width]; padding never is.

    Raises:
        ValueError: padding is more than half a window or not of all sides alike, or a window is
            larger than the image.
    """
    if places.ends != places.padding:
        raise ValueError(f"padding {places.padding} before and {places.ends} after differ")
    pairs = zip(places.kernel, places.padding, strict=True)
    if any(2 * padding > kernel for kernel, padding in pairs):
        raise ValueError(f"padding {places.padding} is more than half of {places.kernel}")
    height, width = places.size(x.shape[2], x.shape[3])
    x = x.contiguous(memory_format=torch.channels_last)
    kernel = _native(x, native_code)
    if kernel is None:
        found = torch.nn.functional.max_pool2d(
            x.float(), places.kernel, places.stride, places.padding, places.dilation
        )
        return found.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    shape = (x.shape[0], x.shape[1], height, width)
    made = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    sizes = (
        x.shape[0], x.shape[2], x.shape[3], x.shape[1], height, width, *places.kernel,
        *places.stride, *places.padding, *places.dilation,
    )  # fmt: skip
    kernel.qf_largest(
        native.pointer(x), (ctypes.c_int64 * 14)(*sizes), ctypes.c_int(torch.get_num_threads()),
        native.pointer(made),
    )  # fmt: skip
    return made
