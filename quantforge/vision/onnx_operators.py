"""ATen operators of the canonical graph as ONNX operators, one function each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import fx

from quantforge.errors import UsageError
from quantforge.vision.operators import argument, clamp_of, operator_name
from quantforge.vision.packed_layers import pair

Shape = tuple[int, ...]


class Builder(Protocol):
    """What the functions need of the graph that is built."""

    @property
    def shapes(self) -> Mapping[str, Any]:
        """Every node's shape for one picture."""
        ...

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append an operator with one output `name`, and return that name."""
        ...

    def add_many(self, kind: str, inputs: list[str], names: list[str], **attributes: Any) -> None:
        """Append an operator with several outputs."""
        ...

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """An initialiser, and its name."""
        ...


def shape_of(builder: Builder, node: Any) -> Shape:
    """Of a node that is one tensor, for one picture."""
    return tuple(builder.shapes[node.name])


def _refused(node: fx.Node, reason: str) -> UsageError:
    return UsageError(f"{node.name} calls {node.target}{reason}; it cannot be exported to ONNX")


def _input(node: fx.Node, place: int = 0) -> str:
    value = node.args[place]
    if not isinstance(value, fx.Node):
        raise _refused(node, f" on {value!r}")
    return value.name


def _clip(builder: Builder, node: fx.Node, out: str) -> None:
    limits = clamp_of(node)
    if limits is None:
        raise _refused(node, " between tensors")
    if limits == (0.0, math.inf):
        builder.add("Relu", [_input(node)], out)
        return
    inputs = [_input(node)]
    for name, end in zip(("low", "high"), limits, strict=True):
        inputs.append(builder.constant(f"{out}.{name}", end) if math.isfinite(end) else "")
    builder.add("Clip", inputs, out)


def _plain(kind: str, **attributes: Any) -> Callable[[Builder, fx.Node, str], None]:
    def write(builder: Builder, node: fx.Node, out: str) -> None:
        builder.add(kind, [_input(node)], out, **attributes)

    return write


def _pairwise(kind: str) -> Callable[[Builder, fx.Node, str], None]:
    def write(builder: Builder, node: fx.Node, out: str) -> None:
        if argument(node, 2, "alpha", 1) != 1 or "rounding_mode" in node.kwargs:
            raise _refused(node, " with a factor or a rounding")
        inputs = []
        for place in (0, 1):
            value: Any = node.args[place]
            named = isinstance(value, fx.Node)
            inputs.append(value.name if named else builder.constant(f"{out}.{place}", value))
        builder.add(kind, inputs, out)

    return write


def _silu(builder: Builder, node: fx.Node, out: str) -> None:
    gate = builder.add("Sigmoid", [_input(node)], f"{out}.gate")
    builder.add("Mul", [_input(node), gate], out)


def _gelu(builder: Builder, node: fx.Node, out: str) -> None:
    kind = argument(node, 1, "approximate", "none")
    builder.add("Gelu", [_input(node)], out, approximate=kind)


def _leaky(builder: Builder, node: fx.Node, out: str) -> None:
    slope = float(argument(node, 1, "negative_slope", 0.01))
    builder.add("LeakyRelu", [_input(node)], out, alpha=slope)


def _concatenate(builder: Builder, node: fx.Node, out: str) -> None:
    parts: Any = node.args[0]
    axis = argument(node, 1, "dim", 0)
    builder.add("Concat", [one.name for one in parts], out, axis=axis)


def _mean(builder: Builder, node: fx.Node, out: str) -> None:
    source: Any = node.args[0]
    dims = argument(node, 1, "dim")
    keep = bool(argument(node, 2, "keepdim", False))
    rank = len(shape_of(builder, source))
    axes = sorted(one % rank for one in ([dims] if isinstance(dims, int) else dims))
    if rank == 4 and axes == [2, 3] and keep:
        builder.add("GlobalAveragePool", [source.name], out)
        return
    named = builder.constant(f"{out}.axes", axes, np.int64)
    builder.add("ReduceMean", [source.name, named], out, keepdims=int(keep))


def _adaptive(builder: Builder, node: fx.Node, out: str) -> None:
    if pair(argument(node, 1, "output_size")) != (1, 1):
        raise _refused(node, f" to {node.args[1]}")
    builder.add("GlobalAveragePool", [_input(node)], out)


def _window(node: fx.Node) -> dict[str, Any]:
    kernel = pair(argument(node, 1, "kernel_size"))
    padding = pair(argument(node, 3, "padding", 0))
    return {
        "kernel_shape": kernel,
        "strides": pair(argument(node, 2, "stride") or kernel),
        "pads": (*padding, *padding),
    }


def _max_pool(builder: Builder, node: fx.Node, out: str) -> None:
    builder.add(
        "MaxPool", [_input(node)], out, dilations=pair(argument(node, 4, "dilation", 1)),
        ceil_mode=int(argument(node, 5, "ceil_mode", False)), **_window(node),
    )  # fmt: skip


def _average_pool(builder: Builder, node: fx.Node, out: str) -> None:
    if argument(node, 6, "divisor_override") is not None:
        raise _refused(node, " with a divisor of its own")
    builder.add(
        "AveragePool", [_input(node)], out, ceil_mode=int(argument(node, 4, "ceil_mode", False)),
        count_include_pad=int(argument(node, 5, "count_include_pad", True)), **_window(node),
    )  # fmt: skip


def _reshape(builder: Builder, node: fx.Node, out: str) -> None:
    """Any change of shape; the first axis is copied where it stays, so that batches may differ."""
    source: Any = node.args[0]
    before, after = shape_of(builder, source), shape_of(builder, node)
    sizes = list(after)
    if before[:1] == after[:1]:
        sizes[0] = 0
    elif math.prod(before) == math.prod(after) and len(sizes) > 1:
        sizes[0] = -1  # pictures and places together
    builder.add("Reshape", [source.name, builder.constant(f"{out}.shape", sizes, np.int64)], out)


def _permute(builder: Builder, node: fx.Node, out: str) -> None:
    source: Any = node.args[0]
    rank = len(shape_of(builder, source))
    order = list(range(rank))
    if operator_name(node) == "permute":
        order = [one % rank for one in argument(node, 1, "dims")]
    else:
        first, second = argument(node, 1, "dim0", 0) % rank, argument(node, 2, "dim1", 1) % rank
        order[first], order[second] = order[second], order[first]
    builder.add("Transpose", [source.name], out, perm=order)


def _softmax(builder: Builder, node: fx.Node, out: str) -> None:
    builder.add("Softmax", [_input(node)], out, axis=argument(node, 1, "dim"))


def _pad(builder: Builder, node: fx.Node, out: str) -> None:
    source: Any = node.args[0]
    mode, sizes = "constant", list(argument(node, 1, "pad"))
    value = argument(node, 2, "value", 0.0)
    if operator_name(node) == "pad":
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", 0.0)
    if mode != "constant":
        raise _refused(node, f" in the mode {mode}")
    rank = len(shape_of(builder, source))
    before, after = [0] * rank, [0] * rank
    for index in range(len(sizes) // 2):
        before[rank - 1 - index], after[rank - 1 - index] = sizes[2 * index : 2 * index + 2]
    places = builder.constant(f"{out}.pads", before + after, np.int64)
    builder.add("Pad", [source.name, places, builder.constant(f"{out}.value", value or 0.0)], out)


def _layer_norm(builder: Builder, node: fx.Node, out: str) -> None:
    shape: Any = argument(node, 1, "normalized_shape")
    gain, shift = argument(node, 2, "weight"), argument(node, 3, "bias")
    named = gain.name if gain is not None else builder.constant(f"{out}.gain", np.ones(shape))
    inputs = [_input(node), named] + ([] if shift is None else [shift.name])
    epsilon = float(argument(node, 4, "eps", 1e-5))
    builder.add("LayerNormalization", inputs, out, axis=-len(shape), epsilon=epsilon)


def _split(builder: Builder, node: fx.Node, out: str) -> None:
    source: Any = node.args[0]
    axis = argument(node, 2, "dim", 0) % len(shape_of(builder, source))
    if axis == 0:
        raise _refused(node, " over pictures")
    parts = builder.shapes[node.name]
    sizes = builder.constant(f"{out}.sizes", [one[axis] for one in parts], np.int64)
    names = [f"{node.name}.{index}" for index in range(len(parts))]
    builder.add_many("Split", [source.name, sizes], names, axis=axis)


def _matmul(builder: Builder, node: fx.Node, out: str) -> None:
    builder.add("MatMul", [_input(node), _input(node, 1)], out)


def _prelu(builder: Builder, node: fx.Node, out: str) -> None:
    """A slope for all channels or for each, which ONNX wants beside the axes behind it."""
    source: Any = node.args[0]
    slope, rank = _input(node, 1), len(shape_of(builder, source))
    behind = [1] * max(rank - 2, 0)
    shape = builder.constant(f"{out}.slope.shape", [-1, *behind], np.int64)
    shaped = builder.add("Reshape", [slope, shape], f"{out}.slope")
    builder.add("PRelu", [source.name, shaped], out)


def _group_norm(builder: Builder, node: fx.Node, out: str) -> None:
    """Each group's numbers as one channel of an InstanceNormalization, then gain and shift."""
    source: Any = node.args[0]
    groups = int(argument(node, 1, "num_groups"))
    shape = shape_of(builder, source)
    ones = builder.constant(f"{out}.ones", np.ones(groups))
    nothing = builder.constant(f"{out}.nothing", np.zeros(groups))
    apart = builder.constant(f"{out}.apart", [0, groups, -1], np.int64)
    whole = builder.constant(f"{out}.whole", [-1, *shape[1:]], np.int64)
    parts = builder.add("Reshape", [source.name, apart], f"{out}.parts")
    epsilon = float(argument(node, 4, "eps", 1e-5))
    inputs = [parts, ones, nothing]
    normal = builder.add("InstanceNormalization", inputs, f"{out}.normal", epsilon=epsilon)
    gain, shift = argument(node, 2, "weight"), argument(node, 3, "bias")
    made = [(kind, held) for kind, held in (("Mul", gain), ("Add", shift)) if held is not None]
    last = builder.add("Reshape", [normal, whole], f"{out}.joined" if made else out)
    channels = builder.constant(f"{out}.channels", [-1, *[1] * (len(shape) - 2)], np.int64)
    for index, (kind, held) in enumerate(made):
        shaped = builder.add("Reshape", [held.name, channels], f"{out}.{kind}.shaped")
        name = out if index == len(made) - 1 else f"{out}.{kind}"
        last = builder.add(kind, [last, shaped], name)


