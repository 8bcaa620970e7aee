"""Recipes of convolutional networks: which pictures, widths, policies and methods.

Put together like those of language models (`quantforge.recipe`): defaults, then the effort's
preset, the recipe file, settings, named options. A file says what it is by `kind: vision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from quantforge import strict_yaml
from quantforge.config import Config
from quantforge.load.source import PackagedModel
from quantforge.recipe import Recipe, Target, compose_as, load_recipe, resolve_target
from quantforge.search.config import Bits, GroupSize
from quantforge.types import PER_CHANNEL, QuantSpec
from quantforge.vision.reconstruction import ReconstructionConfig

KIND = "vision"


def _checked_edges(text: str) -> str:
    """What `VisionSearchConfig.edges` takes; its ValueError becomes the recipe's error line."""
    if text != "plan":
        QuantSpec.parse(text)
    return text


class PicturesConfig(Config):
    """What a network is calibrated on.

    Attributes:
        source: "synthetic" makes pictures from the network's own BatchNorm statistics; a folder, a
            .parquet, .npy or .npz file, or a hub id of a dataset.
        count: pictures that everything is fitted on.
        held_out: further pictures, on which every choice is made.
        batch: pictures that go through the network together.
        match: pattern of file names, in a folder or an archive.
    """

    source: str = "synthetic"
    match: str = "*"
    count: int = Field(default=64, ge=1)
    held_out: int = Field(default=32, ge=2)
    batch: int = Field(default=16, ge=1)


class VisionSearchConfig(Config):
    """Which widths weights may have, and how they are chosen.

    Attributes:
        bits: widths of the candidates.
        group_sizes: group sizes of the candidates; -1 is per output channel.
        solver: "integer-program", or "uniform", one spec for all layers.
        edges: the first and the last layer's spec, which budgets then do not count; "plan" searches
            for them as for any other.
        sensitivity: how predicted losses are estimated, see `vision.sensitivity`.
    """

    bits: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
    group_sizes: tuple[GroupSize, ...] = (PER_CHANNEL,)
    solver: Literal["integer-program", "uniform"] = "integer-program"
    edges: Annotated[str, AfterValidator(_checked_edges)] = "plan"
    sensitivity: Literal["fisher", "hawq", "measured"] = "fisher"

    def candidates(self, row_lengths: set[int]) -> tuple[QuantSpec, ...]:
        """All grids whose groups divide at least one row length, sorted."""
        every = {QuantSpec(bits, size) for bits in self.bits for size in self.group_sizes}
        return tuple(sorted(s for s in every if any(s.divides(n) for n in row_lengths)))


class ActivationsConfig(Config):
    """What activations are rounded to.

    Attributes:
        bits: widths to choose among; several are searched together with the weights'. Empty leaves
            activations float.
        method: how a grid's range is found: "minmax", "percentile" or "mse".
        edges: width of the network's input and of what the last layer reads; None searches.
        operands: round what residual additions add, as integer-only execution needs; without it
            only what layers read is rounded.
    """

    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = (8,)
    method: Literal["minmax", "percentile", "mse"] = "mse"
    edges: Annotated[int, Field(ge=2, le=8)] | None = 8
    operands: bool = True


class WeightsConfig(Config):
    """How weights become codes before anything is learned.

    Attributes:
        feedback: "nearest", or error feedback along the unfolded inputs: "gptq", "gptaq", "qep".
        grid: what the grid minimises, see `gptq.fit_grid`.
        damping: of the grams, relative to their mean diagonals.
        correct_bias: give every channel back the mean it had.
        equalise: try cross-layer equalisation, and keep it where held-out outputs come nearer.
    """

    feedback: Literal["nearest", "gptq", "gptaq", "qep"] = "qep"
    grid: Literal["minmax", "mse", "diagonal"] = "diagonal"
    damping: float = Field(default=0.01, gt=0)
    correct_bias: bool = True
    equalise: bool = False


