"""One token through a Llama-shaped decoder in one call of the C++ library.

Between two small layers eager PyTorch spends longer than in them. Here the whole step, from an
embedding to logits, is one call: `DecodeStep` describes the network once and `run` is called for
every token. See `cpu/decode.h` for what it computes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge_kernels import cpu_library
from quantforge_kernels.backends import CPU
from quantforge_kernels.cpu_library import Weight
from quantforge_kernels.native import pointer
from quantforge_kernels.prepared import PreparedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A linear of the network.

    Attributes:
        weight: prepared for the `cpu` backend, or dense [out, in] float32 or bfloat16, contiguous.
        bias: [out] float32, or None.
    """

    weight: PreparedWeight | Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A decoder block.

    Attributes:
        matrices: query, key, value, output, gate, up and down.
        attention_norm: [hidden] float32.
        feed_norm: [hidden] float32.
    """

    matrices: tuple[Matrix, ...]
    attention_norm: Tensor
    feed_norm: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and constants of the network.

    Attributes:
        hidden: features of a state.
        feed: features inside the feed-forward.
        heads: of queries.
        key_heads: of keys and values.
        head_width: features of a head.
        vocabulary: logits.
        epsilon: of the norms.
        attention_scale: of the scores.
    """

    hidden: int
    feed: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    epsilon: float
    attention_scale: float


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("dense_half", ctypes.c_int64),
    )


_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in _MATRICES),
        ("attention_norm", ctypes.c_void_p),
        ("feed_norm", ctypes.c_void_p),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "hidden", "feed", "heads", "key_heads", "head_width", "layers", "capacity",
            )
        ),
        ("epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("quantized", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("layer", ctypes.POINTER(_Layer)),
        ("head", _Matrix),
        *(
            (name, ctypes.c_void_p)
            for name in ("final_norm", "keys", "values", "cosine", "sine")
        ),
    )  # fmt: skip


class DecodeStep:
    """A network, its key-value cache, and the step that uses both. One sequence.

    Args:
        blocks: in forward order.
        head: the output projection.
        final_norm: [hidden] float32.
        cosine: [capacity, head_width] float32, of every position.
        sine: likewise.
        shape: sizes.
        quantized: round inputs of packed products to int8 by group.

    Attributes:
        keys: [blocks, key_heads, capacity, head_width] float32, filled by position.
        values: likewise.

    Raises:
        BuildError: the library cannot be built here.
        ValueError: a weight is prepared for another backend.
    """

    def __init__(
        self,
        blocks: list[Block],
        head: Matrix,
        final_norm: Tensor,
        *,
        cosine: Tensor,
        sine: Tensor,
        shape: Shape,
        quantized: bool,
    ) -> None:
        self._library = cpu_library.library()
        self.shape, self.capacity = shape, cosine.shape[0]
        size = (len(blocks), shape.key_heads, self.capacity, shape.head_width)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)
        self._held: list[object] = [blocks, head, final_norm, cosine, sine]
        layers = (_Layer * len(blocks))(*(self._layer(block) for block in blocks))
        self._network = _Network(
            shape.hidden,
            shape.feed,
            shape.heads,
            shape.key_heads,
            shape.head_width,
            len(blocks),
            self.capacity,
            shape.epsilon,
            shape.attention_scale,
            quantized,
            1,
            layers,
            self._matrix(head),
            *(pointer(t) for t in (final_norm, self.keys, self.values, cosine, sine)),
        )

    def run(self, x: Tensor, position: int) -> Tensor:
        """Logits after the token at `position`; its keys and values enter the cache.

        Args:
            x: [hidden] embedding of the token.
            position: number of tokens before it.

        Returns:
            [vocabulary] float32.

        Raises:
            ValueError: the cache has no such position.
        """
        if not 0 <= position < self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens has no position {position}")
        state = x.detach().float().clone(memory_format=torch.contiguous_format)
        logits = torch.empty(self.shape.vocabulary)
        self._network.threads = torch.get_num_threads()
        self._library.qf_decode(
            ctypes.byref(self._network), ctypes.c_int64(position), pointer(state), pointer(logits)
        )
        return logits

    def _layer(self, block: Block) -> _Layer:
        matrices = (self._matrix(matrix) for matrix in block.matrices)
        return _Layer(*matrices, pointer(block.attention_norm), pointer(block.feed_norm))

    def _matrix(self, matrix: Matrix) -> _Matrix:
        bias, weight = pointer(matrix.bias), matrix.weight
        if isinstance(weight, Tensor):
            numbers = (ctypes.c_int64 * 5)(*weight.shape, 1, 16, 0)
            self._held.append(numbers)
            half = weight.dtype == torch.bfloat16
            address = ctypes.cast(numbers, ctypes.c_void_p)
            return _Matrix(None, None, None, address, pointer(weight), bias, half)
        if weight.backend != CPU.name:
            raise ValueError(f"a weight is prepared for {weight.backend!r}, not for {CPU.name!r}")
        packed = Weight(weight.codes, weight.scale, weight.zero, weight.geometry)
        codes, scales, zeros, numbers = packed.arguments
        self._held.append(numbers)
        address = ctypes.cast(numbers, ctypes.c_void_p)
        return _Matrix(codes, scales, zeros, address, None, bias, 0)
