"""Options of the calibrate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config


class CalibrateConfig(Config):
    """How sensitivities are estimated.

    Attributes:
        estimator: how the loss increase of a candidate is predicted; "exact" reads the curvature
            of the loss, "factored" its first-order factored form.
        batch_size: sequences run at once.
    """

    estimator: Literal["exact", "factored"] = "exact"
    batch_size: int = Field(default=4, ge=1)
