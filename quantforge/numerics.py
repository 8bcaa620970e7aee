"""Second moments of layer inputs, and their factors. Pure: tensors in, tensors out.

`gram` is the mean of x xᵀ over tokens, [in, in] (GPTQ's "Hessian" up to a factor of two; the loss
Hessian has another name here, `curvature`). A gram is factored once and serves every candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from quantforge_kernels.moment import add_cross, add_gram
from torch import Tensor

from quantforge.errors import InputError

MAX_DAMPING_STEPS = 8
# Of a token in a gram, before powers, relative to the mean: none is left out altogether.
LEAST_WEIGHT = 1e-4
# Smallest diagonal entry of a live input, relative to the mean: below it only rounding errors of
# the sums are left, and with little damping a factor would blow them up.
DIAGONAL_FLOOR = 1e-6
# Networks are run in the range of float32, whatever their own dtype.
OVERFLOW = "the model overflows float32 on this text: check its weights, or get them again"


class GramAccumulator:
    """Accumulates X Xᵀ over batches of inputs.

    Attributes:
        total: [in, in] float32, lower triangle; read through `mean`.
        tokens: number of inputs seen.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(
        self, inputs: Tensor, dtype: torch.dtype = torch.float32, weights: Tensor | None = None
    ) -> None:
        """Add inputs [..., in] of any float dtype, rounded to `dtype`; sums are float32.

        Args:
            inputs: the inputs.
            dtype: of the products.
            weights: [...] how much each of them counts; alike if None.
        """
        rows = _weighted(inputs, weights).reshape(-1, inputs.shape[-1]).to(dtype)
        add_gram(self.total, rows)
        self.tokens += rows.shape[0]

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [self.total, torch.tensor(self.tokens)]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        self.total, self.tokens = sums[0], int(sums[1])

    def mean(self) -> Tensor:
        """[in, in] float32 symmetric mean of x xᵀ.

        Raises:
            InputError: nothing was accumulated.
        """
        if self.tokens == 0:
            raise InputError("no calibration tokens reached this layer")
        lower = torch.tril(self.total) / self.tokens
        return lower + torch.tril(lower, -1).T


