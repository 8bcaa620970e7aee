"""Options of the quantize stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from quantforge.config import Config

# What the float network's inputs are needed for.
CROSS_METHODS = ("gptaq", "foem-gptaq", "qep", "qronos")


def _listed(value: Any) -> Any:
    """A single value stands for a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Coefficient = Annotated[float, Field(ge=0, le=1)]
Coefficients = Annotated[tuple[Coefficient, ...], BeforeValidator(_listed)]


class RoundingConfig(Config):
    """Block-wise learned rounding after compensation.

    Attributes:
        steps: training steps a block; 0 switches it off.
        batch: sequences a step, at most `quantize.batch_size`.
        momentum: weight of the past in the running mean whose sign a step follows.
        latent_step: first step of the latents, in codes; falls linearly to 0.
        scale_step: first step of the scales, relative to their size; falls linearly to 0.
        check_every: steps between measurements on the held-out sequences.
        patience: measurements in a row without a lower error after which a block is left; 0 takes
            all steps.
        share: of the blocks, those that are predicted to lose most by the plan, whose rounding is
            learned; below 1 it needs a searched plan.
        weighted: weight the block's output channels by how much the loss depends on them.
    """

    steps: int = Field(default=0, ge=0)
    batch: int = Field(default=1, ge=1)
    momentum: float = Field(default=0.8, ge=0, lt=1)
    latent_step: float = Field(default=0.006, gt=0)
    scale_step: float = Field(default=0.0005, ge=0)
    check_every: int = Field(default=20, ge=1)
    patience: int = Field(default=0, ge=0)
    share: float = Field(default=1.0, gt=0, le=1)
    weighted: bool = True


class TuningConfig(Config):
    """End-to-end tuning of scales and norms with the integers fixed.

    Attributes:
        steps: optimizer steps; 0 switches it off.
        batch: sequences a step, run one at a time.
        scale_step: first step of the scales, relative to their size.
        norm_step: first step of the norm weights.
        warm_up: steps over which the step sizes rise; then they fall linearly to 0.
        recompute: the activations of every so many-th block are computed again in the backward
            pass instead of being kept; 0 keeps all. Saves memory, changes nothing else.
    """

    steps: int = Field(default=20, ge=0)
    batch: int = Field(default=4, ge=1)
    scale_step: float = Field(default=0.002, gt=0)
    norm_step: float = Field(default=0.0005, ge=0)
    warm_up: int = Field(default=4, ge=1)
    recompute: int = Field(default=1, ge=0)


