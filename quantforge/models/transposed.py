"""Linears that a network's class stores transposed, and ordinary ones in their place.

GPT-2 has `Conv1D` modules: a linear whose weight is [in, out]. Everything here, and the layout of
checkpoints, takes [out, in], so such a module is replaced by a linear that computes the same. Stock
transformers does not do that: compressed-tensors packs linears and embeddings alone, and a folder
with packed weights for a Conv1D loads there with random weights in their places, or not at all
(checked with transformers 5.24). So `quantforge.load` alone reads the folders of such networks, in
which kept weights are [out, in] too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from quantforge.scratch import IN_MEMORY, Scratch


class StraightLinear(nn.Linear):
    """An ordinary linear in the place of a transposed one; it has the bias of that."""


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a linear stored transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def straighten(module: nn.Module, scratch: Scratch = IN_MEMORY) -> dict[str, nn.Module]:
    """Put a linear in the place of every transposed one, in place.

    Args:
        module: the network.
        scratch: where weights go.

    Returns:
        Path → the module that was there, whose weight was moved and takes no memory now.
    """
    found = {name: one for name, one in module.named_modules() if is_transposed(one)}
    for name, one in found.items():
        module.set_submodule(name, _straight(one, scratch))
    return found


def _straight(original: Any, scratch: Scratch) -> StraightLinear:
    rows, columns = original.nf, original.nx
    linear = StraightLinear(columns, rows, bias=False, device="meta")
    weight = original.weight
    straight = scratch.keep(weight.data.T).contiguous()
    linear.weight = nn.Parameter(straight, requires_grad=weight.requires_grad)
    linear.bias = original.bias
    linear.train(original.training)
    weight.data = weight.data.new_empty(0)
    return linear


@contextmanager
def straightened(module: nn.Module) -> Iterator[None]:
    """`straighten` inside; after it the modules of before, with what the linears hold by then."""
    originals = straighten(module)
    try:
        yield
    finally:
        for name, original in originals.items():
            linear: Any = module.get_submodule(name)
            weight: Any = original.weight
            weight.data = linear.weight.data.T.contiguous()
            module.set_submodule(name, original)
