"""A block as a function of its input, and how far its output is from the float network's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantforge.types import QuantizedWeight
from quantforge.vision.network import ActivationGrid, Block, VisionNetwork, kernel_of
from quantforge.vision.streams import compute, is_batch_size, node_named, segment


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """Everything quantized of a block.

    Attributes:
        weights: layer name → integers.
        biases: layer name → [out] bias.
        grids: name of a site's node in the block → grid.
    """

    weights: Mapping[str, QuantizedWeight]
    biases: Mapping[str, Tensor]
    grids: Mapping[str, ActivationGrid]


class BlockRun:
    """A block as a function of its input, with weights, biases and roundings from outside."""

    def __init__(self, network: VisionNetwork, block: Block) -> None:
        self.network, self.block = network, block
        self.nodes = segment(network, block)
        self._source = node_named(network, block.source)

    def __call__(
        self,
        inputs: Tensor,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        rounding: Callable[[fx.Node, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The block's output.

        Args:
            inputs: at its source.
            weights: layer name → flattened weight; float ones for the others.
            biases: layer name → bias, of the same layers.
            rounding: gets every node and its output, and gives what stands for it.
        """
        known: dict[fx.Node, object] = {self._source: inputs}
        for node in self.nodes:
            if is_batch_size(node):
                known[node] = len(inputs)
                continue
            name, replaced = str(node.target), None
            if node.op == "call_module" and name in weights:
                layer = self.network.layer(name)
                replaced = (kernel_of(layer, weights[name]), biases[name])
            made = compute(self.network.graph, node, known, replaced)
            known[node] = made if rounding is None else rounding(node, made)
        result = known[self.nodes[-1]]
        assert isinstance(result, Tensor)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockData:
    """What a block is learned on; the pictures are the first dimension.

    Attributes:
        inputs: of the quantized network.
        native: of the float network.
        targets: the float network's output.
        importance: of every number of the output, with mean 1, e.g. the squared gradient of the
            loss; None for alike.
    """

    inputs: Tensor
    native: Tensor
    targets: Tensor
    importance: Tensor | None = None

    def part(self, index: Tensor | slice) -> BlockData:
        """Some of the pictures."""
        weights = None if self.importance is None else self.importance[index]
        return BlockData(
            inputs=self.inputs[index], native=self.native[index], targets=self.targets[index],
            importance=weights,
        )  # fmt: skip

    def error(self, output: Tensor) -> Tensor:
        """[] mean squared error of an output."""
        squares = (output - self.targets).square()
        return (squares if self.importance is None else squares * self.importance).mean()


@torch.no_grad()
def block_error(run: BlockRun, state: BlockState, data: BlockData, batch: int = 16) -> float:
    """Error of a quantized block relative to the mean square of its targets, all sites rounded."""
    weights = {name: one.dequantize() for name, one in state.weights.items()}
    total = scale = 0.0

    def rounding(node: fx.Node, made: Tensor) -> Tensor:
        grid = state.grids.get(node.name)
        return made if grid is None else grid.rounded(made)

    for start in range(0, len(data.inputs), batch):
        part = data.part(slice(start, start + batch))
        share = len(part.inputs) / len(data.inputs)
        total += share * float(part.error(run(part.inputs, weights, state.biases, rounding)))
        scale += share * float(part.error(torch.zeros(())))
    return total / max(scale, 1e-30)
