"""Options of the calibration stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config


class CalibrateConfig(Config):
    """How sensitivities are measured.

    Attributes:
        estimator: how a candidate's loss increase is predicted.
        gradient_sequences: fitting sequences used for gradients; grams use all of them.
        gradient_batch: sequences a backward pass.
        recompute: the activations of every so many-th block are computed again in a backward pass
            instead of being kept; 0 keeps all. Saves memory, changes nothing else.
        batch_size: sequences a forward pass, of which one block's activations are held.
        precision: of matrix products in forward and backward passes.
        damping: of the grams, relative to the mean of their diagonals.
        grid: what the scales of the candidates minimise.
    """

    estimator: Literal["fisher-factored"] = "fisher-factored"
    gradient_sequences: int = Field(default=32, ge=1)
    gradient_batch: int = Field(default=1, ge=1)
    recompute: int = Field(default=1, ge=0)
    batch_size: int = Field(default=4, ge=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    damping: float = Field(default=0.01, ge=0)
    grid: Literal["minmax", "mse", "diagonal", "conditional"] = "diagonal"
