"""What layers cost: multiplications of a picture, bit operations, bytes; and budgets in these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantforge.errors import UsageError
from quantforge.search.allocate import planned_weights, stored_cost
from quantforge.search.budget import Budget
from quantforge.types import LayerInfo, QuantSpec
from quantforge.vision.network import VisionNetwork
from quantforge.vision.search import FLOAT_BITS, Limits, operations
from quantforge.vision.streams import Stream


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


WHOLE = QuantSpec(8)  # what "bops:-50%" is less than, with 8-bit activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What plans of one network are counted by.

    Attributes:
        layers: in forward order; fixed ones are not counted in budgets of bits.
        fixed: name of a fixed layer → its spec.
        macs: layer name → multiplications of one picture.
        reads: layer name → its input's grid.
    """

    layers: tuple[LayerInfo, ...]
    fixed: Mapping[str, QuantSpec]
    macs: Mapping[str, int]
    reads: Mapping[str, str]

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

    @property
    def beside_bits(self) -> int:
        """Bits that a file holds beside the planned weights: biases, and layers of a fixed spec."""
        fixed = sum(stored_cost(one, self.fixed[one.name]) for one in self.layers if one.fixed)
        return fixed + sum(FLOAT_BITS * one.out_features for one in self.layers)

    def limits(self, budget: Budget) -> Limits:
        """A budget's limits in stored bits and in bit operations.

        Raises:
            UsageError: a part is not about convolutional networks.
        """
        weights = planned_weights(self.layers)
        bits = float(budget.total_bits(weights)) if budget.bits < 16 else math.inf
        for limit in budget.sizes:
            if limit.kind == "vram":
                raise UsageError(f"{budget.text}: a convolutional network keeps no keys and values")
            share = limit.amount * self.float_bytes if limit.kind == "share" else limit.amount
            bits = min(bits, float(share * 8) - self.beside_bits)
        if budget.latency:
            raise UsageError(
                f"{budget.text}: latency is of language models; give bops:-50% or a size"
            )
        most = [
            float(x.amount * (self.whole_operations if x.kind == "operations-share" else 1))
            for x in budget.operations
        ]
        return Limits(bits=bits, operations=min(most, default=math.inf))
