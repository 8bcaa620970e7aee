"""Grids and error feedback for layers whose rows fall into groups with a gram of their own.

A convolution with channel groups is that many linear layers side by side, each with its own inputs
(`methods.convolution`). Few groups are compensated one after the other. A depthwise layer is a
thousand groups of one row and nine or twenty-five columns, where calling anything once a group
costs more than the arithmetic: there all groups take their j-th column at the same time, on factors
of all grams made in one call.

The result is that of `gptq.fit_grid` and `compensation.compensate` on every group. Only FOEM's
form C has no place in the other forms' loop, and forms A and B are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.methods.compensation import GPTQ, Feedback, compensate, require_usable
from quantforge.methods.gptq import Grid, fit_grid
from quantforge.numerics import (
    DIAGONAL_FLOOR,
    MAX_DAMPING_STEPS,
    OVERFLOW,
    Factor,
    factorize,
    require_finite,
)
from quantforge.types import PER_CHANNEL, PER_TENSOR, QuantizedWeight, QuantSpec

AT_ONCE = 8  # more groups than this are compensated together


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFactors:
    """`numerics.Factor` of every group.

    Attributes:
        upper: [groups, n, n] float32 U, in the order of `order`.
        order: [groups, n] int64, original index of the j-th column.
        diagonal: [groups, n] float32, of the undamped grams.
        dead: [groups, n] bool.
    """

    upper: Tensor
    order: Tensor
    diagonal: Tensor
    dead: Tensor

    def conditional_importance(self) -> Tensor:
        """[groups, n] 1/U_jj² in the original order."""
        found = 1.0 / self.upper.diagonal(dim1=1, dim2=2).square()
        return torch.empty_like(found).scatter_(1, self.order, found)


def factorize_groups(gram: Tensor, *, damping: float = 0.01) -> GroupFactors:
    """Damp and factor all grams at once; see `numerics.factorize`.

    A group that nothing reached, or whose gram no damping makes positive definite, gets a diagonal
    factor: plain rounding.

    Args:
        gram: [groups, n, n] symmetric positive semi-definite.
        damping: added to a diagonal, relative to its mean over live inputs.

    Raises:
        InputError: a gram holds NaN or Inf.
    """
    require_finite(gram, "the grams of the layer's inputs", OVERFLOW)
    diagonal = gram.diagonal(dim1=1, dim2=2).double()
    dead = diagonal <= 0
    live = (~dead).sum(1, keepdim=True)
    mean = torch.where(dead, 0.0, diagonal).sum(1, keepdim=True) / live.clamp_min(1)
    mean = torch.where(live == 0, 1.0, mean)
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    base = torch.where(dead, mean, torch.maximum(diagonal, DIAGONAL_FLOOR * mean)).gather(1, order)
    across = order.unsqueeze(1).expand_as(gram)
    matrix = gram.double().gather(1, order.unsqueeze(2).expand_as(gram)).gather(2, across)
    gone = dead.gather(1, order)
    matrix.masked_fill_(gone.unsqueeze(1) | gone.unsqueeze(2), 0.0)
    upper = torch.diag_embed((base + damping * mean).rsqrt())
    left = torch.arange(len(gram))[live[:, 0] > 0]
    for step in range(MAX_DAMPING_STEPS):
        if len(left) == 0:
            break
        used = damping if step == 0 else max(damping, 1e-4) * 10.0**step
        damped = matrix[left]
        damped.diagonal(dim1=1, dim2=2).copy_(base[left] + used * mean[left])
        root, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        identity = torch.eye(gram.shape[1], dtype=torch.float64).expand_as(root)
        made = torch.linalg.solve_triangular(root.flip(1, 2), identity, upper=True)
        good = (failed == 0) & torch.isfinite(made).flatten(1).all(1)
        upper[left[good]] = made[good]
        left = left[~good]
    return GroupFactors(
        upper=upper.float(), order=order, diagonal=diagonal.float(), dead=dead & (live > 0)
    )


def quantize_groups(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    *,
    cross: Tensor | None = None,
    feedback: Feedback = GPTQ,
    grid: Grid = "diagonal",
    damping: float = 0.01,
    at_once: int = AT_ONCE,
) -> QuantizedWeight:
    """Fit the grid of a convolution's weight and quantize it with error feedback.

    Args:
        weight: [out, n] flattened kernels, rows of a channel group beside each other.
        gram: [groups, n, n] of the inputs that the quantized layer reads.
        spec: width and grouping; scales run over a row, so a group of them divides n.
        cross: [groups, n, n] mean of (u − ũ) ũᵀ, where the feedback asks for it.
        feedback: which member of the family.
        grid: how the grid is fitted, see `gptq.fit_grid`.
        damping: of the grams, relative to their mean diagonals.
        at_once: up to so many groups are done one after the other.

    Raises:
        InputError: weight or moments hold NaN or Inf.
        ValueError: shapes do not fit, or the spec has one scale for a matrix of several groups.
    """
    groups = len(gram)
    if len(weight) % groups or weight.shape[1] != gram.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} has no grams {tuple(gram.shape)}")
    if groups > 1 and spec.group_size == PER_TENSOR:
        raise ValueError("a layer with channel groups has no single scale for its matrix")
    if groups <= at_once or (feedback.pull and feedback.pull_form != "C"):
        parts = []
        for index, rows in enumerate(weight.view(groups, -1, weight.shape[1])):
            factor = factorize(gram[index], damping=damping)
            scale, zero = fit_grid(rows, factor, spec, grid)
            mine = None if cross is None else cross[index]
            parts.append(
                compensate(rows, factor, spec, scale, zero=zero, cross=mine, feedback=feedback)
            )
        return _stacked(parts)
    factors = factorize_groups(gram, damping=damping)
    scale, zero = fit_groups(weight, factors, spec, grid)
    return compensate_groups(
        weight, factors, spec, scale, zero=zero, cross=cross, feedback=feedback
    )


def fit_groups(
    weight: Tensor, factors: GroupFactors, spec: QuantSpec, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """[out, scales a row] scales, and zero-points, of every row, as `gptq.fit_grid` has them.

    Groups are laid side by side in long rows, so that one search serves all of them.

    Args:
        weight: [out, n].
        factors: of every group's gram.
        spec: width and grouping, of a row of n.
        grid: what it minimises.
    """
    groups, width = factors.diagonal.shape
    rows = len(weight) // groups
    importance = factors.diagonal
    if grid == "conditional":
        importance, grid = factors.conditional_importance(), "diagonal"
    mean = importance.mean(1, keepdim=True)
    importance = torch.where(mean > 0, importance / mean, 1.0)
    beside = weight.view(groups, rows, width).transpose(0, 1).reshape(rows, -1)
    size = width if spec.group_size == PER_CHANNEL else spec.width(width)
    columns = torch.arange(groups * width)
    factor = Factor(
        upper=torch.empty(0, 0), order=columns, diagonal=importance.flatten(),
        dead=factors.dead.flatten(), damping=0.0,
    )  # fmt: skip
    scale, zero = fit_grid(beside, factor, replace(spec, group_size=size), grid)

    def back(found: Tensor) -> Tensor:
        return found.view(rows, groups, -1).transpose(0, 1).reshape(len(weight), -1)

    return back(scale), None if zero is None else back(zero)


def compensate_groups(
    weight: Tensor,
    factors: GroupFactors,
    spec: QuantSpec,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    cross: Tensor | None = None,
    feedback: Feedback = GPTQ,
) -> QuantizedWeight:
    """`compensation.compensate` of all groups at the same time, in torch.

    Args:
        weight: [out, n].
        factors: of every group's gram.
        spec: width and grouping.
        scale: [out, scales a row].
        zero: likewise, of an asymmetric spec.
        cross: [groups, n, n], where the feedback asks for it.
        feedback: which member of the family; FOEM in form C alone.

    Raises:
        InputError: the weight or `cross` holds NaN or Inf.
        ValueError: `cross` is missing, or the feedback has another form.
    """
    require_usable(weight)
    if feedback.pull and feedback.pull_form != "C":
        raise ValueError("many groups know FOEM's form C alone")
    groups, width = factors.order.shape
    rows, order, upper = len(weight) // groups, factors.order, factors.upper
    stored = scale.bfloat16()
    original = weight.float().view(groups, rows, width)
    latent, mismatch, first = original, None, None
    if feedback.needs_cross:
        if cross is None or cross.shape != upper.shape:
            raise ValueError("this feedback needs cross, the mean of (u - u~) u~^T of every group")
        require_finite(cross, "the cross moments of the layer's inputs", OVERFLOW)
        across = order.unsqueeze(1).expand_as(cross)
        ordered = cross.float().gather(2, across)  # columns in order, rows as they are
        if feedback.target:
            shift = feedback.target * (ordered @ upper.transpose(1, 2)) @ upper
            shift = torch.empty_like(shift).scatter_(2, across, shift)
            latent = original + original @ shift
            if feedback.first_column:
                first = _first(original, ordered, upper, order, feedback.target)
        if feedback.mismatch:
            ordered = ordered.gather(1, order.unsqueeze(2).expand_as(cross))
            strict = torch.triu(ordered @ upper.transpose(1, 2), 1)
            mismatch = feedback.mismatch * (strict @ upper)
    by_row = order.unsqueeze(1).expand(groups, rows, width)
    centre = torch.full_like(scale, spec.middle) if zero is None else zero.float()
    place = by_row // spec.width(width)
    steps = stored.float().view(groups, rows, -1).gather(2, place)
    centres = centre.view(groups, rows, -1).gather(2, place)
    fixed = original if feedback.mismatch else latent
    codes = _loop(
        latent.gather(2, by_row), fixed.gather(2, by_row), upper, steps, centres, spec.top,
        mismatch=mismatch, pull=feedback.pull, first=first,
    )  # fmt: skip
    codes = torch.empty_like(codes).scatter_(2, by_row, codes)
    middle = centre.view(groups, rows, -1).repeat_interleave(spec.width(width), 2)
    codes = torch.where(factors.dead.unsqueeze(1), middle, codes)
    return QuantizedWeight(
        codes=codes.to(torch.uint8).view(len(weight), width),
        scale=stored,
        zero=None if zero is None else zero.to(torch.uint8),
        spec=spec,
    )


def _first(original: Tensor, ordered: Tensor, upper: Tensor, order: Tensor, share: float) -> Tensor:
    """[groups, rows] what the first code is chosen for in Qronos (`compensation.first_shift`)."""
    unit = torch.zeros_like(upper[:, :, :1])
    unit[:, 0] = 1.0
    root = torch.linalg.solve_triangular(upper.transpose(1, 2), unit, upper=False)
    shift = share * ordered[:, :, 0] / root.square().sum(1)
    own = original.gather(2, order[:, None, :1].expand(-1, original.shape[1], 1))
    return own[:, :, 0] + torch.einsum("grn,gn->gr", original, shift)


def _loop(
    latent: Tensor,
    fixed: Tensor,
    upper: Tensor,
    steps: Tensor,
    centres: Tensor,
    top: int,
    *,
    mismatch: Tensor | None,
    pull: float,
    first: Tensor | None,
) -> Tensor:
    """[groups, rows, n] float32 codes; all is [groups, rows, n] in the order of the columns."""
    latent, codes = latent.clone(), torch.empty_like(latent)
    for j in range(latent.shape[2]):
        if j > 0 and pull:
            latent[:, :, j] -= pull * (latent[:, :, j] - fixed[:, :, j])
        step, centre, own = steps[:, :, j], centres[:, :, j], latent[:, :, j]
        wanted = first if j == 0 and first is not None else own
        code = (wanted / step + centre).round().clamp(0.0, float(top))
        codes[:, :, j] = code
        error = own - (code - centre) * step
        error = (error - pull * (own - fixed[:, :, j])) / upper[:, j, j].unsqueeze(1)
        later = upper[:, j, j + 1 :].unsqueeze(1)
        latent[:, :, j + 1 :] -= error.unsqueeze(2) * later
        if mismatch is not None:
            owed = mismatch[:, j, j + 1 :].unsqueeze(1)
            latent[:, :, j + 1 :] += fixed[:, :, j : j + 1] * owed
    return codes


def _stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several weights as one."""
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )
