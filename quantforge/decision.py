"""What calibration leaves behind, and how a plan is held against the uniform networks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from quantforge.calibrate.evidence import Evidence
from quantforge.format.store import CandidateStore
from quantforge.hull import read_hull
from quantforge.results import AnyQuality, CurvePoint, RefinementRound, TargetOutcome
from quantforge.search.allocate import known_losses, uniform_plans
from quantforge.search.budget import Budget
from quantforge.search.correction import relative_error
from quantforge.search.vocabulary import inside_blocks, outside_specs
from quantforge.types import BitPlan, QuantSpec, Sensitivity


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What calibration leaves behind; serves every budget.

    Where there is nothing to search it holds what the configured stages read, and no more.

    Attributes:
        channel_weights: per block [hidden], mean squared gradient at its output, or ones; on the
            network's device.
        final_hidden: [sequences, length, hidden] bfloat16, the float network's head input on the
            fitting tokens; on the CPU until it is used. None where nothing is tuned.
        output_grams: gives a layer's output gram, in blocks; None where rows are taken alone.
        token_squares: gives what the loss feels of every fitting token at a layer's output,
            [sequences, length] with mean 1; None where tokens count alike.
        sensitivity: predicted loss of every candidate, corrected by the uniform networks; None
            where nothing is searched.
        store: integers of every candidate, read to the network's device; None likewise.
        uniform: measured uniform networks, by stored bits.
        evidence: gives the tables that the sensitivities rest on; None where nothing is searched.
        factors: by which the losses of every spec were multiplied to correct them.
        vocabulary: candidates of embedding and head, their losses measured; None where they are
            kept. Part of `sensitivity` too, where there is one.
        key: fingerprint of what decides everything above, and so the key of what rests on it.
    """

    channel_weights: tuple[Tensor, ...]
    final_hidden: Tensor | None
    output_grams: Callable[[str], Sequence[Tensor]] | None
    token_squares: Callable[[str], Tensor] | None = None
    sensitivity: Sensitivity | None = None
    store: CandidateStore | None = None
    uniform: tuple[CurvePoint, ...] = ()
    evidence: Callable[[], Evidence] | None = None
    factors: Mapping[QuantSpec, float] = field(default_factory=dict)
    vocabulary: Sensitivity | None = None
    key: str = ""

    def needed_for_search(self) -> tuple[Sensitivity, CandidateStore]:
        """Both, where they were made.

        Raises:
            ValueError: they were not.
        """
        if self.sensitivity is None or self.store is None:
            raise ValueError("the measurement was made without a search in mind")
        return self.sensitivity, self.store

    @property
    def uniform_kept(self) -> tuple[CurvePoint, ...]:
        """The uniform networks with their bits as plans count them: embedding and head are kept.

        They were measured so, but by their blocks' bits alone, which differ where a plan may
        quantize the others.
        """
        if self.sensitivity is None:
            return self.uniform
        bits = {plan.budget: plan.stored_bits for plan in uniform_plans(self.sensitivity)}
        return tuple(
            replace(point, stored_bits=bits.get(point.name, point.stored_bits))
            for point in self.uniform
        )

    def predicted_losses(self, plan: BitPlan) -> dict[str, float | None]:
        """Layer name → predicted loss in nats a token, 0 where kept; None where not estimated."""
        if self.sensitivity is None:
            return dict.fromkeys(plan.assignment)
        return known_losses(self.sensitivity, plan.assignment)

    def predicted_error(self, plan: BitPlan) -> float | None:
        """Standard error of a plan's predicted loss in nats, see `correction.relative_error`."""
        if self.sensitivity is None or plan.predicted_loss is None:
            return None
        measured = {
            QuantSpec.parse(p.name.removeprefix("uniform ")): (
                p.quality.loss,
                p.quality.loss_stderr,
            )
            for p in self.uniform
        }
        share = relative_error(inside_blocks(self.sensitivity), self.factors, measured)
        return None if share is None else share * plan.predicted_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A plan within a budget, and how it was come by.

    Attributes:
        plan: within all limits and inside all targets.
        targets: how it met those.
        refinement: what looking around the searched plan found.
    """

    plan: BitPlan
    targets: tuple[TargetOutcome, ...] = ()
    refinement: tuple[RefinementRound, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A plan and what it was compared with; nothing where there was no other.

    Attributes:
        plan: the plan to execute.
        measured: with the corrected predictions the plan was found with.
        curve: measured uniform networks and the plan, all with one-pass compensation.
        hull_kl: loss of the uniform lower hull at the plan's bits; None outside what was measured.
        cheapest_uniform: name and loss of the cheapest uniform plan of ceil(budget) bits.
        warnings: one line each.
        targets: how the budget's targets were met.
        refinement: what looking around the plan found.
    """

    plan: BitPlan
    measured: Measurement
    curve: tuple[CurvePoint, ...] = ()
    hull_kl: float | None = None
    cheapest_uniform: tuple[str, float] | None = None
    warnings: tuple[str, ...] = ()
    targets: tuple[TargetOutcome, ...] = ()
    refinement: tuple[RefinementRound, ...] = ()


