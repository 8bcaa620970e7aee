"""The linear model of HIGGS (Malinovskii et al. 2024, arXiv 2411.17525), fitted to measurements.

A quantized network's loss rises by about Σ_l α_l t_l², t_l² = ‖Ŵ_l - W_l‖² / ‖W_l‖² of layer l.
α_l does not depend on the quantizer, so it is measured once, with noise of known size in place of
rounding errors, and gives every candidate's loss from its relative error. Where the loss is
quadratic with Hessian H and the noise isotropic, α_l = ½ tr(H_ll) ‖W_l‖² / n_l: HAWQ-V2 with a
measured trace. The paper's own procedure of fitting was not at hand; this one is least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantforge.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class LinearModel:
    """Coefficients of the relative errors.

    Attributes:
        coefficients: [layers] α, in nats a unit of relative squared error.
        stderr: [layers] standard errors; nan where there are no more measurements than layers.
    """

    coefficients: NDArray[np.float64]
    stderr: NDArray[np.float64]


def fit_linear(errors: NDArray[np.float64], increases: NDArray[np.float64]) -> LinearModel:
    """Least-squares coefficients of increases in loss on relative squared errors, no intercept.

    Args:
        errors: [measurements, layers] t² of every layer, 0 where it was left alone.
        increases: [measurements] of the loss, in nats.

    Raises:
        InputError: the measurements do not determine every coefficient.
        ValueError: shapes differ.
    """
    if errors.ndim != 2 or increases.shape != (len(errors),):
        raise ValueError(
            f"errors must be [measurements, layers] and increases [measurements], got "
            f"{errors.shape} and {increases.shape}"
        )
    measurements, layers = errors.shape
    size = np.linalg.norm(errors, axis=0)
    scaled = errors / np.where(size > 0, size, 1.0)
    coefficients, _, rank, _ = np.linalg.lstsq(scaled, increases, rcond=None)
    if rank < layers:
        raise InputError(
            f"{measurements} measurements determine {rank} of {layers} coefficients: "
            "put noise into every layer, in proportions that differ"
        )
    spread = np.full(layers, np.nan)
    if measurements > layers:
        left = increases - scaled @ coefficients
        variance = float(left @ left) / (measurements - layers)
        spread = np.sqrt(variance * np.linalg.inv(scaled.T @ scaled).diagonal())
    return LinearModel(coefficients=coefficients / size, stderr=spread / size)