class CrossAccumulator:
    """Accumulates (x − x̃) x̃ᵀ: how the inputs behind quantized layers x̃ miss the float ones x.

    The difference enters the products, not x itself, so bfloat16 products lose little.

    Attributes:
        total: [in, in] float32.
        tokens: number of pairs seen.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, device=device)
        self.tokens = 0

    def add(
        self,
        native: Tensor,
        quantized: Tensor,
        dtype: torch.dtype = torch.float32,
        weights: Tensor | None = None,
    ) -> None:
        """Add pairs [..., in] of any float dtype, rounded to `dtype`; sums are float32.

        Args:
            native: x.
            quantized: x̃.
            dtype: of the products.
            weights: [...] how much each pair counts; alike if None.
        """
        difference = _weighted(native.float() - quantized.float(), weights)
        rows = _weighted(quantized, weights).reshape(-1, quantized.shape[-1])
        add_cross(self.total, difference.reshape(rows.shape).to(dtype), rows.to(dtype))
        self.tokens += rows.shape[0]

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [self.total, torch.tensor(self.tokens)]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        self.total, self.tokens = sums[0], int(sums[1])

    def mean(self) -> Tensor:
        """[in, in] float32 mean, not symmetric: rows belong to the difference."""
        return self.total / max(self.tokens, 1)


def _weighted(inputs: Tensor, weights: Tensor | None) -> Tensor:
    """Inputs [..., in] times the roots of their weights [...]."""
    if weights is None:
        return inputs
    return inputs * weights.to(inputs.device).sqrt().unsqueeze(-1)


def token_weights(squares: Sequence[Tensor], power: float) -> Tensor:
    """[sequences, length] how much each token counts in the gram that some layers share; mean 1.

    To second order the loss increases by Σ_t (g_tᵀ D x_t)², so an input matters as much as the
    loss feels the output at its token (GuidedQuant, arXiv 2505.07004; YAQA, arXiv 2505.22988, whose
    input side weights tokens so). Gradients are heavy-tailed: with power 1 a gram may rest on one
    token in a hundred, and would be fitted to those. A power between leaves most tokens in.

    Args:
        squares: of every layer [sequences, length] ‖g_t‖² over its mean.
        power: of the weights: 1 is the loss's own, 0 counts all alike.
    """
    mean = torch.stack(list(squares)).float().mean(0)
    weights = mean.clamp_min(LEAST_WEIGHT).pow(power)
    return weights / weights.mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What the column loop needs of a gram.

    Attributes:
        upper: [in, in] float32 U with UᵀU = (damped gram)⁻¹, in the order of `order`.
        order: [in] int64, original index of the j-th column to be quantized.
        diagonal: [in] float32, diagonal of the undamped gram, original order.
        dead: [in] bool, inputs that were always zero; none of them where all were, since a layer
            that saw nothing is better rounded than erased.
        damping: damping used, relative to the mean of the diagonal.
        fallback: the gram was of no use (it could not be factored, or nothing but zeros reached the
            layer); U is diagonal and compensation becomes plain rounding.
    """

    upper: Tensor
    order: Tensor
    diagonal: Tensor
    dead: Tensor
    damping: float
    fallback: bool = False

    def conditional_importance(self) -> Tensor:
        """[in] float32 1/U_jj² in the original order: what an error in column j costs the row.

        It is the part of the diagonal that later columns cannot make up for, so it, not the
        diagonal, is the weight of a column's rounding error in the compensated loss.
        """
        importance = torch.empty_like(self.diagonal)
        importance[self.order] = 1.0 / self.upper.diagonal().square()
        return importance

    def rescaled(self, scale: Tensor) -> Factor:
        """The factor of inputs that were divided by `scale` [in], positive.

        Their gram is D⁻¹ gram D⁻¹, so U D is its factor, with the damping divided along and columns
        in the old order.
        """
        return replace(
            self,
            upper=self.upper * scale[self.order],
            diagonal=self.diagonal / scale.square(),
        )


def factorize(
    gram: Tensor, *, damping: float = 0.01, act_order: bool = True, group_width: int | None = None
) -> Factor:
    """Damp and factor a gram, U = R⁻¹ with R Rᵀ the damped gram and both upper triangular.

    One Cholesky and one triangular inverse in float64, instead of the usual Cholesky, inverse,
    Cholesky. If the matrix is not positive definite the damping grows tenfold until it is; if it
    never is, the factor says so and stands for plain rounding.

    Args:
        gram: [in, in] symmetric positive semi-definite.
        damping: added to the diagonal, relative to its mean over live inputs.
        act_order: take columns by decreasing diagonal instead of in order.
        group_width: columns of a group of so many stay together: groups go by decreasing mean of
            their diagonal, columns inside likewise. Does nothing without `act_order`.

    Returns:
        The factor; dead inputs get the mean of the live diagonal.

    Raises:
        InputError: the gram holds NaN or Inf.
    """
    require_finite(gram, "the gram of the layer's inputs", OVERFLOW)
    diagonal = gram.diagonal().double()
    dead = diagonal <= 0
    unseen = bool(dead.all())
    live_mean = diagonal.new_ones(()) if unseen else diagonal[~dead].mean()
    order = torch.arange(len(diagonal), device=gram.device)
    if act_order:
        order = _by_size(diagonal, group_width or len(diagonal))
    base = torch.where(dead, live_mean, diagonal.clamp_min(DIAGONAL_FLOOR * live_mean))[order]
    upper, used = None, damping
    if not unseen:
        matrix = gram[order][:, order].double()
        if dead.any():  # an indefinite gram could still couple them
            matrix.masked_fill_(dead[order] | dead[order].unsqueeze(1), 0.0)
        upper, used = _inverse_root(matrix, base, damping, live_mean)
    fallback = upper is None
    if upper is None:
        upper = torch.diag((base + damping * live_mean).rsqrt())
    return Factor(
        upper=upper.float(),
        order=order,
        diagonal=diagonal.float(),
        dead=dead & (not unseen),
        damping=used,
        fallback=fallback,
    )


