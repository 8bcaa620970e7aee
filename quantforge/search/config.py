"""Options of the search stage."""

from __future__ import annotations

import re
from itertools import product
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from quantforge.config import Config
from quantforge.types import PER_CHANNEL, PER_TENSOR, SUPPORTED_BITS, Grid, QuantSpec


def _checked_group_size(size: int) -> int:
    """A size that a spec takes; its ValueError becomes the recipe's error line."""
    return QuantSpec(SUPPORTED_BITS[0], size).group_size


def _checked_group_size_or_tensor(size: int) -> int:
    """The same where one scale for the whole matrix may be asked for."""
    return size if size == PER_TENSOR else _checked_group_size(size)


def _checked_inclusion(text: str) -> str:
    """What `EmbeddingsConfig.include` takes; its ValueError becomes the recipe's error line."""
    width = re.fullmatch(r"(\d+)bit", text)
    if text in ("keep", "plan"):
        return text
    try:
        usable = QuantSpec.parse(f"{width[1]}b-pc" if width else text).grid == "uniform"
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{text!r} is none of keep, plan, 8bit or a spec like 8b-g64")
    return text


Bits = Annotated[int, Field(ge=SUPPORTED_BITS[0], le=SUPPORTED_BITS[-1])]
SolverName = Literal[
    "dynamic-program", "integer-program", "lagrangian", "pareto", "ordering", "uniform"
]
GroupSize = Annotated[int, AfterValidator(_checked_group_size)]
GroupSizeOrTensor = Annotated[int, AfterValidator(_checked_group_size_or_tensor)]


