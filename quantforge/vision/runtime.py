"""Executes a quantized network packed: integers between layers, numbers where something needs them.

Every node of the canonical graph becomes a step once, when the module is made. A tensor whose site
has a grid is uint8 codes; a layer that reads codes multiplies integers and writes codes of its own
site, or of the site of the activation function behind it, whose clamp is then part of the layer's
rounding. Zeros that are put around the images of a layer are part of its padding. Additions, max
pooling, padding, concatenation and what only moves values work on codes too. Everything else
(global pooling, softmax, SiLU, ..) reads numbers and is rounded where it is a site.
A layer whose input has no grid runs with its weight alone packed.

It equals `network.Simulation` but for the last bit of a float32 rescaling, which decides ties: a
code may differ by one there. With `dyadic`, layers and additions that read and write codes are
rescaled by integers alone (HAWQ-V3): b / 2^c in place of a scale, b of 31 bits, and a bias that is
a whole number of products of scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from quantforge_kernels.code_maps import CodeGrid, add_codes, from_codes, largest_codes, to_codes
from quantforge_kernels.integer_outputs import Output
from torch import Tensor, fx, nn
from torch.nn import functional

from quantforge.vision.network import ActivationGrid, QuantizedNetwork
from quantforge.vision.operators import (
    MOVING,
    added,
    clamp_of,
    margins,
    operator_name,
    pooled,
    zeros_added,
)
from quantforge.vision.packed_layers import (
    NO_MARGINS,
    CodedLayer,
    Margins,
    WeightOnlyLayer,
    codes_output,
    dyadic_output,
    float_output,
)

NO_LIMITS = (float("-inf"), float("inf"))


@dataclass(slots=True)
class Coded:
    """A tensor as codes.

    Attributes:
        codes: uint8.
        grid: what they mean.
    """

    codes: Tensor
    grid: ActivationGrid

    def numbers(self) -> Tensor:
        """In float32."""
        return from_codes(self.codes, code_grid(self.grid))


@dataclass(frozen=True, slots=True)
class Step:
    """One node: what it computes, and which results nobody reads after it."""

    name: str
    run: Callable[[dict[str, Any]], Any]
    done: tuple[str, ...]


def code_grid(grid: ActivationGrid) -> CodeGrid:
    """A grid as the kernels take it."""
    return CodeGrid(scale=grid.scale, zero=grid.zero, top=grid.top)


def rounded(value: Any, grid: ActivationGrid | None) -> Any:
    """A result as its site wants it."""
    if grid is None or (isinstance(value, Coded) and value.grid == grid):
        return value
    return Coded(to_codes(_numbers(value), code_grid(grid)), grid)


def _numbers(value: Any) -> Any:
    return value.numbers() if isinstance(value, Coded) else value


class VisionRuntime(nn.Module):
    """A quantized network, ready to run.

    Args:
        quantized: what runs; nothing of it that is large is kept.
        dyadic: rescale by integers alone between codes.
        native_code: whether layers use the C++ where it can be built.

    Raises:
        UsageError: a layer that cannot be run so.
    """

    def __init__(
        self, quantized: QuantizedNetwork, *, dyadic: bool = False, native_code: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        planner = _Planner(quantized, dyadic, native_code, self.layers)
        self.steps, self.result = planner.steps()
        self.source = planner.source

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales and biases that it keeps in memory."""
        total = 0
        for layer in self.layers.values():
            if isinstance(layer, CodedLayer | WeightOnlyLayer):
                total += layer.stored_bytes
            else:
                total += sum(one.numel() * one.element_size() for one in layer.parameters())
        return total

    def results(self, pictures: Tensor) -> dict[str, Any]:
        """Every node's result by name: a tensor or `Coded`; names of fused nodes are missing."""
        values: dict[str, Any] = {self.source: pictures}
        for step in self.steps:
            values[step.name] = step.run(values)
        return values

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """[batch, channels, height, width] float32 → [batch, classes] logits."""
        values: dict[str, Any] = {self.source: pictures}
        for step in self.steps:
            values[step.name] = step.run(values)
            for name in step.done:
                del values[name]
        logits: Tensor = _numbers(values[self.result])
        return logits