def _by_size(diagonal: Tensor, width: int) -> Tensor:
    """[in] columns by decreasing diagonal inside groups of `width`, and these by their means."""
    groups = diagonal.view(-1, width)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    inside += width * torch.arange(len(groups), device=diagonal.device).unsqueeze(1)
    return inside[torch.argsort(groups.mean(1), descending=True, stable=True)].flatten()


def _inverse_root(
    matrix: Tensor, base: Tensor, damping: float, mean: Tensor
) -> tuple[Tensor | None, float]:
    """U and the damping that was needed for it; None if none of the ladder is enough.

    Args:
        matrix: [in, in] float64 gram in the order of the columns; its diagonal is overwritten.
        base: [in] float64 diagonal before damping.
        damping: the first to try, relative to `mean`.
        mean: scalar.
    """
    identity = torch.eye(len(base), dtype=base.dtype, device=base.device)
    for step in range(MAX_DAMPING_STEPS):
        used = damping if step == 0 else max(damping, 1e-4) * 10.0**step
        matrix.diagonal().copy_(base + used * mean)
        root, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(root.flip(0, 1), identity, upper=True)
            if torch.isfinite(upper).all():
                return upper, used
    return None, used


def require_finite(values: Tensor, name: str, advice: str) -> None:
    """Refuse a tensor that holds NaN or Inf.

    Args:
        values: any float dtype and shape.
        name: what it is, for the message.
        advice: what to do about it.

    Raises:
        InputError: it does; says how many values.
    """
    finite = torch.isfinite(values)
    if not finite.all():
        count = values.numel() - int(finite.sum())
        raise InputError(f"{name}: {count} of {values.numel()} values are NaN or Inf; {advice}")


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """[out] mean squared output error d gram dᵀ of every row d of `difference` [out, in]."""
    return ((difference @ gram) * difference).sum(1)


# Numbers of a row from which on `row_products` takes it in pieces.
_PIECE = 1 << 16


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """[n, m] products of few long rows, [n, k] and [m, k].

    On the CPU long rows in bfloat16 are multiplied in float32, piece by piece: oneDNN's own product
    ends the process for some shapes on processors with AMX (a division by zero, as [3, 524288] by
    [524288, 2] in torch 2.13).
    """
    pieces = first.dtype == torch.bfloat16 and first.device.type == "cpu"
    if not pieces or first.shape[1] <= _PIECE:
        return first @ second.T
    total = torch.zeros(len(first), len(second))
    both = (torch.split(one, _PIECE, dim=1) for one in (first, second))
    for a, b in zip(*both, strict=True):
        total += a.float() @ b.float().T
    return total


def relative(error: Tensor, reference: Tensor) -> float:
    """Sum of `error` over sum of `reference`; 0 where both vanish."""
    total = float(reference.sum(dtype=torch.float64))
    return float(error.sum(dtype=torch.float64)) / total if total > 0 else 0.0


def draw_categorical(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index for every row, by inverting its cumulative distribution.

    torch.multinomial draws a number for every entry: 0.68 s for 512 rows of 49,152 entries on two
    cores, where this takes 0.06 s.

    Args:
        weights: [rows, entries] non-negative float32, not all 0 in a row; need not sum to 1.
        generator: draws one number a row.

    Returns:
        [rows, 1] int64.
    """
    cumulative = weights.cumsum(dim=-1)
    share = torch.rand(len(weights), 1, generator=generator, device=generator.device)
    point = share.to(weights.device) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True)
    return index.clamp_(max=weights.shape[1] - 1)  # where rounding made the point the whole sum
