"""A canonical graph as JSON, and back: a file can name nothing but the operators allowed.

A node has a name, what it is, its target and its arguments. An argument is a number, a boolean,
null, a short text, a list, `{"node": name}`, `{"dtype": name}` or `{"float": "inf"}`. Operators are
those of `ALLOWED`: they compute, and neither read, write, draw numbers nor make tensors out of
nothing. A graph that was read is run once on tensors without storage, which shows arguments that do
not fit and sizes out of bounds before anything is allocated.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantforge.errors import UsageError

MOST_NODES = 20_000
MOST_NUMBERS = 1 << 28  # of a tensor, at one picture
_LARGEST = 1 << 31
_TO_THE_END = (1 << 63) - 1  # of a slice
_LONGEST_TEXT = 32
_MOST_CHANNELS = 1 << 24
_LARGEST_KERNEL_NUMBER = 1 << 16
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_PATH = re.compile(r"[A-Za-z0-9_-]{1,200}(\.[A-Za-z0-9_-]{1,200}){0,31}")
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
_GETITEM = "getitem"
MODULE = "quantforge_module"  # in a node's meta: path of the module that it was traced from

# Names of overloads of torch.ops.aten.
ALLOWED = frozenset(
    f"{name}.{overload}"
    for names, overloads in (
        (
            "relu relu_ relu6 relu6_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid "
            "hardsigmoid_ sigmoid silu silu_ gelu elu leaky_relu leaky_relu_ tanh mish softplus "
            "clamp clamp_ clamp_min clamp_max flatten alias clone contiguous detach expand permute "
            "reshape squeeze t unsqueeze view _unsafe_view dropout avg_pool2d max_pool2d "
            "max_pool2d_with_indices adaptive_avg_pool2d _adaptive_avg_pool2d mean sum amax neg "
            "abs exp sqrt rsqrt cat stack constant_pad_nd pad layer_norm native_layer_norm "
            "group_norm matmul bmm mm addmm baddbmm linear scaled_dot_product_attention "
            "upsample_nearest2d upsample_bilinear2d chunk unbind pixel_shuffle roll "
            "linalg_vector_norm _softmax prelu "
            "channel_shuffle native_group_norm feature_dropout minimum maximum adaptive_max_pool2d "
            "adaptive_avg_pool1d avg_pool1d",
            "default",
        ),
        ("add sub mul div add_ sub_ mul_ div_ slice split", "Tensor"),
        ("add sub mul div rsub", "Scalar"),
        ("pow", "Tensor_Scalar"),
        ("flatten", "using_ints"),
        ("transpose select softmax unbind sym_size", "int"),
        ("max min", "dim"),
        ("squeeze mean sum", "dim dims dim_IntList"),
        ("split split_with_sizes", "sizes default"),
        ("upsample_nearest2d upsample_bilinear2d", "vec"),
        ("_to_copy to", "default dtype"),
    )
    for name in names.split()
    for overload in overloads.split()
)  # fmt: skip


def node_to_json(node: fx.Node) -> dict[str, Any]:
    """One node.

    Raises:
        UsageError: it is none of a canonical graph, or its operator is not allowed.
    """
    target = str(node.target)
    if node.op == "call_function":
        if node.target is operator.getitem:
            target = _GETITEM
        else:
            target = target.removeprefix("aten.")
            if target not in ALLOWED:
                called = getattr(node.target, "__name__", "") if "<" in target else node.target
                where = f" in {node.meta[MODULE]!r}" if node.meta.get(MODULE) else ""
                raise UsageError(
                    f"{node.name}{where} calls {called}, which is not saved; rewrite it"
                )
    elif node.op not in ("placeholder", "call_module", "get_attr", "output"):
        raise UsageError(f"{node.name} is a {node.op}, which a canonical graph does not have")
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_argument_to_json(node, one) for one in node.args],
        "kwargs": {name: _argument_to_json(node, one) for name, one in node.kwargs.items()},
    }


def _argument_to_json(node: fx.Node, value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_argument_to_json(node, one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, dtype in _DTYPES.items():
        if value is dtype:
            return {"dtype": name}
    raise UsageError(f"{node.name} has the argument {value!r}, which cannot be saved")


def graph_from_json(rows: Any, root: nn.Module) -> fx.GraphModule:
    """The graph of a list of nodes.

    Args:
        rows: as `node_to_json` made them.
        root: holds the layers, by path, and the constants.

    Raises:
        ValueError: it is no such list; the message says where.
    """
    if not isinstance(rows, list) or not 2 <= len(rows) <= MOST_NODES:
        raise ValueError(f"a graph has 2 to {MOST_NODES} nodes")
    graph, known = fx.Graph(), dict[str, fx.Node]()
    for index, row in enumerate(rows):
        fields = {"name", "op", "target", "args", "kwargs"}
        if not isinstance(row, dict) or set(row) != fields:
            raise ValueError(f"node {index} does not have the fields {sorted(fields)}")
        _add_node(graph, known, row, root, index == len(rows) - 1)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise ValueError("a graph has one input")
    graph.lint()
    return fx.GraphModule(root, graph)


def _add_node(
    graph: fx.Graph, known: dict[str, fx.Node], row: Mapping[str, Any], root: nn.Module, last: bool
) -> None:
    name, kind, target = row["name"], row["op"], row["target"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in known:
        raise ValueError(f"{name!r} is no name of a node, or a second one of that name")
    if not isinstance(row["args"], list) or not isinstance(row["kwargs"], dict):
        raise ValueError(f"{name} has no list of arguments")  # noqa: TRY004 (a file, not a call)
    if (kind == "output") != last:
        raise ValueError("a graph ends with its output, and only there")
    words = row["kwargs"]
    if any(not _NAME.fullmatch(word) for word in words):
        raise ValueError(f"{name} has an argument without a proper name")
    arguments = tuple(_argument_from_json(name, one, known, 0) for one in row["args"])
    named = {word: _argument_from_json(name, one, known, 0) for word, one in words.items()}
    resolved = _target(name, kind, target, arguments, root)
    node = graph.create_node(kind, resolved, arguments, named, name=name)
    if node.name != name:
        raise ValueError(f"{name!r} cannot be the name of a node")
    known[name] = node


def _target(name: str, kind: Any, target: Any, arguments: tuple[Any, ...], root: nn.Module) -> Any:
    if not isinstance(target, str):
        raise ValueError(f"{name} has no target")  # noqa: TRY004 (a file, not a call)
    if kind == "call_function":
        if target == _GETITEM:
            return operator.getitem
        if target not in ALLOWED:
            raise ValueError(f"{name} calls {target!r}, which is none of the operators allowed")
        short, _, overload = target.partition(".")
        found = getattr(getattr(torch.ops.aten, short, None), overload, None)
        if found is None:
            raise ValueError(f"{name} calls {target!r}, which this torch does not have")
        return found
    if kind in ("call_module", "get_attr"):
        held = dict(root.named_modules()) if kind == "call_module" else dict(root.named_buffers())
        if not _PATH.fullmatch(target) or target not in held:
            raise ValueError(f"{name} names {target!r}, which the file does not hold")
        if kind == "call_module" and (
            not isinstance(held[target], nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
            or len(arguments) != 1
            or not isinstance(arguments[0], fx.Node)
        ):
            raise ValueError(f"{name} is no call of a layer on one tensor")
        return target
    if kind == "placeholder" and not arguments:
        return name
    if kind == "output" and len(arguments) == 1 and isinstance(arguments[0], fx.Node):
        return "output"
    raise ValueError(f"{name} is a {kind!r} that a graph does not have")


def _argument_from_json(  # noqa: PLR0911 (a case a line)
    name: str, value: Any, known: Mapping[str, fx.Node], depth: int
) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and (abs(value) <= _LARGEST or value == _TO_THE_END):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and len(value) <= _LONGEST_TEXT and value.isascii():
        return value
    if isinstance(value, list) and len(value) <= MOST_NODES and depth < 3:
        return [_argument_from_json(name, one, known, depth + 1) for one in value]
    if isinstance(value, dict) and len(value) == 1:
        kind, text = next(iter(value.items()))
        if kind == "node" and isinstance(text, str) and text in known:
            return known[text]
        if kind == "dtype" and isinstance(text, str) and text in _DTYPES:
            return _DTYPES[text]
        if kind == "float" and text in ("inf", "-inf"):
            return float(text)
    raise ValueError(f"{name} has the argument {str(value)[:80]!r}, which is none")


def layer_to_json(layer: Any) -> dict[str, Any]:
    """What a layer is, without its numbers."""
    if isinstance(layer, nn.Linear):
        return {"kind": "Linear", "in": layer.in_features, "out": layer.out_features}
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UsageError(f"a layer pads with {layer.padding_mode} {layer.padding}; use numbers")
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return {
        "kind": "ConvTranspose2d" if transposed else "Conv2d",
        "in": layer.in_channels,
        "out": layer.out_channels,
        "groups": layer.groups,
        **{
            name: [int(one) for one in getattr(layer, name)]
            for name in ("kernel_size", "stride", "padding", "dilation")
        },
        **({"output_padding": [int(one) for one in layer.output_padding]} if transposed else {}),
    }


def layer_from_json(path: str, row: Any) -> nn.Module:
    """A layer with a bias and without storage.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(row, dict) or row.get("kind") not in ("Linear", "Conv2d", "ConvTranspose2d"):
        raise ValueError(f"{path} is no layer")
    kind = row["kind"]
    fields = {"kind", "in", "out"}
    pairs = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    if kind != "Linear":
        fields |= {"groups", *pairs}
    if kind == "ConvTranspose2d":
        pairs["output_padding"] = 0
        fields.add("output_padding")
    if set(row) != fields:
        raise ValueError(f"{path} does not have the fields {sorted(fields)}")
    for name in fields & {"in", "out", "groups"}:
        _count(path, name, row[name], 1, _MOST_CHANNELS)
    if kind == "Linear":
        return nn.Linear(row["in"], row["out"], device="meta")
    for name, least in pairs.items():
        if name in fields and (not isinstance(row[name], list) or len(row[name]) != 2):
            raise ValueError(f"{path} has {name} {row[name]!r}, which is no pair")
        for one in row[name]:
            _count(path, name, one, least)
    made: Any = nn.Conv2d if kind == "Conv2d" else nn.ConvTranspose2d
    if row["in"] % row["groups"] or row["out"] % row["groups"]:
        raise ValueError(f"{path} has {row['groups']} groups, which do not divide its channels")
    numbers = {name: tuple(row[name]) for name in pairs if name != "kernel_size"}
    layer: nn.Module = made(
        row["in"], row["out"], tuple(row["kernel_size"]), groups=row["groups"], device="meta",
        **numbers,
    )  # fmt: skip
    return layer


