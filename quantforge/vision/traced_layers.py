"""Layers made from the weights and the arguments of calls in an exported graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantforge.vision.exported import arguments_of
from quantforge.vision.graph_file import layer_to_json

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input}
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def convolution_options(
    node: fx.Node, kernel: tuple[int, int]
) -> tuple[dict[str, Any], list[int] | None]:
    """What a convolution is besides its weight.

    Args:
        node: calls one of `CONVOLUTIONS`.
        kernel: height and width of its kernel.

    Returns:
        Options of the module; zeros to add before it (left, right, top, bottom) where a padding
        that is not the same on both sides cannot be one of them.
    """
    given = arguments_of(node)
    stride, dilation = (pair(given.get(name, 1)) for name in ("stride", "dilation"))
    padding: Any = given.get("padding", 0)
    sides = None
    if isinstance(padding, str):
        down, across = (
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        )
        padding = (down // 2, across // 2)
        if down % 2 or across % 2:
            sides = [across // 2, across - across // 2, down // 2, down - down // 2]
            padding = (0, 0)
    options = {
        "stride": stride, "padding": pair(padding), "dilation": dilation,
        "groups": int(given.get("groups", 1)),
    }  # fmt: skip
    if node.target is aten.conv_transpose2d.input:
        options["output_padding"] = pair(given.get("output_padding", 0))
    return options, sides


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear layer with these values."""
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, bias)


def convolution(
    weight: Tensor, bias: Tensor | None, options: Mapping[str, Any], *, transposed: bool
) -> nn.Module:
    """A convolution with these values."""
    before, after = weight.shape[1] * options["groups"], weight.shape[0]
    kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    if transposed:
        before, after = after, before
    kernel = pair(list(weight.shape[2:]))
    return _filled(kind(before, after, kernel, device="meta", **options), weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with these values; a bias of 0 where there is none."""
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    kept = torch.zeros(out, dtype=weight.dtype) if bias is None else bias
    for name, value in (("weight", weight), ("bias", kept)):
        own = value.clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(own, requires_grad=False))
    made: nn.Module = layer
    return made


def pair(value: Any) -> tuple[int, int]:
    """Height and width of one number or two."""
    one = list(value) if isinstance(value, list | tuple) else [value]
    return (int(one[0]), int(one[-1]))


def place(root: nn.Module, path: str, layer: nn.Module) -> str:
    """Make `layer` a submodule, unless an equal one has that path, or that path with a number.

    Args:
        root: of all layers.
        path: wanted; what is no letter, digit or hyphen becomes "_".
        layer: to add.

    Returns:
        The path that it has.
    """
    path = re.sub(r"[^A-Za-z0-9_.-]", "_", path)
    parts = path.split(".")
    inside = [".".join(parts[:count]) for count in range(1, len(parts))]
    if any(isinstance(_held(root, one), LAYERS) for one in inside):
        path = path.replace(".", "_")  # no layer lies inside another
    name, count = path, 1
    while (known := _held(root, name)) is not None:
        if isinstance(known, LAYERS) and _equal(known, layer):
            return name
        count += 1
        name = f"{path}_{count}"
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(last, layer)
    return name


def _held(root: nn.Module, path: str) -> Any:
    """What is at a path; None for nothing."""
    held: Any = root
    for part in path.split("."):
        held = getattr(held, part, None)
    return held


def _equal(one: Any, other: Any) -> bool:
    return (
        layer_to_json(one) == layer_to_json(other)
        and torch.equal(one.weight, other.weight)
        and torch.equal(one.bias, other.bias)
    )
