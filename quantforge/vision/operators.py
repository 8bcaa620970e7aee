"""What the canonical graph's operators are to what executes it: their names and their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantforge_kernels.integer_layout import Places
from torch import fx

from quantforge.vision.packed_layers import Margins, pair

# Of codes as of numbers: they move values and change none.
MOVING = frozenset({
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape", "slice",
    "select", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view", "_reshape_copy",
})  # fmt: skip
# Their values are some of those of their first argument, so they are on its grid. Those beyond
# `MOVING` return several tensors, or have a kernel of their own for codes or none.
SELECTING = MOVING | {
    "channel_shuffle", "chunk", "max_pool2d", "max_pool2d_with_indices", "pixel_shuffle", "split",
    "split_with_sizes", "upsample_nearest2d",
}  # fmt: skip


def operator_name(node: fx.Node) -> str:
    """`relu` for a call of `aten.relu.default` or `aten.relu_.default`; "" for no ATen operator."""
    parts = str(node.target).split(".")
    if node.op != "call_function" or parts[0] != "aten" or len(parts) < 2:
        return ""
    name = parts[1]
    return name.rstrip("_") if name.rstrip("_") else name


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or by name."""
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, default)


def clamp_of(node: fx.Node) -> tuple[float, float] | None:
    """The range to which an operator clamps; None for one that does something else."""
    name = operator_name(node)
    if name == "relu":
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    named: Mapping[str, tuple[str, str, float, float]] = {
        "hardtanh": ("min_val", "max_val", -1.0, 1.0),
        "clamp": ("min", "max", -math.inf, math.inf),
        "clamp_min": ("min", "", -math.inf, math.inf),
        "clamp_max": ("", "max", -math.inf, math.inf),
    }
    if name not in named:
        return None
    first, second, low, high = named[name]
    places = (1, 1) if name == "clamp_max" else (1, 2)
    ends = (
        argument(node, places[0], first, low) if first else low,
        argument(node, places[1], second, high) if second else high,
    )
    given = [
        default if end is None else end for end, default in zip(ends, (low, high), strict=True)
    ]
    if any(isinstance(end, fx.Node) for end in given):
        return None
    return float(given[0]), float(given[1])


def added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of a plain addition; None for anything else."""
    if operator_name(node) != "add" or argument(node, 2, "alpha", 1) != 1:
        return None
    first, second = argument(node, 0, "self"), argument(node, 1, "other")
    if isinstance(first, fx.Node) and isinstance(second, fx.Node):
        return first, second
    return None


def zeros_added(node: fx.Node) -> list[int] | None:
    """The sides of a padding with 0, the last dimension's first; None for anything else."""
    name = operator_name(node)
    if name not in ("constant_pad_nd", "pad"):
        return None
    constant = name != "pad" or argument(node, 2, "mode", "constant") == "constant"
    value = argument(node, 2 if name == "constant_pad_nd" else 3, "value")
    sides = argument(node, 1, "pad")
    if not constant or value not in (None, 0) or any(type(one) is not int for one in sides):
        return None
    return list(sides)


def margins(node: fx.Node) -> Margins | None:
    """What a padding with 0 puts around images; None for anything else, and for one that cuts."""
    sides = zeros_added(node)
    if sides is None or len(sides) > 4 or min(sides, default=0) < 0:
        return None
    left, right, top, bottom = [*sides, 0, 0, 0, 0][:4]
    return Margins(before=(top, left), after=(bottom, right))


def pooled(node: fx.Node) -> Places | None:
    """Where a max pooling reads; None for anything else, and for one that rounds its size up."""
    if operator_name(node) != "max_pool2d" or argument(node, 5, "ceil_mode", False):
        return None
    kernel = pair(argument(node, 1, "kernel_size"))
    stride = argument(node, 2, "stride") or kernel
    return Places(
        kernel=kernel, stride=pair(stride), padding=pair(argument(node, 3, "padding", 0)),
        dilation=pair(argument(node, 4, "dilation", 1)),
    )  # fmt: skip
