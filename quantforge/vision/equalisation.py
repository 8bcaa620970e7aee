"""Cross-layer equalisation: ranges are moved between two layers without changing the network.

Where a layer's output goes through nothing, or through a function with f(s x) = s f(x) for s > 0,
into one other layer alone, its channel i can be divided by s_i and the other's input channel i
multiplied. With r and r' the largest magnitudes of the two channels,

    s_i = √(r_i / r'_i)

makes both √(r_i r'_i) (Nagel et al. 2019, arXiv 1906.04721), pair after pair until nothing moves.
Then no channel of an activation is lost in the range of another, nor a column of a weight in that
of its row. ReLU and leaky ReLU are such functions. ReLU6 is not, as its 6 would have to move along,
channel by channel, which the canonical graph has no constant for: pairs joined by it are left as
they are, and so networks like MobileNetV2 and EfficientNet-Lite have little to equalise.

Grids with a scale for every channel do not mind the first layer's rows, so it is no matter of
course that this helps: `equalised_if_better` quantizes both networks and takes the one whose
divergence from the float network is less on pictures that neither was calibrated on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from quantforge.vision.network import VisionNetwork, kernel_of, weight_matrix

ROUNDS = 20
SETTLED = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two layers of which the second alone reads the first.

    Attributes:
        first: name of the layer that writes.
        second: of the one that reads.
    """

    first: str
    second: str


def pairs(network: VisionNetwork) -> tuple[Pair, ...]:
    """The pairs that can be equalised exactly, in forward order."""
    aten = torch.ops.aten
    passed = {aten.relu.default, aten.leaky_relu.default, aten.clone.default}
    names = {layer.name for layer in network.layers}
    seen: dict[str, int] = {}
    for node in network.graph.graph.nodes:
        if node.op == "call_module":
            seen[str(node.target)] = seen.get(str(node.target), 0) + 1
    found = []
    for node in network.graph.graph.nodes:
        if node.op != "call_module" or str(node.target) not in names:
            continue
        behind = _only_reader(node)
        while behind is not None and behind.target in passed:
            behind = _only_reader(behind)
        if behind is None or behind.op != "call_module" or str(behind.target) not in names:
            continue
        pair = Pair(first=str(node.target), second=str(behind.target))
        if seen[pair.first] == seen[pair.second] == 1:
            found.append(pair)
    return tuple(found)


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The node that reads this one, if it is the only one."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def equalised(network: VisionNetwork) -> VisionNetwork:
    """The same function with the ranges of all pairs made equal; `network` stays as it is."""
    graph = copy.deepcopy(network.graph)
    statistics = dict(network.statistics)
    found = pairs(network)
    for _ in range(ROUNDS):
        moved = 0.0
        for pair in found:
            first, second = graph.get_submodule(pair.first), graph.get_submodule(pair.second)
            scale = _scales(first, second)
            _divide(first, second, scale)
            moved = max(moved, float((scale - 1.0).abs().max()))
            if pair.first in statistics:
                mean, deviation = statistics[pair.first]
                statistics[pair.first] = (mean / scale, deviation / scale)
        if moved < SETTLED:
            break
    return replace(network, graph=graph, statistics=statistics)


def _columns(layer: Any) -> Tensor:
    """[groups, out / groups, in / groups, places] weight of a layer."""
    matrix = weight_matrix(layer)
    groups = getattr(layer, "groups", 1)
    channels = layer.in_features if hasattr(layer, "in_features") else layer.in_channels
    return matrix.view(groups, -1, channels // groups, matrix.shape[1] // (channels // groups))


def _scales(first: Any, second: Any) -> Tensor:
    """[channels] what the first layer's outputs are divided by; 1 where a channel is all zero."""
    written = weight_matrix(first).abs().amax(1)
    read = _columns(second).abs().amax((1, 3)).flatten()
    usable = (written > 0) & (read > 0)
    return torch.where(usable, written / torch.where(usable, read, 1.0), 1.0).sqrt()


@torch.no_grad()
def _divide(first: Any, second: Any, scale: Tensor) -> None:
    """Divide the outputs of one layer, and multiply the inputs of the other, in place."""
    first.weight.copy_(kernel_of(first, weight_matrix(first) / scale.unsqueeze(1)))
    first.bias.div_(scale)
    columns = _columns(second)
    scaled = columns * scale.view(columns.shape[0], 1, -1, 1)
    second.weight.copy_(kernel_of(second, scaled.reshape(len(second.bias), -1)))


def equalised_if_better(
    network: VisionNetwork, loss: Callable[[VisionNetwork], float]
) -> tuple[VisionNetwork, float, float]:
    """The network, or the equalised one where that loses less.

    Args:
        network: the float network.
        loss: quantizes a network and gives its error on held-out pictures.

    Returns:
        What is better, and the losses without and with equalisation; the same number twice where
        there is no pair.
    """
    before = loss(network)
    if not pairs(network):
        return network, before, before
    other = equalised(network)
    after = loss(other)
    return (other if after < before else network), before, after
