"""Options of the evaluate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config


class EvaluateConfig(Config):
    """How networks are compared while compiling.

    Attributes:
        curve_windows: held-out sequences on which uniform networks and the plan are measured.
        curve_bits: widths of the uniform networks that are measured.
        precision: of matrix products.
        prompts: texts whose greedy continuations go into the report.
        tokens: length of those continuations.
    """

    curve_windows: int = Field(default=8, ge=2)
    curve_bits: tuple[int, ...] = (2, 3, 4)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    prompts: tuple[str, ...] = (
        "The capital of France is",
        "To make a cup of tea, first",
        "In 1969, the first astronauts",
    )
    tokens: int = Field(default=24, ge=1)
