"""Questions about the nodes of an exported graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an ATen operator by their names."""
    target: Any = node.target
    named = zip((one.name for one in target._schema.arguments), node.args, strict=False)
    return dict(named) | node.kwargs


def module_of(node: fx.Node) -> str:
    """Path of the module that calls a node of the exported graph; "" where it is not known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def sizes_of(view: fx.Node) -> list[int]:
    """The shape of a view with -1 for the number of pictures; [] if that is not its one size."""
    sizes = [one if isinstance(one, int) else -1 for one in view.meta["val"].shape]
    named = any(isinstance(one, fx.Node) for one in view.all_input_nodes[1:])
    return sizes if named and sizes.count(-1) == 1 and 0 not in sizes else []


def is_batch(node: Any) -> bool:
    """Whether a node of the exported graph is the number of pictures."""
    if not isinstance(node, fx.Node) or node.target is not aten.sym_size.int:
        return False
    counted, dimension = node.args
    return isinstance(counted, fx.Node) and counted.op == "placeholder" and bool(dimension == 0)


def has_batch(node: fx.Node, size: fx.Node) -> bool:
    """Whether a tensor's first dimension is the number of pictures.

    Then it is asked for its size, so that parts of the graph do not depend on the pictures.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    return str(value.shape[0]) == str(size.meta["val"])


def flattens(view: fx.Node) -> bool:
    """Whether a view makes [pictures, numbers] of a tensor of pictures."""
    before, shape = view.args[0], view.args[1]
    if not isinstance(before, fx.Node) or not isinstance(shape, list | tuple) or len(shape) != 2:
        return False
    rows: Any = shape[0]
    return is_batch(rows) and has_batch(before, rows)


def alone(layer: fx.Node) -> bool:
    """Whether a layer of the exported graph runs once, and one node reads it."""
    weight = layer.args[1] if len(layer.args) > 1 else None
    return len(layer.users) == 1 and isinstance(weight, fx.Node) and len(weight.users) == 1
