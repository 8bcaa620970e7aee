"""Second moments of layer inputs, and their factors. Pure: tensors in, tensors out.

`gram` is the mean of x xᵀ over tokens, [in, in] (GPTQ's "Hessian" up to a factor of two; the loss
Hessian has another name here, `curvature`). A gram is factored once and serves every candidate.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.errors import InputError

# A gram is computed in strips of columns: a strip needs only the rows from its own diagonal down,
# which saves up to half of the products.
STRIPS = 4
MAX_DAMPING_STEPS = 8


class GramAccumulator:
    """Accumulates X Xᵀ over batches of inputs.

    Attributes:
        total: [in, in] float32, lower triangle of strips filled; read through `mean`.
        tokens: number of inputs seen.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., in] of any float dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        features = rows.shape[1]
        strip = -(-features // STRIPS)
        for start in range(0, features, strip):
            stop = min(start + strip, features)
            self.total[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """[in, in] float32 symmetric mean of x xᵀ.

        Raises:
            InputError: nothing was accumulated.
        """
        if self.tokens == 0:
            raise InputError("no calibration tokens reached this layer")
        lower = torch.tril(self.total) / self.tokens
        return lower + torch.tril(lower, -1).T


class WeightedGramAccumulator:
    """Accumulates one gram for each group of output channels, weighted by what the loss feels.

    The gram of group k is the mean over tokens of g_k x xᵀ, with g_k the mean over the group's
    channels of the squared gradient of the loss with respect to the layer's output (GuidedQuant,
    arXiv 2505.07004): the block diagonal of the Fisher matrix, averaged over the rows of a group.
    All-equal gradients of 1 give the plain gram.

    Attributes:
        grams: an accumulator for each group.
    """

    def __init__(self, features: int, groups: int, device: torch.device | str = "cpu") -> None:
        self.grams = [GramAccumulator(features, device) for _ in range(groups)]

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add inputs [..., in] and the gradients [..., out] of the loss at their outputs.

        Costs as much as a plain gram for each group.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        squares = gradients.reshape(-1, gradients.shape[-1]).float().square()
        for gram, part in zip(self.grams, self.parts(squares.shape[1]), strict=True):
            gram.add(rows * squares[:, part].mean(1, keepdim=True).sqrt())

    def parts(self, out_features: int) -> list[slice]:
        """Rows of the weight that belong to each group: contiguous, equal to within one row."""
        edges = [out_features * k // len(self.grams) for k in range(len(self.grams) + 1)]
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    def mean(self) -> Tensor:
        """[groups, in, in] float32 weighted means of x xᵀ.

        Raises:
            InputError: nothing was accumulated.
        """
        return torch.stack([gram.mean() for gram in self.grams])


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What the column loop needs of a gram.

    Attributes:
        upper: [in, in] float32 U with UᵀU = (damped gram)⁻¹, in the order of `order`.
        order: [in] int64, original index of the j-th column to be quantized.
        diagonal: [in] float32, diagonal of the undamped gram, original order.
        dead: [in] bool, inputs that were always zero.
        damping: damping used, relative to the mean of the diagonal.
    """

    upper: Tensor
    order: Tensor
    diagonal: Tensor
    dead: Tensor
    damping: float

    def conditional_importance(self) -> Tensor:
        """[in] float32 1/U_jj² in the original order: what an error in column j costs the row.

        It is the part of the diagonal that later columns cannot make up for, so it, not the
        diagonal, is the weight of a column's rounding error in the compensated loss.
        """
        importance = torch.empty_like(self.diagonal)
        importance[self.order] = 1.0 / self.upper.diagonal().square()
        return importance


def factorize(gram: Tensor, *, damping: float = 0.01, act_order: bool = True) -> Factor:
    """Damp and factor a gram, U = R⁻¹ with R Rᵀ the damped gram and both upper triangular.

    One Cholesky and one triangular inverse in float64, instead of the usual Cholesky, inverse,
    Cholesky. If the matrix is not positive definite the damping grows tenfold until it is.

    Args:
        gram: [in, in] symmetric positive semi-definite.
        damping: added to the diagonal, relative to its mean over live inputs.
        act_order: take columns by decreasing diagonal instead of in order.

    Returns:
        The factor; dead inputs get the mean of the live diagonal.

    Raises:
        InputError: the gram holds NaN or Inf.
    """
    if not torch.isfinite(gram).all():
        raise InputError("layer inputs hold NaN or Inf; the calibration text or model is broken")
    matrix = gram.double()
    diagonal = matrix.diagonal().clone()
    dead = diagonal <= 0
    live_mean = diagonal[~dead].mean() if (~dead).any() else diagonal.new_ones(())
    order = torch.arange(len(diagonal), device=gram.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    matrix = matrix[order][:, order]
    base = torch.where(dead, live_mean, diagonal)[order]
    identity = torch.eye(len(diagonal), dtype=torch.float64, device=gram.device)
    used = damping
    for _ in range(MAX_DAMPING_STEPS):
        matrix.diagonal().copy_(base + used * live_mean)
        root, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(root.flip(0, 1), identity, upper=True)
            if torch.isfinite(upper).all():
                return Factor(
                    upper=upper.float(),
                    order=order,
                    diagonal=diagonal.float(),
                    dead=dead,
                    damping=used,
                )
        used = max(used, 1e-4) * 10.0
    raise InputError(f"a gram could not be factored even with damping {used:g}")


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """[out] mean squared output error d gram dᵀ of every row d of `difference` [out, in]."""
    return ((difference @ gram) * difference).sum(1)


def relative(error: Tensor, reference: Tensor) -> float:
    """Sum of `error` over sum of `reference`; 0 where both vanish."""
    total = float(reference.sum(dtype=torch.float64))
    return float(error.sum(dtype=torch.float64)) / total if total > 0 else 0.0
