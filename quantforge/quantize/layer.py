"""One layer: the members of the compensation family that are allowed, and which of them is taken.

Every candidate is a `Feedback` (how much of the earlier layers' errors is repaired, how strongly
the weights are pulled back) and a damping. All of them are fitted on the fitting tokens; where
there are several, the one whose output on held-out tokens is nearest to the float network's is
kept, for the loss on the fitting tokens always prefers the least regularised. Where MagR or AWQ's
clip is asked for, all of them start from the weight it makes; what they are judged by is the weight
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from quantforge.methods.awq import clip_groups, search_clip
from quantforge.methods.compensation import (
    FEEDBACKS,
    GPTQ,
    PULLS,
    CrossTerms,
    Feedback,
    asymmetric_error,
    compensate,
    cross_terms,
    require_usable,
    target_shift,
)
from quantforge.methods.gptq import fit_grid
from quantforge.methods.magr import magr
from quantforge.methods.output_feedback import compensate_rows
from quantforge.methods.refit import refit_scales
from quantforge.methods.rtn import round_to_nearest
from quantforge.numerics import Factor, factorize
from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.streams import StageMoments
from quantforge.types import QuantizedWeight, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to quantize a layer.

    Attributes:
        feedback: member of the family.
        damping: of the gram.
        act_order: take columns by decreasing diagonal of the gram.
        group_width: columns of a group of so many stay together; None lets them mix.
    """

    feedback: Feedback
    damping: float
    act_order: bool = True
    group_width: int | None = None

    def __str__(self) -> str:
        parts = [f"damping {self.damping:g}"]
        if self.feedback.mismatch:
            parts.append(f"mismatch {self.feedback.mismatch:g}")
        if self.feedback.target:
            parts.append(f"target {self.feedback.target:g}")
        if self.feedback.pull:
            parts.append(f"pull {self.feedback.pull:g}")
        return ", ".join(parts)


def choices(config: QuantizeConfig, group_width: int) -> list[Choice]:
    """Every allowed combination; the published coefficients where nothing else is asked for.

    Args:
        config: method, its candidates, order of the columns.
        group_width: weights of a row that share a scale.
    """
    base = FEEDBACKS[config.method]
    strength = "target" if base.target else "mismatch"
    strengths = config.mismatch or (getattr(base, strength),)
    pulls = config.pull or (PULLS[config.pull_form] if base.pull else 0.0,)
    return [
        Choice(
            feedback=replace(
                base,
                **{strength: amount},
                pull=pull,
                pull_form=config.pull_form,
                first_column=base.first_column and amount > 0,
            ),
            damping=damping,
            act_order=config.order != "natural",
            group_width=group_width if config.order == "groups" else None,
        )
        for amount, pull, damping in product(strengths, pulls, config.damping)
    ]


class Stage:
    """What the layers that read one input share: its moments, and what choices make of them."""

    def __init__(self, fitting: StageMoments, held_out: StageMoments | None) -> None:
        self.fitting, self.held_out = fitting, held_out
        self._factors: dict[tuple[float, bool, int | None], Factor] = {}
        self._terms: dict[Choice, CrossTerms] = {}

    def factor(self, choice: Choice) -> Factor:
        """The gram's factor with a choice's damping and order; made once."""
        key = (choice.damping, choice.act_order, choice.group_width)
        if key not in self._factors:
            damping, act_order, width = key
            self._factors[key] = factorize(
                self.fitting.gram, damping=damping, act_order=act_order, group_width=width
            )
        return self._factors[key]

    def terms(self, choice: Choice) -> CrossTerms:
        """What a choice makes of the cross moment; made once."""
        if choice not in self._terms:
            factor = self.factor(choice)
            self._terms[choice] = cross_terms(self.fitting.cross, factor, choice.feedback)
        return self._terms[choice]

    def aim(self, weight: Tensor, choice: Choice) -> Tensor:
        """[out, in] what a weight should become if it were free, as far as a choice answers."""
        factor, terms = self.factor(choice), self.terms(choice)
        if terms.mismatch is None or self.fitting.cross is None:
            return terms.target(weight)
        shift = target_shift(self.fitting.cross.float(), factor, choice.feedback.mismatch)
        return weight + weight @ shift


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensated:
    """A quantized layer and what it is compared with.

    Attributes:
        quantized: the result.
        rounded: rounding to nearest on the same kind of grid.
        factor: of the gram with the damping that was used.
        choice: what was taken; None for plain rounding.
    """

    quantized: QuantizedWeight
    rounded: QuantizedWeight
    factor: Factor
    choice: Choice | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """How the loss couples a layer's outputs; nothing of it where rows are taken alone.

    Attributes:
        grams: diagonal blocks of the output gram, which cover the rows in order.
        factors: of these, damped.
    """

    grams: Sequence[Tensor] = ()
    factors: Sequence[Factor] = ()

    @classmethod
    def of(cls, grams: Sequence[Tensor], damping: float) -> Outputs:
        """Factor the blocks of an output gram."""
        return cls(grams=grams, factors=[factorize(gram, damping=damping) for gram in grams])

    def couple(self, rows: Tensor) -> Tensor:
        """The output gram times [out, in]; the same where rows are taken alone."""
        if not self.grams:
            return rows
        parts = torch.split(rows, [len(gram) for gram in self.grams])
        return torch.cat([gram @ part for gram, part in zip(self.grams, parts, strict=True)])


