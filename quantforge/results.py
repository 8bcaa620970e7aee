"""What stages find out and measure: plain, JSON-friendly records without times, dates or hosts.

What a command hands back is put together from them in `outcomes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How the loss of a network against its float reference is called.

    Attributes:
        name: short, as in a table's head.
        noun: what it is.
        axis: with its unit, beside an axis.
        unit: behind a number, with a space before it; empty where there is none.
        each: the same, with what it is a mean of.
        digits: how a loss is formatted in a sentence.
    """

    name: str
    noun: str
    axis: str
    unit: str = ""
    each: str = ""
    digits: str = ".3g"

    @property
    def scale(self) -> str:
        """What a loss is counted in."""
        return self.each.strip() or self.name

    @property
    def head(self) -> str:
        """Name and unit, for the head of a column."""
        return f"{self.name} ({self.unit.strip()})" if self.unit else self.name


class Loss(Protocol):
    """What every measurement of a network says."""

    @property
    def loss(self) -> float:
        """Mean over the pieces that were measured: windows of text, pictures."""

    @property
    def loss_stderr(self) -> float:
        """Its standard error over them."""

    @property
    def windows(self) -> int:
        """How many pieces."""

    @property
    def metric(self) -> Metric:
        """What the loss is."""


METRICS: Mapping[str, Metric] = {
    "kl": Metric(
        name="KL",
        noun="KL divergence",
        axis="KL, nats per token",
        unit=" nats",
        each=" nats a token",
        digits=".4f",
    ),
    "cosine": Metric(
        name="1 - cosine",
        noun="1 - cosine of the pooled output",
        axis="1 - cosine of the pooled output",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How a network compares with its float reference on a set of equal windows.

    Attributes:
        text: which text, how many tokens were scored and the BOS rule.
        windows: number of non-overlapping windows.
        window_length: tokens a window.
        perplexity: exp of the mean token cross-entropy.
        reference_perplexity: the same for the float model.
        kl: mean token KL(reference ‖ model), in nats.
        kl_stderr: standard error of `kl` over windows.
        top1: share of tokens on which both put the same token first.
        window_kl: mean KL of every window, for paired comparisons.
        window_nll: mean cross-entropy of every window.
    """

    text: str
    windows: int
    window_length: int
    perplexity: float
    reference_perplexity: float
    kl: float
    kl_stderr: float
    top1: float
    window_kl: tuple[float, ...]
    window_nll: tuple[float, ...]

    metric: ClassVar[Metric] = METRICS["kl"]

    @property
    def loss(self) -> float:
        """What a plan is chosen by."""
        return self.kl

    @property
    def loss_stderr(self) -> float:
        """Its standard error over windows."""
        return self.kl_stderr

    @property
    def window_loss(self) -> tuple[float, ...]:
        """It, of every window."""
        return self.window_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledQuality:
    """How an encoder compares with its float reference on a set of equal windows.

    What is compared is the mean of the last hidden states over a window's tokens.

    Attributes:
        text: which text, and the rule of special tokens.
        windows: number of windows.
        window_length: tokens a window, special ones included.
        cosine: mean cosine to the float network's output.
        cosine_stderr: its standard error over windows.
        mse: mean of ‖difference‖² / ‖float output‖².
        mse_stderr: its standard error over windows.
        window_distance: 1 - cosine of every window, for paired comparisons.
        window_mse: relative squared error of every window.
    """

    text: str
    windows: int
    window_length: int
    cosine: float
    cosine_stderr: float
    mse: float
    mse_stderr: float
    window_distance: tuple[float, ...]
    window_mse: tuple[float, ...]

    metric: ClassVar[Metric] = METRICS["cosine"]

    @property
    def loss(self) -> float:
        """What a plan is chosen by."""
        return sum(self.window_distance) / self.windows

    @property
    def loss_stderr(self) -> float:
        """Its standard error over windows."""
        return self.cosine_stderr

    @property
    def window_loss(self) -> tuple[float, ...]:
        """It, of every window."""
        return self.window_distance


AnyQuality = Quality | PooledQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """How a network answers a task's questions.

    Attributes:
        task: its name.
        metric: as lm-eval calls it, e.g. "acc".
        value: over all questions.
        stderr: standard error over questions; not a number where they have no scores of their own.
        questions: number of them.
        answers: score of every question, in order; empty where the metric is not a mean of them.
    """

    task: str
    metric: str
    value: float
    stderr: float
    questions: int
    answers: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDifference:
    """Difference of two networks on the same questions (first minus second).

    Attributes:
        task: its name.
        metric: as lm-eval calls it.
        value: of the scores.
        stderr: its standard error over questions; not a number where they have no scores.
    """

    task: str
    metric: str
    value: float
    stderr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Difference of two networks over the same windows (first minus second).

    Attributes:
        kl: mean difference of KL, in nats.
        kl_stderr: its standard error over windows.
        nll: mean difference of cross-entropy, in nats.
        nll_stderr: its standard error over windows.
    """

    kl: float
    kl_stderr: float
    nll: float
    nll_stderr: float

    @property
    def lower(self) -> bool:
        """Whether the first is lower by two standard errors (design: measuring quality)."""
        return self.kl + 2 * self.kl_stderr < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledDifference:
    """Difference of two encoders over the same windows (first minus second).

    Attributes:
        distance: mean difference of 1 - cosine.
        distance_stderr: its standard error over windows.
        mse: mean difference of the relative squared error.
        mse_stderr: its standard error over windows.
    """

    distance: float
    distance_stderr: float
    mse: float
    mse_stderr: float

    @property
    def lower(self) -> bool:
        """Whether the first is lower by two standard errors."""
        return self.distance + 2 * self.distance_stderr < 0


AnyDifference = PairedDifference | PooledDifference


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One measured network on the size–KL plane.

    Attributes:
        name: e.g. "uniform 3b-g64" or "plan".
        stored_bits: average stored bits a weight.
        quality: held-out measurement.
    """

    name: str
    stored_bits: float
    quality: AnyQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOutcome:
    """How a target of quality was met: by plans measured before any tuning.

    Attributes:
        text: the target as the user wrote it.
        limit: most nats a token, of KL or of rise in cross-entropy.
        predicted: what the search predicted for the plan; None where it had no prediction.
        measured: mean over the held-out windows.
        stderr: its standard error over windows.
        upper: upper end of the one-sided 95 % interval, which is within the limit.
        windows: how many windows.
        plans: how many plans were measured to find this one.
    """

    text: str
    limit: float
    predicted: float | None
    measured: float
    stderr: float
    upper: float
    windows: int
    plans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementRound:
    """One look around a plan, by networks measured on held-out tokens before any tuning.

    Attributes:
        plans: how many were measured, the plan itself aside.
        layers: how many layers have another spec afterwards; 0 where the plan was kept.
        before: KL of the plan in nats a token.
        after: KL of the best; not above `before`.
        stderr: standard error of their difference over windows. The best of many is better on the
            windows it was chosen on than on others.
    """

    plans: int
    layers: int
    before: float
    after: float
    stderr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPoint:
    """The network in training, measured on held-out tokens.

    Attributes:
        step: finished steps.
        loss: mean training loss of a token since the point before, in nats; None at the start.
        kl: of the network as it would be stored, in nats a token.
        soft_kl: of the network as it is trained, between float and integer; equal to `kl` where
            nothing is soft.
    """

    step: int
    loss: float | None
    kl: float
    soft_kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """What recovery by training did.

    Attributes:
        tokens: it trained on.
        steps: of the optimizer.
        points: measurements on held-out tokens, the start first.
        best: index of the point whose state was taken; 0 is the start.
        kept: whether the state that was taken is better than the untrained network.
        note: anything a user should know; empty otherwise.
    """

    tokens: int
    steps: int
    points: tuple[TrainingPoint, ...]
    best: int
    kept: bool = True
    note: str = ""

    @property
    def gap(self) -> float:
        """KL of the stored network above that of the trained one, at the end."""
        return self.points[-1].kl - self.points[-1].soft_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorCost:
    """What predicting the losses takes beside the passes that every calibration makes.

    Attributes:
        name: of the estimator.
        what: in words; empty for nothing.
        seconds: about; the time of its forward and backward passes at the measured rate.
    """

    name: str
    what: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        name: module path.
        spec: chosen spec as text, "kept" where left alone.
        predicted_loss: predicted loss increase in nats a token; None where it was not estimated.
        weight_error: ‖Ŵ − W‖² / ‖W‖².
        output_error: relative squared error of the layer's output on calibration inputs, tokens
            counted as its gram counted them (`quantize.token_weighting`).
        rtn_output_error: the same for round-to-nearest on the same grid.
        damping: relative damping that was needed to factor the gram.
        dead_columns: input features that were always zero.
        note: anything a user should know, e.g. a fallback; empty otherwise.
    """

    name: str
    spec: str
    predicted_loss: float | None
    weight_error: float
    output_error: float
    rtn_output_error: float
    damping: float
    dead_columns: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """Sizes of a checkpoint, counted from the files that were written.

    Attributes:
        planned_weights: number of weights the plan covers.
        code_bits: average code bits over them.
        stored_bits: average stored bits over them (codes + scales + zero-points).
        kept_weights: number of weights outside the plan: norms, and embedding and head where they
            are kept or their spec was given beforehand.
        checkpoint_bytes: bytes of all safetensors files.
        checkpoint_bits: 8 × bytes over all weights, kept ones included.
        reference_bytes: bytes of the same network in 16 bits.
    """

    planned_weights: int
    code_bits: float
    stored_bits: float
    kept_weights: int
    checkpoint_bytes: int
    checkpoint_bits: float
    reference_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One short greedy continuation, before and after.

    Attributes:
        prompt: the text given.
        reference: the float model's continuation.
        quantized: the quantized model's continuation.
    """

    prompt: str
    reference: str
    quantized: str
