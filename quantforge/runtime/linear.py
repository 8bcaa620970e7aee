"""Modules that keep their weight packed: buffers and one operator call.

A weight is loaded in the order of the file. `prepare` hands it to the backend that will run it, and
where that has an order of its own the buffers hold it from then on, in place of the words.
"""

from __future__ import annotations

import torch
from quantforge_kernels import (
    Geometry,
    PreparedWeight,
    packed_words,
    prepare,
    qembedding,
    qembedding_prepared,
    qlinear,
    qlinear_prepared,
)
from torch import Tensor, nn

from quantforge.format import compressed
from quantforge.types import QuantizedWeight, QuantSpec


class PackedWeight(nn.Module):
    """Buffers of one packed [out, in] matrix, named as in the checkpoint.

    The zero-points are held unpacked, [out, groups] uint8: they are few, and kernels read them so.

    Args:
        out_features: rows.
        in_features: columns.
        spec: width and grouping.
        device: of the buffers, which hold nothing until loaded.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        spec: QuantSpec,
        *,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.spec = spec
        words, groups = packed_words(in_features, spec.bits), spec.groups(in_features)
        packed = torch.empty(out_features, words, dtype=torch.int32, device=device)
        scale = torch.empty(out_features, groups, dtype=torch.bfloat16, device=device)
        zero = None
        if not spec.symmetric:
            zero = torch.empty(out_features, groups, dtype=torch.uint8, device=device)
        self.register_buffer(compressed.PACKED, packed)
        self.register_buffer(compressed.SCALE, scale)
        self.register_buffer(compressed.ZERO_POINT, zero)
        self.order = ""  # name of the backend whose order the buffers are in; empty: the file's

    @property
    def geometry(self) -> Geometry:
        """Shape and grouping, as the kernels take them."""
        return Geometry(
            out_features=self.out_features,
            in_features=self.in_features,
            bits=self.spec.bits,
            group_size=self.spec.group_size,
        )

    @property
    def prepared(self) -> PreparedWeight | None:
        """The weight in its backend's order; None while it is in the file's."""
        if not self.order:
            return None
        return PreparedWeight(
            backend=self.order,
            geometry=self.geometry,
            codes=self.weight_packed,
            scale=self.weight_scale,
            zero=self.weight_zero_point,
        )

    def prepare(self, dtype: torch.dtype, *, backend: str = "auto", mode: str = "exact") -> None:
        """Put the filled buffers into the order of the backend that will run them, once.

        Args:
            dtype: of the inputs to come.
            backend: name of a kernel backend, or "auto".
            mode: how inputs enter the product, "exact" or "a8".

        Raises:
            BackendError: the backend is unknown or cannot run this.
        """
        if self.order:
            return
        zero = self.weight_zero_point
        made = prepare(
            self.weight_packed, self.weight_scale, zero, self.geometry, dtype,
            backend=backend, mode=mode,
        )  # fmt: skip
        if made is not None:
            self.fill(made.codes, made.scale, made.zero)
            self.order = made.backend

    def fill(self, packed: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Take over loaded buffers: words, 16-bit scales, [out, groups] zero-points."""
        self.weight_packed, self.weight_scale, self.weight_zero_point = packed, scale, zero

    def share(self, other: PackedWeight) -> None:
        """Use the buffers of `other`, e.g. of the embedding a head is tied to."""
        self.fill(other.weight_packed, other.weight_scale, other.weight_zero_point)
        self.order = other.order

    def extra_repr(self) -> str:
        """The shape and the spec, for printing."""
        return f"{self.in_features}, {self.out_features}, {self.spec}"


class QuantLinear(PackedWeight):
    """A linear layer with a packed weight; a head is one too.

    The weight `(code - zero) * scale` is formed in the dtype of the input, as stock tools form it.

    Args:
        out_features: rows.
        in_features: columns.
        spec: width and grouping.
        bias: whether there is one.
        device: of the buffers, which hold nothing until loaded.
        backend: name of a kernel backend, or "auto".
        mode: how inputs enter the product: "exact" as they are, "a8" rounded to int8 by group.
    """

    bias: Tensor | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        device: torch.device | str = "meta",
        backend: str = "auto",
        mode: str = "exact",
    ) -> None:
        super().__init__(out_features, in_features, spec, device=device)
        self.backend, self.mode = backend, mode
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, *, backend: str = "auto"
    ) -> QuantLinear:
        """A layer that computes with `weight`, on its device."""
        out_features, in_features = weight.codes.shape
        layer = cls(out_features, in_features, weight.spec, bias=bias is not None, backend=backend)
        packed = compressed.to_tensors(weight)[compressed.PACKED]
        layer.fill(packed, weight.scale, weight.zero)
        if bias is not None:
            layer.bias = bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        prepared = self.prepared
        if prepared is not None:
            return qlinear_prepared(x, prepared, self.bias, mode=self.mode)
        return qlinear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.spec.bits,
            self.spec.group_size,
            self.bias,
            backend=self.backend,
        )


class QuantEmbedding(PackedWeight):
    """A lookup table with packed rows; only the rows looked up are decoded.

    Args:
        out_features: rows, the vocabulary.
        in_features: columns.
        spec: width and grouping.
        dtype: of the result.
        device: of the buffers, which hold nothing until loaded.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        spec: QuantSpec,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(out_features, in_features, spec, device=device)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[...] token ids → [..., in]."""
        prepared = self.prepared
        if prepared is not None:
            return qembedding_prepared(ids, prepared, self.dtype)
        return qembedding(
            ids,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.spec.bits,
            self.spec.group_size,
            self.in_features,
            self.dtype,
        )
