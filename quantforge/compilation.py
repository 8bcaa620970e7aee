"""One compilation: the loaded model, its calibration text, and each stage as a method.

The order of the calls is in `pipeline.py`; what each of them needs from the others is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from quantforge.calibrate.artefact import quality_of
from quantforge.calibration import Calibrator
from quantforge.decision import Chosen, Measurement, choose
from quantforge.errors import InputError
from quantforge.evaluate.generate import greedy
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.evaluate.quality import measure as measure_quality
from quantforge.files import fingerprint
from quantforge.format.footprint import Footprint
from quantforge.format.manifest import plan_to_dict
from quantforge.format.store import CandidateStore
from quantforge.journal import NO_JOURNAL, Journal, open_journal
from quantforge.memory import StageTimer, release_freed
from quantforge.models import Model
from quantforge.planning import excess, find_plan, priced, require_loadable, require_within
from quantforge.progress import Monitor
from quantforge.quantize.sequential import (
    QuantizedLayer,
    put_weight,
    quantize_from_store,
    quantize_sequentially,
)
from quantforge.quantize.tune import tune_scales
from quantforge.recipe import Recipe
from quantforge.results import Generation, Quality, TargetOutcome
from quantforge.search.allocate import reachable_bits, table_row, uniform_plans
from quantforge.search.budget import Budget, Limit
from quantforge.search.settled import settled_plan
from quantforge.targets import Met, meet
from quantforge.types import BitPlan, CalibrationSet, QuantSpec, Sensitivity

# Raised with every change of what the quantize stage computes: older journals are then not used.
JOURNAL_VERSION = 1


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

    @property
    def settled(self) -> bool:
        """Whether there is nothing to search, nor integers of the search to take."""
        return self.recipe.search.settled is not None and self.recipe.quantize.sequential

    def measure(self, *, fresh: bool) -> AbstractContextManager[Measurement]:
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
            measure_plans=self.measure_plans,
        )
        make = calibrator.settled if self.settled else calibrator.searched
        return make(fresh=fresh)

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
        require_loadable(self.model.layers, plan.assignment, self.recipe.search)
        return plan

    def _find(self, sensitivity: Sensitivity | None, budget: Budget | None) -> BitPlan:
        if self.given is not None:
            return self._given_plan(self.given, sensitivity)
        if sensitivity is None:
            only = settled_plan(self.model.layers, self.recipe.search, budget)
            if budget is not None:
                require_within(budget, self.footprint, only.assignment)
            return only
        if budget is None:
            only = settled_plan(self.model.layers, self.recipe.search, None)
            budget = Budget.parse(only.budget)
        return find_plan(sensitivity, budget, self.footprint, self.recipe.search)

    def decide(
        self, measured: Measurement, budget: Budget | None
    ) -> tuple[BitPlan, tuple[TargetOutcome, ...]]:
        """The plan within all limits of a budget and inside its targets, and how it met those.

        Raises:
            BudgetError: there is none.
        """
        if budget is None or not budget.targets or self.given is not None:
            return self.find(measured.sensitivity, budget), ()
        met = self._meet(measured, budget)
        return met.plan, met.outcomes

    def search(self, measured: Measurement, budget: Budget | None) -> Chosen:
        """The plan for a budget, measured beside the uniform networks.

        Never worse than uniform: where a uniform plan that fits is better on held-out tokens, it is
        taken instead and the report says so. A plan that is not searched is not measured either;
        one that is given is measured if its integers are known, and always taken.
        """
        with self._timed("search"):
            plan, targets = self.decide(measured, budget)
            if measured.sensitivity is None:
                return Chosen(plan=plan, measured=measured)
            if plan.predicted_loss is None:
                note = "the plan has specs that are no candidates: it was not compared with uniform"
                return Chosen(plan=plan, measured=measured, warnings=(note,))
            _, store = measured.needed_for_search()
            (quality,) = self.measure_plans([plan], store, "measure the plan")
        room = self._room(plan, measured.sensitivity, budget)
        chosen = choose(plan, quality, measured, room, given=self.given is not None)
        return replace(chosen, targets=targets)

    def _given_plan(
        self, given: Mapping[str, QuantSpec | None], sensitivity: Sensitivity | None
    ) -> BitPlan:
        plan = priced(self.model.layers, given, sensitivity)
        if plan.predicted_loss is None and not self.recipe.quantize.sequential:
            known = set() if sensitivity is None else set(sensitivity.specs)
            name, spec = next((n, s) for n, s in given.items() if s is not None and s not in known)
            raise InputError(
                f"{name} is {spec}, which is no candidate: without quantize.sequential=true the "
                "plan can only have specs of search.bits and search.group_sizes"
            )
        return plan

    def _meet(self, measured: Measurement, budget: Budget) -> Met:
        """The fewest bits whose measured quality is inside the targets."""
        sensitivity, store = measured.needed_for_search()
        weights = sum(layer.numel for layer in sensitivity.layers)
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

    def fitting_uniform(self, sensitivity: Sensitivity, budget: Budget) -> list[BitPlan]:
        """Uniform plans within all limits of a budget."""
        return [
            plan
            for plan in uniform_plans(sensitivity)
            if plan.stored_bits <= budget.bits
            and all(excess(x, self.footprint, plan.assignment) <= 0 for x in budget.sizes)
        ]

    def _room(self, plan: BitPlan, sensitivity: Sensitivity, budget: Budget | None) -> Budget:
        """A budget as one limit in bits, by which uniform plans are let in beside `plan`."""
        if budget is None or self.given is not None:
            return Budget.parse(plan.budget)
        if not budget.sizes and not budget.targets:
            return budget
        bits = [plan.stored_bits]
        if not budget.targets:
            bits += [one.stored_bits for one in self.fitting_uniform(sensitivity, budget)]
        return budget.in_bits(Fraction(max(bits)))

    def journal(
        self, plan: BitPlan, measured: Measurement, *, fresh: bool
    ) -> AbstractContextManager[Journal]:
        """Where `quantize` notes what it has finished; a network in memory has none."""
        if self.model.source.kind == "memory":
            return nullcontext(NO_JOURNAL)
        key = fingerprint(
            JOURNAL_VERSION,
            measured.key,
            plan_to_dict(plan),
            measured.predicted_losses(plan),
            self.recipe.quantize.model_dump(mode="json"),
            self.recipe.evaluate.model_dump(mode="json"),
            self.seed,
        )
        return open_journal(key, fresh=fresh, monitor=self.monitor)

    def quantize(
        self, plan: BitPlan, measured: Measurement, journal: Journal = NO_JOURNAL
    ) -> Iterator[QuantizedLayer]:
        """Quantized layers in forward order; the network holds the dequantized weights after."""
        _ = self.float_continuations  # and the reference: nothing may have changed the network yet
        with self._timed("quantize"):
            layers = self._compensate(plan, measured, journal)
            if self.recipe.quantize.tuning.steps == 0 or not any(plan.assignment.values()):
                yield from layers
                return
            finished = list(layers)
        with self._timed("tune"):
            yield from self._tune(finished, measured, journal)

    def _compensate(
        self, plan: BitPlan, measured: Measurement, journal: Journal
    ) -> Iterator[QuantizedLayer]:
        """Layers as they are compensated, block by block or from the store."""
        predicted = measured.predicted_losses(plan)
        options = self.recipe.quantize
        if options.sequential:
            return quantize_sequentially(
                self.model,
                plan,
                self.calibration,
                predicted,
                options,
                channel_weights=measured.channel_weights,
                generator=torch.Generator().manual_seed(self.seed),
                monitor=self.monitor,
                output_grams=measured.output_grams,
                journal=journal,
            )
        sensitivity, store = measured.needed_for_search()
        errors = table_row(sensitivity, sensitivity.error, plan.assignment)
        return quantize_from_store(self.model, plan, store, predicted, errors, monitor=self.monitor)

    def _tune(
        self, layers: list[QuantizedLayer], measured: Measurement, journal: Journal
    ) -> Iterator[QuantizedLayer]:
        """The same layers with tuned scales, if that lowers the KL on held-out tokens."""
        if measured.final_hidden is None:
            raise ValueError("the measurement was made without tuning in mind")
        weights = {one.layer.name: one.weight for one in layers if one.weight is not None}
        named = list(self.model.module.named_parameters())
        norms = {name: p.detach().clone() for name, p in named if p.ndim == 1}
        windows = self.recipe.evaluate.curve_windows
        before = self.measure_held_out(windows)
        release_freed()
        tuned = tune_scales(
            self.model,
            weights,
            self.calibration.fitting.to(self.model.device),
            measured.final_hidden.to(self.model.device),
            self.recipe.quantize.tuning,
            generator=torch.Generator().manual_seed(self.seed),
            monitor=self.monitor,
            journal=journal,
        )
        release_freed()
        for name, weight in tuned.items():
            put_weight(self.model, name, weight.dequantize())
        with torch.no_grad():
            for name, parameter in named:
                if name in norms:  # as the checkpoint will hold them
                    parameter.copy_(parameter.bfloat16())
        after = self.measure_held_out(windows)
        if after.kl >= before.kl:
            self.notes.append("tuning the scales did not lower the held-out KL and was undone")
            tuned = weights
            for name, weight in weights.items():
                put_weight(self.model, name, weight.dequantize())
            with torch.no_grad():
                for name, parameter in named:
                    if name in norms:
                        parameter.copy_(norms[name])
        for one in layers:
            yield replace(one, weight=tuned.get(one.layer.name))

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
        return Footprint.of(self.model, shard_bytes=self.recipe.export.shard_bytes)

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
        journal: Journal = NO_JOURNAL,
        *,
        all_windows: bool = False,
    ) -> list[Quality]:
        """Held-out quality of networks put together from the store; the network is restored.

        Args:
            plans: whose specs are all in the store.
            store: integers of the candidates.
            what: stage for the monitor.
            journal: gets every measurement; what it has is not measured again.
            all_windows: take every held-out sequence instead of `evaluate.curve_windows`.
        """
        _ = self.float_continuations  # before anything changes the network
        modules: dict[str, Any] = {
            layer.name: self.model.module.get_submodule(layer.name) for layer in self.model.layers
        }
        floats = {name: module.weight.detach().clone() for name, module in modules.items()}
        windows = None if all_windows else self.recipe.evaluate.curve_windows
        text = self.calibration.description
        qualities = []
        try:
            for index, plan in enumerate(plans):
                entry = f"quality-{fingerprint(plan_to_dict(plan), windows)[:32]}"
                if known := journal.read(entry):
                    qualities.append(quality_of(known.facts))
                    continue
                for name, spec in plan.assignment.items():
                    kept = floats[name] if spec is None else store.get(name, spec).dequantize()
                    put_weight(self.model, name, kept)
                qualities.append(self.measure_held_out(windows, text=text))
                journal.write(entry, {}, asdict(qualities[-1]))
                self.monitor.step(what, index + 1, len(plans))
        finally:  # an interrupt must not leave a caller's network in memory changed
            for name, weight in floats.items():
                put_weight(self.model, name, weight)
        return qualities

    def _timed(self, stage: str) -> StageTimer:
        return StageTimer(self.timings, stage)
