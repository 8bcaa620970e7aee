"""Scales in closed form: with the integers fixed, the layer's output error is quadratic in them.

A row of a quantized weight is s·Z: scale s_g times the integers z_j of every group g. What it costs
on the calibration inputs is, with d = s·Z − w and the gram H of the inputs,

    f(s) = d H dᵀ − 2 c dᵀ            minimal where  A s = b,
    A_gk = z_g H_gk z_kᵀ,             b_g = z_g (H wᵀ + cᵀ)_g

over all groups of the row jointly: scales of one row answer for each other's errors. c = W C
belongs to layers whose inputs x̃ come from quantized layers and whose targets come from the float
inputs x:

    mean (ŵ x̃ − w x)² = mean (d x̃ − w (x − x̃))² = d H dᵀ − 2 w C dᵀ + constant,
    H = mean x̃ x̃ᵀ,  C = mean (x − x̃) x̃ᵀ.

Only the change of the scales is solved for, so that a singular system (a ridge damps it) leaves
them where they were in the directions that the inputs do not see. Scales are stored in 16 bits; a
row whose rounded scales would be worse than those it came with keeps the latter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantforge.types import QuantSpec

# Relative to the diagonal of A. It only has to keep the factorization from failing.
RIDGE = 1e-6
# Rows are taken in chunks whose temporaries hold about this many numbers.
CHUNK_NUMBERS = 1 << 24


def refit_scales(
    codes: Tensor,
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    *,
    zero: Tensor | None = None,
    cross_term: Tensor | None = None,
) -> Tensor:
    """The scales that minimise the output error for the integers as they are.

    Costs about out · in² / 2 multiply-adds.

    Args:
        codes: [out, in] uint8.
        weight: [out, in] float weight that the layer should have.
        gram: [in, in] mean of x̃ x̃ᵀ over the layer's inputs, undamped.
        scale: [out, groups] scales to start from.
        spec: width and grouping.
        zero: [out, groups] zero-points, whole or not; None is the symmetric grid.
        cross_term: [out, in] W C where the targets come from other inputs, see the module's header.

    Returns:
        [out, groups] float32, bfloat16-representable and non-zero; in no row worse than `scale`
        rounded to bfloat16.
    """
    rows, columns = weight.shape
    groups = spec.groups(columns)
    gram, old = gram.float(), scale.bfloat16().float()
    centre = torch.full_like(old, spec.middle) if zero is None else zero.float()
    chunk = max(1, CHUNK_NUMBERS // (4 * columns + 6 * groups * groups))
    parts = []
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        integers = codes[part].view(-1, groups, columns // groups).float()
        integers -= centre[part].unsqueeze(-1)
        difference = (integers * old[part].unsqueeze(-1)).flatten(1) - weight[part].float()
        force = -difference @ gram
        if cross_term is not None:
            force += cross_term[part]
        downhill = (force.view_as(integers) * integers).sum(-1).double()
        system = _normal_matrix(integers, gram)
        new = (old[part] + _solve(system, downhill)).bfloat16().float()
        new = torch.where(torch.isfinite(new) & (new != 0), new, old[part])
        step = (new - old[part]).double()
        gain = 2.0 * (step * downhill).sum(1) - torch.einsum("rg,rgk,rk->r", step, system, step)
        parts.append(torch.where((gain > 0).unsqueeze(1), new, old[part]))
    return torch.cat(parts)


def _normal_matrix(integers: Tensor, gram: Tensor) -> Tensor:
    """[rows, groups, groups] float64 A of the header, from integers [rows, groups, width]."""
    rows, groups, width = integers.shape
    lower = integers.new_zeros(rows, groups, groups, dtype=torch.float64)
    for group in range(groups):
        first = group * width
        reached = integers[:, group] @ gram[first : first + width, first:]
        reached = reached.view(rows, groups - group, width)
        lower[:, group:, group] = (reached * integers[:, group:]).sum(-1)
    return lower + lower.tril(-1).mT


def _solve(system: Tensor, downhill: Tensor) -> Tensor:
    """[rows, groups] float32 step; NaN in rows that cannot be factored, 0 for groups of zeros."""
    size = system.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
    inverse = torch.where(size > 0, 1.0 / size, 0.0)
    scaled = system * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    scaled.diagonal(dim1=1, dim2=2).fill_(1.0 + RIDGE)
    root, failed = torch.linalg.cholesky_ex(scaled)
    step = torch.cholesky_solve((downhill * inverse).unsqueeze(-1), root).squeeze(-1) * inverse
    return torch.where(failed.unsqueeze(1) == 0, step, torch.nan).float()
