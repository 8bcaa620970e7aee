"""The two Fisher estimates of candidates' losses, and the best of both.

The exact Fisher estimate e of a candidate (see `fisher`) is unbiased but noisy: with 48 sequences
about 20 % a layer and candidate. A search over thousands of them would pick what noise made cheap.
The factored estimate f has little noise, but is wrong by a factor that depends on the kind of
layer, the grid and the layer. So

    log e = log f + a(kind, grid) + b(layer) + c(layer, grid) + noise

where a comes from sums over all layers of a kind, where noise averages out, and b and c are shrunk
towards 0 as their own noise deserves (empirical Bayes, Efron and Morris 1973: the variance of what
is measured, less that of its noise, is the variance of what is true). The noise is known, because
the exact estimate is a mean over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What a logarithm is taken of is at least this: an estimate of nothing tells nothing.
LEAST = 1e-12
# Relative variance of an estimate that tells nothing, of a single sequence for example.
MOST_NOISE = 1e6


def factored_losses(rows: Tensor, moments: Tensor) -> Tensor:
    """½ Σ_o E[g_o²] d_o gram d_oᵀ of a layer's candidates in nats a token, [candidates] float64.

    Args:
        rows: [candidates, out] d_o gram d_oᵀ; +inf for candidates that do not fit.
        moments: [out] E[g_o²].
    """
    return 0.5 * (rows.double() @ moments.double().cpu())


def exact_losses(products: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """½ E[(Σ_t g_tᵀ D x_t)²] in nats a token and its standard error, [layers, candidates] float64.

    Args:
        products: [sequences, layers, candidates] Σ_t g_tᵀ D x_t.
        length: tokens a sequence.
    """
    samples = products.square() / (2 * length)
    return samples.mean(0), standard_error(samples)


def combined_losses(
    factored: Tensor, products: Tensor, length: int, kinds: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Both estimates as one, and its standard error, [layers, candidates] float64.

    The error takes those of a, b and c as independent, which makes it somewhat too large.

    Args:
        factored: [layers, candidates] factored estimate; +inf for candidates that do not fit.
        products: [sequences, layers, candidates] Σ_t g_tᵀ D x_t, at least two sequences.
        length: tokens a sequence.
        kinds: kind of every layer, e.g. "q_proj".
    """
    fits = factored.isfinite()
    samples = products.square() / (2 * length)
    factor, kind_error = _kind_factors(factored, samples, kinds)
    base = factored * factor
    ratios = torch.where(fits, samples / base.where(fits, torch.ones(())).clamp_min(LEAST), 0.0)
    by_layer = ratios.sum(2) / fits.sum(1).clamp_min(1)
    layer, layer_error = _shrunk(by_layer.mean(0), standard_error(by_layer), fits.any(1))
    own = ratios.mean(0) / by_layer.mean(0).clamp_min(LEAST)[:, None]
    # What a candidate's samples vary by beyond their layer's.
    apart = ratios - own * by_layer[:, :, None]
    noise = standard_error(apart) / by_layer.mean(0).clamp_min(LEAST)[:, None]
    candidate, candidate_error = _shrunk(own, noise, fits)
    loss = torch.where(fits, base * layer[:, None] * candidate, torch.inf)
    parts = (kind_error, layer_error[:, None], candidate_error)
    error = sum((part.square() for part in parts), torch.zeros_like(loss)).sqrt()
    return loss, torch.where(fits, loss * error, torch.inf)


def _kind_factors(factored: Tensor, samples: Tensor, kinds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Exact over factored sum of all layers of a kind, and its relative standard error.

    Returns:
        Two [layers, candidates] tables; 1 and 0 where nothing is known.
    """
    factors, errors = torch.ones_like(factored), torch.zeros_like(factored)
    fits = factored.isfinite()
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([other == kind for other in kinds])
        known = fits & rows[:, None]
        below = factored.where(known, torch.zeros(())).sum(0)
        sums = samples.where(known, torch.zeros(())).sum(1)
        above = sums.mean(0)
        usable = (below > LEAST) & (above > LEAST)
        factors[rows] = torch.where(usable, above / below.clamp_min(LEAST), 1.0)
        errors[rows] = torch.where(usable, standard_error(sums) / above.clamp_min(LEAST), 0.0)
    return factors, errors


def _shrunk(measured: Tensor, error: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Factors around 1 shrunk in their logarithm, and what is left of their relative error.

    Args:
        measured: factors, unbiased.
        error: their standard errors.
        known: which of them to trust at all; 1 for the others.
    """
    usable = known & (measured > LEAST)
    logarithm = measured.clamp_min(LEAST).log()
    noise = (error / measured.clamp_min(LEAST)).square().clamp_max(MOST_NOISE)
    if not bool(usable.any()):
        return torch.ones_like(measured), torch.zeros_like(measured)
    true = (logarithm[usable].square().mean() - noise[usable].mean()).clamp_min(0.0)
    weight = torch.where(usable, true / (true + noise).clamp_min(LEAST), 0.0)
    return (weight * logarithm).exp(), (weight * noise).sqrt()


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first axis; infinite for a single sample."""
    if len(samples) < 2:
        return torch.full_like(samples[0], torch.inf)
    error: Tensor = torch.std(samples, 0) / len(samples) ** 0.5
    return error
