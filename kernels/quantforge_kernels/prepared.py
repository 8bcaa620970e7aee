"""Operators over a prepared weight: repacked once for a backend, used at every call.

`prepare` chooses the backend and gives it the words; what comes back, a `PreparedWeight`, is all
that has to be kept. `qlinear_prepared` and `qembedding_prepared` equal `qlinear` and `qembedding`
of the words it was made from. They are `torch.library` operators where a gradient or the compiler
needs them to be; otherwise they call the backend directly, since the way through torch's
dispatcher costs as much as a small layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge_kernels.backends import (
    AUTO,
    BACKENDS,
    Backend,
    BackendError,
    Prepared,
    Request,
    choose_backend,
)
from quantforge_kernels.geometry import Geometry
from quantforge_kernels.ops import check_weight

EXACT = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWeight:
    """A packed matrix in the order of the backend that reads it.

    Attributes:
        backend: its name.
        geometry: shape and grouping.
        codes: in the backend's order, as are
        scale: the scales and
        zero: the zero-points, None for a symmetric weight.
    """

    backend: str
    geometry: Geometry
    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def prepare(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    backend: str = AUTO,
    mode: str = EXACT,
) -> PreparedWeight | None:
    """Repack a weight for the backend that will run it.

    Args:
        words: [out, ceil(in * bits / 32)] int32, contiguous.
        scale: [out, groups] floating point.
        zero: [out, groups] uint8, or None.
        geometry: shape and grouping.
        dtype: of the inputs to come.
        backend: name of a backend, or "auto".
        mode: "exact", or "a8" for inputs rounded to int8.

    Returns:
        The prepared weight, or None where the backend reads the words themselves.

    Raises:
        ValueError: tensors that do not fit together.
        BackendError: the backend is unknown or cannot run this.
    """
    check_weight(words, scale, zero, geometry.bits, geometry.group_size, geometry.in_features)
    chosen = choose_backend(backend, _request(geometry, zero, dtype, words.device.type, mode))
    if chosen.prepared is None:
        return None
    codes, scale, zero = chosen.prepared.prepare(words, scale, zero, geometry)
    return PreparedWeight(
        backend=chosen.name, geometry=geometry, codes=codes, scale=scale, zero=zero
    )


def qlinear_prepared(
    x: Tensor, weight: PreparedWeight, bias: Tensor | None = None, *, mode: str = EXACT
) -> Tensor:
    """`x @ weight.T + bias` with a prepared weight.

    Args:
        x: [..., in] of a dtype the backend runs; it need not be contiguous.
        weight: see `prepare`.
        bias: [out] in the dtype of `x`, or None.
        mode: "exact" or "a8".

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: an input of another width or device, or a bias that does not fit.
        BackendError: the backend cannot run this dtype or mode.
    """
    geometry = weight.geometry
    if x.dim() == 0 or x.shape[-1] != geometry.in_features:
        raise ValueError(f"x must be [..., {geometry.in_features}], got {tuple(x.shape)}")
    if x.device != weight.codes.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.codes.device}")
    if bias is not None and (bias.shape != (geometry.out_features,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be {x.dtype} of shape {(geometry.out_features,)}, "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )
    backend = BACKENDS[weight.backend]
    reason = backend.capability.obstacle(
        _request(geometry, weight.zero, x.dtype, x.device.type, mode)
    )
    if reason:
        raise BackendError(f"backend {backend.name!r} cannot run this input ({reason})")
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _wants_gradient(x, bias)):
        result: Tensor = _qlinear_prepared(
            x, weight.codes, weight.scale, weight.zero, bias, _plain(geometry), backend.name, mode
        )
        return result
    return _form(backend).linear(x, weight.codes, weight.scale, weight.zero, geometry, bias, mode)


def qembedding_prepared(ids: Tensor, weight: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of a prepared weight.

    Args:
        ids: int32 or int64 of any shape, each in `[0, out)`.
        weight: see `prepare`.
        dtype: of the result.

    Returns:
        [*ids.shape, in] in `dtype`.

    Raises:
        ValueError: ids of another dtype or device.
        IndexError: an id is no row. On a GPU the kernel asserts it instead: the error comes with
            the next synchronization, as from torch's embedding.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    if ids.device != weight.codes.device:
        raise ValueError(f"ids are on {ids.device}, the weight on {weight.codes.device}")
    result: Tensor = _qembedding_prepared(
        ids,
        weight.codes,
        weight.scale,
        weight.zero,
        _plain(weight.geometry),
        weight.backend,
        dtype,
    )
    return result


def _request(
    geometry: Geometry, zero: Tensor | None, dtype: torch.dtype, device: str, mode: str
) -> Request:
    return Request(
        bits=geometry.bits,
        group_size=geometry.group_size,
        symmetric=zero is None,
        dtype=dtype,
        device=device,
        mode=mode,
    )


def _wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


def _plain(geometry: Geometry) -> list[int]:
    """What an operator's schema can carry; `_geometry` is the inverse."""
    return [geometry.out_features, geometry.in_features, geometry.bits, geometry.group_size]


def _geometry(numbers: list[int]) -> Geometry:
    out_features, in_features, bits, group_size = numbers
    return Geometry(
        out_features=out_features, in_features=in_features, bits=bits, group_size=group_size
    )


def _form(backend: Backend) -> Prepared:
    if backend.prepared is None:
        raise BackendError(f"backend {backend.name!r} reads no prepared weights")
    return backend.prepared


@torch.library.custom_op("quantforge::qlinear_prepared", mutates_args=())
def _qlinear_prepared(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    geometry: list[int],
    backend: str,
    mode: str,
) -> Tensor:
    return _form(BACKENDS[backend]).linear(x, codes, scale, zero, _geometry(geometry), bias, mode)


@_qlinear_prepared.register_fake
def _qlinear_prepared_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    geometry: list[int],
    backend: str,
    mode: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], geometry[0])


@torch.library.custom_op("quantforge::prepared_input_gradient", mutates_args=())
def _prepared_input_gradient(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: list[int],
    backend: str,
) -> Tensor:
    return _form(BACKENDS[backend]).input_gradient(
        gradient, codes, scale, zero, _geometry(geometry)
    )


@_prepared_input_gradient.register_fake
def _prepared_input_gradient_fake(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: list[int],
    backend: str,
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], geometry[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, codes, scale, zero, _bias, geometry, backend, _mode = inputs
    ctx.arguments = (geometry, backend)
    ctx.save_for_backward(codes, scale, zero)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = _prepared_input_gradient(gradient, *ctx.saved_tensors, *ctx.arguments)
    if ctx.needs_input_grad[4]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, None, None, None, to_bias, None, None, None


_qlinear_prepared.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("quantforge::qembedding_prepared", mutates_args=())
def _qembedding_prepared(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: list[int],
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    return _form(BACKENDS[backend]).embedding(ids, codes, scale, zero, _geometry(geometry), dtype)


@_qembedding_prepared.register_fake
def _qembedding_prepared_fake(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: list[int],
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty(*ids.shape, geometry[1], dtype=dtype)
