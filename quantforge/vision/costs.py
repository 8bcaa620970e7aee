"""What layers cost: multiplications of a picture, bit operations, bytes; and budgets in these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from quantforge_kernels.layout import packed_words
from torch import nn

from quantforge.errors import UsageError
from quantforge.search.allocate import planned_weights
from quantforge.search.budget import Budget
from quantforge.types import LayerInfo, QuantSpec
from quantforge.vision.network import VisionNetwork
from quantforge.vision.search import Limits, operations
from quantforge.vision.streams import Stream

SCALE_BITS, ZERO_BITS = 16, 8
STORED = ("codes", "scale", "bias")  # of a layer
# Of safetensors' header: a tensor's type, shape and place, and what is always there.
ENTRY_BYTES, HEADER_BYTES = 88, 64


def multiplications(network: VisionNetwork) -> dict[str, int]:
    """Layer name → multiplications of one picture; of a layer that runs twice, both times."""
    picture = torch.zeros(1, network.channels, *network.preprocessing.size)
    stream = Stream(network, [picture])
    found = dict.fromkeys((layer.name for layer in network.layers), 0)
    for node in network.graph.graph.nodes:
        if node.op != "call_module":
            continue
        read = stream.value(node.args[0].name)[0]
        made = stream.value(node.name)[0]
        layer = network.layer(str(node.target))
        if isinstance(layer, nn.ConvTranspose2d):
            places = read.shape[-2] * read.shape[-1]
            found[str(node.target)] += places * layer.weight.numel()
        else:
            found[str(node.target)] += made.numel() * layer.weight[0].numel()
    return found


def file_cost(layer: LayerInfo, spec: QuantSpec) -> int:
    """Bits of a layer's integers and scales in a file, where every row of codes fills words."""
    rows, groups = layer.out_features, spec.groups(layer.in_features)
    total = rows * (32 * packed_words(layer.in_features, spec.bits) + groups * SCALE_BITS)
    if spec.symmetric:
        return total
    return total + rows * groups * ZERO_BITS + 8 * (ENTRY_BYTES + len(f"{layer.name}.zero"))


def beside_bytes(network: VisionNetwork) -> int:
    """Bytes at most that a file has beside integers and scales: biases, constants, its header."""
    names = [f"{one.name}.{kind}" for one in network.layers for kind in STORED]
    total = 4 * sum(layer.out_features for layer in network.layers)
    for node in network.graph.graph.nodes:
        if node.op == "get_attr":
            held: Any = network.graph
            for part in str(node.target).split("."):
                held = getattr(held, part)
            names.append(str(node.target))
            total += held.nbytes
    return total + HEADER_BYTES + sum(ENTRY_BYTES + len(name) for name in names)


WHOLE = QuantSpec(8)  # what "bops:-50%" is less than, with 8-bit activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What plans of one network are counted by.

    Attributes:
        layers: in forward order; fixed ones are not counted in budgets of bits.
        macs: layer name → multiplications of one picture.
        reads: layer name → its input's grid.
        beside: bytes that a file has beside integers and scales.
    """

    layers: tuple[LayerInfo, ...]
    macs: Mapping[str, int]
    reads: Mapping[str, str]
    beside: int

    @property
    def whole_operations(self) -> int:
        """Bit operations of a picture with 8-bit weights and activations."""
        every = dict.fromkeys((layer.name for layer in self.layers), WHOLE)
        widths = dict.fromkeys(self.reads.values(), WHOLE.bits)
        return operations(self.layers, self.macs, self.reads, every, widths)

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weights and biases."""
        return sum(4 * (one.numel + one.out_features) for one in self.layers)

    def limits(self, budget: Budget) -> Limits:
        """A budget's limits in stored bits, in bytes of the file and in bit operations.

        Raises:
            UsageError: a part is not about convolutional networks.
        """
        weights = planned_weights(self.layers)
        bits = float(budget.total_bits(weights)) if budget.bits < 16 else math.inf
        file = math.inf
        for limit in budget.sizes:
            if limit.kind == "vram":
                raise UsageError(f"{budget.text}: a convolutional network keeps no keys and values")
            share = limit.amount * self.float_bytes if limit.kind == "share" else limit.amount
            file = min(file, float(share * 8) - 8 * self.beside)
        if budget.latency:
            raise UsageError(
                f"{budget.text}: latency is of language models; give bops:-50% or a size"
            )
        most = [
            float(x.amount * (self.whole_operations if x.kind == "operations-share" else 1))
            for x in budget.operations
        ]
        return Limits(bits=bits, file=file, operations=min(most, default=math.inf))
