"""Embedding and head as integers: [vocabulary, hidden] matrices, looked up in and multiplied with.

The head is a linear layer: its gram is that of the final hidden states, and GPTQ feeds errors along
its rows. An embedding is looked up, so its error is plain, row by row, and how often a token occurs
is how much its row counts; nothing couples the columns of a row. A tied matrix is both. How much
each use matters to the loss differs from row to row and network to network, so several ways are
tried: GPTQ with the gram, GPTQ with as much of the identity beside it (the mean of its diagonal),
and rounding to nearest. The network's held-out KL with that matrix alone quantized decides between
them, on the narrowest candidate, where they differ most, and is every candidate's loss as well: of
one or two matrices it can be measured, where for the layers of the blocks it has to be predicted.
SmolLM2-135M, tied, 4 bits in groups of 64: 0.035 by GPTQ, 0.051 with the identity, 0.324 rounded on
a grid that does not know the gram (8 windows of 256 tokens of Python's manual; standard errors
0.004, 0.004, 0.019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.methods.gptq import Grid, fit_grid, gptq
from quantforge.methods.rtn import round_to_nearest
from quantforge.numerics import GramAccumulator, factorize, output_error, relative
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec

# Damping at which the identity counts as much as the gram.
EQUAL_PARTS = 1.0
WAYS = {
    "embedding": ("rounded",),
    "linear": ("rounded", "gptq"),
    "tied": ("rounded", "gptq", "gptq, lookups as much"),
}


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


class MatrixQuantizer:
    """Quantizes one matrix in any of its ways; grams are factored once.

    Attributes:
        ways: names of the ways that its use allows.
    """

    def __init__(self, layer: LayerInfo, weight: Tensor, gram: Tensor, damping: float) -> None:
        """Get ready for a matrix.

        Args:
            layer: says how the matrix is used.
            weight: [vocabulary, hidden] float32.
            gram: [hidden, hidden] of the head's inputs.
            damping: of the gram, relative to the mean of its diagonal.
        """
        self.ways = WAYS[layer.kind]
        self._weight, self._looked_up = weight, layer.kind == "embedding"
        if self._looked_up:
            gram = torch.eye(len(gram), device=gram.device)
        self._factor = factorize(gram, damping=damping)
        self._equal = factorize(gram, damping=EQUAL_PARTS)

    def make(self, way: str, spec: QuantSpec) -> QuantizedWeight:
        """The matrix as integers of `spec`, made in the way of that name."""
        if way == "rounded":
            grid: Grid = "mse" if self._looked_up else "diagonal"
            scale, zero = fit_grid(self._weight, self._factor, spec, grid)
            return round_to_nearest(self._weight, scale, spec, zero)
        if way == "gptq":
            return gptq(self._weight, self._factor, spec, grid="diagonal")
        return gptq(self._weight, self._equal, spec, grid="mse")


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
