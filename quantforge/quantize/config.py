"""Options of the quantize stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config


class QuantizeConfig(Config):
    """How the chosen widths become integers.

    Attributes:
        method: "rtn" rounds on the grid, "gptq" feeds errors back.
        sequential: take every block's inputs from the quantized blocks before it; otherwise the
            one-pass integers of the calibration are used as they are.
        grid: what the scales minimise.
        damping: of the grams, relative to the mean of their diagonals.
        batch_size: sequences a pass.
        precision: of matrix products.
    """

    method: Literal["rtn", "gptq"] = "gptq"
    sequential: bool = True
    grid: Literal["minmax", "mse", "diagonal", "conditional"] = "diagonal"
    damping: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=4, ge=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
