"""The packed kernels in C++, called through ctypes; see `cpu/packed.h` for the layout.

Every function takes tensors that were checked before. Threads are torch's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantforge_kernels import native
from quantforge_kernels.geometry import Geometry
from quantforge_kernels.native import pointer

LANES = 16  # rows of a tile
UNIT = 32  # columns of a unit

SOURCE = "packed"
OPTIONS = native.Options(math=native.IN_ORDER)

_LEVELS = {1: "portable", 2: "AVX2", 3: "AVX-512 VNNI"}
_ROUNDS = 4  # added to the level where bfloat16 is rounded by an instruction
_Numbers = ctypes.c_int64 * 5


@dataclass(frozen=True, slots=True)
class Weight:
    """A prepared weight.

    Attributes:
        codes: [tiles, units, bits, 16] int32.
        scale: [tiles, groups, 16] bfloat16 or float32.
        zero: [tiles, groups, 16] uint8, or None.
        geometry: what it holds.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    geometry: Geometry

    @property
    def arguments(
        self,
    ) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.Array[ctypes.c_int64]]:
        """As the library takes them."""
        numbers = numbers_of(self.geometry, self.scale.dtype)
        return pointer(self.codes), pointer(self.scale), pointer(self.zero), numbers


def numbers_of(geometry: Geometry, scale_dtype: torch.dtype) -> ctypes.Array[ctypes.c_int64]:
    """Rows, columns, groups, bits and whether scales are float32, as the library takes them."""
    wide = scale_dtype != torch.bfloat16
    rows, columns = geometry.out_features, geometry.in_features
    return _Numbers(rows, columns, geometry.groups, geometry.bits, wide)


@cache
def library() -> ctypes.CDLL:
    """The library for this machine, built on first use.

    Raises:
        BuildError: it cannot be built here.
    """
    return declared(native.load(SOURCE, OPTIONS))


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its result types."""
    for name in ("qf_prepare", "qf_linear", "qf_unpack", "qf_rows", "qf_decode"):
        getattr(loaded, name).restype = None
    loaded.qf_stream.restype = ctypes.c_uint64
    return loaded


def instructions(loaded: ctypes.CDLL) -> str:
    """The instruction set a library was compiled for."""
    level = int(loaded.qf_instructions())
    name = _LEVELS[level % _ROUNDS]
    return f"{name}, BF16" if level >= _ROUNDS else name


def prepare(
    loaded: ctypes.CDLL, words: Tensor, scale: Tensor, zero: Tensor | None, geometry: Geometry
) -> Weight:
    """Repack a weight; scales that are not bfloat16 become float32."""
    tiles = -(-geometry.out_features // LANES)
    units = -(-geometry.in_features // UNIT)
    scale = (scale if scale.dtype == torch.bfloat16 else scale.float()).contiguous()
    zero = None if zero is None else zero.contiguous()
    shape = (tiles, geometry.groups, LANES)
    weight = Weight(
        torch.zeros(tiles, units, geometry.bits, LANES, dtype=torch.int32),
        torch.zeros(shape, dtype=scale.dtype),
        None if zero is None else torch.zeros(shape, dtype=torch.uint8),
        geometry,
    )
    loaded.qf_prepare(
        pointer(words),
        ctypes.c_int64(words.shape[1]),
        pointer(scale),
        pointer(zero),
        numbers_of(geometry, scale.dtype),
        ctypes.c_int(torch.get_num_threads()),
        *(pointer(tensor) for tensor in (weight.codes, weight.scale, weight.zero)),
    )
    return weight


def multiply(
    loaded: ctypes.CDLL, x: Tensor, weight: Weight, bias: Tensor | None, *, quantized: bool
) -> Tensor:
    """[rows, in] contiguous → [rows, out], streaming the weight."""
    y = x.new_empty(x.shape[0], weight.geometry.out_features)
    loaded.qf_linear(
        pointer(x),
        *weight.arguments,
        pointer(bias),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_int(x.dtype == torch.bfloat16),
        ctypes.c_int(quantized),
        ctypes.c_int(torch.get_num_threads()),
        pointer(y),
    )
    return y


def unpack(
    loaded: ctypes.CDLL, weight: Weight, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Rows of tiles [first, last) of the weight, transposed: [in, 16 (last - first)] in `dtype`."""
    target = torch.empty(weight.geometry.in_features, LANES * (last - first), dtype=dtype)
    loaded.qf_unpack(
        *weight.arguments,
        ctypes.c_int64(first),
        ctypes.c_int64(last),
        ctypes.c_int(dtype == torch.bfloat16),
        ctypes.c_int(torch.get_num_threads()),
        pointer(target),
    )
    return target


def rows(loaded: ctypes.CDLL, weight: Weight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] int64 contiguous ids, each a row of the weight → [n, in] in `dtype`."""
    target = torch.empty(ids.numel(), weight.geometry.in_features, dtype=dtype)
    loaded.qf_rows(
        *weight.arguments,
        pointer(ids),
        ctypes.c_int64(ids.numel()),
        ctypes.c_int(dtype == torch.bfloat16),
        pointer(target),
    )
    return target


def stream(words: Tensor) -> int:
    """Sum of int64 words modulo 2^64, read once by torch's threads."""
    threads = ctypes.c_int(torch.get_num_threads())
    return int(library().qf_stream(pointer(words), ctypes.c_int64(words.numel()), threads))
