"""Options of the search stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantforge.config import Config

Bits = Annotated[int, Field(ge=2, le=8)]


class SearchConfig(Config):
    """Which plans are considered, and who finds one.

    Attributes:
        bits: widths of the candidates.
        group_sizes: groups of the candidates where they divide a row; -1 is per channel.
        solver: "dynamic-program" for the additive optimum, "uniform" for one spec everywhere.
        independent: lift the rule that layers which servers fuse share one spec.
    """

    bits: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
    group_sizes: tuple[int, ...] = (32, 64, 96, 128, 192, 256, 288, -1)
    solver: Literal["dynamic-program", "uniform"] = "dynamic-program"
    independent: bool = False
