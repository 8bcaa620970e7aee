"""The whole spectrum as a density, by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017).

For a random unit start, the Ritz values of m Lanczos steps are the nodes of a Gauss quadrature of
the spectral density (1/n) Σ_i δ(λ − λ_i), and the squared first entries of their vectors its
weights: every moment up to 2 m − 1 is right in expectation, the weights of a start sum to 1, and
the first moment of a start of random signs is Hutchinson's estimate of tr H / n.

Criteria of a loss landscape, as in Gabdullin's loss-landscape-analysis:

    r_e  = |λ_min / λ_max|
    K_hn = Σ_{λ<0} (|λ| w)ⁿ / Σ_{λ>0} (λ w)ⁿ,   n = ½

K_hn is 0 at a minimum and 1 where both signs weigh alike. Here Lanczos re-orthogonalises against
all vectors, not the last ten: ghosts of settled eigenvalues would count twice in K_hn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.methods.curvature.eigen import lanczos
from quantforge.methods.curvature.operator import Matvec, Probe, draw_probe, require_at_least
from quantforge.methods.curvature.trace import Estimate

# Variance of the smoothing kernel relative to the range of the spectrum (PyHessian).
RELATIVE_VARIANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LandscapeCriteria:
    """How far from a minimum the curvature looks.

    Attributes:
        lowest: smallest node of all starts.
        highest: largest node of all starts.
        extreme_ratio: r_e of `lowest` and `highest`; inf where `highest` is 0 and `lowest` is not.
        negative_weight: K_hn, averaged over starts; inf where there is no positive curvature.
        extreme_ratio_error: standard error of r_e over starts.
        negative_weight_error: standard error of K_hn over starts.
    """

    lowest: float
    highest: float
    extreme_ratio: float
    negative_weight: float
    extreme_ratio_error: float
    negative_weight_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensity:
    """The quadrature of every start.

    Attributes:
        nodes: [starts, steps] float64.
        weights: [starts, steps] float64, each row sums to 1; 0 where a start ended early.
        dimension: n.
        products: products with the operator it took.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    products: int

    def mean_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """(1/n) tr f(H) = the mean of f over the eigenvalues, for f of nodes, elementwise."""
        return _over_starts((function(self.nodes) * self.weights).sum(1), self.products)

    def trace(self) -> Estimate:
        """The trace of H."""
        return _over_starts(self.dimension * (self.nodes * self.weights).sum(1), self.products)

    def smoothed(self, points: Tensor, *, variance: float | None = None) -> Tensor:
        """[points] float64 density, the nodes blurred by a Gaussian; for figures.

        Args:
            points: [points] where.
            variance: of the Gaussian; by default 1e-5 · max(1, range of the nodes).
        """
        if variance is None:
            spread = float(self.nodes.max() - self.nodes.min())
            variance = RELATIVE_VARIANCE * max(1.0, spread)
        distance = points.to(self.nodes).unsqueeze(1) - self.nodes.flatten()
        kernel = torch.exp(-0.5 * distance.square() / variance) / math.sqrt(2 * math.pi * variance)
        return kernel @ self.weights.flatten() / len(self.nodes)

    def criteria(self, *, power: float = 0.5) -> LandscapeCriteria:
        """r_e and K_hn with n = `power`."""
        # Nodes of a null space come out as rounding errors of either sign; a power below 1 would
        # make something of them.
        noise = self.nodes.abs().max() * torch.finfo(torch.float32).eps
        nodes = torch.where(self.nodes.abs() <= noise, 0.0, self.nodes)
        lowest, highest = float(nodes.min()), float(nodes.max())
        ends = [_ratio(abs(float(row.min())), abs(float(row.max()))) for row in nodes]
        sums = [
            (self.weights * side.clamp_min(0.0)).pow(power).sum(1).tolist()
            for side in (-nodes, nodes)
        ]
        shares = [_ratio(below, above) for below, above in zip(*sums, strict=True)]
        extreme = _over_starts(torch.tensor(ends, dtype=torch.float64), self.products)
        negative = _over_starts(torch.tensor(shares, dtype=torch.float64), self.products)
        return LandscapeCriteria(
            lowest=lowest,
            highest=highest,
            extreme_ratio=_ratio(abs(lowest), abs(highest)),
            negative_weight=negative.value,
            extreme_ratio_error=extreme.standard_error,
            negative_weight_error=negative.standard_error,
        )


def spectral_density(
    matvec: Matvec,
    dimension: int,
    *,
    generator: torch.Generator,
    steps: int = 50,
    starts: int = 4,
    kind: Probe = "rademacher",
    dtype: torch.dtype = torch.float32,
) -> SpectralDensity:
    """The spectral density of H; costs steps · starts products and `steps` vectors of memory.

    Args:
        matvec: H on vectors [dimension].
        dimension: of the vectors.
        generator: draws the starts.
        steps: Lanczos steps a start.
        starts: random starts, at least 2 so that their spread is known.
        kind: distribution of the starts' entries.
        dtype: of the vectors.
    """
    require_at_least(starts, 2, "the number of starts")
    steps = min(steps, dimension)
    nodes = torch.zeros(starts, steps, dtype=torch.float64)
    weights = torch.zeros(starts, steps, dtype=torch.float64)
    products = 0
    for row in range(starts):
        start = draw_probe(dimension, generator, kind=kind, dtype=dtype)
        values, vectors = lanczos(matvec, start, steps=steps).eigen()
        nodes[row] = values[-1]  # a start that ends early is filled up with weightless nodes
        nodes[row, : len(values)] = values
        weights[row, : len(values)] = vectors[0].square()
        products += len(values)
    return SpectralDensity(nodes=nodes, weights=weights, dimension=dimension, products=products)


def _over_starts(values: Tensor, products: int) -> Estimate:
    """Mean and standard error of independent values [starts]."""
    finite = bool(torch.isfinite(values).all())
    error = float(values.std()) / math.sqrt(len(values)) if finite else math.inf
    return Estimate(value=float(values.mean()), standard_error=error, products=products)


def _ratio(part: float, whole: float) -> float:
    """The quotient; 0 for 0/0 and inf where only `whole` is 0."""
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole
