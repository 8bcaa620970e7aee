"""Sensitivities of layers from curvature and weight error, with standard errors carried along.

HAWQ (Dong et al. 2019, arXiv 1905.03696) orders layers by λ/n, the top eigenvalue of the block
Hessian over the layer's size, and fine-tunes them in the order of Ω = λ ‖Q(W) − W‖². HAWQ-V2 (Dong
et al. 2020, arXiv 1911.03852) scores a choice of bits by Ω = (tr H / n) ‖Q(W) − W‖²: for an error
that is isotropic, E[½ Dᵀ H D] = ½ Ω, so half of it is a loss increase in the units of the loss.

The weight errors are known exactly, so a score's standard error is that of its curvature times the
error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Sensitivities and how far they may be off.

    Attributes:
        values: [layers] or [layers, specs] float64.
        standard_errors: the same shape; 0 where a value is exact or infinite.
    """

    values: Tensor
    standard_errors: Tensor

    def order(self) -> list[int]:
        """Layers by descending score, ties in their own order; for scores [layers]."""
        if self.values.dim() != 1:
            raise UsageError("only one score a layer can be put in order; choose a spec")
        ranking: list[int] = torch.argsort(self.values, descending=True, stable=True).tolist()
        return ranking


def eigenvalue_density(eigenvalues: Tensor, errors: Tensor, sizes: Tensor) -> Scores:
    """HAWQ's λ/n: more bits to layers where it is larger. Small layers look very sensitive by it.

    Args:
        eigenvalues: [layers] top eigenvalue of every block.
        errors: [layers] its standard error or residual.
        sizes: [layers] weights of each.
    """
    return _scaled(eigenvalues, errors, 1.0 / sizes.double())


def fine_tuning_scores(eigenvalues: Tensor, errors: Tensor, squared_errors: Tensor) -> Scores:
    """HAWQ's Ω = λ ‖Q(W) − W‖²: the layer where it is largest is quantized and tuned first.

    Half of it bounds the quadratic loss increase of any error of that norm from above.

    Args:
        eigenvalues: [layers] top eigenvalue of every block.
        errors: [layers] its standard error or residual.
        squared_errors: [layers] or [layers, specs] ‖Q(W) − W‖², +inf where a spec does not fit.
    """
    return _scaled(eigenvalues, errors, squared_errors)


def mean_trace_scores(
    traces: Tensor, errors: Tensor, sizes: Tensor, squared_errors: Tensor
) -> Scores:
    """HAWQ-V2's Ω = (tr H / n) ‖Q(W) − W‖², of weights or of activations.

    Args:
        traces: [layers] trace of every diagonal block.
        errors: [layers] its standard error.
        sizes: [layers] entries of each: weights, or an activation's entries in a sample.
        squared_errors: [layers] or [layers, specs], +inf where a spec does not fit.
    """
    return _scaled(traces.double() / sizes, errors.double() / sizes, squared_errors)


def cautious(values: Tensor, errors: Tensor) -> Tensor:
    """`values`, but nowhere below their standard error.

    A block's trace can come out negative by chance, or because the network is not at a minimum. As
    a sensitivity that would say that coarse weights are better than exact ones; an estimate that
    does not rise above its own error is taken at that error instead.
    """
    return torch.maximum(values, errors)


def _scaled(values: Tensor, errors: Tensor, factors: Tensor) -> Scores:
    """Values and errors [layers] times factors [layers] or [layers, specs], infinite ones kept."""
    factors = factors.double()
    shape = (-1,) + (1,) * (factors.dim() - 1)
    fits = torch.isfinite(factors)
    finite = torch.where(fits, factors, 0.0)
    return Scores(
        values=torch.where(fits, values.double().view(shape) * finite, torch.inf),
        standard_errors=errors.double().view(shape) * finite,
    )
