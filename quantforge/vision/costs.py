"""What the layers of a network cost a picture: multiplications, and where they are made."""

from __future__ import annotations

import torch
from torch import nn

from quantforge.vision.network import VisionNetwork
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