def _resize(mode: str) -> Callable[[Builder, fx.Node, str], None]:
    def write(builder: Builder, node: fx.Node, out: str) -> None:
        source: Any = node.args[0]
        place = 2 if mode == "linear" else 1  # behind align_corners
        corners = mode == "linear" and bool(argument(node, 2, "align_corners", False))
        place += 1
        if str(node.target).endswith(".vec"):
            scales = argument(node, place, "scale_factors")
        else:
            both = [argument(node, place + at, f"scales_{side}") for at, side in enumerate("hw")]
            scales = None if None in both else both
        before, after = shape_of(builder, source)[2:], builder.shapes[node.name][2:]
        exact = scales is None or all(
            float(scale) * old == new for scale, old, new in zip(scales, before, after, strict=True)
        )
        # A size that was rounded down is not the scale that torch goes by.
        named = (
            [builder.constant(f"{out}.sizes", after, np.int64)] if exact
            else [builder.constant(f"{out}.scales", scales)]
        )  # fmt: skip
        inputs = [source.name, "", *(["", *named] if exact else named)]
        how = "asymmetric" if mode == "nearest" else "half_pixel"
        builder.add(
            "Resize", inputs, out, mode=mode, axes=[2, 3], nearest_mode="floor",
            coordinate_transformation_mode="align_corners" if corners else how,
        )  # fmt: skip

    return write


