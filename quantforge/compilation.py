"""One compilation: the loaded model, its calibration text, and each stage as a method.

The order of the calls is in `pipeline.py`; what each of them needs from the others is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial

import torch
from torch import Tensor

from quantforge.assembling import changed_weights, derivatives, stored_weights
from quantforge.calibration import Calibrator
from quantforge.decision import Chosen, Decided, Measurement, choose
from quantforge.errors import InputError
from quantforge.evaluate.generate import greedy
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.evaluate.quality import measure as measure_quality
from quantforge.format.footprint import Footprint
from quantforge.format.store import CandidateStore
from quantforge.memory import StageTimer
from quantforge.models import Model
from quantforge.planning import excess, find_plan, priced, require_within
from quantforge.progress import Monitor
from quantforge.quantize.sequential import (
    QuantizedLayer,
    quantize_from_store,
    quantize_sequentially,
)
from quantforge.quantize.tune import kept_if_better, tune_scales
from quantforge.recipe import Recipe
from quantforge.refinement import Refined, Surroundings, refine
from quantforge.results import CurvePoint, Generation, Quality
from quantforge.search.allocate import (
    known_losses,
    make_plan,
    planned_weights,
    reachable_bits,
    spent_bits,
    table_row,
    uniform_plans,
)
from quantforge.search.budget import Budget, Limit
from quantforge.search.latency import LatencyModel, in_time, require_in_time
from quantforge.search.settled import settled_plan
from quantforge.search.vocabulary import Candidates, inside_blocks, outside_specs
from quantforge.targets import Met, meet
from quantforge.types import BitPlan, CalibrationSet, LayerInfo, QuantSpec, Sensitivity
from quantforge.vocabulary import VocabularyCalibrator


@dataclass(kw_only=True)
class Job:
    """State of one compilation.

    Attributes:
        model: the network; float until `quantize` has run.
        calibration: fitting and held-out tokens.
        recipe: effective configuration.
        effort: name of the preset that went into it.
        seed: of everything random.
        monitor: progress and cancellation.
        timings: stage → seconds of wall time.
        notes: warnings that came up on the way, one line each.
        given: layer name → spec, where the plan is the user's own and not searched.
        vocabulary: embedding and head where plans cover them, with their candidates.
        latency: times of layers; None where no device was named.
    """

    model: Model
    calibration: CalibrationSet
    recipe: Recipe
    effort: str
    seed: int
    monitor: Monitor
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    given: Mapping[str, QuantSpec | None] | None = None
    vocabulary: Candidates = field(default_factory=dict)
    latency: LatencyModel | None = None

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every layer that plans cover: those of the blocks in forward order, then the others."""
        return (*self.model.layers, *self.vocabulary)

    @property
    def fixed(self) -> dict[str, QuantSpec]:
        """Layer name → the spec it has whatever the plan."""
        return {layer.name: specs[0] for layer, specs in self.vocabulary.items() if layer.fixed}

    @property
    def settled(self) -> bool:
        """Whether there is nothing to search, nor integers of the search to take."""
        return self.recipe.search.settled is not None and self.recipe.quantize.sequential

    @contextmanager
    def measure(self, *, fresh: bool) -> Iterator[Measurement]:
        """What the later stages read, from the cache where everything that made it is equal.

        Sensitivities and candidates are part of it unless the plan is `settled`. What is on disk
        can be read while the body runs.
        """
        if self.settled:
            self.find(None, None)  # a plan that fits no network is refused before the work
        calibrator = Calibrator(
            model=self.model,
            calibration=self.calibration,
            recipe=self.recipe,
            seed=self.seed,
            monitor=self.monitor,
            timings=self.timings,
            vocabulary=bool(self.vocabulary),
            measure_plans=self.measure_plans,
        )
        make = calibrator.settled if self.settled else calibrator.searched
        with make(fresh=fresh) as measured:
            if not self.vocabulary:
                yield measured
                return
            further = VocabularyCalibrator(
                calibrator=calibrator, candidates=self.vocabulary, measure=self.measure_changed
            )
            with further.beside(measured, fresh=fresh) as both:
                yield both

    def find(self, sensitivity: Sensitivity | None, budget: Budget | None) -> BitPlan:
        """The plan within a budget's limits of size, or the one that was given.

        Args:
            sensitivity: of all candidates; None where the recipe leaves nothing to search.
            budget: None where the recipe leaves nothing to search: then what the plan costs.

        Raises:
            BudgetError: no plan is within the budget.
            InputError: the only plan there is does not fit every layer.
        """
        if self.given is not None:
            return self._given_plan(self.given, sensitivity)
        if sensitivity is None:
            only = settled_plan(self.model.layers, self.recipe.search, budget)
            fixed = self.fixed
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

    def search(self, measured: Measurement, budget: Budget | None) -> Chosen:
        """The plan for a budget, measured beside the uniform networks.

        Never worse than uniform: where a uniform plan that fits is better on held-out tokens, it is
        taken instead and the report says so. A plan that is not searched is not measured either;
        one that is given is measured if its integers are known, and always taken.
        """
        with self._timed("search"):
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
        if budget is not None and budget.latency:
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

    def _compared(
        self, plan: BitPlan, measured: Measurement
    ) -> tuple[Quality, tuple[CurvePoint, ...]]:
        """Quality of a plan, and the uniform networks with the same embedding and head."""
        sensitivity, store = measured.needed_for_search()
        outside = outside_specs(sensitivity.layers, plan.assignment)
        plans = [plan]
        if any(outside.values()):
            known = {point.name for point in measured.uniform}
            plans += [one for one in uniform_plans(sensitivity, outside) if one.budget in known]
        first, *others = self.measure_plans(plans, store, "measure the plan")
        if len(plans) == 1:
            return first, measured.uniform
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

    def _meet(self, measured: Measurement, budget: Budget) -> Met:
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

        def measure(plan: BitPlan) -> Quality:
            what = "measure plans for the target"
            return self.measure_plans([plan], store, what, all_windows=True)[0]

        limit = min(target.nats for target in budget.targets)
        promising = {point.name for point in measured.uniform if point.quality.kl <= limit}
        return meet(
            budget.targets,
            find,
            measure,
            self.reference.window_nll,
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
            return derivatives(
                self.model, whole(one), evidence.specs, store,
                self.calibration.fitting[:count], target,
                options=self.recipe.calibrate, monitor=self.monitor,
            ).mean(0)  # fmt: skip

        surroundings = Surroundings(
            derive=derive,
            measure=lambda plans: self.measure_plans(
                [whole(one) for one in plans], store, "measure plans around it"
            ),
            within=lambda one: self._within(whole(one), sensitivity, budget),
            limit=limit,
        )
        blocks = inside_blocks(sensitivity, evidence.specs)
        found = refine(plan, blocks, evidence.products, self.recipe.search, surroundings)
        return found if found.plan is plan else replace(found, plan=whole(found.plan))

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

    def quantize(self, plan: BitPlan, measured: Measurement) -> Iterator[QuantizedLayer]:
        """Quantized layers in forward order; the network holds the dequantized weights after."""
        _ = self.float_continuations  # and the reference: nothing may have changed the network yet
        with self._timed("quantize"):
            layers = self._compensate(plan, measured)
            if self.recipe.quantize.tuning.steps == 0 or not any(plan.assignment.values()):
                yield from layers
                return
            finished = list(layers)
        with self._timed("tune"):
            yield from self._tune(finished, measured)

    def _compensate(self, plan: BitPlan, measured: Measurement) -> Iterator[QuantizedLayer]:
        """Layers as they are compensated, block by block or from the store; then the others."""
        predicted = measured.predicted_losses(plan)
        options = self.recipe.quantize
        outside: list[QuantizedLayer] = []

        def enter() -> None:
            outside.extend(self._quantize_outside(plan, measured))

        if options.sequential:
            yield from quantize_sequentially(
                self.model,
                plan,
                self.calibration,
                predicted,
                options,
                channel_weights=measured.channel_weights,
                generator=torch.Generator().manual_seed(self.seed),
                monitor=self.monitor,
                output_grams=measured.output_grams,
                enter=enter,
            )
        else:
            sensitivity, store = measured.needed_for_search()
            enter()
            errors = table_row(sensitivity, sensitivity.error, plan.assignment)
            yield from quantize_from_store(
                self.model, plan, store, predicted, errors,
                layers=self.model.layers, monitor=self.monitor,
            )  # fmt: skip
        yield from outside

    def _quantize_outside(self, plan: BitPlan, measured: Measurement) -> Iterator[QuantizedLayer]:
        """Embedding and head, with what calibration made of them."""
        if measured.vocabulary is None or measured.store is None:
            return
        table = measured.vocabulary
        specs = {layer.name: plan.assignment[layer.name] for layer in table.layers}
        yield from quantize_from_store(
            self.model,
            plan,
            measured.store,
            known_losses(table, specs),
            table_row(table, table.error, specs),
            layers=table.layers,
            monitor=self.monitor,
            what="quantize embeddings",
        )

    def _tune(
        self, layers: list[QuantizedLayer], measured: Measurement
    ) -> Iterator[QuantizedLayer]:
        """The same layers with tuned scales, if that lowers the KL on held-out tokens."""
        if measured.final_hidden is None:
            raise ValueError("the measurement was made without tuning in mind")
        weights = {
            one.layer.name: one.weight
            for one in layers
            if one.weight is not None and not one.layer.outside
        }
        windows = self.recipe.evaluate.curve_windows
        tune = partial(
            tune_scales,
            self.model,
            weights,
            self.calibration.fitting.to(self.model.device),
            measured.final_hidden.to(self.model.device),
            self.recipe.quantize.tuning,
            float_head=self.reference.head if self.vocabulary else None,
            generator=torch.Generator().manual_seed(self.seed),
            monitor=self.monitor,
        )
        tuned = kept_if_better(self.model, weights, tune, lambda: self.measure_held_out(windows).kl)
        if tuned is weights:
            self.notes.append("tuning the scales did not lower the held-out KL and was undone")
        for one in layers:
            yield one if one.layer.outside else replace(one, weight=tuned.get(one.layer.name))

    def measure_held_out(self, windows: int | None = None, text: str = "held-out") -> Quality:
        """Quality of the network as it now stands on the first held-out sequences."""
        held_out = self.calibration.held_out[:windows]
        return measure_quality(
            self.model.module,
            self.model.architecture,
            held_out,
            self.reference,
            text=text,
            precision=self.recipe.evaluate.precision,
        )

    @cached_property
    def footprint(self) -> Footprint:
        """Shapes of everything the checkpoint will hold."""
        shard_bytes = self.recipe.export.shard_bytes
        return Footprint.of(self.model, shard_bytes=shard_bytes, fixed=self.fixed)

    @cached_property
    def reference(self) -> ReferenceOutputs:
        """The float network on the held-out tokens; first used before anything changes it."""
        return ReferenceOutputs.collect(
            self.model.module,
            self.model.architecture,
            self.calibration.held_out,
            precision=self.recipe.evaluate.precision,
            keep_head_copy=True,
            monitor=self.monitor,
        )

    @cached_property
    def float_continuations(self) -> tuple[str, ...]:
        """Greedy continuations of the report's prompts by the float network."""
        _ = self.reference
        return self.continuations()

    def continuations(self) -> tuple[str, ...]:
        """Greedy continuations of the report's prompts by the network as it now stands."""
        if self.model.tokenizer is None:
            return ()
        options = self.recipe.evaluate
        return tuple(
            greedy(self.model.module, self.model.tokenizer, prompt, tokens=options.tokens)
            for prompt in options.prompts
        )

    def generations(self) -> tuple[Generation, ...]:
        """The report's prompts continued before and after."""
        after = self.continuations()
        rows = zip(self.recipe.evaluate.prompts, self.float_continuations, after, strict=False)
        return tuple(Generation(prompt=p, reference=f, quantized=q) for p, f, q in rows)

    def measure_plans(
        self,
        plans: list[BitPlan],
        store: CandidateStore,
        what: str,
        *,
        all_windows: bool = False,
    ) -> list[Quality]:
        """Held-out quality of networks put together from the store; the network is restored.

        Args:
            plans: whose specs are all in the store.
            store: integers of the candidates.
            what: stage for the monitor.
            all_windows: take every held-out sequence instead of `evaluate.curve_windows`.
        """
        networks = (stored_weights(plan, store) for plan in plans)
        return self.measure_changed(networks, what, count=len(plans), all_windows=all_windows)

    def measure_changed(
        self,
        networks: Iterable[Mapping[str, Tensor | None]],
        what: str | None = None,
        *,
        count: int = 0,
        all_windows: bool = False,
    ) -> list[Quality]:
        """Held-out quality of networks with other weights; the network is restored.

        Args:
            networks: layer name → [out, in] weight in the place of its own, which None keeps; they
                all name the same layers.
            what: stage for the monitor; None reports nothing.
            count: of networks, for the monitor.
            all_windows: take every held-out sequence instead of `evaluate.curve_windows`.
        """
        _ = self.float_continuations  # before anything changes the network
        windows = None if all_windows else self.recipe.evaluate.curve_windows
        text = self.calibration.description
        qualities = []
        with changed_weights(self.model) as loan:
            for index, weights in enumerate(networks):
                loan.put(weights)
                qualities.append(self.measure_held_out(windows, text=text))
                if what is not None:
                    self.monitor.step(what, index + 1, count)
        return qualities

    def _timed(self, stage: str) -> StageTimer:
        return StageTimer(self.timings, stage)
