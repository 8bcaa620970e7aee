"""How long layers take: measured here, one by one, with the kernels that run them.

A layer's time on codes depends on its shape and on the width of its weights, not on what the codes
are nor on how many bits of an activation's byte are used; so layers of one shape are measured once,
on made-up codes, in turns over all candidates, and the least of several turns is taken: other
processes only ever add to a time. Additions and functions between layers are not in it. Times are
of this machine and of as many threads as torch is set to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec
from quantforge.vision.network import ActivationGrid, VisionNetwork
from quantforge.vision.packed_layers import CodedLayer, WeightOnlyLayer, codes_output
from quantforge.vision.streams import Stream

ROUNDS = 7
LEAST = 2e-4  # seconds of one timing: a short call is repeated until it takes so long
_GRID = ActivationGrid(bits=8, scale=0.0625, zero=128)
_ANY = (float("-inf"), float("inf"))


def layer_seconds(
    network: VisionNetwork, specs: Sequence[QuantSpec], *, batch: int = 1, rounds: int = ROUNDS
) -> Tensor:
    """[layers, specs, 2] float64 seconds of a layer on codes and on numbers; 0 where none fits.

    Args:
        network: the float network.
        specs: of the weights.
        batch: pictures at a time.
        rounds: turns over all candidates of a shape.
    """
    pictures = torch.zeros(batch, network.channels, *network.preprocessing.size)
    stream, known = Stream(network, [pictures]), dict[Any, Tensor]()
    rows = {layer.name: torch.zeros(len(specs), 2).double() for layer in network.layers}
    infos = {layer.name: layer for layer in network.layers}
    for node in network.graph.graph.nodes:
        if node.op != "call_module":
            continue
        read, name = stream.value(node.args[0].name)[0], str(node.target)
        stream.value(node.name)
        key = (*_shape(network.layer(name)), tuple(read.shape))
        if key not in known:
            known[key] = _timed(network.layer(name), infos[name], read, specs, rounds)
        rows[name] += known[key]  # a layer that is called twice takes both times
    return torch.stack(list(rows.values()))


def _shape(layer: Any) -> tuple[Any, ...]:
    """Equal for layers that take the same time on the same input."""
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    return (type(layer), tuple(layer.weight.shape), *(getattr(layer, one, None) for one in names))


def _timed(
    layer: Any, info: LayerInfo, read: Tensor, specs: Sequence[QuantSpec], rounds: int
) -> Tensor:
    """[specs, 2] seconds of one layer."""
    found = torch.zeros(len(specs), 2, dtype=torch.float64)
    codes = torch.full(read.shape, 128, dtype=torch.uint8)
    calls: list[tuple[int, int, Callable[[], Any]]] = []
    for row, spec in enumerate(specs):
        if not spec.divides(info.in_features):
            continue
        weight = _made_up(info, spec)
        numbers = WeightOnlyLayer(layer, weight, layer.bias)
        calls.append((row, 1, partial(numbers, read)))
        if isinstance(layer, nn.ConvTranspose2d):  # which has no kernel on codes
            calls.append((row, 0, partial(numbers, read)))
            continue
        coded = CodedLayer(layer, weight, layer.bias, _GRID, codes_output(_GRID, *_ANY))
        calls.append((row, 0, partial(coded, codes)))
    repeats = [_repeats(call) for *_, call in calls]
    for index in range(rounds):
        for (row, column, call), count in zip(calls, repeats, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                call()
            spent = (time.perf_counter() - began) / count
            least = spent if index == 0 else min(spent, float(found[row, column]))
            found[row, column] = least
    return found


def _repeats(call: Callable[[], Any]) -> int:
    """Calls in a row that are long enough to be timed; the first ones warm up."""
    call()
    began = time.perf_counter()
    call()
    return max(1, round(LEAST / max(time.perf_counter() - began, 1e-7)))


def _made_up(info: LayerInfo, spec: QuantSpec) -> QuantizedWeight:
    """Integers of a layer's shape."""
    groups = spec.groups(info.in_features)
    scale = torch.ones(info.out_features, groups, dtype=torch.bfloat16)
    codes = torch.zeros(info.out_features, info.in_features, dtype=torch.uint8)
    zero = None if spec.symmetric else torch.zeros(info.out_features, groups, dtype=torch.uint8)
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, spec=spec)
