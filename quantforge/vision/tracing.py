"""From any network to the canonical graph (`network`): exported, layers lifted, BatchNorm folded.

`torch.export` writes a network as ATen operators whose weights are inputs. Convolutions and linear
layers become modules again, named after their weight; a weight that is used twice is one module
where stride, padding, bias and the rest are equal too, and else two. A BatchNorm behind a layer is
folded into it:

    W' = W · γ / √(σ² + ε),    b' = β + (b − μ) · γ / √(σ² + ε)        for every output channel,

and elsewhere stays as a product and a sum. What does nothing in evaluation (dropout, copies) goes,
and so does a softmax or log_softmax at the end: predictions are the same without, and losses want
logits. What depends on parameters alone (weight normalisation) is computed once. Other parameters
become buffers of the graph. The number of pictures is asked of the tensor at hand, so that a part
of the graph needs nothing but what enters it.

What is made is checked: it can be saved, and it computes what the network does on random pictures.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantforge.errors import InputError, UsageError
from quantforge.vision.exported import (
    alone,
    arguments_of,
    flattens,
    has_batch,
    is_batch,
    module_of,
    sizes_of,
)
from quantforge.vision.folding import Norm
from quantforge.vision.graph_file import MODULE, check_saved
from quantforge.vision.traced_layers import (
    CONVOLUTIONS,
    convolution,
    convolution_options,
    linear,
    place,
)

aten = torch.ops.aten

# Hand on their first argument unchanged.
_NOTHING = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
}
_NORMS = {
    aten._native_batch_norm_legit_no_training.default,
    aten._native_batch_norm_legit.no_stats,
    aten.batch_norm.default,
    aten.instance_norm.default,
}
_SOFTMAXES = {
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
TOLERANCE = 1e-3  # of the largest logit: folding and another order of sums make less than 1e-4


def traced(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """The canonical graph of a network, which computes the same in evaluation mode.

    Args:
        module: takes pictures alone and returns logits, or their softmax or log_softmax, a tensor.
        example: [2 or more, channels, height, width] pictures of the size that it will see.

    Raises:
        InputError: the network cannot be exported, or is not of this kind.
    """
    name = type(module).__name__
    batch = torch.export.Dim("batch", min=1, max=4096)
    with _evaluating(module), torch.no_grad():
        try:
            exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            exported = exported.run_decompositions({})
        except Exception as error:  # whatever the exporter meets in somebody's code
            said = " ".join(str(error).split())[:300]
            raise InputError(f"{name} cannot be exported as a graph ({said})") from error
        lifting = _Lifting(name=name, state=_state(exported))
        for node in exported.graph.nodes:
            lifting.add(node)
        graph = lifting.finish()
        try:
            check_saved(graph, example.shape[1], (example.shape[2], example.shape[3]))
        except (UsageError, ValueError) as error:
            raise InputError(f"{name} cannot be saved: {error}") from error
        _check_same(name, module, lambda x: lifting.ending(graph(x)), example.shape)
    return graph


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every part of a network in evaluation mode, for a while."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes.items():
            one.training = mode


def _check_same(
    name: str, module: nn.Module, made: Callable[[Tensor], Tensor], shape: torch.Size
) -> None:
    """Compare on random pictures.

    Raises:
        InputError: the results differ by more than the order of sums can make.
    """
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    leaves = torch.utils._pytree.tree_leaves(module(pictures))
    (expected,) = (one for one in leaves if isinstance(one, Tensor))
    found = made(pictures)
    equal = (found == expected) | (found.isnan() & expected.isnan())
    largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    difference = float((found - expected).abs().masked_fill(equal, 0.0).max())
    if not difference <= TOLERANCE * largest:
        relative = difference / largest if largest else difference
        raise InputError(
            f"{name} as a graph computes something else: on random pictures its logits differ by "
            f"up to {relative:.2g} of the largest; a part of it cannot be traced"
        )


def _state(exported: Any) -> dict[str, tuple[str, Tensor]]:
    """Placeholder → (its name in the network, its values)."""
    found: dict[str, tuple[str, Tensor]] = {}
    tensors: Mapping[str, Any] = {**exported.constants, **exported.state_dict}
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None:
            value = tensors[spec.target].detach()
            found[spec.arg.name] = (
                spec.target,
                value.float() if value.is_floating_point() else value,
            )
    return found


@dataclass(slots=True)
class _Lifting:
    """A canonical graph in the making.

    Attributes:
        name: of the network, for people.
        state: of `_state`, and of what was computed from nothing else.
        root: holds layers and buffers.
        graph: what is made.
        made: node of the exported graph → of this one.
        placeholders: nodes of `made` that hold pictures.
        ending: what the network does with the logits.
    """

    name: str
    state: dict[str, tuple[str, Any]]
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    placeholders: int = 0
    ending: Callable[[Tensor], Tensor] = torch.clone

    def add(self, node: fx.Node) -> None:
        """Take over one node.

        Raises:
            InputError: it is none that a canonical graph can have.
        """
        if node.op == "placeholder":
            if node.name not in self.state:
                self.placeholders += 1
                self.made[node] = self.graph.placeholder("pictures")
        elif node.op == "output":
            self._output(node)
        elif node.op != "call_function":
            raise InputError(f"{self.name} has a {node.op} ({node.name}); no canonical graph has")
        elif self._is_constant(node):
            arguments, keywords = fx.node.map_arg(
                (node.args, node.kwargs), lambda one: self.state[one.name][1]
            )
            function: Any = node.target
            self.state[node.name] = (node.name, _single(function(*arguments, **keywords)))
        else:
            self.made[node] = self._call(node)
            if self.made[node].op == "call_function":
                self.made[node].meta.setdefault(MODULE, module_of(node))

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters alone."""
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        return not drawn and all(one.name in self.state for one in node.all_input_nodes)

    def _output(self, node: fx.Node) -> None:
        (outputs,) = node.args
        results = outputs if isinstance(outputs, tuple | list) else (outputs,)
        if self.placeholders != 1 or len(results) != 1 or not isinstance(results[0], fx.Node):
            raise InputError(
                f"{self.name} takes {self.placeholders} tensors and returns {len(results)}: "
                "expected pictures in and logits out"
            )
        last: Any = results[0]
        shape = last.meta["val"].shape
        if len(shape) != 2 or isinstance(shape[0], int) or not int(shape[1]) >= 2:
            given = ", ".join("n" if not isinstance(one, int) else str(one) for one in shape)
            raise InputError(
                f"{self.name} gives [{given}] for n pictures; a classifier gives logits "
                "[n, classes] of 2 or more classes"
            )
        while last.target in _NOTHING:
            last = last.args[0]
        if last.target in _SOFTMAXES and last.args[1] in (1, -1):
            softmax, options = last.target, last.args[1:]
            self.ending = lambda logits: softmax(logits, *options)
            last = last.args[0]
        self.graph.output(self._argument(last))

    def _call(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        if target in _NOTHING:
            return self._source(node)
        if target in _NORMS and self._holds(
            node, ("weight", "bias", "running_mean", "running_var")
        ):
            return self._norm(node)
        if target is operator.getitem and getattr(node.args[0], "target", None) in _NORMS:
            return self._source(node)
        if target in CONVOLUTIONS and self._holds(node, ("weight", "bias")):
            return self._convolution(node)
        if target is aten.linear.default and self._holds(node, ("weight", "bias")):
            weight, bias = self._values(node, ("weight", "bias"))
            return self._layer(node, linear(weight, bias), self._source(node))
        return self._function(node)

    def _holds(self, node: fx.Node, names: tuple[str, ...]) -> bool:
        """Whether arguments of a call are parameters, or None."""
        given = arguments_of(node)
        return all(given.get(one) is None or given[one].name in self.state for one in names)

    def _values(self, node: fx.Node, names: tuple[str, ...]) -> list[Any]:
        """The values of those arguments."""
        given = (arguments_of(node).get(one) for one in names)
        return [None if one is None else self.state[one.name][1] for one in given]

    def _function(self, node: fx.Node) -> fx.Node:
        """Any other call, as it is."""
        target: Any = node.target
        first = node.args[0] if node.args else None
        if target is aten.view.default and flattens(node) and isinstance(first, fx.Node):
            return self.graph.call_function(aten.flatten.using_ints, (self._argument(first), 1))
        if target in _VIEWS:  # a copy before it may be gone
            target = aten.reshape.default
            if sizes := sizes_of(node):
                return self.graph.call_function(target, (self._source(node), sizes))
        own: dict[fx.Node, fx.Node] = {}
        for size in node.all_input_nodes:
            if is_batch(size) and isinstance(first, fx.Node) and has_batch(first, size):
                counted = (self._argument(first), 0)
                own[size] = self.graph.call_function(aten.sym_size.int, counted)

        def made(one: fx.Node) -> Any:
            return own[one] if one in own else self._argument(one)

        arguments = fx.node.map_arg(node.args, made)
        keywords = fx.node.map_arg(node.kwargs, made)
        return self.graph.call_function(target, arguments, keywords)

    def _source(self, node: fx.Node) -> fx.Node:
        """The node of this graph for the first argument."""
        made: fx.Node = self._argument(node.args[0])
        return made

    def _argument(self, node: Any) -> Any:
        """The node of this graph for one of the exported, a buffer for one of the state."""
        if node in self.made:
            return self.made[node]
        target, value = self.state[node.name]
        if not isinstance(value, Tensor):
            return value
        self.made[node] = self._constant(target, value)
        return self.made[node]

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        """A buffer."""
        name = "constant_" + re.sub(r"\W", "_", name)
        while hasattr(self.root, name):
            name += "_"
        self.root.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
        return self.graph.get_attr(name)

    def _convolution(self, node: fx.Node) -> fx.Node:
        weight, bias = self._values(node, ("weight", "bias"))
        options, sides = convolution_options(node, tuple(weight.shape[2:]))
        before = self._source(node)
        if sides is not None:
            before = self.graph.call_function(aten.constant_pad_nd.default, (before, sides, 0.0))
        transposed = node.target is aten.conv_transpose2d.input
        return self._layer(node, convolution(weight, bias, options, transposed=transposed), before)

    def _layer(self, node: fx.Node, layer: nn.Module, before: fx.Node) -> fx.Node:
        """A call of a new module, or of an equal one once more where one weight is used twice."""
        weight = arguments_of(node)["weight"]
        path = self.state[weight.name][0].removesuffix(".weight").replace(".weight_", ".")
        if weight.op != "placeholder":
            path = module_of(node) or path
        return self.graph.call_module(place(self.root, path, layer), (before,))

    def _norm(self, node: fx.Node) -> fx.Node:
        """Fold a BatchNorm into the layer before it, or write it as a product and a sum.

        Raises:
            InputError: it takes its statistics from the pictures at hand.
        """
        given, source = arguments_of(node), node.args[0]
        assert isinstance(source, fx.Node)
        before = self._source(node)
        value = source.meta["val"]
        gamma, beta, mean, variance = self._values(
            node, ("weight", "bias", "running_mean", "running_var")
        )
        if node.target is aten.instance_norm.default and given["use_input_stats"]:
            ends = (
                int(value.shape[1]),
                *(
                    None if given[one] is None else self._argument(given[one])
                    for one in ("weight", "bias")
                ),
            )
            return self.graph.call_function(aten.group_norm.default, (before, *ends, given["eps"]))
        if mean is None or variance is None or given.get("training", False):
            raise InputError(
                f"{self.name} has a BatchNorm without running statistics in "
                f"{module_of(node)!r}: what it gives for a picture depends on the others"
            )
        norm = Norm.of(gamma, beta, mean, variance, given["eps"])
        if before.op == "call_module" and alone(source):
            calls = [one for one in self.graph.nodes if one.target == before.target]
            layer: Any = self.root.get_submodule(str(before.target))
            # A linear layer's outputs lie on its last dimension, a norm's channels on the second.
            if len(calls) == 1 and (value.dim() == 2 or not isinstance(layer, nn.Linear)):
                norm.fold_into(layer)
                return before
        shape = (1, -1, *[1] * (value.dim() - 2))
        for what, values, call in (
            ("gain", norm.gain, aten.mul.Tensor),
            ("shift", norm.shift, aten.add.Tensor),
        ):
            held = self._constant(f"{node.name}_{what}", values.float().view(shape))
            before = self.graph.call_function(call, (before, held))
        return before

    def finish(self) -> fx.GraphModule:
        """The graph without what nothing reads."""
        module = fx.GraphModule(self.root, self.graph).eval()
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module


def _single(value: Any) -> Any:
    """A result in float32 where it is a tensor of floats."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floats else value
