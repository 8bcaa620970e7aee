"""Traces from products: Hutchinson (1989), the joint probe of all blocks, Hutch++ (Meyer 2021).

Hutchinson: E[vᵀ H v] = tr H for entries of v that are independent with mean 0 and variance 1. The
variance of one probe is 2 (‖H‖² − Σ h_jj²) for ±1 entries and 2 ‖H‖² for normal ones (Frobenius
norms), so ±1 is exact where H is diagonal.

Joint probe (HAWQ-V2's trace of every layer): with one v over all blocks and u = H v, v_i · u_i is
unbiased for tr H_ii for every block i at once. The price is the off-diagonal term in the variance
of block i, 2 (‖H_ii‖² − Σ_{j in i} h_jj²) + ‖H_i,rest‖² for ±1 entries.

Hutch++ (Meyer, Musco, Musco, Woodruff 2021): the trace on the range of H S, for k random columns S,
is taken exactly and only the rest is sampled; exact where rank H ≤ k.

Probing stops on the standard error of the mean, never on a mean that stopped moving: two early
samples that agree by chance would end it. At least `LEAST_PROBES` are drawn before it may stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.methods.curvature.operator import (
    Matvec,
    Probe,
    checked_product,
    dot,
    draw_probe,
    require_at_least,
)

LEAST_PROBES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One number and how far it may be off.

    Attributes:
        value: the estimate.
        standard_error: one standard deviation of `value`; 0 where it is exact.
        products: products with the operator it took.
        converged: the standard error reached the tolerance that was asked for.
    """

    value: float
    standard_error: float
    products: int
    converged: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTraces:
    """The traces of several blocks, from the same probes.

    Attributes:
        samples: [probes, blocks] float64, one unbiased value of every trace a probe.
        products: products with the operator they took.
        converged: every block's standard error reached the tolerance that was asked for.
    """

    samples: Tensor
    products: int
    converged: bool = True

    @property
    def values(self) -> Tensor:
        """[blocks] float64 traces."""
        return self.samples.mean(0)

    @property
    def standard_errors(self) -> Tensor:
        """[blocks] float64, one standard deviation of `values`."""
        return self.samples.std(0) / math.sqrt(len(self.samples))

    def combined(self, weights: Tensor) -> Estimate:
        """Σ_i weights_i tr H_ii; its error counts that the blocks were probed together.

        Args:
            weights: [blocks], e.g. a plan's squared weight error of every layer over its size.
        """
        sums = self.samples @ weights.to(self.samples)
        error = float(sums.std()) / math.sqrt(len(sums))
        return Estimate(
            value=float(sums.mean()),
            standard_error=error,
            products=self.products,
            converged=self.converged,
        )