class _Planner:
    """Makes the steps of a network."""

    def __init__(
        self, quantized: QuantizedNetwork, dyadic: bool, native_code: bool, layers: nn.ModuleDict
    ) -> None:
        self.quantized, self.dyadic, self.native_code = quantized, dyadic, native_code
        self.layers = layers
        self.graph = quantized.network.graph
        self.source = ""
        self.grids: Mapping[str, ActivationGrid] = {
            site.node: quantized.grids[site.grid]
            for site in quantized.network.sites
            if site.grid in quantized.grids
        }
        self.coded: dict[fx.Node, ActivationGrid] = {}  # nodes whose result is codes
        self.same: dict[fx.Node, fx.Node] = {}  # activation function → what computes it
        self.around: dict[fx.Node, Margins] = {}  # paddings that the layers behind them do

    def steps(self) -> tuple[tuple[Step, ...], str]:
        """All steps, and the name of the last result."""
        nodes = list(self.graph.graph.nodes)
        made: list[tuple[str, Callable[[dict[str, Any]], Any], list[str]]] = []
        result = ""
        for node in nodes:
            if node.op == "output":
                result = self._name(node.args[0])
                continue
            if node in self.same or self._left_to_layers(node):
                continue
            reads = [self._name(one) for one in node.all_input_nodes]
            if node.op == "placeholder":
                self.source = node.name
                reads = [node.name]
            made.append((node.name, self._step(node), reads))
        last: dict[str, int] = {}
        for index, (_, _, reads) in enumerate(made):
            last.update(dict.fromkeys(reads, index))
        # A result is dropped after its last reader; the input's own step replaces it.
        steps = tuple(
            Step(name, run, tuple(
                one for one, at in last.items() if at == index and one not in (name, result)
            ))
            for index, (name, run, _) in enumerate(made)
        )  # fmt: skip
        return steps, result

    def _name(self, node: Any) -> str:
        return str(self.same.get(node, node).name)

    def _step(self, node: fx.Node) -> Callable[[dict[str, Any]], Any]:
        if node.op == "call_module":
            return self._layer(node)
        grid = self.grids.get(node.name)
        if node.op == "placeholder":
            name = node.name
            self._mark(node, grid)
            return lambda values: rounded(values[name], grid)
        return self._addition(node) or self._on_codes(node, grid) or self._on_numbers(node, grid)

    def _mark(self, node: fx.Node, grid: ActivationGrid | None) -> None:
        if grid is not None:
            self.coded[node] = grid

    def _behind(self, node: fx.Node) -> tuple[fx.Node, tuple[float, float]]:
        """The node whose result a layer or an addition may compute, and its clamp."""
        if node.name not in self.grids and len(node.users) == 1:
            user = next(iter(node.users))
            limits = clamp_of(user) if user.op == "call_function" else None
            if limits is not None and limits[0] <= limits[1]:
                return user, limits
        return node, NO_LIMITS

    def _fuse(self, node: fx.Node, behind: fx.Node) -> ActivationGrid | None:
        """Let `node` compute `behind`; its grid."""
        grid = self.grids.get(behind.name)
        if behind is not node:
            self.same[behind] = node
            self._mark(behind, grid)
        self._mark(node, grid)
        return grid

    def _input(self, node: Any) -> ActivationGrid | None:
        return self.coded.get(node)

    def _takes_codes(self, node: fx.Node) -> bool:
        """Whether a layer multiplies integers if it is given codes."""
        name = str(node.target)
        transposed = isinstance(self.quantized.network.layer(name), nn.ConvTranspose2d)
        return name in self.quantized.weights and not transposed

    def _left_to_layers(self, node: fx.Node) -> bool:
        """Whether all that reads a padding with zeros are layers, which then do it themselves."""
        around = margins(node)
        grid = self._input(node.args[0]) if around else None
        if around is None or grid is None or self.grids.get(node.name, grid) != grid:
            return False
        for user in node.users:
            convolves = user.op == "call_module" and self._takes_codes(user)
            if not convolves or isinstance(
                self.quantized.network.layer(str(user.target)), nn.Linear
            ):
                return False
        before: Any = node.args[0]
        self.around[node], self.same[node] = around, self.same.get(before, before)
        self._mark(node, grid)
        return True

    def _layer(self, node: fx.Node) -> Callable[[dict[str, Any]], Any]:
        name, source = str(node.target), self._name(node.args[0])
        layer: Any = self.quantized.network.layer(name)
        before: Any = node.args[0]
        weight, grid = self.quantized.weights.get(name), self._input(before)
        key = f"{len(self.layers)}_{name.replace('.', '_')}"
        if weight is None or grid is None or not self._takes_codes(node):
            run: nn.Module = layer
            if weight is not None:
                run = WeightOnlyLayer(layer, weight, self.quantized.biases[name])
            self.layers[key] = run
            own = self.grids.get(node.name)
            self._mark(node, own)
            return lambda values: rounded(run(_numbers(values[source])), own)
        behind, limits = self._behind(node)
        target = self._fuse(node, behind)
        bias = self.quantized.biases[name].float()
        output: Output = float_output(*limits)
        if target is not None:
            codes = codes_output(target, *limits)
            output = dyadic_output(name, weight, bias, grid, codes) if self.dyadic else codes
        coded = CodedLayer(
            layer, weight, bias, grid, output, margins=self.around.get(before, NO_MARGINS),
            native_code=self.native_code,
        )  # fmt: skip
        self.layers[key] = coded
        if target is None:
            return lambda values: coded(values[source].codes)
        return lambda values: Coded(coded(values[source].codes), target)

    def _addition(self, node: fx.Node) -> Callable[[dict[str, Any]], Any] | None:
        pair = added(node)
        if pair is None:
            return None
        first, second = (self._input(one) for one in pair)
        behind, limits = self._behind(node)
        if first is None or second is None or behind.name not in self.grids:
            return None
        target = self.grids[behind.name]
        self._fuse(node, behind)
        codes = codes_output(target, *limits)
        grids = tuple(code_grid(one) for one in (first, second, target))
        names = [self._name(one) for one in pair]

        def run(values: dict[str, Any]) -> Any:
            a, b = (values[name] for name in names)
            if a.codes.shape != b.codes.shape:
                return rounded((a.numbers() + b.numbers()).clamp(*limits), target)
            made = add_codes(
                a.codes, grids[0], b.codes, grids[1], grids[2], least=codes.least, most=codes.most,
                dyadic=self.dyadic, native_code=self.native_code,
            )  # fmt: skip
            return Coded(made, target)

        return run

    def _on_codes(
        self, node: fx.Node, grid: ActivationGrid | None
    ) -> Callable[[dict[str, Any]], Any] | None:
        """What moves codes or compares them; None where the result would be of another grid."""
        sources = node.all_input_nodes
        own = self._input(sources[0]) if sources else None
        if own is None or any(self._input(one) != own for one in sources):
            return None
        if grid not in (None, own):
            return None
        name, source = operator_name(node), self._name(sources[0])
        if name in MOVING or name == "cat" or (name == "dropout" and not node.args[2]):
            call = self._call(node, lambda value: value.codes)
            self._mark(node, own)
            return lambda values: Coded(call(values), own)
        change = self._of_codes(node, own.zero)
        if change is None:
            return None
        self._mark(node, own)
        return lambda values: Coded(change(values[source].codes), own)

    def _of_codes(self, node: fx.Node, zero: int) -> Callable[[Tensor], Tensor] | None:
        """What is of codes as of numbers, if 0 is the code `zero`."""
        if (places := pooled(node)) is not None:
            return partial(largest_codes, places=places, native_code=self.native_code)
        if (sides := zeros_added(node)) is not None:
            return lambda codes: functional.pad(codes, sides, value=zero)
        if clamp_of(node) == (0.0, float("inf")):
            return lambda codes: codes.clamp(min=zero)
        return None

    def _on_numbers(
        self, node: fx.Node, grid: ActivationGrid | None
    ) -> Callable[[dict[str, Any]], Any]:
        call = self._call(node, _numbers)
        self._mark(node, grid)
        return lambda values: rounded(call(values), grid)

    def _call(self, node: fx.Node, read: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
        """The node's own function of what `read` makes of its inputs."""
        target: Any = node.target
        if node.op == "get_attr":
            held = self.graph
            for part in str(target).split("."):
                held = getattr(held, part)
            return lambda values: held

        def run(values: dict[str, Any]) -> Any:
            def fetch(one: fx.Node) -> Any:
                return read(values[self._name(one)])

            return target(*fx.map_arg(node.args, fetch), **fx.map_arg(node.kwargs, fetch))

        return run
