"""Extreme eigenvalues from products: power iteration with deflation, and Lanczos.

Power iteration is HAWQ's (Dong et al. 2019): it finds the eigenvalue of largest magnitude, then,
kept orthogonal to what was found, the next. It stops on the residual ‖H v − λ v‖, not on a value
that stopped moving, and it cannot tell λ from −λ: a loss away from its minimum has negative
curvature, and there a shift is needed, or Lanczos, which sees both ends of the spectrum.

Lanczos with full re-orthogonalisation: m products give the tridiagonal T = Vᵀ H V on the Krylov
space of a random start. Its eigenvalues (Ritz values) at both ends settle first; β_m |s_m| bounds
the residual of each without another product. Without re-orthogonalisation, copies of settled
eigenvalues ("ghosts") appear. Invariant subspaces are seen by a tolerance relative to ‖T‖, since
an off-diagonal entry is never exactly zero. An eigenvalue of several eigenvectors is found once.

For a symmetric H a residual r means that an eigenvalue lies within r of the value: it is the
error bar here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from quantforge.methods.curvature.operator import (
    Matvec,
    checked_product,
    dot,
    draw_probe,
    require_at_least,
)

# Off-diagonals and residuals below this many units of rounding, relative to ‖H‖, are zero.
ROUNDING_UNITS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenpairs:
    """Some eigenvalues with their vectors.

    Attributes:
        values: [count] float64.
        vectors: [count, n], of unit length.
        residuals: [count] float64 ‖H v − λ v‖; an eigenvalue lies within it of the value.
        products: products with the operator they took.
        converged: all residuals reached the tolerance that was asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def power_iteration(
    matvec: Matvec,
    dimension: int,
    *,
    generator: torch.Generator,
    count: int = 1,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
    dtype: torch.dtype = torch.float32,
) -> Eigenpairs:
    """The eigenvalues of largest magnitude, largest first, with their signs.

    Args:
        matvec: H on vectors [dimension].
        dimension: of the vectors.
        generator: draws the starts.
        count: how many pairs.
        tolerance: a pair is done when its residual, outside the vectors found before, is at most
            this share of its |λ|.
        max_iterations: products for each pair at most.
        dtype: of the vectors.
    """
    require_at_least(max_iterations, 1, "the number of iterations")
    count = min(count, dimension)
    vectors = torch.empty(count, dimension, dtype=dtype, device=generator.device)
    values: list[float] = []
    residuals: list[float] = []
    products, converged = 0, True
    for index in range(count):
        start = draw_probe(dimension, generator, kind="gaussian", dtype=dtype)
        pair = _iterate(
            matvec,
            start,
            vectors[:index],
            tolerance,
            max_iterations,
            max(map(abs, values), default=0.0),
        )
        vectors[index] = pair.vector
        values.append(pair.value)
        residuals.append(pair.residual)
        products += pair.products
        converged &= pair.converged
    return Eigenpairs(
        values=torch.tensor(values, dtype=torch.float64),
        vectors=vectors,
        residuals=torch.tensor(residuals, dtype=torch.float64),
        products=products,
        converged=converged,
    )