def _count(
    path: str, name: str, value: Any, least: int, most: int = _LARGEST_KERNEL_NUMBER
) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{path} has {name} {str(value)[:40]!r}, not a whole number from {least} up"
        )


def root_of(layers: Mapping[str, nn.Module], constants: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds layers by their paths, and constants.

    Raises:
        ValueError: a path is none, or leads through a layer.
    """
    root = nn.Module()
    held: Any
    for path, held in (*layers.items(), *constants.items()):
        if not _PATH.fullmatch(path):
            raise ValueError(f"{path[:80]!r} is no path of a layer")
        *above, name = path.split(".")
        owner = root
        for part in above:
            if part not in owner._modules:
                if hasattr(owner, part):
                    raise ValueError(f"{path!r} cannot be the path of a layer")
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
            if type(owner) is not nn.Module:
                raise ValueError(f"{path} lies inside another layer")
        if hasattr(owner, name):
            raise ValueError(f"{path!r} cannot be the path of a layer, or is one twice")
        if isinstance(held, nn.Module):
            owner.add_module(name, held)
        else:
            owner.register_buffer(name, held)
    return root


class _Sized(fx.Interpreter):
    """Runs a graph on tensors without storage and refuses those that are too large."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[str, tuple[int, ...] | list[tuple[int, ...]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.shapes[n.name] = tuple(made.shape)
        elif isinstance(made, list | tuple):
            self.shapes[n.name] = [tuple(one.shape) for one in made if isinstance(one, Tensor)]
        if isinstance(made, Tensor) and made.numel() > MOST_NUMBERS:
            raise ValueError(f"{n.name} has {made.numel()} numbers for one picture")
        return made

    def fetch_attr(self, target: str) -> Any:
        held = super().fetch_attr(target)
        return held.to("meta") if isinstance(held, Tensor) else held


def shapes_of(
    graph: fx.GraphModule, channels: int, size: tuple[int, int]
) -> dict[str, tuple[int, ...] | list[tuple[int, ...]]]:
    """Run a graph for its shapes alone.

    Args:
        graph: to check; not changed.
        channels: of a picture.
        size: height and width of one.

    Returns:
        Every node's shape for one picture, or shapes where it makes several tensors.

    Raises:
        ValueError: it does not run, or something in it is too large.
    """
    sized = _Sized(fx.GraphModule(_on_meta(graph), graph.graph))
    try:
        made = sized.run(torch.empty(1, channels, *size, device="meta"))
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"its graph does not run: {lines[0]}") from error
    if not isinstance(made, Tensor):
        raise ValueError("its graph does not end in a tensor")  # noqa: TRY004 (a file, not a call)
    return sized.shapes


def _on_meta(graph: fx.GraphModule) -> nn.Module:
    layers = {
        path: layer_from_json(path, layer_to_json(layer))
        for path, layer in graph.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    }
    buffers = {path: one.to("meta") for path, one in graph.named_buffers()}
    return root_of(layers, buffers)


def check_saved(graph: fx.GraphModule, channels: int, size: tuple[int, int]) -> None:
    """Write a graph and read it again, without its numbers.

    Raises:
        UsageError: it cannot be written.
        ValueError: it cannot be read.
    """
    rows = [node_to_json(node) for node in graph.graph.nodes]
    shapes_of(graph_from_json(rows, _on_meta(graph)), channels, size)
