"""The fewest bits whose measured quality is inside a target.

A target is about the network, not about a prediction: plans are put together from the candidates
that calibration stored and measured on all held-out tokens, which takes seconds each. The bits are
bisected. It begins where the predicted loss equals the target, goes up or down in growing steps
until one plan inside the target and one outside it are known, and then halves the interval between
them until it is a hundredth of a bit.

A plan is inside a target if the upper end of its one-sided 95 % interval is: mean plus as many
standard errors over the held-out windows as Student's law asks for so few, of the KL, of an
encoder's 1 - cosine, or of the cross-entropy's paired difference to the float network.

Two things this does not promise. What is measured has the one-pass compensation of the candidates;
`quantize` then compensates block by block and tunes, which lowers the loss, so that the finished
network is usually better than asked for and a little larger than it had to be. And the interval is
of this text: on another one the loss may be larger.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Protocol, TypeVar, runtime_checkable

from scipy.special import stdtrit

from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.results import Loss, Quality, TargetOutcome
from quantforge.search.budget import Target

RESOLUTION = Fraction(1, 100)
FIRST_STEP = Fraction(1, 4)
_PREDICTED_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A loss measured over windows, in its metric's unit, and the upper end of its interval."""

    mean: float
    stderr: float
    windows: int

    @property
    def upper(self) -> float:
        """One-sided 95 %, by Student's law."""
        return self.mean + float(stdtrit(self.windows - 1, 0.95)) * self.stderr


class Planned(Protocol):
    """What is asked of a plan."""

    @property
    def budget(self) -> str:
        """As the user wrote it."""

    @property
    def stored_bits(self) -> float:
        """Average a weight."""

    @property
    def predicted_loss(self) -> float | None:
        """In the target's unit."""

    @property
    def identity(self) -> Hashable:
        """Equal for plans that make the same network."""


@runtime_checkable
class Classified(Protocol):
    """A measurement of single predictions."""

    @property
    def scores(self) -> Sequence[float]:
        """Of every picture 1 where the prediction is right, else 0."""