def _reduce(kind: str) -> Callable[[Builder, fx.Node, str], None]:
    def write(builder: Builder, node: fx.Node, out: str) -> None:
        source: Any = node.args[0]
        rank = len(shape_of(builder, source))
        dims: Any = argument(node, 1, "dim", [])
        axes = [one % rank for one in ([dims] if isinstance(dims, int) else dims or range(rank))]
        if 0 in axes:
            raise _refused(node, " over pictures")
        keep = int(bool(argument(node, 2, "keepdim", False)))
        named = builder.constant(f"{out}.axes", sorted(axes), np.int64)
        builder.add(kind, [source.name, named], out, keepdims=keep)

    return write


OPERATORS: Mapping[str, Callable[[Builder, fx.Node, str], None]] = {
    **dict.fromkeys(("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), _clip),
    **dict.fromkeys(
        ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout"), _plain("Identity")
    ),
    **dict.fromkeys(
        ("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze"), _reshape
    ),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _split),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive),
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "add": _pairwise("Add"),
    "sub": _pairwise("Sub"),
    "mul": _pairwise("Mul"),
    "div": _pairwise("Div"),
    "pow": _pairwise("Pow"),
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "hardswish": _plain("HardSwish"),
    "hardsigmoid": _plain("HardSigmoid", alpha=1.0 / 6.0, beta=0.5),
    "exp": _plain("Exp"),
    "sqrt": _plain("Sqrt"),
    "abs": _plain("Abs"),
    "neg": _plain("Neg"),
    "silu": _silu,
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "cat": _concatenate,
    "mean": _mean,
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    "amax": _reduce("ReduceMax"),
    "sum": _reduce("ReduceSum"),
    "upsample_nearest2d": _resize("nearest"),
    "upsample_bilinear2d": _resize("linear"),
    "minimum": _pairwise("Min"),
    "maximum": _pairwise("Max"),
}


def write_operator(builder: Builder, node: fx.Node, out: str) -> None:
    """Append what computes a node.

    Args:
        builder: of the graph.
        node: a call of an ATen operator.
        out: name of the result.

    Raises:
        UsageError: there is no ONNX operator for it.
    """
    write = OPERATORS.get(operator_name(node))
    if write is None:
        raise _refused(node, ", which has no ONNX operator here")
    write(builder, node, out)