def quantize_layer(
    weight: Tensor,
    stage: Stage,
    spec: QuantSpec,
    config: QuantizeConfig,
    outputs: Outputs = Outputs(),
) -> Compensated:
    """Quantize one layer by the configured method.

    Args:
        weight: [out, in] float32.
        stage: moments of its input.
        spec: width, grouping and symmetry.
        config: method, its candidates, grid, MagR's strength.
        outputs: lets rows answer for each other.

    Raises:
        InputError: weight or moments hold NaN or Inf.
    """
    require_usable(weight)
    plain = Choice(feedback=GPTQ, damping=config.damping[0])
    allowed = choices(config, spec.width(weight.shape[1])) if config.method != "rtn" else [plain]
    factor = stage.factor(allowed[0])
    start = _shrunk(weight, stage, spec, config)
    scale, zero = fit_grid(start, factor, spec, config.grid)
    rounded = round_to_nearest(start, scale, spec, zero)
    if config.method == "rtn":
        return Compensated(quantized=rounded, rounded=rounded, factor=factor, choice=None)
    best: Compensated | None = None
    least = torch.inf
    for choice in allowed:
        rows = _Rows(
            weight=weight, start=start, stage=stage, spec=spec, choice=choice, config=config
        )
        quantized = (
            compensate_rows(
                stage.aim(weight, choice) if config.row_aim == "target" else weight,
                outputs.factors,
                rows.quantize,
            )
            if outputs.factors
            else rows.quantize(slice(None))
        )
        factor = stage.factor(choice)
        made = Compensated(quantized=quantized, rounded=rounded, factor=factor, choice=choice)
        error = _held_out_error(weight, stage, quantized, outputs) if len(allowed) > 1 else 0.0
        if best is None or error < least:
            best, least = made, error
    assert best is not None
    return best


def _shrunk(weight: Tensor, stage: Stage, spec: QuantSpec, config: QuantizeConfig) -> Tensor:
    """The weight after MagR and after AWQ's clip, as far as they are asked for."""
    gram = stage.fitting.gram
    if config.magr:
        weight = magr(weight, gram, spec, strength=config.magr)
    if config.clip:
        weight = clip_groups(weight, search_clip(weight, gram, spec))
    return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows of one layer, quantized by one member of the family.

    Attributes:
        weight: [out, in] the float weight.
        start: [out, in] the same after MagR and clip.
        stage: moments of the layer's input.
        spec: width, grouping and symmetry.
        choice: member and damping.
        config: grid, and whether scales are solved for once more.
    """

    weight: Tensor
    start: Tensor
    stage: Stage
    spec: QuantSpec
    choice: Choice
    config: QuantizeConfig

    def quantize(self, rows: Tensor | slice, carried: Tensor | None = None) -> QuantizedWeight:
        """Quantize some rows, which other rows may ask to differ by `carried` from their aim.

        The grid is fitted to what is really rounded: the target, where it is not the weight.
        """
        start, feedback = self.start[rows], self.choice.feedback
        factor, terms = self.stage.factor(self.choice), self.stage.terms(self.choice)
        rounded = terms.target(start) if carried is None else terms.target(start) + carried
        scale, zero = fit_grid(rounded, factor, self.spec, self.config.grid)
        made = compensate(
            start, factor, self.spec, scale,
            zero=zero, terms=terms, feedback=feedback, carried=carried,
        )  # fmt: skip
        return self._refitted(made, self.weight[rows], carried) if self.config.refit else made

    def _refitted(
        self, made: QuantizedWeight, weight: Tensor, carried: Tensor | None
    ) -> QuantizedWeight:
        """The scales that are best for the integers, as far as the method answers for x̃ ≠ x."""
        feedback, moments = self.choice.feedback, self.stage.fitting
        share, cross = feedback.target + feedback.mismatch, moments.cross
        fitted = refit_scales(
            made.codes,
            weight if carried is None else weight + carried,
            moments.gram,
            made.scale,
            made.spec,
            zero=made.zero,
            cross_term=share * (weight @ cross) if share and cross is not None else None,
        )
        return replace(made, scale=fitted.bfloat16())


def _held_out_error(
    weight: Tensor, stage: Stage, quantized: QuantizedWeight, outputs: Outputs
) -> float:
    """Squared distance to the float output on held-out tokens, up to a constant.

    Where rows answer for each other it is the distance that the output gram measures.
    """
    if stage.held_out is None:
        raise ValueError("several candidates need held-out tokens")
    difference = quantized.dequantize() - weight
    gram, cross = stage.held_out.gram, stage.held_out.cross
    error = asymmetric_error(difference, weight, gram, cross, outputs.couple(difference))
    return float(error.sum(dtype=torch.float64))
