"""One compilation: the loaded model, its calibration text, and each stage as a method.

The order of the calls is in `pipeline.py`; what each of them needs from the others is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from quantforge.calibration import Calibrator
from quantforge.decision import Chosen, Measurement, choose
from quantforge.evaluate.generate import greedy
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.evaluate.quality import measure as measure_quality
from quantforge.format.store import CandidateStore
from quantforge.memory import StageTimer, release_freed
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.quantize.sequential import (
    QuantizedLayer,
    put_weight,
    quantize_from_store,
    quantize_sequentially,
)
from quantforge.quantize.tune import tune_scales
from quantforge.recipe import Recipe
from quantforge.results import Generation, Quality
from quantforge.search.allocate import search, table_row
from quantforge.search.budget import Budget
from quantforge.search.settled import settled_plan
from quantforge.types import BitPlan, CalibrationSet, Sensitivity


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
    """

    model: Model
    calibration: CalibrationSet
    recipe: Recipe
    effort: str
    seed: int
    monitor: Monitor
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
            measure_plans=self._measure_plans,
        )
        make = calibrator.settled if self.settled else calibrator.searched
        return make(fresh=fresh)

    def find(self, sensitivity: Sensitivity | None, budget: Budget | None) -> BitPlan:
        """The plan within a budget.

        Args:
            sensitivity: of all candidates; None where the recipe leaves nothing to search.
            budget: None where the recipe leaves nothing to search: then what the plan costs.

        Raises:
            BudgetError: no plan is within the budget.
            InputError: the only plan there is does not fit every layer.
        """
        if sensitivity is None:
            return settled_plan(self.model.layers, self.recipe.search, budget)
        if budget is None:
            only = settled_plan(self.model.layers, self.recipe.search, None)
            budget = Budget.parse(only.budget)
        return search(sensitivity, budget, self.recipe.search)

    def search(self, measured: Measurement, budget: Budget | None) -> Chosen:
        """The plan for a budget, measured beside the uniform networks.

        Never worse than uniform: where a uniform plan that fits is better on held-out tokens, it is
        taken instead and the report says so. A plan that is not searched is not measured either.
        """
        with self._timed("search"):
            plan = self.find(measured.sensitivity, budget)
            if measured.sensitivity is None:
                return Chosen(plan=plan, measured=measured)
            _, store = measured.needed_for_search()
            (quality,) = self._measure_plans([plan], store, "measure the plan")
        return choose(plan, quality, measured, Budget.parse(plan.budget))

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
            )
        sensitivity, store = measured.needed_for_search()
        errors = table_row(sensitivity, sensitivity.error, plan.assignment)
        return quantize_from_store(self.model, plan, store, predicted, errors, monitor=self.monitor)

    def _tune(
        self, layers: list[QuantizedLayer], measured: Measurement
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

    def _measure_plans(
        self, plans: list[BitPlan], store: CandidateStore, what: str
    ) -> list[Quality]:
        """Held-out quality of networks put together from the store; the network is restored."""
        _ = self.float_continuations  # before anything changes the network
        modules: dict[str, Any] = {
            layer.name: self.model.module.get_submodule(layer.name) for layer in self.model.layers
        }
        floats = {name: module.weight.detach().clone() for name, module in modules.items()}
        windows, text = self.recipe.evaluate.curve_windows, self.calibration.description
        qualities = []
        try:
            for index, plan in enumerate(plans):
                for name, spec in plan.assignment.items():
                    kept = floats[name] if spec is None else store.get(name, spec).dequantize()
                    put_weight(self.model, name, kept)
                qualities.append(self.measure_held_out(windows, text=text))
                self.monitor.step(what, index + 1, len(plans))
        finally:  # an interrupt must not leave a caller's network in memory changed
            for name, weight in floats.items():
                put_weight(self.model, name, weight)
        return qualities

    def _timed(self, stage: str) -> StageTimer:
        return StageTimer(self.timings, stage)
