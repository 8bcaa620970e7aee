"""A `VisionNetwork` from a network in memory."""

from __future__ import annotations

import torch
from torch import nn

from quantforge.errors import InputError
from quantforge.types import LayerInfo
from quantforge.vision.blocks import find_blocks
from quantforge.vision.folding import STATISTICS
from quantforge.vision.network import Preprocessing, VisionNetwork, weight_matrix
from quantforge.vision.sites import find_sites, is_layer, tied_layers
from quantforge.vision.tracing import traced


def build(
    module: nn.Module,
    preprocessing: Preprocessing,
    *,
    name: str,
    fingerprint: str,
    channels: int = 3,
    operands: bool = True,
) -> VisionNetwork:
    """Trace a classifier and describe it.

    Args:
        module: takes pictures alone and returns logits; a softmax or log_softmax at its end is
            left out, which changes no prediction.
        preprocessing: of its pictures; gives their size.
        name: for people.
        fingerprint: of what it was made from.
        channels: of its pictures.
        operands: round what residual additions add, see `sites`.

    Raises:
        InputError: it cannot be traced or saved, gives no logits, or has no layers.
    """
    example = torch.zeros(2, channels, *preprocessing.size)
    graph = traced(module, example)
    if not any(is_layer(node) for node in graph.graph.nodes):
        raise InputError(f"{name} has no convolution and no linear layer: nothing to quantize")
    blocks = find_blocks(graph.graph)
    block_of = {layer: index for index, one in enumerate(blocks) for layer in one.layers}
    tied = tied_layers(graph.graph)
    layers: list[LayerInfo] = []
    reads, statistics = {}, {}
    for node in graph.graph.nodes:
        path = str(node.target)
        if not is_layer(node) or path in reads:
            continue
        layer = graph.get_submodule(path)
        out, columns = weight_matrix(layer).shape
        layers.append(
            LayerInfo(
                name=path,
                kind="linear" if isinstance(layer, nn.Linear) else "convolution",
                out_features=out,
                in_features=columns,
                block=block_of[path],
                stage=len(layers),
                fused_group=tied[path],
            )
        )
        reads[path] = node.args[0].name
        if hasattr(layer, STATISTICS):
            statistics[path] = getattr(layer, STATISTICS)
    return VisionNetwork(
        graph=graph, name=name, layers=tuple(layers), reads=reads,
        sites=find_sites(graph.graph, operands=operands), blocks=blocks, channels=channels,
        preprocessing=preprocessing, fingerprint=fingerprint, statistics=statistics,
    )  # fmt: skip
