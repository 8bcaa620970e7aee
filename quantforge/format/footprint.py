"""What a plan takes on disk and in memory, from the network's shapes alone.

The same rules by which the checkpoint is written (`quantforge.export.writer`) are applied to shapes
instead of tensors: which tensors there are, their dtypes, their order, the shards and the headers.
So the predicted bytes are those of the files, exactly, and a budget in bytes can be met before
anything is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantforge.errors import InputError
from quantforge.format import compressed
from quantforge.format.container import container_bytes
from quantforge.models import Model
from quantforge.results import SizeReport
from quantforge.types import KEPT_BITS, LayerInfo, QuantSpec

KEPT_DTYPE = torch.bfloat16
"""Dtype of the floating tensors that a checkpoint keeps."""

_Stored = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor of a checkpoint."""
_Assignment = Mapping[str, QuantSpec | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Shapes of everything that a checkpoint of one network holds.

    Attributes:
        layers: every layer that a plan may quantize, in the order in which they are written.
        tensors: the network's state as it is kept, in its order, without a tied head.
        shard_bytes: a shard is closed before it grows beyond this.
        token_bytes: keys and values of one token in 16 bits; None where the network's
            configuration does not tell.
        fixed: layers whose spec was given beforehand: in every plan, counted as no part of it.
    """

    layers: tuple[LayerInfo, ...]
    tensors: tuple[_Stored, ...]
    shard_bytes: int
    token_bytes: int | None
    fixed: _Assignment = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, *, shard_bytes: int, fixed: _Assignment | None = None) -> Footprint:
        """The footprint of a loaded network."""
        config: Any = model.module.config
        tied = (
            f"{model.architecture.head}.weight" if model.architecture.tied(model.module) else None
        )
        tensors = [
            (name, KEPT_DTYPE if t.is_floating_point() else t.dtype, tuple(t.shape))
            for name, t in model.module.state_dict().items()
            if name != tied
        ]
        return cls(
            layers=(*model.layers, *model.architecture.vocabulary(model.module)),
            tensors=tuple(tensors),
            shard_bytes=shard_bytes,
            token_bytes=_token_bytes(config),
            fixed=dict(fixed or {}),
        )

    def checkpoint_bytes(self, assignment: _Assignment) -> int:
        """Bytes of all safetensors files: every tensor and every header."""
        total, shard, size = 0, list[_Stored](), 0
        for tensor in self._stored(assignment):
            count = _data_bytes(tensor)
            if shard and size + count > self.shard_bytes:
                total += container_bytes(shard)
                shard, size = [], 0
            shard.append(tensor)
            size += count
        return total + container_bytes(shard)

    def memory_bytes(self, assignment: _Assignment, context: int) -> int:
        """Packed weights, kept ones in 16 bits, and keys and values of `context` tokens, batch 1.

        Activations, the runtime's own code and its workspace come on top.

        Raises:
            InputError: the network's configuration does not tell the size of keys and values.
        """
        if self.token_bytes is None:
            raise InputError(
                "the model's config names no layers and heads, so the memory of keys and values "
                "is not known; give a budget without vram:"
            )
        weights = sum(_data_bytes(tensor) for tensor in self._stored(assignment))
        return weights + context * self.token_bytes

    def sizes(self, assignment: _Assignment) -> SizeReport:
        """What `format.sizes.size_report` counts in the folder once it is written."""
        planned = stored_bits = 0
        code_bits = 0.0
        for layer in self.layers:
            if layer.name not in assignment or layer.name in self.fixed:
                continue
            spec = assignment[layer.name]
            planned += layer.numel
            code_bits += layer.numel * (KEPT_BITS if spec is None else spec.code_bits)
            stored_bits += 8 * _layer_bytes(layer, spec)
        kept = sum(math.prod(shape) for _, _, shape in self.tensors) - planned
        size = self.checkpoint_bytes(assignment)
        return SizeReport(
            planned_weights=planned,
            code_bits=code_bits / planned,
            stored_bits=stored_bits / planned,
            kept_weights=kept,
            checkpoint_bytes=size,
            checkpoint_bits=8 * size / (planned + kept),
            reference_bytes=self.reference_bytes,
        )

    @property
    def reference_bytes(self) -> int:
        """All weights in 16 bits, without headers."""
        return sum(math.prod(shape) for _, _, shape in self.tensors) * KEPT_BITS // 8

    def _stored(self, assignment: _Assignment) -> Iterator[_Stored]:
        """The checkpoint's tensors in the order in which they are written."""
        state = {name: (name, dtype, shape) for name, dtype, shape in self.tensors}
        specs = {**assignment, **self.fixed}
        quantized = {name for name, spec in specs.items() if spec is not None}
        for layer in self.layers:
            spec = specs.get(layer.name)
            if spec is None:
                continue
            shapes = compressed.stored_shapes(layer.out_features, layer.in_features, spec)
            for suffix, (dtype, shape) in shapes.items():
                yield f"{layer.name}.{suffix}", dtype, shape
            if f"{layer.name}.bias" in state:
                yield state[f"{layer.name}.bias"]
        for name, dtype, shape in self.tensors:
            if name.rpartition(".")[0] not in quantized:
                yield name, dtype, shape


def _layer_bytes(layer: LayerInfo, spec: QuantSpec | None) -> int:
    """Bytes of a layer's codes, scales and zero-points with the padding of their rows."""
    if spec is None:
        return layer.numel * KEPT_BITS // 8
    shapes = compressed.stored_shapes(layer.out_features, layer.in_features, spec)
    return sum(
        dtype.itemsize * math.prod(shape)
        for suffix, (dtype, shape) in shapes.items()
        if suffix != compressed.SHAPE
    )


def _data_bytes(tensor: _Stored) -> int:
    _, dtype, shape = tensor
    return dtype.itemsize * math.prod(shape)


def _token_bytes(config: Any) -> int | None:
    """Bytes of one token's keys and values over all layers, in 16 bits."""
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not (layers and heads and groups and hidden):
        return None
    size = getattr(config, "head_dim", None) or hidden // heads
    return 2 * int(layers) * int(groups) * int(size) * KEPT_BITS // 8