class QuantizeConfig(Config):
    """How the chosen widths become integers.

    Attributes:
        method: "rtn" rounds on the grid; the others feed errors back, see `methods.compensation`.
            Those that look at the float network's inputs beside the quantized ones take about half
            as long again and are much better: held-out KL of SmolLM2-135M at 3 bits in groups of
            64, untuned: gptq 0.250, gptaq 0.205, qep 0.201 (paired standard error 0.004).
        mismatch: how much of the earlier layers' errors a layer repairs (GPTAQ's, QEP's
            coefficient); the method's published value where empty.
        pull: FOEM's pull towards the float weights; the method's published value where empty.
        pull_form: which of FOEM's three rules; "A" and "B" run in torch and are slow. "A" takes a
            pull in units of the gram, which has to be below the damping.
        sequential: take every block's inputs from the quantized blocks before it; otherwise the
            one-pass integers of the calibration are used as they are.
        true_sequential: inside a block too, fit a layer to what the layers before it give when
            they are quantized. Off: it takes half as long again, and lowered the held-out KL of
            SmolLM2-135M at 3 bits by 0.003 ± 0.005.
        output_feedback: feed the error of a row on to the rows behind it as well, by the output
            gram of the calibration; not with "rtn" and not without `sequential`.
        row_aim: what a row's error is counted from when rows behind make up for it: "target" is
            what the row should be beside quantized inputs, "weight" the float weight, so that rows
            take back part of each other's answer to quantized inputs. The first is the optimum of
            one layer alone, but in a network every layer answers for the same errors of the layers
            before, and it wants the mismatch coefficient that fits: held-out KL of SmolLM2-135M at
            3 bits in groups of 64, untuned, with a coefficient of 0.15, 0.25 and 0.5: 0.199, 0.190,
            0.203; with "weight" 0.189 and 0.191 at the last two (paired errors 0.002 to 0.003).
        token_weighting: tokens count in the grams by the squared gradient of the loss at the
            outputs of their layers, to this power: 1 is the loss's own weight, 0 (off) counts all
            alike. Not in AWQ's choice of scales, and what `mismatch`, `pull` and `damping` are
            chosen by counts held-out tokens alike. Takes gradients of all fitting tokens. With 0.5
            the held-out KL of SmolLM2-135M in groups of 64 is lower by 4, 8 and 15 % at 2, 3 and 4
            bits where neither rounding is learned nor scales are tuned; after both it is 5 %
            higher at 2 bits, 2 % lower at 3 and the same at 4 (docs/methods.md).
        output_damping: of the output grams, relative to the mean of their diagonals.
        grid: what the scales minimise; "absmean" nothing: the mean magnitude of ternary weights.
        order: in which a row's columns are quantized: "activation" by decreasing mean square of
            their input, "groups" likewise but with the columns of a group together (as servers with
            one scale index a group want it of scales that follow the columns), "natural" as they
            stand. Scales are fixed before, so all three store the same form.
        awq: before a block is quantized, divide input channels of its layers where that folds into
            the norm or linear before them, by the scale with the least error of plain rounding.
        clip: before a min-max grid is fitted, clip every group at the share of its range that costs
            least (AWQ's second step); the other grids are searched over their range anyway. Not
            where targets or other rows move what is rounded away from the weight.
        magr: MagR's strength, in units of the weights: before the grid is fitted a layer's weight
            moves to where the range of its groups is smaller and its output almost the same. The
            paper takes 1e-3 per channel and 1e-4 for groups; 0 switches it off.
        refit: solve for the scales once more when the integers are fixed.
        damping: of the grams, relative to the mean of their diagonals. Where `mismatch`, `pull` or
            `damping` list several values, every layer gets those with the least error on held-out
            tokens.
        batch_size: sequences a pass.
        precision: of matrix products.
        rounding: learned rounding after the compensation of a block.
        tuning: of scales and norms, after all blocks.
    """

    method: Literal["rtn", "gptq", "gptaq", "foem", "foem-gptaq", "qep", "qronos"] = "qep"
    mismatch: Coefficients = ()
    pull: Coefficients = ()
    pull_form: Literal["A", "B", "C"] = "C"
    sequential: bool = True
    true_sequential: bool = False
    output_feedback: bool = True
    row_aim: Literal["weight", "target"] = "weight"
    token_weighting: float = Field(default=0.0, ge=0, le=1)
    output_damping: float = Field(default=1.0, gt=0)
    grid: Literal["minmax", "mse", "positive", "diagonal", "conditional", "absmean"] = "diagonal"
    order: Literal["activation", "groups", "natural"] = "activation"
    awq: bool = False
    clip: bool = False
    magr: float = Field(default=0.0, ge=0)
    refit: bool = False
    damping: Coefficients = Field(default=(0.01,), min_length=1)
    batch_size: int = Field(default=4, ge=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    rounding: RoundingConfig = RoundingConfig()
    tuning: TuningConfig = TuningConfig()

    @property
    def chooses(self) -> bool:
        """Whether layers choose between several candidates on held-out tokens."""
        if self.method == "rtn":
            return False
        return max(len(self.mismatch), 1) * max(len(self.pull), 1) * len(self.damping) > 1

    @property
    def needs_output_grams(self) -> bool:
        """Whether rows answer for each other."""
        return self.output_feedback and self.sequential and self.method != "rtn"

    @property
    def weighs_tokens(self) -> bool:
        """Whether grams count tokens by what the loss feels of them."""
        return self.token_weighting > 0 and self.sequential and self.method != "rtn"

    @property
    def needs_held_out(self) -> bool:
        """Whether something is chosen on held-out tokens while blocks are quantized."""
        return self.rounding.steps > 0 or self.chooses

    @property
    def needs_float_stream(self) -> bool:
        """Whether blocks need what the float network has at their entrance."""
        return self.rounding.steps > 0 or self.method in CROSS_METHODS

    @model_validator(mode="after")
    def _used_or_refused(self) -> Self:
        """An option that would silently be passed over is an error."""
        self._check_pull()
        self._check_parts()
        if self.mismatch and self.method not in CROSS_METHODS:
            raise ValueError(f"mismatch does nothing with {self.method}; use gptaq or qep")
        if self.method == "rtn" and self.pull:
            raise ValueError("pull does nothing with rtn; use foem")
        if self.clip and (self.needs_output_grams or self.method in ("qep", "qronos")):
            raise ValueError(
                "clip needs a grid that is fitted to the clipped weight: use rtn, gptq, foem or "
                "gptaq, with output_feedback=false"
            )
        if self.clip and self.grid != "minmax":
            raise ValueError(
                f"clip does nothing with grid {self.grid}, which is searched; use minmax"
            )
        for name in ("refit", "order"):
            changed = getattr(self, name) != QuantizeConfig.model_fields[name].default
            if self.method == "rtn" and changed:
                raise ValueError(f"{name} does nothing with rtn; use gptq")
        if self.sequential:
            return self
        fields = QuantizeConfig.model_fields
        for name in (
            "method", "mismatch", "pull", "pull_form", "true_sequential", "grid", "order", "awq",
            "clip", "magr", "refit", "damping",
        ):  # fmt: skip
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name} does nothing without quantize.sequential=true (effort fast sets false)"
                )
        if self.rounding.steps > 0:
            raise ValueError("rounding.steps does nothing without quantize.sequential=true")
        return self

    def _check_pull(self) -> None:
        """FOEM's rule and its coefficient go together."""
        if self.pull_form == "C":
            return
        if not any(self.pull) and (self.pull or not self.method.startswith("foem")):
            raise ValueError("pull_form does nothing without a pull; use method foem, or give one")
        if self.pull_form == "A" and self.pull and max(self.pull) >= min(self.damping):
            raise ValueError(
                f"pull {max(self.pull):g} in form A diverges: it is in units of the gram and has "
                f"to be below the damping, {min(self.damping):g}"
            )

    def _check_parts(self) -> None:
        """Options of parts that are switched off, and of parts that do not go together."""
        for name, part in (("rounding", self.rounding), ("tuning", self.tuning)):
            defaults = {key: field.default for key, field in type(part).model_fields.items()}
            changed = [k for k, v in part.model_dump().items() if v != defaults[k] and k != "steps"]
            if part.steps == 0 and changed:
                raise ValueError(f"{name}.{changed[0]} does nothing with {name}.steps=0")
        checks = -(-self.rounding.steps // self.rounding.check_every)
        if 0 < checks <= self.rounding.patience:
            raise ValueError(
                f"rounding.patience={self.rounding.patience} does nothing: {self.rounding.steps} "
                f"steps are measured {checks} times; lower it, or rounding.check_every"
            )
        if self.rounding.steps and self.rounding.batch > self.batch_size:
            raise ValueError(
                f"rounding.batch={self.rounding.batch} is more than batch_size={self.batch_size}"
            )
        if self.token_weighting and not self.weighs_tokens:
            raise ValueError("token_weighting does nothing with rtn or sequential=false")
        for name in ("row_aim", "output_damping"):
            changed = getattr(self, name) != QuantizeConfig.model_fields[name].default
            if changed and not self.needs_output_grams:
                raise ValueError(f"{name} does nothing without feedback between rows")
        if self.method == "rtn" and len(self.damping) > 1:
            raise ValueError("rtn does not choose between dampings: give one")
