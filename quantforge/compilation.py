"""One compilation: the loaded model, its calibration text, and each stage as a method.

The order of the calls is in `pipeline.py`; what each of them needs from the others is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from quantforge.assembling import StoredWeights, changed_weights
from quantforge.calibrate.artefact import quality_of
from quantforge.calibration import Calibrator
from quantforge.choosing import PlanChooser
from quantforge.decision import Chosen, Measurement
from quantforge.evaluate.generate import greedy
from quantforge.evaluate.reference import AnyReference, collect
from quantforge.evaluate.reference import measure as measure_quality
from quantforge.files import fingerprint
from quantforge.format.footprint import Footprint
from quantforge.format.manifest import plan_to_dict
from quantforge.format.store import CandidateStore
from quantforge.journal import NO_JOURNAL, Journal, open_journal
from quantforge.memory import StageTimer
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.quantize.sequential import (
    KeepFloat,
    QuantizedLayer,
    quantize_from_store,
    quantize_sequentially,
)
from quantforge.recipe import Recipe
from quantforge.recovery import Recovery
from quantforge.results import AnyQuality, Generation, TrainingOutcome
from quantforge.search.allocate import (
    known_losses,
    table_row,
)
from quantforge.search.budget import Budget
from quantforge.search.latency import LatencyModel
from quantforge.search.vocabulary import Candidates, fixed_specs
from quantforge.types import BitPlan, CalibrationSet, LayerInfo, QuantSpec
from quantforge.vocabulary import VocabularyCalibrator

# Raised with every change of what the quantize stage computes: older journals are then not used.
JOURNAL_VERSION = 2


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
        training: how training went; None where there was none.
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
    training: TrainingOutcome | None = None

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
            self.plans.find(None, None)  # a plan that fits no network is refused before the work
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

    @property
    def plans(self) -> PlanChooser:
        """Finds plans for this network."""
        return PlanChooser(
            model=self.model,
            vocabulary=self.vocabulary,
            recipe=self.recipe,
            footprint=self.footprint,
            given=self.given,
            latency=self.latency,
            measure=self.measure_plans,
            window_nll=lambda: self.reference.window_nll,
            fitting=self.calibration.fitting,
            monitor=self.monitor,
        )

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every layer that plans cover: those of the blocks in forward order, then the others."""
        return self.plans.layers

    def search(self, measured: Measurement, budget: Budget | None) -> Chosen:
        """The plan for a budget, measured beside the uniform networks, see `PlanChooser.choose`."""
        with self._timed("search"):
            return self.plans.choose(measured, budget)

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
            self.recipe.training.model_dump(mode="json"),
            self.recipe.evaluate.model_dump(mode="json"),
            self.seed,
        )
        return open_journal(key, fresh=fresh, monitor=self.monitor, share=self.model.share)

    def quantize(
        self, plan: BitPlan, measured: Measurement, journal: Journal = NO_JOURNAL
    ) -> Iterator[QuantizedLayer]:
        """Quantized layers in forward order; the network holds the dequantized weights after."""
        _ = self.float_continuations  # and the reference: nothing may have changed the network yet
        training = self.recipe.training
        tunes, trains = self.recipe.quantize.tuning.steps > 0, training.on
        originals: dict[str, Tensor] = {}
        with self._timed("quantize"):
            scratch = self.model.scratch

            def keep(name: str, weight: Tensor) -> None:
                originals[name] = scratch.keep(weight)

            layers = self._kept(
                self._compensate(
                    plan, measured, journal, keep if training.needs_originals else None
                )
            )
            after = tunes or trains or training.block_steps > 0
            if not after or not any(plan.assignment.values()):
                yield from layers
                return
            finished = list(layers)
        recovery = self._recovery(measured, journal)
        if training.block_steps:
            with self._timed("train blocks"):
                finished = recovery.train_blocks(
                    finished, originals, self.calibration.held_out, measured.channel_weights
                )
        if tunes:
            with self._timed("tune"):
                finished = recovery.tune(finished)
        if trains:
            with self._timed("train"):
                finished = recovery.train(finished, originals)
            self.training = recovery.outcome
        yield from finished

    def _kept(self, layers: Iterable[QuantizedLayer]) -> Iterator[QuantizedLayer]:
        """The same layers, whose integers take no memory where the network takes none."""
        for one in layers:
            kept = None if one.weight is None else self.model.scratch.keep_weight(one.weight)
            yield replace(one, weight=kept)

    def _compensate(
        self,
        plan: BitPlan,
        measured: Measurement,
        journal: Journal,
        keep_float: KeepFloat | None = None,
    ) -> Iterator[QuantizedLayer]:
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
                token_squares=measured.token_squares,
                enter=enter,
                journal=journal,
                keep_float=keep_float,
            )
        else:
            sensitivity, store = measured.needed_for_search()
            enter()
            errors = table_row(sensitivity, sensitivity.error, plan.assignment)
            yield from quantize_from_store(
                self.model, plan, store, predicted, errors,
                layers=self.model.layers, monitor=self.monitor, keep_float=keep_float,
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

    def _recovery(self, measured: Measurement, journal: Journal) -> Recovery:
        """Tuning and training, ready to be called."""
        windows = self.recipe.evaluate.curve_windows
        return Recovery(
            model=self.model,
            recipe=self.recipe,
            tokens=self.calibration.fitting,
            final_hidden=measured.final_hidden,
            float_output=self.reference.output if self.vocabulary else None,
            measure=lambda: self.measure_held_out(windows).loss,
            evidence=measured.evidence,
            seed=self.seed,
            monitor=self.monitor,
            journal=journal,
            notes=self.notes,
        )

    def measure_held_out(self, windows: int | None = None, text: str = "held-out") -> AnyQuality:
        """Quality of the network as it now stands on the first held-out sequences."""
        held_out = self.calibration.held_out[:windows]
        return measure_quality(
            self.model.module,
            self.model.architecture,
            held_out,
            self.reference,
            text=text,
            precision=self.recipe.evaluate.precision,
            share=self.model.share,
        )

    @cached_property
    def footprint(self) -> Footprint:
        """Shapes of everything the checkpoint will hold."""
        shard_bytes = self.recipe.export.shard_bytes
        return Footprint.of(self.model, shard_bytes=shard_bytes, fixed=fixed_specs(self.vocabulary))

    @cached_property
    def reference(self) -> AnyReference:
        """The float network on the held-out tokens; first used before anything changes it.

        Its head is the network's own tensor as long as nothing changes that (`keep_float_head`).
        """
        return collect(
            self.model.module,
            self.model.architecture,
            self.calibration.held_out,
            precision=self.recipe.evaluate.precision,
            keep_head_copy=bool(self.vocabulary),
            monitor=self.monitor,
            share=self.model.share,
        )

    def keep_float_head(self) -> None:
        """Let the reference have its own head from here on: the network's is about to change."""
        if not self.vocabulary:  # else it has one already
            self.reference = self.reference.with_own_head()

    @cached_property
    def float_continuations(self) -> tuple[str, ...]:
        """Greedy continuations of the report's prompts by the float network."""
        _ = self.reference
        return self.continuations()

    def continuations(self) -> tuple[str, ...]:
        """Greedy continuations of the report's prompts by the network as it now stands.

        An encoder, or a network without a tokenizer, has none.
        """
        if self.model.tokenizer is None or self.model.architecture.encodes:
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
    ) -> list[AnyQuality]:
        """Held-out quality of networks put together from the store; the network is restored.

        Args:
            plans: whose specs are all in the store.
            store: integers of the candidates.
            what: stage for the monitor.
            journal: gets every measurement; what it has is not measured again.
            all_windows: take every held-out sequence instead of `evaluate.curve_windows`.
        """
        windows = None if all_windows else self.recipe.evaluate.curve_windows
        entries = [f"quality-{fingerprint(plan_to_dict(x), windows)[:32]}" for x in plans]
        noted = [journal.read(entry) for entry in entries]
        known = [None if entry is None else quality_of(entry.facts) for entry in noted]
        missing = [index for index, quality in enumerate(known) if quality is None]
        made = self.measure_changed(
            (StoredWeights(plans[index], store) for index in missing),
            what,
            start=len(plans) - len(missing),
            count=len(plans),
            all_windows=all_windows,
            note=lambda index, quality: journal.write(entries[missing[index]], {}, asdict(quality)),
        )
        found = iter(made)
        return [next(found) if quality is None else quality for quality in known]

    def measure_changed(
        self,
        networks: Iterable[Mapping[str, Tensor | None]],
        what: str | None = None,
        *,
        start: int = 0,
        count: int = 0,
        all_windows: bool = False,
        note: Callable[[int, AnyQuality], None] | None = None,
    ) -> list[AnyQuality]:
        """Held-out quality of networks with other weights; the network is restored.

        Args:
            networks: layer name → [out, in] weight in the place of its own, which None keeps; they
                all name the same layers.
            what: stage for the monitor; None reports nothing.
            start: networks that were measured before, for the monitor.
            count: of all networks, likewise.
            all_windows: take every held-out sequence instead of `evaluate.curve_windows`.
            note: is told of every network, by its place among these, as it is measured.
        """
        _ = self.float_continuations  # before anything changes the network
        windows = None if all_windows else self.recipe.evaluate.curve_windows
        text = self.calibration.description
        qualities = []
        with changed_weights(self.model) as loan:
            for index, weights in enumerate(networks):
                loan.put(weights)
                qualities.append(self.measure_held_out(windows, text=text))
                if note is not None:
                    note(index, qualities[-1])
                if what is not None:
                    self.monitor.step(what, start + index + 1, count)
        return qualities

    def _timed(self, stage: str) -> StageTimer:
        return StageTimer(self.timings, stage)
