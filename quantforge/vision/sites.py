"""Where activations are rounded, and which of them share a grid.

A layer's input is rounded where it is made: at the output of the function that computes it, after
the activation function, so that its range is that of what the layer reads. Moving values about
(pooling by the maximum, padding with 0, reshaping, slicing) leaves them on their grid, so the
search for the place goes back through such nodes; through a concatenation it goes back to all its
parts, which therefore share one grid.

The operands of a residual addition are rounded too, each on its own grid, where `operands` asks for
it: then an addition reads integers, as in HAWQ-V3. Without it what a layer adds to the residual is
its exact sum (BRECQ, QDrop), which costs fewer bits' worth of error and more memory traffic. What
is added and also read by a layer is rounded either way. A shared grid of the operands, as some
runtimes want, would be as wide as the wider one; two rescalings cost nothing beside a convolution.

A down-sampling convolution shares a spec with the convolution beside it, which reads the same
input, as in HAWQ-V3's published tables (its text says otherwise): `fused_group`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from quantforge.vision.network import Site, VisionNetwork
from quantforge.vision.operators import SELECTING, operator_name

aten = torch.ops.aten

PADDING = {aten.pad.default, aten.constant_pad_nd.default}
ADDITIONS = {aten.add.Tensor}
CONCATENATIONS = {aten.cat.default, aten.concat.default}


def is_layer(node: fx.Node) -> bool:
    """Whether a node calls a convolution or a linear layer."""
    return node.op == "call_module"


def is_residual(node: fx.Node) -> bool:
    """Whether a node adds two computed tensors."""
    computed = [one for one in node.args if isinstance(one, fx.Node) and one.op != "get_attr"]
    return node.target in ADDITIONS and len(computed) == 2


def _moves(node: fx.Node) -> bool:
    """Whether a node's values are those of its first argument, and maybe zeros."""
    if operator_name(node) in SELECTING:
        return True
    if node.target is operator.getitem:  # of a tuple; what computes one is no site itself
        return isinstance(node.args[0], fx.Node) and _moves(node.args[0])
    if node.target not in PADDING:
        return False
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else 0.0
    if node.target is aten.constant_pad_nd.default:
        mode, value = "constant", node.args[2] if len(node.args) > 2 else 0.0
    return mode != "constant" or value in (None, 0)


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that made the values of `node`: itself, unless it only moves them."""
    if _moves(node):
        return sources(node.args[0])  # type: ignore[arg-type]
    if node.target in CONCATENATIONS:
        parts = node.args[0]
        assert isinstance(parts, list | tuple)
        return [one for part in parts for one in sources(part)]  # type: ignore[arg-type]
    return [node]


def _read(graph: fx.Graph, *, operands: bool) -> Iterator[fx.Node]:
    """Nodes whose values have to be on a grid, by who reads them."""
    for node in graph.nodes:
        if is_layer(node):
            yield node.args[0]
        elif operands and is_residual(node):
            yield from node.args[:2]


def find_sites(graph: fx.Graph, *, operands: bool = True) -> tuple[Site, ...]:
    """All sites in forward order; constants have none.

    Args:
        graph: canonical.
        operands: round what residual additions add.
    """
    leader: dict[fx.Node, fx.Node] = {}

    def lead(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for read in _read(graph, operands=operands):
        made = [one for one in sources(read) if one.op != "get_attr"]
        for one in made:
            leader.setdefault(one, one)
        for one in made[1:]:
            leader[lead(one)] = lead(made[0])
    return tuple(
        Site(node=node.name, grid=lead(node).name) for node in graph.nodes if node in leader
    )


def layer_grids(network: VisionNetwork) -> dict[str, str]:
    """Layer name → name of the grid that its input is on; "" where it reads a constant."""
    grids = {site.node: site.grid for site in network.sites}
    nodes = {node.name: node for node in network.graph.graph.nodes}
    return {
        layer: next((grids[one.name] for one in sources(nodes[read]) if one.name in grids), "")
        for layer, read in network.reads.items()
    }


def tied_layers(graph: fx.Graph) -> dict[str, str]:
    """Layer name → name of the first layer that it is tied to."""
    tied = {str(node.target): str(node.target) for node in graph.nodes if is_layer(node)}
    for node in graph.nodes:
        if not is_residual(node) or not all(is_layer(one) for one in node.args[:2]):
            continue
        for added in node.args[:2]:
            beside = [one for one in added.args[0].users if is_layer(one) and one is not added]
            if beside:
                tied[str(added.target)] = tied[str(beside[0].target)]
    return tied