def top_by_power(
    matvec: Matvec,
    dimension: int,
    *,
    generator: torch.Generator,
    tolerance: float = 1e-2,
    max_iterations: int = 100,
    dtype: torch.dtype = torch.float32,
) -> Eigenpairs:
    """The largest eigenvalue by sign, by power iteration alone; arguments as in `power_iteration`.

    Where the largest magnitude λ is negative, a second iteration on H − λ I, which has no negative
    eigenvalue, finds the other end; the tolerance is then relative to the width of the spectrum.
    """
    iterate = partial(
        power_iteration,
        dimension=dimension,
        generator=generator,
        tolerance=tolerance,
        max_iterations=max_iterations,
        dtype=dtype,
    )
    first = iterate(matvec)
    shift = float(first.values[0])
    if shift >= 0:
        return first
    second = iterate(lambda v: matvec(v) - shift * v)
    return replace(
        second,
        values=second.values + shift,
        products=first.products + second.products,
        converged=first.converged and second.converged,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Iterate:
    """Where power iteration ended: one eigenpair, as in `Eigenpairs`."""

    vector: Tensor
    value: float
    residual: float
    products: int
    converged: bool


def _iterate(
    matvec: Matvec,
    start: Tensor,
    found: Tensor,
    tolerance: float,
    max_iterations: int,
    scale: float,
) -> _Iterate:
    """Power iteration outside the span of `found` [k, n]; `scale` is the |λ| found before.

    What is left of `found`'s errors in the product would keep the residual of a much smaller
    eigenvalue up, so iteration ends by the residual outside; the whole one is reported.
    """
    floor = ROUNDING_UNITS * torch.finfo(start.dtype).eps * scale
    outside = _orthogonal(start, found)
    products, converged = 0, False
    while True:
        vector = outside / outside.norm()
        product = checked_product(matvec, vector)
        products += 1
        value = float(dot(vector, product))
        outside = _orthogonal(product, found)
        remaining = float((outside - value * vector).norm())
        converged = remaining <= max(tolerance * abs(value), floor)
        if converged or products == max_iterations:
            residual = float((product - value * vector).norm())
            return _Iterate(
                vector=vector,
                value=value,
                residual=residual,
                products=products,
                converged=converged,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tridiagonal:
    """H on a Krylov space of m dimensions.

    Attributes:
        basis: [m, n] orthonormal rows.
        diagonal: [m] float64.
        off_diagonal: [m] float64; the last one couples to what the space leaves out, and is 0
            where the space is invariant.
    """

    basis: Tensor
    diagonal: Tensor
    off_diagonal: Tensor

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Ritz values [m] float64, ascending, and their vectors [m, m] in `basis`, as columns."""
        inner = self.off_diagonal[:-1]
        matrix = torch.diag(self.diagonal) + torch.diag(inner, 1) + torch.diag(inner, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    steps: int,
    finished: Callable[[Tridiagonal], bool] = lambda _: False,
) -> Tridiagonal:
    """Reduce H to tridiagonal form on the Krylov space of `start`.

    Args:
        matvec: H on vectors [n].
        start: [n], not zero; its dtype and device are those of the vectors.
        steps: dimensions of the space at most, a product and a vector of memory each.
        finished: asked after every step whether to stop.
    """
    require_at_least(steps, 1, "the number of Lanczos steps")
    steps = min(steps, len(start))
    basis = start.new_empty(steps, len(start))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    vector, scale = start / start.norm(), 0.0
    negligible = ROUNDING_UNITS * torch.finfo(start.dtype).eps
    for step in range(steps):
        basis[step] = vector
        product = checked_product(matvec, vector)
        diagonal.append(float(dot(vector, product)))
        rest = _orthogonal(product, basis[: step + 1])
        beta = float(rest.norm())
        scale = max(scale, abs(diagonal[-1]), beta)
        invariant = beta <= negligible * scale
        off_diagonal.append(0.0 if invariant else beta)
        reduced = Tridiagonal(
            basis=basis[: step + 1],
            diagonal=torch.tensor(diagonal, dtype=torch.float64),
            off_diagonal=torch.tensor(off_diagonal, dtype=torch.float64),
        )
        if invariant or finished(reduced):
            break
        vector = rest / beta
    return reduced


def extreme_eigenvalues(
    matvec: Matvec,
    dimension: int,
    *,
    generator: torch.Generator,
    count: int = 1,
    tolerance: float = 1e-2,
    max_steps: int = 50,
    dtype: torch.dtype = torch.float32,
) -> Eigenpairs:
    """The lowest and the highest eigenvalues, by sign and not by magnitude.

    Args:
        matvec: H on vectors [dimension].
        dimension: of the vectors.
        generator: draws the start.
        count: how many from each end.
        tolerance: done when their residuals are at most this share of the largest magnitude.
        max_steps: products at most.
        dtype: of the vectors.

    Returns:
        The pairs in ascending order, the `count` lowest before the `count` highest; fewer where
        the operator has fewer different eigenvalues.
    """
    require_at_least(count, 1, "the number of eigenvalues")

    def select(reduced: Tridiagonal) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = reduced.eigen()
        bounds = reduced.off_diagonal[-1] * vectors[-1].abs()
        size = len(values)
        chosen = sorted({*range(min(count, size)), *range(max(size - count, 0), size)})
        return values[chosen], vectors[:, chosen], bounds[chosen]

    def settled(reduced: Tridiagonal) -> bool:
        values, _, bounds = select(reduced)
        return bool((bounds <= tolerance * values.abs().max()).all())

    def finished(reduced: Tridiagonal) -> bool:
        return len(reduced.diagonal) >= 2 * count and settled(reduced)

    start = draw_probe(dimension, generator, kind="gaussian", dtype=dtype)
    reduced = lanczos(matvec, start, steps=max_steps, finished=finished)
    values, combinations, bounds = select(reduced)
    return Eigenpairs(
        values=values,
        vectors=combinations.T.to(reduced.basis) @ reduced.basis,
        residuals=bounds,
        products=len(reduced.diagonal),
        converged=settled(reduced),
    )


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` [n] without its part in the span of the orthonormal rows of `basis` [k, n].

    Twice, because once leaves what rounding put back.
    """
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
