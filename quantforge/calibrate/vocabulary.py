"""Embedding and head as integers: [vocabulary, hidden] matrices, looked up in and multiplied with.

The head is a linear layer: its gram is that of the final hidden states, and GPTQ feeds errors along
its rows. An embedding is looked up, so its error is plain, row by row, and how often a token occurs
is how much its row counts; nothing couples the columns of a row. A tied matrix is both. How much
each use matters to the loss differs from row to row and network to network, so several ways are
tried: GPTQ with the gram, GPTQ with as much of the identity beside it (the mean of its diagonal),
and rounding on the grid of least squared error. The network's held-out KL with that matrix alone
quantized decides between them, and is the candidate's loss as well: of one or two matrices it can
be measured, where for the layers of the blocks it has to be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantforge.methods.gptq import fit_grid, gptq
from quantforge.methods.rtn import round_to_nearest
from quantforge.numerics import GramAccumulator, factorize, output_error, relative
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec

# Damping at which the identity counts as much as the gram.
EQUAL_PARTS = 1.0


def head_gram(hidden: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[hidden, hidden] float32 mean x xᵀ of what enters the head.

    Args:
        hidden: [sequences, length, hidden].
        dtype: of the products.
        device: where they are formed.
    """
    gram = GramAccumulator(hidden.shape[-1], device)
    for sequence in hidden:
        gram.add(sequence.to(device), dtype)
    return gram.mean()


def variants(
    layer: LayerInfo, weight: Tensor, spec: QuantSpec, gram: Tensor, damping: float
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Ways to quantize one matrix, by name.

    Args:
        layer: says how the matrix is used.
        weight: [vocabulary, hidden] float32.
        spec: width and grouping.
        gram: [hidden, hidden] of the head's inputs.
        damping: of the gram, relative to the mean of its diagonal.
    """
    identity = factorize(torch.eye(len(gram), device=gram.device), damping=damping)
    if layer.kind != "linear":
        scale, zero = fit_grid(weight, identity, spec, "mse")
        yield "rounded", round_to_nearest(weight, scale, spec, zero)
    if layer.kind == "embedding":
        return
    factor = factorize(gram, damping=damping)
    if layer.kind == "linear":
        scale, zero = fit_grid(weight, factor, spec, "diagonal")
        yield "rounded", round_to_nearest(weight, scale, spec, zero)
    yield "gptq", gptq(weight, factor, spec, grid="diagonal")
    if layer.kind == "tied":
        both = factorize(gram, damping=EQUAL_PARTS)
        yield "gptq, lookups as much", gptq(weight, both, spec, grid="mse")


def relative_error(
    layer: LayerInfo, difference: Tensor, weight: Tensor, gram: Tensor, counts: Tensor
) -> float:
    """Relative squared error of what the matrix gives: rows, logits, or the mean of both if tied.

    Args:
        layer: says how the matrix is used.
        difference: [vocabulary, hidden] quantized less float.
        weight: [vocabulary, hidden] float.
        gram: [hidden, hidden] of the head's inputs.
        counts: [vocabulary] how often each token occurs; how much its row counts when looked up.
    """
    found = []
    if layer.kind != "linear":
        rows = (counts * one.square().sum(1) for one in (difference, weight))
        found.append(relative(*rows))
    if layer.kind != "embedding":
        found.append(relative(output_error(difference, gram), output_error(weight, gram)))
    return sum(found) / len(found)
