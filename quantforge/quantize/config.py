"""Options of the quantize stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantforge.config import Config


class QuantizeConfig(Config):
    """How weights become codes.

    Attributes:
        method: compensation method; "rtn" rounds to nearest.
        damping: relative damping added to a gram before it is factored.
    """

    method: Literal["rtn", "gptq", "foem"] = "foem"
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)
