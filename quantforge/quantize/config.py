"""Options of the quantize stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from quantforge.config import Config


class RoundingConfig(Config):
    """Block-wise learned rounding after compensation.

    Attributes:
        steps: training steps a block; 0 switches it off.
        latent_step: first step of the latents, in codes; falls linearly to 0.
        scale_step: first step of the scales, relative to their size; falls linearly to 0.
        check_every: steps between measurements on the held-out sequences.
        weighted: weight the block's output channels by how much the loss depends on them.
    """

    steps: int = Field(default=0, ge=0)
    latent_step: float = Field(default=0.006, gt=0)
    scale_step: float = Field(default=0.0005, ge=0)
    check_every: int = Field(default=20, ge=1)
    weighted: bool = True


class TuningConfig(Config):
    """End-to-end tuning of scales and norms with the integers fixed.

    Attributes:
        steps: optimizer steps; 0 switches it off.
        batch: sequences a step, run one at a time.
        scale_step: first step of the scales, relative to their size.
        norm_step: first step of the norm weights.
        warm_up: steps over which the step sizes rise; then they fall linearly to 0.
    """

    steps: int = Field(default=32, ge=0)
    batch: int = Field(default=4, ge=1)
    scale_step: float = Field(default=0.002, gt=0)
    norm_step: float = Field(default=0.0005, ge=0)
    warm_up: int = Field(default=4, ge=1)


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
        rounding: learned rounding after the compensation of a block.
        tuning: of scales and norms, after all blocks.
    """

    method: Literal["rtn", "gptq"] = "gptq"
    sequential: bool = True
    grid: Literal["minmax", "mse", "diagonal", "conditional"] = "diagonal"
    damping: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=4, ge=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    rounding: RoundingConfig = RoundingConfig()
    tuning: TuningConfig = TuningConfig()

    @model_validator(mode="after")
    def _used_or_refused(self) -> Self:
        """An option that `sequential: false` would silently pass over is an error."""
        if self.sequential:
            return self
        fields = QuantizeConfig.model_fields
        for name in ("method", "grid", "damping"):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} does nothing without quantize.sequential=true")
        if self.rounding.steps > 0:
            raise ValueError("rounding.steps does nothing without quantize.sequential=true")
        return self
