"""A convolutional network as data: one graph in one canonical form, float and quantized.

Whatever a network came from, it is held as a `torch.fx.GraphModule` with one placeholder, the
pictures [batch, channels, height, width], and one output, the logits [batch, classes], in which

- every convolution and linear layer is a `call_module` of a `torch.nn.Conv2d`, `ConvTranspose2d` or
  `Linear`, zero-padded, with a bias and with BatchNorm already folded in;
- everything else is a `call_function` of an ATen operator (`torch.ops.aten.*`) or of
  `operator.getitem`, whose arguments are other nodes, numbers, booleans, None and lists of these.

So nothing of the original code is needed to run, save or export it, and a saved graph is a list of
operator names that can be checked against those allowed.

A tensor of the graph that is rounded to few bits is a `Site`: the output of one node, after the
activation function that follows a layer, so that what is observed is what the next layer reads.
Sites whose tensors meet in an addition or a concatenation of integers share one grid.

A quantized weight is the matrix [out, in / groups · height · width] that a kernel is when
flattened (a transposed convolution's is moved to [out, ..] first); groups of a scale run over
neighbouring places and then channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quantforge.types import LayerInfo, QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationGrid:
    """The grid of an activation: `(code − zero) · scale` with codes 0 .. 2^bits − 1.

    0 is always one of its values, because convolutions pad with it.

    Attributes:
        bits: width of a code, 2..8.
        scale: step of the grid, positive, a float32 number.
        zero: the code that means 0.
    """

    bits: int
    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activation bits must be in 2..8, got {self.bits}")
        if not self.scale > 0.0 or not 0 <= self.zero <= self.top:
            raise ValueError(f"not a grid: scale {self.scale}, zero {self.zero}")

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def codes(self, x: Tensor) -> Tensor:
        """The uint8 codes of `x`, rounded half to even, clamped."""
        return (x / self.scale).round_().add_(self.zero).clamp_(0, self.top).to(torch.uint8)

    def value(self, codes: Tensor) -> Tensor:
        """The float32 values of codes."""
        return (codes.to(torch.int16) - self.zero).float() * self.scale

    def rounded(self, x: Tensor) -> Tensor:
        """`x` on the grid, in float32: the definition that every backend computes."""
        return self.value(self.codes(x))

    @classmethod
    def covering(cls, low: float, high: float, bits: int) -> ActivationGrid:
        """The grid over [low, high] stretched to hold 0, whose zero is a code."""
        low, high = min(low, 0.0), max(high, 0.0)
        top = (1 << bits) - 1
        scale = float(torch.tensor(max((high - low) / top, 1e-12), dtype=torch.float32))
        return cls(bits=bits, scale=scale, zero=min(max(round(-low / scale), 0), top))


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A tensor that may be rounded.

    Attributes:
        node: name of the graph's node whose output it is.
        grid: sites with the same name here share one `ActivationGrid`.
    """

    node: str
    grid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of the graph with one tensor in and one out: what is reconstructed as a whole.

    Attributes:
        name: for people, e.g. "blocks.3".
        source: node whose output enters.
        result: node whose output leaves.
        layers: names of the layers inside, in forward order.
    """

    name: str
    source: str
    result: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """From a picture to the network's input, as its own configuration says.

    Attributes:
        size: height and width of the input.
        mean: per channel, of pixels in 0..1.
        deviation: per channel, likewise.
        crop: share of the short side that the centre crop keeps.
        interpolation: of the resize: "bicubic", "bilinear" or another of Pillow's filters.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    crop: float = 0.875
    interpolation: str = "bicubic"


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionNetwork:
    """A float network, folded and described.

    Attributes:
        graph: the canonical graph, in evaluation mode, float32.
        name: for people.
        layers: every convolution and linear layer in forward order; `LayerInfo.name` is the
            module's path in `graph`, `in_features` the length of a flattened kernel, `block` the
            index into `blocks`, `fused_group` joins layers that must share a spec.
        reads: layer name → name of the node whose output the layer reads.
        sites: all of them, in forward order.
        blocks: in forward order; together they hold every layer once.
        channels: of the input.
        preprocessing: how pictures become input.
        fingerprint: SHA-256 of what it was made from.
        statistics: layer name → (mean, deviation), both [out], that the layer's output had in
            training, where a BatchNorm was folded into it: that BatchNorm's shift and
            |γ| · √(σ² / (σ² + ε)). Calibration pictures are made from them.
    """

    graph: fx.GraphModule
    name: str
    layers: tuple[LayerInfo, ...]
    reads: Mapping[str, str]
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    channels: int
    preprocessing: Preprocessing
    fingerprint: str
    statistics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def layer(self, name: str) -> Any:
        """The `Conv2d`, `ConvTranspose2d` or `Linear` of that name."""
        return self.graph.get_submodule(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedNetwork:
    """A network with integers for weights and grids for activations.

    Attributes:
        network: the float one; its graph and the weights of layers that are kept.
        weights: layer name → integers; a layer that is not in it stays float.
        biases: layer name → [out] float32 bias, corrected; of every layer in `weights`.
        grids: `Site.grid` → grid; sites whose grid is not in it stay float.
    """

    network: VisionNetwork
    weights: Mapping[str, QuantizedWeight]
    biases: Mapping[str, Tensor]
    grids: Mapping[str, ActivationGrid]


def weight_matrix(layer: Any) -> Tensor:
    """[out, in / groups · height · width] float weight of a layer of the canonical graph."""
    weight: Tensor = layer.weight.detach()
    if isinstance(layer, torch.nn.ConvTranspose2d):
        # [in, out / groups, h, w] → [out, in / groups, h, w], the channels of each group apart
        apart = weight.view(layer.groups, -1, *weight.shape[1:])
        weight = apart.transpose(1, 2).reshape(layer.out_channels, -1, *layer.kernel_size)
    return weight.flatten(1)


def kernel_of(layer: Any, matrix: Tensor) -> Tensor:
    """Inverse of `weight_matrix`: a matrix in the shape of the layer's own weight."""
    if not isinstance(layer, torch.nn.ConvTranspose2d):
        return matrix.view(layer.weight.shape)
    channels = layer.in_channels // layer.groups
    apart = matrix.view(layer.groups, -1, channels, *layer.kernel_size)
    return apart.transpose(1, 2).reshape(layer.weight.shape)


class Simulation(fx.Interpreter):
    """The definition of a quantized network: float arithmetic on dequantized numbers.

    Weights are `code × scale` in float32, every site's tensor is replaced by its rounded one, and
    everything else is as in the float graph. What executes packed equals it but for the order of
    sums.
    """

    def __init__(self, quantized: QuantizedNetwork) -> None:
        super().__init__(quantized.network.graph)
        self._sites = {
            site.node: quantized.grids[site.grid]
            for site in quantized.network.sites
            if site.grid in quantized.grids
        }
        self._weights = {
            name: kernel_of(quantized.network.layer(name), weight.dequantize())
            for name, weight in quantized.weights.items()
        }
        self._biases = quantized.biases

    def run_node(self, n: fx.Node) -> Any:
        """One node, its output rounded where it is a site."""
        if n.op == "call_module" and n.target in self._weights:
            name = str(n.target)
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            own = {"weight": self._weights[name], "bias": self._biases[name]}
            made: Any = torch.func.functional_call(self.fetch_attr(name), own, inputs)
        else:
            made = super().run_node(n)
        grid = self._sites.get(n.name)
        return made if grid is None else grid.rounded(made)
