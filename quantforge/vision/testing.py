"""Canonical networks with random weights, quantized by their ranges: shapes without accuracy.

Tests and benchmarks of execution need a network of a known shape and no trained one. Weights are
drawn so that activations keep their size; a network is rounded to nearest, and its activations get
the grids that cover what some pictures give.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec
from quantforge.vision.building import build
from quantforge.vision.efficientnet_lite import (
    MEMBERS,
    STAGES,
    EfficientNetLite,
    Stage,
    lite_preprocessing,
)
from quantforge.vision.network import (
    ActivationGrid,
    Preprocessing,
    QuantizedNetwork,
    Site,
    VisionNetwork,
    weight_matrix,
)
from quantforge.vision.operators import operator_name

RESNET_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
_EIGHT_BITS = QuantSpec(8)
_ACTIVATIONS = ("relu", "relu6", "hardtanh", "hardswish", "silu", "sigmoid")


class BasicBlock(nn.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        same = stride == 1 and channels == out
        self.down = None if same else nn.Conv2d(channels, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → [batch, out, ..]."""
        y = self.second(_relu(self.first(x)))
        return _relu(torch.ops.aten.add.Tensor(y, x if self.down is None else self.down(x)))


class ResNetLike(nn.Module):
    """ResNet-18 in shape: 11.7 million weights."""

    def __init__(self, stages: Collection[tuple[int, int]] = RESNET_STAGES) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        blocks, channels = [], 64
        for out, stride in stages:
            blocks += [BasicBlock(channels, out, stride), BasicBlock(out, out, 1)]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width] → [batch, 1000]."""
        x = torch.ops.aten.max_pool2d.default(_relu(self.stem(x)), [3, 3], [2, 2], [1, 1])
        logits: Tensor = self.head(_pooled(self.blocks(x)))
        return logits


def _relu(x: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.relu.default(x)
    return made


def _pooled(x: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten.flatten.using_ints(torch.ops.aten.mean.dim(x, [2, 3], True), 1)
    return made


def traced(network: nn.Module, seed: int = 0) -> fx.GraphModule:
    """The canonical graph of a network, its weights drawn anew."""
    _draw(network, seed)
    return fx.symbolic_trace(network.eval())


def _draw(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            size = (2.0 / layer.weight[0].numel()) ** 0.5
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * size
        elif not isinstance(layer, nn.BatchNorm2d):
            continue
        if layer.bias is not None:
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) * 0.1


def efficientnet(
    size: int = 32, stages: Sequence[Stage] = STAGES, *, classes: int = 10, seed: int = 0
) -> VisionNetwork:
    """EfficientNet-Lite0 as a compiler sees it, its weights drawn anew.

    Args:
        size: of a picture's sides.
        stages: of the network; fewer make it small.
        classes: logits.
        seed: of the weights.
    """
    name = "efficientnet-lite0"
    network = EfficientNetLite(MEMBERS[name], classes=classes, stages=stages).eval()
    _draw(network, seed)
    preprocessing = replace(lite_preprocessing(name), size=(size, size))
    return build(network, preprocessing, name=name, fingerprint="0" * 64)


def described(
    graph: fx.GraphModule, size: int = 32, *, leave: Collection[str] = (), name: str = "stand-in"
) -> VisionNetwork:
    """A network with a site wherever a tensor would be rounded.

    Args:
        graph: canonical.
        size: of a picture's sides.
        leave: nodes that are no sites though they would be.
        name: of the network.
    """
    layers: list[LayerInfo] = []
    reads, sites = {}, []
    for node in graph.graph.nodes:
        users = list(node.users)
        behind = users and operator_name(users[0]) in _ACTIVATIONS and len(users) == 1
        rounds = node.op in ("placeholder", "call_module") or operator_name(node) in (
            *_ACTIVATIONS, "add", "cat", "flatten",
        )  # fmt: skip
        last = any(user.op == "output" for user in users)
        if rounds and not behind and not last and node.name not in leave:
            sites.append(Site(node=node.name, grid=node.name))
        if node.op == "call_module":
            path, layer = str(node.target), graph.get_submodule(str(node.target))
            rows, columns = weight_matrix(layer).shape
            reads[path] = node.args[0].name
            layers.append(
                LayerInfo(
                    name=path, kind="linear" if isinstance(layer, nn.Linear) else "convolution",
                    out_features=rows, in_features=columns, block=0, stage=len(layers),
                    fused_group=path,
                )
            )  # fmt: skip
    return VisionNetwork(
        graph=graph, name=name, layers=tuple(layers), reads=reads, sites=tuple(sites), blocks=(),
        channels=3, fingerprint="0" * 64,
        preprocessing=Preprocessing(size=(size, size), mean=(0.5,) * 3, deviation=(0.25,) * 3),
    )  # fmt: skip


class _Ranges(fx.Interpreter):
    """Runs a graph and notes the least and largest number of every tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.found[n.name] = (float(made.min()), float(made.max()))
        return made


@torch.no_grad()
def quantized(
    network: VisionNetwork,
    pictures: Tensor,
    *,
    spec: QuantSpec = _EIGHT_BITS,
    activations: int = 8,
    keep: Collection[str] = (),
) -> QuantizedNetwork:
    """A network rounded to nearest.

    Args:
        network: float.
        pictures: [n, channels, height, width] that show how large activations get.
        spec: of every weight that its groups divide; per channel at its width elsewhere.
        activations: bits of a code.
        keep: layers that stay float.
    """
    ranges = _Ranges(network.graph)
    ranges.run(pictures)
    weights: dict[str, QuantizedWeight] = {}
    for info in network.layers:
        if info.name in keep:
            continue
        fits = spec.divides(info.in_features)
        own = spec if fits else QuantSpec(spec.bits, symmetric=spec.symmetric)
        matrix = weight_matrix(network.layer(info.name))
        scale, zero = minmax_grid(matrix, own)
        weights[info.name] = round_to_nearest(matrix, scale, own, zero)
    return QuantizedNetwork(
        network=network,
        weights=weights,
        biases={name: network.layer(name).bias.detach().clone() for name in weights},
        grids={
            site.grid: ActivationGrid.covering(*ranges.found[site.node], activations)
            for site in network.sites
        },
    )


def with_negative_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """A symmetric weight with every second row's scales negative: the nearest that such have."""
    scale = weight.scale.clone()
    scale[::2] = -scale[::2]
    groups = weight.dequantize().view(*scale.shape, -1)
    codes = (groups / scale.float().unsqueeze(-1) + weight.spec.middle).round()
    codes = codes.clamp(0, weight.spec.top).to(torch.uint8).flatten(1)
    return QuantizedWeight(codes=codes, scale=scale, zero=None, spec=weight.spec)
