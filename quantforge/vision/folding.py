"""BatchNorm with its statistics in training: a gain and a shift of every channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.vision.network import kernel_of, weight_matrix

STATISTICS = "quantforge_statistics"  # of a folded layer: (mean, deviation) of its outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """What a BatchNorm does in evaluation: `x · gain + shift`.

    Attributes:
        gain: [channels] float64, γ / √(σ² + ε).
        shift: [channels] float64, β − μ · gain.
        mean: [channels] of its outputs in training, β.
        deviation: [channels] of its outputs in training: less than |γ| where the variance is no
            larger than ε.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(
        cls,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        epsilon: float,
    ) -> Norm:
        """The norm of these parameters and statistics, all [channels]."""
        gamma = torch.ones_like(mean) if gamma is None else gamma
        beta = torch.zeros_like(mean) if beta is None else beta
        gain = gamma.double() / (variance.double() + epsilon).sqrt()
        return cls(
            gain=gain,
            shift=beta.double() - mean.double() * gain,
            mean=beta.clone(),
            deviation=(gain.abs() * variance.double().sqrt()).float(),
        )

    def fold_into(self, layer: Any) -> None:
        """Let a layer's weight and bias do this to its outputs, and note their statistics."""
        with torch.no_grad():
            matrix = weight_matrix(layer).double() * self.gain[:, None]
            layer.weight.copy_(kernel_of(layer, matrix))
            layer.bias.copy_(layer.bias.double() * self.gain + self.shift)
        setattr(layer, STATISTICS, (self.mean, self.deviation))
