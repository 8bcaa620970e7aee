"""Sensitivities of attention heads, in the manner of HeSS (2026, arXiv 2603.25336).

The rows of a query projection [heads · size, in] belong to heads, size rows each, and lie behind
each other in the flat weight. So heads are blocks of the layer's operator, and the joint probe of
`trace` gives the trace of all of them from the same products. A head's score is its share of the
layer's trace; shares of different layers are not comparable. Budgets follow the shares up to a cap,
and what a capped head leaves goes to the others.

The paper's code is not published. It takes the Fisher trace, which is the Hessian of a loss with
labels drawn from the network, and weighs a second error term half; only the trace is here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantforge.errors import UsageError
from quantforge.methods.curvature.operator import Matvec
from quantforge.methods.curvature.scores import Scores
from quantforge.methods.curvature.trace import BlockTraces, hutchinson_blocks


def head_traces(
    matvec: Matvec,
    heads: int,
    out_features: int,
    in_features: int,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 50,
    dtype: torch.dtype = torch.float32,
) -> BlockTraces:
    """The trace of every head's rows of one projection.

    Args:
        matvec: H of the layer's loss, on its weight [out · in], row by row.
        heads: how many the rows belong to, equally many rows each.
        out_features: rows of the weight.
        in_features: columns of the weight.
        generator: draws the probes.
        tolerance: as in `hutchinson_blocks`.
        max_probes: as in `hutchinson_blocks`.
        dtype: of the vectors.
    """
    if heads < 1 or out_features % heads:
        raise UsageError(f"{out_features} rows do not split into {heads} heads")
    return hutchinson_blocks(
        matvec,
        [out_features // heads * in_features] * heads,
        generator=generator,
        tolerance=tolerance,
        max_probes=max_probes,
        dtype=dtype,
    )


def head_scores(traces: BlockTraces) -> Scores:
    """Every head's share of its layer's trace, [heads], summing to 1.

    Traces that came out negative count as 0. The standard error is that of a ratio of means, to
    first order: part and whole come from the same probes.

    Raises:
        UsageError: no head has a positive trace.
    """
    means = traces.values.clamp_min(0.0)
    whole = means.sum()
    if whole <= 0:
        raise UsageError("no head has a positive trace; take more probes or drawn labels")
    shares = means / whole
    counted = traces.samples * (traces.values > 0)
    deviations = (counted - shares * counted.sum(1, keepdim=True)) / whole
    return Scores(
        values=shares,
        standard_errors=deviations.std(0) / math.sqrt(len(deviations)),
    )


def head_budgets(shares: Tensor, total: float, cap: float) -> Tensor:
    """[heads] float64 parts of `total` in proportion to `shares`, none above `cap`.

    What a capped head cannot take is given to the others in proportion to their shares (equally
    where these are all 0), until it fits.

    Args:
        shares: [heads], not negative.
        total: what is given out, at least 0; the result sums to it.
        cap: the most that a head may get.

    Raises:
        UsageError: the heads together cannot take the total.
    """
    heads = len(shares)
    if not 0 <= total <= heads * cap * (1 + 1e-12):
        raise UsageError(f"{heads} heads of at most {cap:g} cannot take {total:g} together")
    budgets = torch.zeros(heads, dtype=torch.float64)
    free = torch.ones(heads, dtype=torch.bool)
    while free.any():
        left = total - float(budgets[~free].sum())
        weights = torch.where(free, shares.double(), 0.0)
        if weights.sum() <= 0:
            weights = free.double()
        parts = left * weights / weights.sum()
        over = free & (parts > cap)
        if not over.any():
            return torch.where(free, parts, budgets)
        budgets[over] = cap
        free &= ~over
    return budgets
