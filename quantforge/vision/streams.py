"""All calibration pictures at one place of a network, moved on node by node.

A layer is quantized on what it will read behind the layers before it. So two streams of values walk
through the graph, a float one and a quantized one; each holds what is still to be read, and is
advanced to the node that is asked for. Layers and grids that are known by the time a node is
reached are used there; everything else is float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quantforge.errors import InputError
from quantforge.vision.network import ActivationGrid, Block, VisionNetwork, kernel_of

# Of a layer: its weight in the layer's own shape, and its bias.
Parameters = tuple[Tensor, Tensor]
# Functions that mind how a tensor lies in memory → the same for any: here channels lie last.
_STRIDED: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


def compute(
    graph: fx.GraphModule,
    node: fx.Node,
    known: Mapping[fx.Node, Any],
    replaced: Parameters | None = None,
) -> Any:
    """What a node of the canonical graph makes of the values of other nodes.

    Args:
        graph: holds the layers.
        node: a call of a layer or a function, or a constant.
        known: values of its arguments.
        replaced: weight and bias in place of the layer's own.

    Raises:
        ValueError: the node is of another kind.
    """
    arguments = fx.node.map_arg(node.args, known.__getitem__)
    keywords = fx.node.map_arg(node.kwargs, known.__getitem__)
    if node.op == "call_function" and callable(node.target):
        function = _STRIDED.get(node.target, node.target)
        return function(*arguments, **keywords)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(graph)
    if node.op != "call_module":
        raise ValueError(f"a canonical graph has no node like {node.format_node()}")
    layer = graph.get_submodule(str(node.target))
    if replaced is None:
        return layer(*arguments, **keywords)
    own = {"weight": replaced[0], "bias": replaced[1]}
    return torch.func.functional_call(layer, own, arguments, keywords)


def node_named(network: VisionNetwork, name: str) -> fx.Node:
    """The node of that name.

    Raises:
        InputError: there is none.
    """
    node: fx.Node
    for node in network.graph.graph.nodes:
        if node.name == name:
            return node
    raise InputError(f"the graph of {network.name} has no node {name!r}")


def is_batch_size(node: fx.Node) -> bool:
    """Whether a node gives the number of pictures, as a number."""
    return node.target is torch.ops.aten.sym_size.int and bool(node.args[1] == 0)


def segment(network: VisionNetwork, block: Block) -> list[fx.Node]:
    """The nodes of a block behind its source, in order, the result last.

    Raises:
        InputError: the block reads anything but its source.
    """
    source, result = node_named(network, block.source), node_named(network, block.result)
    inside, waiting = set[fx.Node](), [result]
    while waiting:
        node = waiting.pop()
        if node is source or node in inside:
            continue
        if node.op == "placeholder":
            raise InputError(f"block {block.name} reads {node.name}, not only {block.source}")
        inside.add(node)
        if not is_batch_size(node):  # of the pictures, whoever is asked
            waiting.extend(node.all_input_nodes)
    return [node for node in network.graph.graph.nodes if node in inside]


def site_grids(
    network: VisionNetwork, grids: Mapping[str, ActivationGrid]
) -> dict[str, ActivationGrid]:
    """Name of a node → the grid that its output is rounded to."""
    return {site.node: grids[site.grid] for site in network.sites if site.grid in grids}


class Stream:
    """Values of all pictures, batch by batch, where the network has been computed so far.

    Attributes:
        weights: layer name → its flattened float32 weight where it is not the float network's.
        biases: layer name → its bias, likewise.
    """

    def __init__(
        self,
        network: VisionNetwork,
        batches: Iterable[Tensor],
        grids: Mapping[str, ActivationGrid] | None = None,
        parameters: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Start at the pictures.

        Args:
            network: whose graph is walked.
            batches: of pictures [batch, channels, height, width].
            grids: `Site.grid` → grid, for the sites that are rounded.
            parameters: layer name → flattened weight and bias to begin with.
        """
        self._network = network
        self._grids: dict[str, ActivationGrid] = {}
        self.weights = {name: weight for name, (weight, _) in (parameters or {}).items()}
        self.biases = {name: bias for name, (_, bias) in (parameters or {}).items()}
        nodes = list(network.graph.graph.nodes)
        self._left = {node: len(node.users) for node in nodes}
        self._values: dict[fx.Node, list[Any]] = {}
        batches = list(batches)
        self._count = len(batches)
        self._named = {node.name: node for node in nodes}
        self._order = {node: index for index, node in enumerate(nodes)}
        self.set_grids(grids or {})
        for node in nodes:
            if node.op == "placeholder":
                laid = (one.contiguous(memory_format=torch.channels_last) for one in batches)
                self._values[node] = [self._rounded(node, one) for one in laid]

    def set_grids(self, grids: Mapping[str, ActivationGrid]) -> None:
        """Take the grids of sites that are still to be reached."""
        self._grids = site_grids(self._network, grids)

    def _rounded(self, node: fx.Node, value: Any) -> Any:
        grid = self._grids.get(node.name)
        return value if grid is None else grid.rounded(value)

    @torch.no_grad()
    def value(self, name: str) -> list[Any]:
        """What the node of that name outputs, a value a batch; computed now if need be.

        Args:
            name: of a node whose readers have not all been computed.

        Raises:
            InputError: there is no such node.
            ValueError: its values are gone.
        """
        node = self._named.get(name)
        if node is None:
            raise InputError(f"the graph of {self._network.name} has no node {name!r}")
        for one in sorted(self._missing(node), key=self._order.__getitem__):
            self._advance(one, kept=node)
        return self._values[node]

    def _missing(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that have to be computed for this one."""
        found, waiting = set[fx.Node](), [node]
        while waiting:
            one = waiting.pop()
            if one in self._values or one in found:
                continue
            if one.op == "placeholder" or (self._left[one] == 0 and one.users):
                raise ValueError(f"the values of {one.name} have been used up")
            found.add(one)
            waiting.extend(one.all_input_nodes)
        return found

    def _advance(self, node: fx.Node, kept: fx.Node) -> None:
        replaced = None
        if node.op == "call_module" and (name := str(node.target)) in self.weights:
            layer = self._network.layer(name)
            replaced = (kernel_of(layer, self.weights[name]), self.biases.get(name, layer.bias))
        inputs = node.all_input_nodes
        made = []
        for batch in range(self._count):
            known = {one: self._values[one][batch] for one in inputs}
            value = compute(self._network.graph, node, known, replaced)
            made.append(self._rounded(node, value))
        self._values[node] = made
        for one in inputs:
            self._left[one] -= 1
            if self._left[one] == 0 and one is not kept:
                del self._values[one]


def in_batches(pictures: Tensor, size: int) -> list[Tensor]:
    """Pictures in runs of at most `size`."""
    return list(torch.split(pictures, size))


def evaluate(
    network: VisionNetwork,
    pictures: Tensor,
    weights: Mapping[str, Tensor],
    on_node: Callable[[fx.Node, Any], Any],
    biases: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The logits, with gradients to weights and biases given from outside.

    Args:
        network: the float network.
        pictures: [batch, channels, height, width].
        weights: layer name → flattened weight in place of the layer's own.
        on_node: gets every node and its value, and gives what stands for it.
        biases: layer name → bias in place of the layer's own, where its weight is replaced.
    """
    known: dict[fx.Node, Any] = {}
    for node in network.graph.graph.nodes:
        if node.op == "output":
            made: Tensor = known[node.all_input_nodes[0]]
            return made
        if node.op == "placeholder":
            known[node] = on_node(node, pictures)
            continue
        replaced, name = None, str(node.target)
        if node.op == "call_module" and name in weights:
            layer = network.layer(name)
            replaced = (kernel_of(layer, weights[name]), (biases or {}).get(name, layer.bias))
        known[node] = on_node(node, compute(network.graph, node, known, replaced))
    raise ValueError("a canonical graph has an output")
