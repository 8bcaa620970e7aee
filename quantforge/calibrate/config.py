"""Options of the calibration stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config


class CalibrateConfig(Config):
    """How sensitivities are measured.

    Attributes:
        estimator: how a candidate's loss increase is predicted: by the Fisher information, exact
            for each candidate ("fisher-exact"), factored ("fisher-factored"), or both ("fisher").
        gradient_sequences: fitting sequences used for gradients; grams use all of them.
        gradient_batch: sequences a backward pass.
        batch_size: sequences a forward pass, of which one block's activations are held.
        precision: of matrix products in forward and backward passes.
        damping: of the grams, relative to the mean of their diagonals.
        grid: what the scales of the candidates minimise.
    """

    estimator: Literal["fisher", "fisher-exact", "fisher-factored"] = "fisher"
    gradient_sequences: int = Field(default=32, ge=1)
    gradient_batch: int = Field(default=4, ge=1)
    batch_size: int = Field(default=4, ge=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    damping: float = Field(default=0.01, ge=0)
    grid: Literal["minmax", "mse", "diagonal", "conditional"] = "diagonal"

    @property
    def reads_products(self) -> bool:
        """Whether gradients are multiplied with the errors of every candidate."""
        return self.estimator != "fisher-factored"