def choose(
    plan: BitPlan,
    quality: AnyQuality,
    measured: Measurement,
    budget: Budget,
    *,
    given: bool = False,
    barred: Collection[str] = (),
) -> Chosen:
    """Compare a plan with the uniform networks and take whichever fits and is better.

    The curve's "plan", the hull and the warnings are about the plan that is taken, whichever it is.

    Args:
        plan: from the search.
        quality: of the network it gives, one-pass compensation as for the uniform ones.
        measured: holds the uniform networks, with the plan's embedding and head.
        budget: decides which uniform plans fit, by its limit in bits.
        given: the plan is the user's own: it is taken, and a better uniform network only named.
        barred: uniform networks that do not fit for another reason than bits, such as latency.
    """
    warnings, metric = [], quality.metric
    digits = metric.digits
    uniform = measured.uniform
    fitting = [p for p in uniform if p.stored_bits <= budget.bits and p.name not in barred]
    best = min(fitting, key=lambda point: point.quality.loss, default=None)
    if best is not None and best.quality.loss < quality.loss and given:
        warnings.append(
            f"{best.name} has a held-out {metric.name} of {best.quality.loss:{digits}} with no "
            f"more bits, the plan that was given {quality.loss:{digits}}"
        )
    elif best is not None and best.quality.loss < quality.loss:
        warnings.append(
            f"{best.name} has a held-out {metric.name} of {best.quality.loss:{digits}}, the plan "
            f"that was found {quality.loss:{digits}} at {plan.stored_bits:.2f} bits: the uniform "
            "network is used"
        )
        sensitivity, _ = measured.needed_for_search()
        outside = outside_specs(sensitivity.layers, plan.assignment)
        taken = next(p for p in uniform_plans(sensitivity, outside) if p.budget == best.name)
        plan, quality = replace(taken, budget=budget.text), best.quality
    hull = read_hull([(p.stored_bits, p.quality.loss) for p in uniform], plan.stored_bits)
    if hull is None and uniform:
        warnings.append(
            f"no uniform network was measured around {plan.stored_bits:.2f} bits; "
            "evaluate.curve_bits adds widths"
        )
    if hull is not None and quality.loss > hull + quality.loss_stderr:
        warnings.append(
            f"the plan's held-out {metric.name} {quality.loss:{digits}} is above "
            f"the hull {hull:{digits}}"
        )
    width = -(-budget.bits.numerator // budget.bits.denominator)
    same = [point for point in uniform if point.name.startswith(f"uniform {width}b-")]
    cheapest = min(same, key=lambda point: point.stored_bits, default=None)
    point = CurvePoint(name="plan", stored_bits=plan.stored_bits, quality=quality)
    return Chosen(
        plan=plan,
        measured=measured,
        curve=(point, *uniform),
        hull_kl=hull,
        cheapest_uniform=None if cheapest is None else (cheapest.name, cheapest.quality.loss),
        warnings=tuple(warnings),
    )
