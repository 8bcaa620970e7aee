"""From any network to the canonical graph (`network`): exported, layers lifted, BatchNorm folded.

`torch.export` writes a network as ATen operators whose weights are inputs. Convolutions and linear
layers become modules again, named after their weight; a BatchNorm behind one is folded into it:

    W' = W · γ / √(σ² + ε),    b' = β + (b − μ) · γ / √(σ² + ε)        for every output channel,

and elsewhere stays as a product and a sum. What does nothing in evaluation (dropout, copies) goes.
Other parameters become buffers of the graph. The number of pictures is asked of the tensor at hand,
so that a part of the graph needs nothing but what enters it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantforge.errors import InputError
from quantforge.vision.network import kernel_of, weight_matrix

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
_NORMS = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}
_CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input}
STATISTICS = "quantforge_statistics"  # of a folded layer: (mean, deviation) of its outputs


def traced(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """The canonical graph of a network, which computes the same in evaluation mode.

    Args:
        module: takes pictures alone and returns logits, a tensor.
        example: [2 or more, channels, height, width] pictures of the size that it will see.

    Raises:
        InputError: the network cannot be exported, or is not of this kind.
    """
    name = type(module).__name__
    batch = torch.export.Dim("batch", min=1, max=4096)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            exported = exported.run_decompositions({})
    except Exception as error:  # whatever the exporter meets in somebody's code
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{name} cannot be exported as a graph ({said})") from error
    finally:
        module.train(training)
    lifting = _Lifting(state=_state(exported))
    for node in exported.graph.nodes:
        lifting.add(node, name)
    return lifting.finish()


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
        state: of `_state`.
        root: holds layers and buffers.
        graph: what is made.
        made: node of the exported graph → of this one.
        placeholders: nodes of `made` that hold pictures.
    """

    state: dict[str, tuple[str, Tensor]]
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    placeholders: int = 0

    def add(self, node: fx.Node, name: str) -> None:
        """Take over one node.

        Raises:
            InputError: it is none that a canonical graph can have.
        """
        if node.op == "placeholder":
            if node.name not in self.state:
                self.placeholders += 1
                self.made[node] = self.graph.placeholder("pictures")
            return
        if node.op == "output":
            (outputs,) = node.args
            results = outputs if isinstance(outputs, tuple | list) else (outputs,)
            if self.placeholders != 1 or len(results) != 1 or not isinstance(results[0], fx.Node):
                raise InputError(
                    f"{name} takes {self.placeholders} tensors and returns {len(results)}: "
                    "expected pictures in and logits out"
                )
            self.graph.output(self.made[results[0]])
            return
        if node.op != "call_function":
            raise InputError(f"{name} has a {node.op} ({node.name}), which no canonical graph has")
        self.made[node] = self._call(node)

    def _call(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        if target in _NOTHING:
            return self._argument(node.args[0])
        if target in _NORMS:
            return self._norm(node)
        if target is operator.getitem and getattr(node.args[0], "target", None) in _NORMS:
            return self._argument(node.args[0])
        weight = node.args[1] if len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.name in self.state:
            if target in _CONVOLUTIONS:
                return self._convolution(node)
            if target is aten.linear.default:
                return self._layer(node, _linear)
        return self._function(node)

    def _function(self, node: fx.Node) -> fx.Node:
        """Any other call, as it is."""
        target: Any = node.target
        first = node.args[0] if node.args else None
        if target is aten.view.default and _flattens(node) and isinstance(first, fx.Node):
            return self.graph.call_function(aten.flatten.using_ints, (self._argument(first), 1))
        own: dict[fx.Node, fx.Node] = {}
        for size in node.all_input_nodes:
            if _is_batch(size) and isinstance(first, fx.Node) and _has_batch(first, size):
                counted = (self._argument(first), 0)
                own[size] = self.graph.call_function(aten.sym_size.int, counted)

        def made(one: fx.Node) -> fx.Node:
            return own[one] if one in own else self._argument(one)

        arguments = fx.node.map_arg(node.args, made)
        keywords = fx.node.map_arg(node.kwargs, made)
        return self.graph.call_function(target, arguments, keywords)

    def _argument(self, node: Any) -> fx.Node:
        """The node of this graph for one of the exported, a buffer for one of the state."""
        if node in self.made:
            return self.made[node]
        target, value = self.state[node.name]
        name = "constant_" + target.replace(".", "_")
        if not hasattr(self.root, name):
            self.root.register_buffer(name, value.clone())
        self.made[node] = self.graph.get_attr(name)
        return self.made[node]

    def _convolution(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        given = dict(zip((one.name for one in target._schema.arguments), node.args, strict=False))
        given |= node.kwargs
        stride, dilation = (_pair(given.get(k, 1)) for k in ("stride", "dilation"))
        padding: Any = given.get("padding", 0)
        groups = int(given.get("groups", 1))
        before = self._argument(given["input"])
        if isinstance(padding, str):
            kernel = self.state[given["weight"].name][1].shape[2:]
            reach = [
                d * (k - 1) if padding == "same" else 0
                for d, k in zip(dilation, kernel, strict=True)
            ]
            if any(one % 2 for one in reach):
                down, across = reach
                sides = [across // 2, across - across // 2, down // 2, down - down // 2]
                before = self.graph.call_function(
                    aten.constant_pad_nd.default, (before, sides, 0.0)
                )
                reach = [0, 0]
            padding = [one // 2 for one in reach]
        options = {
            "stride": stride,
            "padding": _pair(padding),
            "dilation": dilation,
            "groups": groups,
        }
        if target is not aten.conv_transpose2d.input:
            return self._layer(node, lambda w, bias: _conv(w, bias, options), before)
        options["output_padding"] = _pair(given.get("output_padding", 0))
        return self._layer(node, lambda w, bias: _transposed(w, bias, options), before)

    def _layer(
        self,
        node: fx.Node,
        make: Callable[[Tensor, Tensor | None], nn.Module],
        before: fx.Node | None = None,
    ) -> fx.Node:
        """A call of a new module, or of the same once more where one weight is used twice."""
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        assert isinstance(weight, fx.Node)
        target, value = self.state[weight.name]
        path = target.removesuffix(".weight").replace(".weight_", ".")
        known = dict(self.root.named_modules()).get(path)
        if not isinstance(known, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            kept = self.state[bias.name][1] if isinstance(bias, fx.Node) else None
            _put(self.root, path, make(value, kept))
        return self.graph.call_module(path, (before or self._argument(node.args[0]),))

    def _norm(self, node: fx.Node) -> fx.Node:
        """Fold a BatchNorm into the layer before it, or write it as a product and a sum."""
        given = [
            self.state[one.name][1] if isinstance(one, fx.Node) else one for one in node.args[1:5]
        ]
        epsilon = node.args[6 if node.target is not aten.batch_norm.default else 7]
        before = self._argument(node.args[0])
        mean, variance = given[2], given[3]
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
        assert isinstance(epsilon, float)
        gamma = given[0] if isinstance(given[0], Tensor) else torch.ones_like(mean)
        beta = given[1] if isinstance(given[1], Tensor) else torch.zeros_like(mean)
        gain = gamma.double() / (variance.double() + epsilon).sqrt()
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if before.op == "call_module" and _alone(source):
            layer: Any = self.root.get_submodule(str(before.target))
            fold(layer, gain, beta.double() - mean.double() * gain)
            # The deviation in training: less than |γ| where the variance is no larger than ε.
            deviation = (gain.abs() * variance.double().sqrt()).float()
            setattr(layer, STATISTICS, (beta.clone(), deviation))
            return before
        shape = (1, -1, *[1] * (source.meta["val"].dim() - 2))
        for what, values, call in (
            ("gain", gain, aten.mul.Tensor),
            ("shift", beta.double() - mean.double() * gain, aten.add.Tensor),
        ):
            name = f"constant_{node.name}_{what}"
            self.root.register_buffer(name, values.float().view(shape))
            before = self.graph.call_function(call, (before, self.graph.get_attr(name)))
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


def _is_batch(node: Any) -> bool:
    """Whether a node of the exported graph is the number of pictures."""
    if not isinstance(node, fx.Node) or node.target is not aten.sym_size.int:
        return False
    counted, dimension = node.args
    return isinstance(counted, fx.Node) and counted.op == "placeholder" and bool(dimension == 0)


def _has_batch(node: fx.Node, size: fx.Node) -> bool:
    """Whether a tensor's first dimension is the number of pictures.

    Then it is asked for its size, so that parts of the graph do not depend on the pictures.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    return str(value.shape[0]) == str(size.meta["val"])


def _flattens(view: fx.Node) -> bool:
    """Whether a view makes [pictures, numbers] of a tensor of pictures."""
    before, shape = view.args[0], view.args[1]
    if not isinstance(before, fx.Node) or not isinstance(shape, list | tuple) or len(shape) != 2:
        return False
    rows: Any = shape[0]
    return _is_batch(rows) and _has_batch(before, rows)


def _alone(layer: fx.Node) -> bool:
    """Whether a layer of the exported graph runs once, and one node reads it."""
    weight = layer.args[1] if len(layer.args) > 1 else None
    return len(layer.users) == 1 and isinstance(weight, fx.Node) and len(weight.users) == 1


def fold(layer: Any, gain: Tensor, shift: Tensor) -> None:
    """Multiply a layer's outputs by `gain` [out] and add `shift` [out], in its weight and bias."""
    with torch.no_grad():
        matrix = weight_matrix(layer).double() * gain[:, None]
        layer.weight.copy_(kernel_of(layer, matrix))
        layer.bias.copy_(layer.bias.double() * gain + shift)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, bias)


def _conv(weight: Tensor, bias: Tensor | None, options: Mapping[str, Any]) -> nn.Module:
    channels = weight.shape[1] * options["groups"]
    kernel = _pair(list(weight.shape[2:]))
    return _filled(
        nn.Conv2d(channels, weight.shape[0], kernel, device="meta", **options), weight, bias
    )


def _transposed(weight: Tensor, bias: Tensor | None, options: Mapping[str, Any]) -> nn.Module:
    channels = weight.shape[1] * options["groups"]
    made = nn.ConvTranspose2d(
        weight.shape[0], channels, _pair(list(weight.shape[2:])), device="meta", **options
    )
    return _filled(made, weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with these values; a bias of 0 where there is none."""
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    zero = torch.zeros(out, dtype=weight.dtype)
    layer.bias = nn.Parameter(zero if bias is None else bias.clone(), requires_grad=False)
    made: nn.Module = layer
    return made


def _pair(value: Any) -> tuple[int, int]:
    one = list(value) if isinstance(value, list | tuple) else [value]
    return (int(one[0]), int(one[-1]))


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Make `layer` the submodule of that path."""
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(last, layer)