class ReconstructionOptions(Config):
    """Learned rounding of blocks, towards the float network's outputs.

    Attributes:
        steps: of a block; 0 leaves it out.
        batch: pictures a step.
        rounding: "adaround", as BRECQ and QDrop do, or "signed", descent on latents as for language
            models, which moves the scales too.
        drop: share of inputs and sites that are left unrounded while a block is learned (QDrop).
        held_out: share of the pictures that judge what was learned.
        learn_ranges: train activation scales too (LSQ).
    """

    steps: int = Field(default=200, ge=0)
    batch: int = Field(default=16, ge=1)
    rounding: Literal["adaround", "signed"] = "signed"
    drop: float = Field(default=0.5, ge=0, lt=1)
    held_out: float = Field(default=0.125, gt=0, lt=1)
    learn_ranges: bool = True

    def of(self, seed: int) -> ReconstructionConfig:
        """What `reconstruct` takes."""
        config = ReconstructionConfig(
            rounding=self.rounding, steps=self.steps, batch=self.batch, drop=self.drop,
            held_out=self.held_out, seed=seed,
        )  # fmt: skip
        return config if self.learn_ranges else replace(config, range_step=0.0)


class TrainingOptions(Config):
    """Training end to end, towards the float network's predictions, after all else.

    Attributes:
        steps: of the optimizer; 0 leaves it out.
        batch: pictures a step.
        quantizer: "hestia", "straight-through" or "lsq", see `train.quantizers`.
        weight_rate: learning rate of the weights, in steps of a layer's grid.
        scale_rate: of the weights' scales, relative to their size; 0 fixes them.
        bias_rate: of the biases; 0 fixes them.
        range_rate: of the activations' steps, relative to their size; 0 fixes them.
        cross_entropy: share of the labels in the loss, where there are labels.
        measure_every: steps between two measurements on held-out pictures.
    """

    steps: int = Field(default=0, ge=0)
    batch: int = Field(default=16, ge=1)
    quantizer: Literal["hestia", "straight-through", "lsq"] = "hestia"
    weight_rate: float = Field(default=0.01, ge=0)
    scale_rate: float = Field(default=1e-3, ge=0)
    bias_rate: float = Field(default=1e-3, ge=0)
    range_rate: float = Field(default=1e-3, ge=0)
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    measure_every: int = Field(default=50, ge=1)


class VisionRecipe(Config):
    """One run's configuration, all of it.

    Attributes:
        schema_version: version of the file's form.
        kind: "vision".
        description: one line for people.
        model: a checkpoint that a package carries, or a folder or hub id.
        network: name of a network that is defined here (`vision.sources`), where the checkpoint is
            weights alone.
        budget: what may be spent, see `vision.compiler`.
        calibration: which pictures are read.
        search: which widths weights may have.
        activations: what activations are rounded to.
        weights: how weights become codes.
        reconstruction: learned rounding after that.
        training: end to end, after that.
    """

    schema_version: Literal[1] = 1
    kind: Literal["vision"] = "vision"
    description: str = ""
    model: PackagedModel | str | None = None
    network: str | None = None
    budget: str | None = None
    calibration: PicturesConfig = PicturesConfig()
    search: VisionSearchConfig = VisionSearchConfig()
    activations: ActivationsConfig = ActivationsConfig()
    weights: WeightsConfig = WeightsConfig()
    reconstruction: ReconstructionOptions = ReconstructionOptions()
    training: TrainingOptions = TrainingOptions()

    @model_validator(mode="after")
    def _one_spec_where_there_is_no_search(self) -> Self:
        if self.search.solver == "uniform" and len(self.activations.bits) > 1:
            raise ValueError(
                "solver uniform takes one width of activations: give activations.bits one"
            )
        return self


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"reconstruction": {"steps": 0}},
    "balanced": {},
    "best": {"calibration": {"count": 256}, "reconstruction": {"steps": 1000}},
}


def compose(
    target: Target, *, effort: str = "balanced", settings: Mapping[str, Any] | None = None
) -> VisionRecipe:
    """The effective recipe of a run, as `quantforge.recipe.compose` does for language models."""
    return compose_as(
        VisionRecipe, lambda name, _: PRESETS[name], target, effort=effort, settings=settings
    )


def any_recipe(name_or_path: str | Path) -> Recipe | VisionRecipe:
    """The recipe of that name or file, of whichever kind, with every default filled in.

    Raises:
        InputError: the file cannot be read.
        UsageError: there is no such recipe, or it holds an unknown key or a bad value.
    """
    target = resolve_target(name_or_path)
    return compose(target) if is_vision_file(target) else load_recipe(name_or_path)


def is_vision_file(target: Target) -> bool:
    """Whether a target's recipe file is one of these.

    Raises:
        InputError: the file cannot be read.
    """
    return target.recipe is not None and strict_yaml.read_mapping(target.recipe).get("kind") == KIND
