"""Causal attention of bfloat16 operands: definition in torch, and the C++ that runs.

    out = softmax(scale q kᵀ, keys not after the query) v

Scores, sums and the softmax are float32; operands and the probabilities are rounded to bfloat16, as
torch's own fused attention does, of whose time on a CPU this takes a fraction. The C++ needs
AVX-512 with bfloat16. Keys and values may have fewer heads than queries: query head h reads the key
head h // (heads / key heads).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantforge_kernels import native

LARGEST_SIZE = 256  # of a head
LANES = 16
# The C++ source beside this file, and how it is compiled.
SOURCE = "attention"
OPTIONS = native.Options(math=native.IN_ORDER)


class _View(ctypes.Structure):
    """A tensor [batch, heads, length, size] whose last index is contiguous."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("wide", ctypes.c_int64),
    )

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        strides = (ctypes.c_int64 * 3)(*tensor.stride()[:3])
        return cls(tensor.data_ptr(), strides, tensor.dtype == torch.float32)


class _Shape(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The native library; None where it cannot be built or the processor lacks the instructions."""
    library = native.optional(SOURCE, "attention runs in torch, more slowly", (), OPTIONS)
    if library is None or not library.qf_attention_available():
        return None
    library.qf_attention_forward.restype = None
    library.qf_attention_backward.restype = None
    return library


def available() -> bool:
    """Whether this machine has the C++ version; it is built if it has to be."""
    return _library() is not None


def supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` runs on these tensors here.

    Args:
        query: [batch, heads, length, size].
        key: [batch, key heads, length, size].
        value: as `key`.
    """
    given = (query, key, value)
    if any(one.ndim != 4 or one.device.type != "cpu" for one in given):
        return False
    if any(one.dtype not in (torch.float32, torch.bfloat16) for one in given):
        return False
    batch, heads, length, size = query.shape
    wanted = (batch, key.shape[1], length, size)
    if key.shape != wanted or value.shape != wanted or 0 in (*query.shape, key.shape[1]):
        return False
    fits = heads % key.shape[1] == 0 and size % LANES == 0 and size <= LARGEST_SIZE
    return fits and available()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of every query to the keys that are not after it.

    Args:
        query: [batch, heads, length, size] bfloat16 or float32, rounded to bfloat16; any strides.
        key: [batch, key heads, length, size], likewise.
        value: as `key`.
        scale: of the scores.

    Returns:
        [batch, heads, length, size] bfloat16, in memory [batch, length, heads, size]. It can be
        differentiated once; gradients have the dtypes of what they belong to.

    Raises:
        RuntimeError: `supported` is false, or a second derivative is asked for.
    """
    if not supported(query, key, value):
        raise RuntimeError("no fused attention for these tensors here: ask `supported` first")
    out: Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return out


def causal_attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`causal_attention` in plain torch, in the dtype of its operands: the definition."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scale * (query @ key.transpose(-1, -2))
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (_rows_contiguous(one.detach()) for one in (query, key, value))
        batch, heads, length, size = query.shape
        out = _like(query, torch.bfloat16)
        log_sums = torch.empty(batch, heads, length)
        shape = _Shape(batch, heads, key.shape[1], length, size, scale)
        _run("qf_attention_forward", shape, query, key, value, out, _threads(), log_sums)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *given, log_sums = ctx.saved_tensors
        at_query, at_key, at_value = (_like(one, one.dtype) for one in given[:3])
        _run(
            "qf_attention_backward", ctx.shape, *given, _rows_contiguous(slope.bfloat16()),
            log_sums, _threads(), at_query, at_key, at_value,
        )  # fmt: skip
        return at_query, at_key, at_value, None


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last index is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory [batch, length, heads, size], seen as [batch, heads, length, size]."""
    batch, heads, length, size = tensor.shape
    return torch.empty(batch, length, heads, size, dtype=dtype).transpose(1, 2)


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _run(name: str, shape: _Shape, *arguments: Any) -> None:
    """Call the library; tensors of four indices go as views, others as addresses."""
    passed: list[Any] = [ctypes.byref(shape)]
    for one in arguments:
        if not isinstance(one, Tensor):
            passed.append(one)
        elif one.ndim == 4:
            passed.append(ctypes.byref(_View.of(one)))
        else:
            passed.append(native.pointer(one))
    getattr(_library(), name)(*passed)