class SearchConfig(Config):
    """Which candidates there are and how they are chosen among.

    Attributes:
        bits: widths of the candidates.
        group_sizes: group sizes of the candidates; -1 is per channel. Sizes that divide no layer
            drop out, sizes that divide some are used there.
        grid: levels of all layers: "uniform", or, as networks that are trained on few bits have
            them, "ternary" (-1, 0, 1; five codes a byte) or "balanced" (-3/2, -1/2, 1/2, 3/2; two
            bits). Those need the solver uniform and one group size, 0 for one scale a matrix, and
            are stored in a format of our own, which `quantforge.load` reads and no stock loader.
        asymmetric: add every candidate with zero-points, which cost `bits` more a group; "only"
            takes these alone. Stock transformers does not load checkpoints that hold such weights;
            `quantforge.load` does.
        solver: how the plan is found: exactly, by "dynamic-program" (default), "integer-program"
            (HiGHS) or "pareto" (HAWQ-V2's enumeration, thinned where it grows too large); by
            "lagrangian" prices, within one layer's step of the best; by "ordering" layers by what
            they save for their cost, with their interactions (Schaefer et al. 2023); or "uniform",
            one grid for all layers.
        interactions: what pairs of layers lose beyond what each loses alone, from gradients of
            single sequences (`search.interactions`): "none", "sparse" (layers of one block and of
            adjacent ones) or "full" (all). With them plans are found by branch and bound where
            few groups of layers are planned, else by exchanges from the dynamic program's, or by
            "ordering", and say how far they may be from the best.
        refine: rounds of looking around the plan that was found: its network is differentiated and
            some twenty near it are measured on held-out tokens (`quantforge.refinement`). Not for
            targets of quality, nor for the plans of `pareto`. Effort "best" takes three where they
            can be. One lowers the KL of SmolLM2-135M before tuning, at 2.5 and 3.0 bits, by 4 to
            9 % on texts that it does not see (docs/search.md), in about five minutes of one core,
            and raises the peak of memory by a third.
        correct: multiply predicted losses by what measured uniform networks say of their spec.
        independent: let layers that servers fuse (q/k/v, gate/up) have different specs.
        server: leave out candidates that this program does not load: "transformers", "vllm" (on
            NVIDIA) or "llama.cpp" (what a GGUF type holds exactly; there two and three bits take
            the room of four), by the rules that `quantforge check` applies to a finished folder.
        tensor_parallel: number of devices among which vLLM will split every layer; leaves out
            groups that do not divide the slices.
    """

    bits: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
    group_sizes: tuple[GroupSizeOrTensor, ...] = (32, 64, 128, 192, PER_CHANNEL)
    grid: Grid = "uniform"
    asymmetric: bool | Literal["only"] = False
    solver: SolverName = "dynamic-program"
    interactions: Literal["none", "sparse", "full"] = "none"
    refine: int = Field(default=0, ge=0)
    correct: bool = True
    independent: bool = False
    server: Literal["any", "transformers", "vllm", "llama.cpp"] = "any"
    tensor_parallel: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _the_server_can_be_planned_for(self) -> SearchConfig:
        if self.tensor_parallel > 1 and self.server != "vllm":
            raise ValueError("tensor_parallel is a rule of vllm: add search.server=vllm (--server)")
        if self.independent and self.server == "vllm":
            raise ValueError("vllm fuses layers, which must share a spec: leave independent out")
        return self

    @model_validator(mode="after")
    def _solver_does_what_is_asked(self) -> SearchConfig:
        if self.interactions != "none" and self.solver not in ("dynamic-program", "ordering"):
            raise ValueError(
                f"interactions have a search of their own, or solver ordering, not {self.solver}: "
                "leave the solver or the interactions out"
            )
        if self.refine and self.solver == "uniform":
            raise ValueError("refine exchanges the grids of layers, solver uniform has one for all")
        return self

    @model_validator(mode="after")
    def _grids_go_with_what_is_asked(self) -> SearchConfig:
        if self.grid == "uniform":
            if PER_TENSOR in self.group_sizes:
                raise ValueError("one scale a matrix (group size 0) needs grid ternary or balanced")
            return self
        if self.bits not in (SearchConfig.model_fields["bits"].default, (2,)):
            raise ValueError(f"bits does nothing with grid {self.grid}: leave it out")
        if self.solver != "uniform" or len(self.group_sizes) != 1:
            raise ValueError(
                f"grid {self.grid} needs solver uniform and one of group_sizes (0: one scale a "
                "matrix, -1: one a row)"
            )
        if self.asymmetric:
            raise ValueError(f"a {self.grid} grid has no zero-points: leave asymmetric out")
        if self.server != "any":
            raise ValueError(f"{self.server} does not read {self.grid} grids: leave server out")
        return self

    def candidates(self, row_lengths: set[int]) -> tuple[QuantSpec, ...]:
        """All grids whose groups divide at least one row length, sorted."""
        return tuple(sorted(s for s in self._specs() if any(s.divides(n) for n in row_lengths)))

    @property
    def settled(self) -> QuantSpec | None:
        """The grid of all layers where nothing is left to choose, else None."""
        specs = self._specs()
        return specs.pop() if self.solver == "uniform" and len(specs) == 1 else None

    def _specs(self) -> set[QuantSpec]:
        if self.grid != "uniform":
            return {QuantSpec(2, size, grid=self.grid) for size in self.group_sizes}
        kinds = {False: (True,), True: (True, False), "only": (False,)}[self.asymmetric]
        return {QuantSpec(*one) for one in product(self.bits, self.group_sizes, kinds)}


class EmbeddingsConfig(Config):
    """What becomes of the token embedding and the head; one matrix where they are tied.

    Attributes:
        include: "keep" leaves them in 16 bits; "plan" makes them layers of the search; a spec
            ("8b-g64", or "8bit" in the first of `group_sizes` that divides) is what they get, and
            budgets in bits do not count them then. None plans them under budgets in bytes, shares
            and memory without a part in bits, and keeps them under others. Stock transformers does
            not load a quantized embedding; `quantforge.load` does.
        bits: widths of their candidates where they are planned.
        group_sizes: group sizes likewise; those that do not divide the hidden size drop out.
    """

    include: Annotated[str, AfterValidator(_checked_inclusion)] | None = None
    bits: tuple[Bits, ...] = Field(default=(4, 5, 6, 8), min_length=1)
    group_sizes: tuple[GroupSize, ...] = Field(default=(64, PER_CHANNEL), min_length=1)
