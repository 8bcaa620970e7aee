"""How warm soft weights start, and which layers harden first.

The first temperature is the one at which a softly quantized Gaussian weight is nearest to itself:
argmin over T of E (soft(z; T) − z)². For ternary weights over their mean magnitude z has variance
π/2 and T is 0.3509, with error 0.3676 where rounding has 0.4137. Finer grids start warmer.

Hestia lets layers with a large trace of the loss's Hessian harden at another pace than the rest:

    s_i = sigmoid(κ zscore_i(log trace_i)),    T_i = T exp(−α s_i)

Its prose keeps sensitive layers soft for longer. With its α > 0 they are cooler and harden
earlier; α < 0 does what the prose says. Which is better is to be measured: both signs are allowed.

In the published code a trace that was estimated below 1e-8 counts as 1e-8, and one such layer
spoils the scores of all. Here a trace that is not positive counts as the smallest one that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from quantforge_kernels.soft_grid import SoftGrid, soft_grid
from torch import Tensor

from quantforge.errors import InputError
from quantforge.methods.hestia import in_groups

TERNARY_SPREAD = math.sqrt(math.pi / 2)  # of a Gaussian with mean magnitude 1
COLDEST, WARMEST = 0.1, 2.0
# Quadrature: so many standard deviations on each side, so many points a step of the grid. Soft
# steps are smooth over T / 2 >= 0.05, which makes the trapezoidal rule exact to 1e-12.
DEVIATIONS = 10.0
DENSITY = 64


def soft_error(temperature: float, *, top: int, zero: float, spread: float) -> float:
    """E (soft(z; T) − z)² of z ~ N(0, spread²) on the grid 0 − zero .. top − zero, in float64.

    Args:
        temperature: in squared steps of the grid, positive.
        top: the largest code.
        zero: the code that means 0; whole or not.
        spread: standard deviation of the weights, in steps of the grid.

    Raises:
        ValueError: the spread is not positive and finite: weights of zeros have no temperature.
    """
    if not 0.0 < spread < math.inf:
        raise ValueError(f"a spread must be positive and finite, got {spread}")
    end = DEVIATIONS * spread
    z = torch.linspace(-end, end, 2 * math.ceil(end * DENSITY) + 1, dtype=torch.float64)
    grid = SoftGrid(top=top, temperature=temperature)
    unit, centre = z.new_ones(1, 1), z.new_tensor(zero)
    soft = soft_grid(z.unsqueeze(0), unit, centre, grid).squeeze(0)
    density = torch.exp(-0.5 * (z / spread).square()) / (spread * math.sqrt(2.0 * math.pi))
    return float(((soft - z).square() * density).sum() * (z[1] - z[0]))


def optimal_temperature(
    *, top: int = 2, zero: float = 1.0, spread: float = TERNARY_SPREAD
) -> float:
    """The temperature at which a softly quantized Gaussian is nearest to itself.

    Args:
        top: the largest code; 2 for ternary weights.
        zero: the code that means 0: 2^(bits − 1) of a symmetric grid.
        spread: standard deviation of the weights, in steps of the grid: `relative_spread`.

    Returns:
        Between 0.1 and 2, as published; in squared steps of the grid.

    Raises:
        ValueError: the spread is not positive and finite: weights of zeros have no temperature.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda temperature: soft_error(float(temperature), top=top, zero=zero, spread=spread),
        bounds=(COLDEST, WARMEST),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(found.x)


def relative_spread(weight: Tensor, scale: Tensor) -> float:
    """Root mean square of the weights [out, in] over their scales [out, groups], in steps.

    Raises:
        ValueError: the shapes do not fit each other, or there is no weight.
    """
    if scale.ndim != 2 or len(weight) != len(scale) or not weight.numel():
        raise ValueError(f"weights {tuple(weight.shape)}, scales {tuple(scale.shape)}: no spread")
    groups = in_groups(weight.detach().float(), scale.shape[1])
    return float((groups / scale.detach().float().unsqueeze(-1)).square().mean().sqrt())


def sensitivity_scores(traces: Sequence[float], gain: float = 1.0) -> list[float]:
    """Where each layer's trace lies among all: sigmoid of its z-score in the logarithm, 0..1.

    Args:
        traces: of the loss's Hessian by the layer's weights, in total and not a weight.
        gain: κ.

    Returns:
        One a layer; ½ for all where the traces are the same.

    Raises:
        InputError: a trace is not finite, or none is positive.
    """
    positive = [trace for trace in traces if trace > 0]
    if not positive or not all(map(math.isfinite, traces)):
        raise InputError("the Hessian's traces are not finite or none is positive: estimate again")
    logarithms = [math.log(max(trace, min(positive))) for trace in traces]
    mean = math.fsum(logarithms) / len(logarithms)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logarithms) / len(logarithms))
    # less than rounding errors of the mean is none
    scores = [(x - mean) / deviation if deviation > 1e-9 else 0.0 for x in logarithms]
    return [1.0 / (1.0 + math.exp(-gain * score)) for score in scores]


def temperature_multipliers(
    traces: Sequence[float], *, strength: float = 0.5, gain: float = 1.0
) -> list[float]:
    """What each layer's temperature is multiplied by: exp(−α s_i).

    Args:
        traces: of the loss's Hessian by the layer's weights, in total.
        strength: α; positive hardens layers of large trace earlier, negative later, 0 all alike.
        gain: κ.

    Raises:
        InputError: a trace is not finite, or none is positive.
    """
    return [math.exp(-strength * score) for score in sensitivity_scores(traces, gain)]
