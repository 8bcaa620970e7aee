"""Which plan: the search's, one that meets a target, one refined around, or the user's own.

`search` and `planning` are arithmetic on tables. Here is what asks the network too: plans are put
together and measured for targets and refinement, and the one that is taken is held against the
uniform networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

from torch import Tensor

from quantforge.assembling import derivatives
from quantforge.claims import written
from quantforge.decision import Chosen, Decided, Measurement, choose
from quantforge.errors import InputError
from quantforge.files import fingerprint
from quantforge.format.footprint import Footprint
from quantforge.format.manifest import plan_from_dict, plan_to_dict
from quantforge.format.store import CandidateStore
from quantforge.models import Model
from quantforge.planning import excess, find_plan, priced, require_loadable, require_within
from quantforge.progress import Monitor
from quantforge.recipe import Recipe
from quantforge.refinement import Refined, Surroundings, refine, remembered
from quantforge.results import AnyQuality, CurvePoint
from quantforge.search.allocate import (
    known_losses,
    make_plan,
    planned_weights,
    reachable_bits,
    spent_bits,
    uniform_plans,
)
from quantforge.search.budget import Budget, Limit
from quantforge.search.latency import LatencyModel, in_time, require_in_time
from quantforge.search.settled import settled_plan
from quantforge.search.vocabulary import Candidates, fixed_specs, inside_blocks, outside_specs
from quantforge.targets import Met, meet
from quantforge.types import BitPlan, LayerInfo, QuantSpec, Sensitivity

# Beside the candidates of a measurement: what refining plans found.
REFINED = "refined"


class MeasurePlans(Protocol):
    """Held-out quality of networks put together from a store; the network is restored."""

    def __call__(
        self,
        plans: list[BitPlan],
        store: CandidateStore,
        what: str,
        *,
        all_windows: bool = False,
    ) -> list[AnyQuality]:
        """See `Job.measure_plans`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChooser:
    """Finds plans for one network.

    Attributes:
        model: the float network; differentiated where a plan is refined, and as before afterwards.
        vocabulary: embedding and head where plans cover them, with their candidates.
        recipe: effective configuration.
        footprint: of the checkpoint.
        given: layer name → spec, where the plan is the user's own and not searched.
        latency: times of layers; None where no device was named.
        measure: networks of plans.
        window_nll: mean cross-entropy of the float network in every held-out window.
        fitting: [sequences, length] fitting tokens.
        monitor: progress and cancellation.
    """

    model: Model
    vocabulary: Candidates
    recipe: Recipe
    footprint: Footprint
    given: Mapping[str, QuantSpec | None] | None
    latency: LatencyModel | None
    measure: MeasurePlans
    window_nll: Callable[[], tuple[float, ...]]
    fitting: Tensor
    monitor: Monitor

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every layer that plans cover: those of the blocks in forward order, then the others."""
        return (*self.model.layers, *self.vocabulary)

    def find(self, sensitivity: Sensitivity | None, budget: Budget | None) -> BitPlan:
        """The plan within a budget's limits of size, or the one that was given.

        Args:
            sensitivity: of all candidates; None where the recipe leaves nothing to search.
            budget: None where the recipe leaves nothing to search: then what the plan costs.

        Raises:
            BudgetError: no plan is within the budget.
            InputError: the only plan there is does not fit every layer.
            UsageError: the plan is not one that the configured server loads.
        """
        plan = self._find(sensitivity, budget)
        if self.model.share.count > 1:  # a solver that ran out of time found whatever it found
            told = self.model.share.exchange(facts={"plan": plan_to_dict(plan)})[0].facts["plan"]
            plan = plan_from_dict(told)
        require_loadable(self.layers, plan.assignment, self.recipe.search)
        return plan

    def _find(self, sensitivity: Sensitivity | None, budget: Budget | None) -> BitPlan:
        """The same, whoever loads it."""
        if self.given is not None:
            return self._given_plan(self.given, sensitivity)
        if sensitivity is None:
            only = settled_plan(self.model.layers, self.recipe.search, budget)
            fixed = fixed_specs(self.vocabulary)
            only = replace(only, assignment={**only.assignment, **fixed}, fixed=tuple(fixed))
            if budget is not None:
                require_within(budget, self.footprint, only.assignment)
                require_in_time(budget, self.layers, only.assignment, self.latency)
            return only
        if budget is None:
            only = settled_plan(self.model.layers, self.recipe.search, None)
            budget = Budget.parse(only.budget)
        return find_plan(sensitivity, budget, self.footprint, self.recipe.search, self.latency)

    def decide(self, measured: Measurement, budget: Budget | None) -> Decided:
        """The plan within all limits of a budget and inside its targets, refined if so configured.

        Raises:
            BudgetError: there is none.
        """
        if budget is None or self.given is not None:
            return Decided(plan=self.find(measured.sensitivity, budget))
        if budget.targets:
            met = self._meet(measured, budget)
            return Decided(plan=met.plan, targets=met.outcomes)
        plan = self.find(measured.sensitivity, budget)
        if measured.sensitivity is None or not self.recipe.search.refine:
            return Decided(plan=plan)
        refined = self._refine(plan, measured, budget)
        return Decided(plan=refined.plan, refinement=refined.rounds)

    def choose(self, measured: Measurement, budget: Budget | None) -> Chosen:
        """The plan for a budget, measured beside the uniform networks.

        Never worse than uniform: where a uniform plan that fits is better on held-out tokens, it is
        taken instead and the report says so. A plan that is not searched is not measured either;
        one that is given is measured if its integers are known, and always taken.
        """
        decided = self.decide(measured, budget)
        plan = decided.plan
        if measured.sensitivity is None:
            return Chosen(plan=plan, measured=measured)
        if plan.predicted_loss is None:
            note = "the plan has specs that are no candidates: it was not compared with uniform"
            return Chosen(plan=plan, measured=measured, warnings=(note,))
        quality, uniform = self._compared(plan, measured)
        room = self._room(plan, measured.sensitivity, budget)
        beside = replace(measured, uniform=uniform)
        barred: set[str] = set()
        if decided.targets:  # uniform networks had their chance, on all held-out windows
            barred = {point.name for point in uniform}
        elif budget is not None and budget.latency:
            outside = outside_specs(measured.sensitivity.layers, plan.assignment)
            fitting = self.fitting_uniform(measured.sensitivity, budget, outside)
            barred = {point.name for point in uniform} - {one.budget for one in fitting}
        chosen = choose(plan, quality, beside, room, given=self.given is not None, barred=barred)
        return replace(
            chosen,
            measured=measured,
            targets=decided.targets,
            refinement=decided.refinement,
        )

    def rivals(
        self, plan: BitPlan, measured: Measurement, budget: Budget | None
    ) -> tuple[str, ...]:
        """What to say of a uniform network that `choose`, which measures plans, may prefer.

        Args:
            plan: from the search, not measured.
            measured: holds the uniform networks.
            budget: of the plan.
        """
        error = measured.predicted_error(plan)
        if self.given is not None or error is None or plan.predicted_loss is None:
            return ()
        sensitivity, _ = measured.needed_for_search()
        outside = outside_specs(sensitivity.layers, plan.assignment)
        if any(outside.values()):
            return ()  # the networks that were measured have another embedding and head
        limit = budget or Budget.parse(plan.budget)
        fitting = {one.budget for one in self.fitting_uniform(sensitivity, limit, outside)}
        points = [point for point in measured.uniform_kept if point.name in fitting]
        best = min(points, key=lambda point: point.quality.loss, default=None)
        if best is None:
            return ()
        below = plan.predicted_loss + error < best.quality.loss
        if below and self.recipe.search.correct:
            return ()
        metric = best.quality.metric
        digits = metric.digits
        return (
            f"{best.name}, with no more bits, was measured at a held-out {metric.name} of "
            f"{best.quality.loss:{digits}}, and the plan is only predicted at "
            f"{plan.predicted_loss:{digits}} ± {error:{digits}}: quantize will measure it and take "
            "the better of the two",
        )

    def _compared(
        self, plan: BitPlan, measured: Measurement
    ) -> tuple[AnyQuality, tuple[CurvePoint, ...]]:
        """Quality of a plan, and the uniform networks with the same embedding and head."""
        sensitivity, store = measured.needed_for_search()
        outside = outside_specs(sensitivity.layers, plan.assignment)
        plans = [plan]
        if any(outside.values()):
            known = {point.name for point in measured.uniform}
            plans += [one for one in uniform_plans(sensitivity, outside) if one.budget in known]
        first, *others = self.measure(plans, store, "measure the plan")
        if len(plans) == 1:
            return first, measured.uniform_kept
        return first, tuple(
            CurvePoint(name=one.budget, stored_bits=one.stored_bits, quality=quality)
            for one, quality in zip(plans[1:], others, strict=True)
        )

    def _given_plan(
        self, given: Mapping[str, QuantSpec | None], sensitivity: Sensitivity | None
    ) -> BitPlan:
        plan = priced(self.layers, given, sensitivity)
        if plan.predicted_loss is None and not self.recipe.quantize.sequential:
            losses = (
                dict.fromkeys(given) if sensitivity is None else known_losses(sensitivity, given)
            )
            name, spec = next(
                (n, s) for n, s in given.items() if s is not None and losses[n] is None
            )
            raise InputError(
                f"{name} is {spec}, which is no candidate: without quantize.sequential=true the "
                "plan can only have specs of search.bits and search.group_sizes"
            )
        return plan

    def _meet(self, measured: Measurement, budget: Budget) -> Met[BitPlan]:
        """The fewest bits whose measured quality is inside the targets."""
        sensitivity, store = measured.needed_for_search()
        weights = planned_weights(sensitivity.layers)
        low, high = (
            Fraction(round(bits * weights), weights)
            for bits in reachable_bits(sensitivity, self.recipe.search)
        )

        def find(bits: Fraction) -> BitPlan:
            limits = (*budget.limits, Limit("bits", bits))
            return self.find(sensitivity, replace(budget, limits=limits))

        def measure(plan: BitPlan) -> AnyQuality:
            what = "measure plans for the target"
            return self.measure([plan], store, what, all_windows=True)[0]

        limit = min(target.nats for target in budget.targets)
        promising = {point.name for point in measured.uniform if point.quality.loss <= limit}
        return meet(
            budget.targets,
            find,
            measure,
            self.window_nll(),
            bits=(low, min(high, budget.bits)),
            also=[
                replace(plan, budget=budget.text)
                for plan in self.fitting_uniform(sensitivity, budget)
                if plan.budget in promising
            ],
        )

    def _refine(self, plan: BitPlan, measured: Measurement, budget: Budget) -> Refined:
        """The best of the plans around one, by networks that are measured.

        Embedding and head stay as the plan has them.
        """
        sensitivity, store = measured.needed_for_search()
        if measured.evidence is None or measured.final_hidden is None:
            raise ValueError("the measurement was made without a search in mind")
        evidence = measured.evidence()
        outside = outside_specs(sensitivity.layers, plan.assignment)
        limit = spent_bits(sensitivity.layers, plan.assignment)
        if not budget.sizes and not budget.latency:  # otherwise headers or time may not fit
            limit = budget.total_bits(planned_weights(sensitivity.layers))
        limit -= spent_bits([x for x in sensitivity.layers if x.outside], plan.assignment)
        count, target = self.recipe.calibrate.gradient_sequences, measured.final_hidden

        def whole(one: BitPlan) -> BitPlan:
            specs = {**one.assignment, **outside}
            return make_plan(sensitivity, specs, budget=one.budget, solver=one.solver)

        def derive(one: BitPlan) -> Tensor:
            with written(everything=False):  # hidden states on the way
                return derivatives(
                    self.model, whole(one), evidence.specs, store,
                    self.fitting[:count], target,
                    options=self.recipe.calibrate, monitor=self.monitor,
                ).mean(0)  # fmt: skip

        surroundings = Surroundings(
            derive=derive,
            measure=lambda plans: self.measure(
                [whole(one) for one in plans], store, "measure plans around it"
            ),
            within=lambda one: self._within(whole(one), sensitivity, budget),
            limit=limit,
        )
        blocks = inside_blocks(sensitivity, evidence.specs)
        specs = {layer.name: plan.assignment[layer.name] for layer in blocks.layers}
        inside = make_plan(blocks, specs, budget=plan.budget, solver=plan.solver)
        recipe = self.recipe
        key = fingerprint(
            plan_to_dict(plan), budget.text, limit, repr(self.latency), recipe.export.shard_bytes,
            recipe.calibrate.model_dump(), recipe.search.model_dump(), recipe.evaluate.model_dump(),
        )  # fmt: skip

        def look() -> Refined:
            found = refine(inside, blocks, evidence.products, recipe.search, surroundings)
            return replace(found, plan=plan if found.plan is inside else whole(found.plan))

        path = store.folder.parent / REFINED / f"{key[:32]}.json"
        return remembered(path, look, self.model.share)

    def fitting_uniform(
        self,
        sensitivity: Sensitivity,
        budget: Budget,
        outside: Mapping[str, QuantSpec | None] | None = None,
    ) -> list[BitPlan]:
        """Uniform plans within all limits of a budget, with these specs of embedding and head."""
        plans = uniform_plans(sensitivity, outside)
        return [plan for plan in plans if self._within(plan, sensitivity, budget)]

    def _within(self, plan: BitPlan, sensitivity: Sensitivity, budget: Budget) -> bool:
        """Whether a plan is within all limits of a budget."""
        return (
            plan.stored_bits <= budget.bits
            and all(excess(x, self.footprint, plan.assignment) <= 0 for x in budget.sizes)
            and in_time(budget, sensitivity.layers, plan.assignment, self.latency)
        )

    def _room(self, plan: BitPlan, sensitivity: Sensitivity, budget: Budget | None) -> Budget:
        """A budget as one limit in bits, by which uniform plans are let in beside `plan`."""
        if budget is None or self.given is not None:
            return Budget.parse(plan.budget)
        if not budget.sizes and not budget.latency and not budget.targets:
            return budget
        bits = [plan.stored_bits]
        if not budget.targets:
            outside = outside_specs(sensitivity.layers, plan.assignment)
            fitting = self.fitting_uniform(sensitivity, budget, outside)
            bits += [one.stored_bits for one in fitting]
        return budget.in_bits(Fraction(max(bits)))
