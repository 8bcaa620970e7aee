"""Options of the calibration stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config

EstimatorName = Literal[
    "fisher",
    "fisher-exact",
    "fisher-factored",
    "fisher-trace",
    "hawq",
    "hawq-v2",
    "empirical-fisher",
    "gram",
    "measured",
]


class CurvatureLimits(Config):
    """What the estimators that differentiate twice may take.

    Products with the Hessian take several forward passes over the text each, in float32, and hold
    graphs of both derivatives: of one sequence at a time for "joint", of all for the others. A
    recipe may hold limits of estimators that it does not name, for `--sensitivity`.

    Attributes:
        sequences: fitting sequences, one a pass.
        tokens: of each, from its beginning.
        trace: how "hawq-v2" finds traces: "joint" by Hutchinson's probes of all layers at once,
            "hutch++" layer by layer.
        eigenvalue: how "hawq" finds each layer's top eigenvalue.
        products: with the Hessian of all layers at once, at most ("joint").
        layer_products: with the Hessian of one layer, for each of them, at most (the others); 6
            for eigenvalues and 24 for traces where nothing is given.
        tolerance: relative error at which products end earlier.
    """

    sequences: int = Field(default=2, ge=1)
    tokens: int = Field(default=128, ge=2)
    trace: Literal["joint", "hutch++"] = "joint"
    eigenvalue: Literal["lanczos", "power"] = "lanczos"
    products: int = Field(default=32, ge=2)
    layer_products: int | None = Field(default=None, ge=2)
    tolerance: float = Field(default=0.05, gt=0)


class CalibrateConfig(Config):
    """How sensitivities are measured.

    Attributes:
        estimator: how a candidate's loss increase is predicted (`calibrate.estimators` has the
            table): by the Fisher information, exact for each candidate ("fisher-exact"), factored
            ("fisher-factored"), or both ("fisher"), or its trace ("fisher-trace"); by the Hessian's
            top eigenvalue ("hawq") or trace ("hawq-v2"); by every weight's own gradient
            ("empirical-fisher"); by the layer's output alone ("gram"); or by networks with one
            layer quantized ("measured").
        curvature: limits of "hawq" and "hawq-v2".
        probes: networks that "measured" puts together at most, if it is to measure every candidate;
            beyond, one a layer.
        gradient_sequences: fitting sequences used for sensitivities, output grams and channels'
            weights; grams use all of them, and `quantize.token_weighting` takes the gradients of
            all, so many at a time.
        gradient_batch: sequences a backward pass.
        batch_size: sequences a forward pass, of which one block's activations are held.
        precision: of matrix products in forward and backward passes.
        damping: of the grams, relative to the mean of their diagonals.
        grid: what the scales of the candidates minimise.
    """

    estimator: EstimatorName = "fisher"
    curvature: CurvatureLimits = CurvatureLimits()
    probes: int = Field(default=256, ge=1)
    gradient_sequences: int = Field(default=32, ge=1)
    gradient_batch: int = Field(default=4, ge=1)
    batch_size: int = Field(default=4, ge=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    damping: float = Field(default=0.01, ge=0)
    grid: Literal["minmax", "mse", "positive", "diagonal", "conditional"] = "diagonal"
