"""Trainable layers in the place of a network's quantized ones, for as long as it is trained.

A stand-in maps inputs to outputs as the layer does and makes its weight from integers and whatever
it trains. It is put where the layer was, so that the network's own code runs unchanged, and the
layer comes back after it, whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from quantforge.memory import release_freed
from quantforge.scratch import IN_MEMORY, Scratch
from quantforge.types import QuantizedWeight

Layer = TypeVar("Layer", bound=nn.Module)


@contextmanager
def stand_ins(
    module: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    make: Callable[[str, nn.Parameter | None], Layer],
    scratch: Scratch = IN_MEMORY,
) -> Iterator[dict[str, Layer]]:
    """Put a stand-in in the place of every quantized layer; put the layers back after.

    Meanwhile the layers' own weights, which hold no more than codes and scales do, take no memory:
    they are made again after it, or stay where they are in scratch files.

    Args:
        module: the network or block; its layers hold `weights`, and hold them again afterwards.
        weights: layer name → integers and scales.
        make: from a layer's name and its bias to what stands in for it.
        scratch: where the layers' own weights are.
    """
    originals: dict[str, Any] = {name: module.get_submodule(name) for name in weights}
    layers = {name: make(name, original.bias) for name, original in originals.items()}
    try:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
            if not scratch.on_disk:
                originals[name].weight.data = originals[name].weight.data.new_empty(0)
        release_freed()
        yield layers
    finally:
        release_freed()  # activations, before the weights come back
        for name, original in originals.items():
            if not scratch.on_disk:
                original.weight.data = weights[name].dequantize(original.weight.dtype)
            module.set_submodule(name, original)


@contextmanager
def trainable_norms(
    module: nn.Module, layers: Mapping[str, nn.Module], behind: nn.Module | None
) -> Iterator[list[nn.Parameter]]:
    """The one-dimensional parameters but those of stand-ins and of what is behind the last states.

    They are norms, and biases of kept layers.

    Inside, only they and the stand-ins' own parameters ask for gradients; the layers' biases do
    not.

    Args:
        module: the network or block.
        layers: name → stand-in.
        behind: head or pooler (`Architecture.behind`).
    """
    needs = {name: p.requires_grad for name, p in module.named_parameters()}
    biases = {id(getattr(layer, "bias", None)) for layer in layers.values()}
    own = [p for layer in layers.values() for p in layer.parameters() if id(p) not in biases]
    outside = [] if behind is None else list(behind.parameters())
    inside = {id(p) for p in (*own, *outside)} | biases
    module.requires_grad_(False)
    norms = [p for p in module.parameters() if p.ndim == 1 and id(p) not in inside]
    for parameter in (*norms, *own):
        parameter.requires_grad_(True)
    try:
        yield norms
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(needs.get(name, False))
            parameter.grad = None


@torch.no_grad()
def put_weights(module: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Write dequantized weights into their layers, in place."""
    for name, weight in weights.items():
        parameter: Any = module.get_submodule(name).weight
        parameter.copy_(weight.dequantize())