def hutchinson_blocks(
    matvec: Matvec,
    sizes: Sequence[int],
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 50,
    kind: Probe = "rademacher",
    scales: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> BlockTraces:
    """The trace of every diagonal block, with one probe over all of them.

    Args:
        matvec: H on vectors of all blocks together.
        sizes: entries of each block, in the order of the vector.
        generator: draws the probes.
        tolerance: stop once every block's standard error is at most this share of its trace.
        max_probes: at most so many products.
        kind: distribution of the probes' entries.
        scales: positive factor of each block's probe (see the module's header); by default 1.
        dtype: of the vectors.
    """
    require_at_least(max_probes, 2, "the number of probes")
    shares, samples = list(sizes), torch.empty(0, len(sizes), dtype=torch.float64)
    factors = torch.ones(len(shares)) if scales is None else torch.tensor(scales)
    factors = factors.double()
    converged = False
    while len(samples) < max_probes and not converged:
        probe = draw_probe(sum(shares), generator, kind=kind, dtype=dtype)
        if scales is not None:
            for part, scale in zip(torch.split(probe, shares), factors.tolist(), strict=True):
                part.mul_(scale)
        product = checked_product(matvec, probe)
        pairs = zip(torch.split(probe, shares), torch.split(product, shares), strict=True)
        sample = torch.stack([dot(one, other) for one, other in pairs]).cpu()
        samples = torch.cat([samples, (sample / factors.square()).unsqueeze(0)])
        converged = _settled(samples, tolerance)
    return BlockTraces(samples=samples, products=len(samples), converged=converged)


def balanced_hutchinson_blocks(
    matvec: Matvec,
    sizes: Sequence[int],
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 50,
    dtype: torch.dtype = torch.float32,
) -> BlockTraces:
    """`hutchinson_blocks` with scales s_i² = 1/tr H_ii from its own first `LEAST_PROBES` probes.

    Those serve for nothing else, so that the scales do not depend on the samples they are used for.
    A first trace below its own error is taken at that error. Arguments as in `hutchinson_blocks`;
    `max_probes` is of both passes together.
    """
    if max_probes < LEAST_PROBES + 2:
        return hutchinson_blocks(
            matvec, sizes, generator=generator, tolerance=tolerance, max_probes=max_probes,
            dtype=dtype,
        )  # fmt: skip
    first = hutchinson_blocks(
        matvec, sizes, generator=generator, tolerance=tolerance, max_probes=LEAST_PROBES,
        dtype=dtype,
    )  # fmt: skip
    if first.converged:
        return first
    traces = torch.maximum(first.values.abs(), first.standard_errors)
    smallest = torch.finfo(dtype).eps * traces.max()  # blocks that the loss does not depend on
    found = hutchinson_blocks(
        matvec,
        sizes,
        generator=generator,
        tolerance=tolerance,
        max_probes=max_probes - LEAST_PROBES,
        scales=(traces.clamp_min(smallest) / traces.max()).rsqrt().tolist(),
        dtype=dtype,
    )
    return replace(found, products=first.products + found.products)


def hutchinson(
    matvec: Matvec,
    dimension: int,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 50,
    kind: Probe = "rademacher",
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """The trace of H; arguments as in `hutchinson_blocks`, with one block of `dimension`."""
    traces = hutchinson_blocks(
        matvec,
        [dimension],
        generator=generator,
        tolerance=tolerance,
        max_probes=max_probes,
        kind=kind,
        dtype=dtype,
    )
    return traces.combined(torch.ones(1))


def hutch_plus_plus(
    matvec: Matvec,
    dimension: int,
    *,
    sketch: int,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 50,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """The trace of H with its dominant part taken exactly.

    With Q = orth(H S): tr H ≈ tr(Qᵀ H Q) + mean of gᵀ (I − Q Qᵀ) H (I − Q Qᵀ) g. The standard error
    is that of the second term; given Q the first has none.

    Args:
        matvec: H on vectors [dimension].
        dimension: of the vectors.
        sketch: k, columns of S; costs 2 k products and k vectors of memory.
        generator: draws S and the probes.
        tolerance: stop once the standard error is at most this share of the trace.
        max_probes: at most so many products for what the sketch leaves.
        dtype: of the vectors.
    """
    require_at_least(max_probes, 2, "the number of probes")
    require_at_least(sketch, 0, "the sketch size")
    basis = _range_basis(matvec, dimension, min(sketch, dimension), generator, dtype)
    columns = basis.shape[1]
    captured = sum(
        float(dot(column, checked_product(matvec, column.contiguous()))) for column in basis.T
    )
    if columns == dimension:  # nothing is left to sample
        return Estimate(value=captured, standard_error=0.0, products=2 * columns)
    samples = torch.empty(0, 1, dtype=torch.float64)
    converged = False
    while len(samples) < max_probes and not converged:
        probe = draw_probe(dimension, generator, dtype=dtype)
        probe -= basis @ (basis.T @ probe)
        sample = dot(probe, checked_product(matvec, probe)).cpu()
        samples = torch.cat([samples, sample.view(1, 1)])
        converged = _settled(samples, tolerance, offset=captured)
    rest = BlockTraces(samples=samples, products=len(samples))
    return Estimate(
        value=captured + float(rest.values),
        standard_error=float(rest.standard_errors),
        products=2 * columns + len(samples),
        converged=converged,
    )


def _range_basis(
    matvec: Matvec, dimension: int, columns: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """[dimension, columns] orthonormal basis of H S for random signs S."""
    images = torch.empty(dimension, columns, dtype=dtype, device=generator.device)
    for column in range(columns):
        probe = draw_probe(dimension, generator, dtype=dtype)
        images[:, column] = checked_product(matvec, probe)
    basis: Tensor = torch.linalg.qr(images).Q
    return basis


def _settled(samples: Tensor, tolerance: float, *, offset: float = 0.0) -> bool:
    """Whether every mean of samples [probes, blocks] (plus `offset`) is known well enough.

    Where a trace and its error both vanish, it is.
    """
    if len(samples) < LEAST_PROBES:
        return False
    error = samples.std(0) / math.sqrt(len(samples))
    return bool((error <= tolerance * (samples.mean(0) + offset).abs()).all())
