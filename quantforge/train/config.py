"""Options of recovery by training."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from quantforge.config import Config


class TrainingConfig(Config):
    """Training of weights, scales and norms on exactly the plan's bits, after all else.

    Attributes:
        block_steps: steps of training a block by itself first, towards the float block's output,
            before the scales are tuned; 0 switches that off. It takes the memory of one block.
        tokens: to train the whole network on; 0 switches it off unless there are `minutes`.
        minutes: of wall time; a few timed steps turn it into tokens, once: a resumed run, and one
            on a busier machine after it, trains on as many.
        batch: sequences a step, over all processes.
        at_once: sequences that go through the network together.
        quantizer: how weights are quantized while they are trained, see `train.quantizers`.
        start: the float weights that training starts from. "dequantized" takes the integers'
            own, in the middle of their cells. "compensated" takes the original ones drawn into
            the cells: where compensation chose another code than the nearest they lie at its edge,
            and a step of any size turns many of them (docs/training.md). "float" takes the
            original ones as they are and forgets the compensation. None: blocks, whose gradients
            are precise, start "compensated", the whole network "dequantized".
        pressure_ramp: share of training in which the quantized weight's share in the one used goes
            from 0 to 1 (Hestia's "compress ratio", published 0.2); 0 starts at 1, at the
            compensated network instead of the float one.
        temperature: of the soft weights at the start, in squared steps of the grid; None takes
            every layer's own, see `methods.temperature`.
        cooling: share of training, at its end, in which the temperature falls to 0.
        cooling_style: how it falls.
        coldest: temperatures below are 0; see `schedules.TemperatureSchedule`.
        alpha: how much cooler layers with a large trace of the loss's second derivatives are:
            their temperature is multiplied by exp(−α s), s in 0..1. Of either sign; 0 (off) cools
            all alike. Hestia's code has 0.5. Of the whole network's training; blocks cool alike.
        kappa: how steeply s follows the logarithm of the trace.
        optimizer: of all parameters, see `train.optimizers`.
        weight_rate: learning rate of the weights; with `relative_rate` in steps of a layer's grid.
        relative_rate: `weight_rate` counts in a layer's mean scale, so that a step moves the
            weights of wide and of narrow grids equally many codes; off, it is absolute, as
            published.
        scale_rate: learning rate of the scales, relative to their size; 0 fixes them.
        norm_rate: learning rate of the norms; 0 fixes them.
        weight_decay: of the weights, decoupled: a step takes `weight_rate · weight_decay` of a
            weight away, whatever its grid.
        betas: how much of the past the optimizer's two running means keep; None takes 0.9 and 0.95
            for AdamW, 0.965 and 0.99 for Sophia.
        curvature: Sophia's estimate: "bartlett" by labels drawn from the network, "hutchinson" by
            differences of gradients along random signs.
        curvature_every: steps between two of them.
        rho: Sophia's; larger clips less.
        warm_up: share of training in which the learning rates rise.
        decay: share of training, at its end, in which they fall.
        floor: to this share of themselves.
        clip: largest norm of all gradients together; 0 clips nothing.
        cross_entropy: share of the text's own next tokens in the loss, beside the divergence from
            the float network.
        hidden_term: weight of the relative squared error of the states that enter the head.
        teacher_top_k: so many of the float network's likeliest tokens a position, with their
            probabilities and what is left as one outcome, are found once, and noted for a run that
            goes on, 8 bytes each. 0 makes its whole distribution anew in every step, from the
            states that enter its head: exact, and a product with the head more a token.
        precision: of matrix products.
        recompute: the activations of every so many-th block are computed again in the backward
            pass; 0 keeps all. Saves memory, changes nothing else.
        evaluate_every: tokens between two measurements on held-out sequences, after which the state
            is noted; the best one measured is what training gives.
    """

    block_steps: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    minutes: float = Field(default=0.0, ge=0)
    batch: int = Field(default=8, ge=1)
    at_once: int = Field(default=1, ge=1)
    quantizer: Literal["hestia", "straight-through", "lsq", "absmean"] = "hestia"
    start: Literal["compensated", "dequantized", "float"] | None = None
    pressure_ramp: float = Field(default=0.2, ge=0, le=1)
    temperature: float | None = Field(default=None, gt=0)
    cooling: float = Field(default=0.8, ge=0, le=1)
    cooling_style: Literal["cosine", "linear"] = "cosine"
    coldest: float = Field(default=0.02, ge=0)
    alpha: float = 0.0
    kappa: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "sophia"] = "adamw"
    weight_rate: float = Field(default=2e-3, ge=0)
    relative_rate: bool = True
    scale_rate: float = Field(default=1e-3, ge=0)
    norm_rate: float = Field(default=2e-4, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] | None = None
    curvature: Literal["bartlett", "hutchinson"] = "bartlett"
    curvature_every: int = Field(default=10, ge=1)
    rho: float = Field(default=0.04, gt=0)
    warm_up: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.3, ge=0, le=1)
    floor: float = Field(default=0.1, ge=0, le=1)
    clip: float = Field(default=1.0, ge=0)
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    hidden_term: float = Field(default=0.0, ge=0)
    teacher_top_k: int = Field(default=0, ge=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: int = Field(default=1, ge=0)
    evaluate_every: int = Field(default=65_536, ge=1)

    @property
    def on(self) -> bool:
        """Whether the whole network is trained."""
        return self.tokens > 0 or self.minutes > 0

    @property
    def needs_originals(self) -> bool:
        """Whether it looks at the float weights from before compensation."""
        return self.block_steps > 0 or (self.on and self.start in ("compensated", "float"))

    @model_validator(mode="after")
    def _used_or_refused(self) -> Self:
        """An option that would silently be passed over is an error."""
        if self.tokens and self.minutes:
            raise ValueError(f"tokens={self.tokens} and minutes={self.minutes:g}: give one of them")
        if not self.on:
            whole = {
                "alpha", "kappa", "cross_entropy", "hidden_term", "norm_rate", "recompute",
                "evaluate_every", "teacher_top_k",
            }  # fmt: skip
            names = whole if self.block_steps else set(type(self).model_fields)
            self._refuse(names, "without training.tokens or minutes")
        if self.block_steps and self.optimizer == "sophia":
            raise ValueError(
                "block_steps needs the optimizer adamw: blocks have no curvature for sophia"
            )
        self._check_quantizer()
        if self.alpha == 0:
            self._refuse({"kappa"}, "without an alpha")
        if self.teacher_top_k and self.hidden_term:
            raise ValueError(
                "hidden_term needs the float network's states: leave teacher_top_k at 0"
            )
        if self.optimizer != "sophia":
            names = {"curvature", "curvature_every", "rho"}
            self._refuse(names, f"with the optimizer {self.optimizer}")
        if self.warm_up + self.decay > 1:
            raise ValueError(
                f"warm_up={self.warm_up:g} and decay={self.decay:g} are more than all of training"
            )
        if self.betas and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.weight_rate == self.scale_rate == self.norm_rate == 0:
            raise ValueError("weight_rate, scale_rate and norm_rate are all 0: nothing is trained")
        if self.block_steps and self.weight_rate == self.scale_rate == 0:
            raise ValueError("block_steps trains nothing with weight_rate=0 and scale_rate=0")
        if self.at_once > self.batch:
            raise ValueError(f"at_once={self.at_once} is more than batch={self.batch}")
        return self

    def _check_quantizer(self) -> None:
        """Options that a quantizer passes over, or cannot do with."""
        if self.quantizer != "hestia":
            soft = {"pressure_ramp", "temperature", "cooling", "cooling_style", "coldest", "alpha"}
            self._refuse({*soft, "kappa"}, f"with the quantizer {self.quantizer}")
        if self.quantizer != "absmean":
            return
        self._refuse({"scale_rate"}, "with the quantizer absmean, whose scales are mean |w|")
        if self.start != "float":
            raise ValueError(
                "the quantizer absmean needs start=float: the mean |w| of other weights is not the "
                "one that they were rounded with"
            )
        if self.weight_rate == 0:
            raise ValueError("the quantizer absmean trains weights: weight_rate must not be 0")

    def _refuse(self, names: set[str], why: str) -> None:
        """No one of these may have another value than its default."""
        for name, field in type(self).model_fields.items():
            if name in names and getattr(self, name) != field.default:
                raise ValueError(f"{name} does nothing {why}")