P = TypeVar("P", bound=Planned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Met(Generic[P]):
    """A plan inside all targets.

    Attributes:
        plan: of the fewest bits that were found.
        outcomes: one a target.
    """

    plan: P
    outcomes: tuple[TargetOutcome, ...]


def bound(target: Target, quality: Loss, reference_nll: Sequence[float]) -> Bound:
    """How far a measured network is from the float one, by what a target looks at.

    Args:
        target: says what.
        quality: of the network.
        reference_nll: mean cross-entropy of the float network on the same windows; of "acc", what
            the float network has of every picture: 1 where it is right.

    Raises:
        InputError: there is one window, which says nothing of a spread.
        UsageError: the target is a perplexity and the network an encoder.
    """
    if quality.windows < 2:
        raise InputError(
            f"{target.text} needs at least two held-out sequences, the calibration text has "
            f"{quality.windows}; raise calibration.sequences or calibration.held_out_share"
        )
    if target.kind in ("kl", "cosine"):
        return Bound(mean=quality.loss, stderr=quality.loss_stderr, windows=quality.windows)
    if target.kind == "acc" and isinstance(quality, Classified):
        lost = [a - b for a, b in zip(reference_nll, quality.scores, strict=True)]
        return _mean_of(lost)
    if not isinstance(quality, Quality):
        raise UsageError(f"{target.text} is about next tokens, which an encoder does not predict")
    rises = [a - b for a, b in zip(quality.window_nll, reference_nll, strict=True)]
    return _mean_of(rises)


def _mean_of(values: Sequence[float]) -> Bound:
    return Bound(
        mean=statistics.fmean(values),
        stderr=statistics.stdev(values) / math.sqrt(len(values)),
        windows=len(values),
    )


def is_inside(targets: Sequence[Target], quality: Loss, reference_nll: Sequence[float]) -> bool:
    """Whether a measured network is inside all targets; see `bound`."""
    return all(bound(one, quality, reference_nll).upper <= one.nats for one in targets)


def meet(
    targets: Sequence[Target],
    find: Callable[[Fraction], P],
    measure: Callable[[P], Loss],
    reference_nll: Sequence[float],
    *,
    bits: tuple[Fraction, Fraction],
    also: Sequence[P] = (),
) -> Met[P]:
    """The plan of fewest bits inside all targets, by bisection on measured quality.

    Args:
        targets: at least one.
        find: the best plan within so many stored bits a weight, and within whatever else limits;
            a BudgetError says that there is none, which a limit on the time can mean at few bits
            where narrow weights are slow.
        measure: held-out quality of a plan.
        reference_nll: mean cross-entropy of the float network on every window.
        bits: fewest and most stored bits a weight.
        also: plans that are taken if they are inside with fewer bits, e.g. uniform ones.

    Raises:
        BudgetError: even the plan of the most bits is outside, or there is none.
        InputError: there are too few held-out windows.
    """
    known: dict[Hashable, Loss] = {}

    def measured(plan: P) -> Loss:
        if plan.identity not in known:
            known[plan.identity] = measure(plan)
        return known[plan.identity]

    def inside(plan: P) -> bool:
        return is_inside(targets, measured(plan), reference_nll)

    low, high = bits
    found = _if_any(find, high)
    guess, step = _predicted(targets, found, low, high), FIRST_STEP
    outside: Fraction | None = None
    while (best := found(guess)) is None or not inside(best):
        if best is not None and guess >= high:
            raise BudgetError(_unreachable(targets, best, measured(best), reference_nll))
        outside, guess, step = guess, min(guess + step, high), 2 * step
    step = FIRST_STEP
    while Fraction(best.stored_bits) - (low if outside is None else outside) > RESOLUTION:
        fewest = Fraction(best.stored_bits)
        guess = max(fewest - step, low) if outside is None else (fewest + outside) / 2
        plan = found(guess)
        if plan is not None and inside(plan):
            best, step = plan, 2 * step
        else:
            outside = guess
    for other in sorted(also, key=lambda plan: plan.stored_bits):
        if other.stored_bits < best.stored_bits and inside(other):
            best = other
            break
    told = outcomes(targets, best, measured(best), reference_nll, len(known))
    return Met(plan=best, outcomes=told)


def _if_any(find: Callable[[Fraction], P], high: Fraction) -> Callable[[Fraction], P | None]:
    """`find`, with None for no plan below `high` bits."""

    def found(at: Fraction) -> P | None:
        try:
            return find(at)
        except BudgetError:
            if at >= high:
                raise
            return None

    return found


def _predicted(
    targets: Sequence[Target],
    found: Callable[[Fraction], P | None],
    low: Fraction,
    high: Fraction,
) -> Fraction:
    """The fewest bits at which the predicted loss is inside all targets; `high` if none."""
    limit = min(target.nats for target in targets)
    top = high
    for _ in range(_PREDICTED_ROUNDS):
        middle = (low + top) / 2
        plan = found(middle)
        loss = None if plan is None else plan.predicted_loss
        if loss is not None and loss <= limit:
            top = middle
        else:
            low = middle
    return top


def outcomes(
    targets: Sequence[Target],
    plan: Planned,
    quality: Loss,
    reference_nll: Sequence[float],
    plans: int,
) -> tuple[TargetOutcome, ...]:
    """How a plan's network meets the targets, found by measuring so many plans."""
    found = []
    for target in targets:
        one = bound(target, quality, reference_nll)
        found.append(
            TargetOutcome(
                text=target.text,
                limit=target.nats,
                predicted=plan.predicted_loss,
                measured=one.mean,
                stderr=one.stderr,
                upper=one.upper,
                windows=quality.windows,
                plans=plans,
            )
        )
    return tuple(found)


def _unreachable(
    targets: Sequence[Target], plan: Planned, quality: Loss, reference_nll: Sequence[float]
) -> str:
    """Names the target that the plan of the most bits misses, and by what."""
    bounds = [(target, bound(target, quality, reference_nll)) for target in targets]
    target, one = next((t, b) for t, b in bounds if b.upper > t.nats)
    unit = "" if target.kind in ("cosine", "acc") else quality.metric.each
    return (
        f"budget {plan.budget} cannot be met: with the most bits that its limits allow, "
        f"{plan.stored_bits:.3f}, the upper bound for {target.text} is {one.upper:.4g}"
        f"{unit}, above {target.nats:.4g}; allow more bits or more loss"
    )
