"""What the later stages need of the float network: made once, and kept in the cache.

Where a plan is searched, that is everything calibration can tell: the integers of every candidate
and the evidence about them, measured uniform networks, output grams, channel weights and final
hidden states; and beside them the sensitivities of every estimator that was ever asked for.
Where there is nothing to search (`SearchConfig.settled`), only what the configured stages read is
made, and where they read nothing, nothing is: plain GPTQ costs no backward pass and no disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from quantforge.calibrate.artefact import (
    load_curve,
    load_evidence,
    load_output_gram,
    load_sensitivity,
    load_token_squares,
    load_traces,
    save_curve,
    save_evidence,
    save_output_gram,
    save_sensitivity,
    save_token_squares,
    save_traces,
)
from quantforge.calibrate.candidates import final_hidden, quantize_candidates, weight_errors
from quantforge.calibrate.estimators import Network, estimate
from quantforge.calibrate.evidence import Evidence
from quantforge.calibrate.fisher import GradientStatistics, gradient_statistics
from quantforge.calibrate.token_loss import sampled_labels
from quantforge.capture import product_dtype
from quantforge.claims import require_room
from quantforge.decision import Measurement
from quantforge.estimate import Shape, states_bytes
from quantforge.files import fingerprint
from quantforge.format.manifest import tool_versions
from quantforge.format.store import CandidateStore
from quantforge.journal import NO_JOURNAL, Journal
from quantforge.machine import machine_traits
from quantforge.measurements import measurement
from quantforge.memory import StageTimer, release_freed
from quantforge.models import Model
from quantforge.parallel import Share
from quantforge.planning import block_candidates, loadable, priced
from quantforge.progress import Monitor
from quantforge.recipe import Recipe
from quantforge.results import AnyQuality, CurvePoint
from quantforge.search.allocate import block_candidate_bytes, uniform_plans
from quantforge.search.correction import corrected, correction_factors
from quantforge.search.interactions import shrunk_interactions
from quantforge.types import BitPlan, CalibrationSet, LayerInfo, QuantSpec, Sensitivity

# Raised with every change of what calibration computes: older measurements are then not used.
MEASUREMENT_VERSION = 11
CANDIDATES = "candidates"
TRACES = "traces.safetensors"
OUTPUT_GRAMS = "output_grams"
TOKEN_SQUARES = "tokens.safetensors"
UNIFORM = "uniform.json"
EVIDENCE = "evidence.safetensors"
JOURNAL = "journal"
# Options of `calibrate` that only the estimators read: evidence is the same whatever they are.
ESTIMATING = {"estimator", "curvature", "probes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the quantize stage reads of a measurement, beside the plan.

    Attributes:
        output_grams: for feedback between rows.
        token_squares: for grams that count tokens by what the loss feels of them.
        channel_weights: for the loss of learned rounding.
        final_hidden: for tuning and training, whose target is the float network's distribution,
            and for the head.
    """

    output_grams: bool
    token_squares: bool
    channel_weights: bool
    final_hidden: bool

    @classmethod
    def of(cls, recipe: Recipe, *, vocabulary: bool = False) -> Needs:
        """What this configuration reads; `vocabulary`: embedding or head are quantized."""
        config = recipe.quantize
        return cls(
            output_grams=config.needs_output_grams,
            token_squares=config.weighs_tokens,
            channel_weights=config.rounding.steps > 0 and config.rounding.weighted,
            final_hidden=config.tuning.steps > 0 or recipe.training.on or vocabulary,
        )

    @property
    def anything(self) -> bool:
        """Whether a network has to be run at all."""
        return self.gradients or self.final_hidden

    @property
    def gradients(self) -> bool:
        """Whether it has to be run backwards."""
        return self.output_grams or self.token_squares or self.channel_weights


class _Shared(TypedDict):
    """Arguments of `measurement` that are the same for all."""

    monitor: Monitor
    share: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrator:
    """Makes measurements of a float network, or takes them from the cache.

    Attributes:
        model: the float network.
        calibration: fitting and held-out tokens.
        recipe: effective configuration.
        seed: of the gradients' labels.
        monitor: progress and cancellation.
        timings: stage → seconds of wall time, added to.
        vocabulary: whether embedding or head are quantized.
        measure_plans: held-out quality of networks put together from a store, with the name of the
            stage for the monitor and the journal of finished ones.
    """

    model: Model
    calibration: CalibrationSet
    recipe: Recipe
    seed: int
    monitor: Monitor
    timings: dict[str, float]
    vocabulary: bool = False
    measure_plans: Callable[[list[BitPlan], CandidateStore, str, Journal], list[AnyQuality]]

    @contextmanager
    def searched(self, *, fresh: bool) -> Iterator[Measurement]:
        """Everything, for any budget; the candidates can be read while the body runs."""
        specs = block_candidates(self.model.layers, self.recipe.search)
        key = self.key(
            self.recipe.calibrate.model_dump(mode="json", exclude=ESTIMATING),
            [str(spec) for spec in specs],
            self.recipe.evaluate.model_dump(mode="json", exclude={"prompts", "tokens"}),
            self.recipe.quantize.needs_output_grams,
            self.recipe.quantize.weighs_tokens,
        )
        name = self._sensitivity_name()
        make = partial(self._estimate, specs, fingerprint(key, name), name)
        shared = self._shared()
        with measurement(key, make, complete=name, fresh=fresh, **shared) as folder:
            yield replace(self._read_all(folder, name), key=fingerprint(key, name))

    @contextmanager
    def settled(self, *, fresh: bool) -> Iterator[Measurement]:
        """What the configured stages read, for a plan that is not searched; maybe nothing."""
        needs = Needs.of(self.recipe, vocabulary=self.vocabulary)
        unread = {"damping", "grid", *ESTIMATING}  # those are about candidates
        options = self.recipe.calibrate.model_dump(mode="json", exclude=unread)
        key = self.key("settled", options, asdict(needs))
        if not needs.anything:
            yield replace(self._read_needed(needs, None), key=key)
            return
        make = partial(self._measure_needed, needs)
        shared = self._shared()
        with measurement(key, make, complete=TRACES, fresh=fresh, **shared) as folder:
            yield replace(self._read_needed(needs, folder), key=key)

    def key(self, *parts: Any) -> str:
        """Fingerprint of `parts` and of what decides every measurement."""
        return fingerprint(
            self.model.source.fingerprint,
            self.calibration.fingerprint,
            *parts,
            MEASUREMENT_VERSION,
            self.seed,
            self.model.device.type,
            tool_versions(),
            machine_traits(),
        )

    def _sensitivity_name(self) -> str:
        """File of a measurement that holds what the configured estimator says."""
        options = self.recipe.calibrate.model_dump(mode="json", include=ESTIMATING)
        return f"sensitivity-{self.recipe.calibrate.estimator}-{fingerprint(options)[:12]}.json"

    def _estimate(self, specs: Sequence[QuantSpec], key: str, name: str, folder: Path) -> None:
        """Fill a folder for `searched`; what another estimator needed too is there already."""
        store = CandidateStore(folder / CANDIDATES, self.model.device)
        with StageTimer(self.timings, "calibrate"):
            if not self.model.share.agree((folder / EVIDENCE).is_file()):
                self._measure_candidates(specs, store, folder)
            sensitivity = estimate(
                self.recipe.calibrate.estimator,
                load_evidence(folder / EVIDENCE),
                self.network(specs, store, folder),
                key,
            )
        self._keep(save_sensitivity, sensitivity, folder / name)  # last: says that all is there
        self._journal(folder).clear()

    def _measure_candidates(
        self, specs: Sequence[QuantSpec], store: CandidateStore, folder: Path
    ) -> None:
        """Everything that does not depend on the estimator."""
        shape = Shape.of(self.model, self.calibration, self.recipe)
        integers = block_candidate_bytes(self.model.layers, specs)
        size = states_bytes(shape, self.recipe) + integers
        self._keep(require_room, size, folder, folder / CANDIDATES, folder / OUTPUT_GRAMS)
        evidence = self._evidence(specs, store, folder)
        release_freed()  # hidden states and gradients, before networks are put together
        table = estimate("fisher-factored", evidence, self.network(specs, store, folder))
        journal = self._journal(folder)
        curve = self._measure_uniform(table, store, journal)
        self._keep(save_curve, curve, folder / UNIFORM)
        self._keep(save_evidence, evidence, folder / EVIDENCE)  # last of these
        journal.clear()
        self.model.share.wait()  # until it can be read

    def _evidence(
        self, specs: Sequence[QuantSpec], store: CandidateStore, folder: Path
    ) -> Evidence:
        """Integers and errors of every candidate, and gradients; their files are written here."""
        errors, final = quantize_candidates(
            self.model,
            self.calibration.fitting,
            specs,
            self.recipe.calibrate,
            store=store,
            monitor=self.monitor,
            journal=self._journal(folder),
        )
        release_freed()
        found = self.gradients(
            folder,
            coupled=self.recipe.quantize.needs_output_grams,
            errors=self.network(specs, store, folder).errors,
            rows={one.layer.name: one.rows for one in errors},
        )
        if self.recipe.quantize.weighs_tokens:
            self._keep_token_squares(folder, found.tokens)
        self._keep(save_traces, found.channels, final, folder / TRACES)
        return Evidence.of(errors, found, specs, self.calibration.fitting.shape[1])

    def network(
        self, specs: Sequence[QuantSpec], store: CandidateStore, scratch: Path | None = None
    ) -> Network:
        """The float network as estimators may run it.

        Args:
            specs: the candidates.
            store: their integers.
            scratch: folder for hidden states on the way.
        """
        options = self.recipe.calibrate
        journal = NO_JOURNAL if scratch is None else self._journal(scratch)

        def measure(assignments: Sequence[Mapping[str, QuantSpec]]) -> list[AnyQuality]:
            layers = self.model.layers
            kept = dict.fromkeys(layer.name for layer in layers)
            plans = [priced(layers, {**kept, **one}, None) for one in assignments]
            return self.measure_plans(plans, store, "measure layers", journal)

        return Network(
            model=self.model,
            fitting=self.calibration.fitting,
            config=options,
            errors=weight_errors(self.model, specs, store, product_dtype(options.precision)),
            measure=measure,
            seed=self.seed,
            monitor=self.monitor,
            scratch=scratch,
        )

    def _measure_needed(self, needs: Needs, folder: Path) -> None:
        """Fill a folder for `settled`."""
        weights: tuple[Tensor, ...] = ()
        shape = Shape.of(self.model, self.calibration, self.recipe)
        states = states_bytes(
            shape, self.recipe, gradients=needs.gradients, hidden=needs.final_hidden
        )
        self._keep(require_room, states, folder, folder / OUTPUT_GRAMS)
        self.model.share.wait()  # scratch of the others is not there yet
        with StageTimer(self.timings, "calibrate"):
            if needs.gradients:
                found = self.gradients(folder, coupled=needs.output_grams)
                if needs.token_squares:
                    self._keep_token_squares(folder, found.tokens)
                release_freed()
                weights = found.channels if needs.channel_weights else ()
            final = torch.empty(0)
            if needs.final_hidden:
                final = final_hidden(
                    self.model, self.calibration.fitting, self.recipe.calibrate, self.monitor
                )
        self._keep(save_traces, weights, final, folder / TRACES)  # last: says that all is there
        self._journal(folder).clear()

    def _read_all(self, folder: Path, name: str) -> Measurement:
        """What a filled folder holds, with predictions corrected by the uniform networks."""
        raw, uniform = load_sensitivity(folder / name), load_curve(folder / UNIFORM)
        kind = self.recipe.search.interactions
        if kind != "none":
            evidence = load_evidence(folder / EVIDENCE)
            pairs = shrunk_interactions(
                evidence.products, evidence.length, raw.layers, sparse=kind == "sparse"
            )
            raw = replace(raw, interactions=pairs)
        known = {QuantSpec.parse(p.name.removeprefix("uniform ")): p.quality.loss for p in uniform}
        factors = correction_factors(raw, known if self.recipe.search.correct else {})
        channels, final = load_traces(folder / TRACES)
        sensitivity = loadable(corrected(raw, factors), self.recipe.search)
        names = {plan.budget for plan in uniform_plans(sensitivity)}
        return Measurement(
            sensitivity=sensitivity,
            store=CandidateStore(folder / CANDIDATES, self.model.device),
            channel_weights=tuple(weight.to(self.model.device) for weight in channels),
            final_hidden=final,
            uniform=tuple(point for point in uniform if point.name in names),
            output_grams=partial(load_output_gram, folder / OUTPUT_GRAMS),
            token_squares=partial(load_token_squares, folder / TOKEN_SQUARES)
            if self.recipe.quantize.weighs_tokens
            else None,
            evidence=partial(load_evidence, folder / EVIDENCE),
            factors=factors,
        )

    def _read_needed(self, needs: Needs, folder: Path | None) -> Measurement:
        """What a folder for `settled` holds; every channel counts alike where nothing asks."""
        device = self.model.device
        channels: tuple[Tensor, ...] = ()
        final: Tensor | None = None
        if folder is not None:
            channels, final = load_traces(folder / TRACES)
        if not needs.channel_weights:
            channels = (torch.ones(self._hidden_features()),) * len(self._block_names())
        grams = squares = None
        if folder is not None and needs.output_grams:
            grams = partial(load_output_gram, folder / OUTPUT_GRAMS)
        if folder is not None and needs.token_squares:
            squares = partial(load_token_squares, folder / TOKEN_SQUARES)
        return Measurement(
            channel_weights=tuple(weight.to(device) for weight in channels),
            final_hidden=final if needs.final_hidden else None,
            output_grams=grams,
            token_squares=squares,
        )

    def _measure_uniform(
        self, sensitivity: Sensitivity, store: CandidateStore, journal: Journal
    ) -> tuple[CurvePoint, ...]:
        """Uniform networks of the widths that budgets are likely to be near."""
        widths = self.recipe.evaluate.curve_bits
        plans = [
            plan
            for plan in uniform_plans(sensitivity)
            if QuantSpec.parse(plan.budget.removeprefix("uniform ")).bits in widths
        ]
        qualities = self.measure_plans(plans, store, "measure uniform networks", journal)
        return tuple(
            CurvePoint(name=plan.budget, stored_bits=plan.stored_bits, quality=quality)
            for plan, quality in zip(plans, qualities, strict=True)
        )

    def gradients(
        self,
        folder: Path,
        *,
        coupled: bool = False,
        first: int = 0,
        errors: Callable[[LayerInfo], Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> GradientStatistics:
        """One backward pass over `gradient_sequences`; see `gradient_statistics`.

        Args:
            folder: of the measurement; receives output grams, and hidden states meanwhile.
            coupled: whether output grams are wanted.
            first: fitting sequence to begin with.
            errors: gives D of a layer's candidates.
            rows: output errors of a layer's candidates, row by row.
        """
        options = self.recipe.calibrate
        generator = torch.Generator(self.model.device).manual_seed(self.seed + first)
        monitor, count = self.monitor, options.gradient_sequences
        if first:
            blocks, sequences = len(self._block_names()), len(self.calibration.fitting)
            before, total = (first - count) * blocks, (sequences - count) * blocks
            monitor = monitor.part("token gradients", before, total)
        return gradient_statistics(
            self.model,
            self.calibration.fitting[first : first + count],
            batch_size=options.gradient_batch,
            precision=options.precision,
            head_gradient=sampled_labels(generator, options.gradient_batch),
            monitor=monitor,
            keep_gram=partial(self._keep, save_output_gram, folder / OUTPUT_GRAMS)
            if coupled
            else None,
            errors=errors,
            rows=rows,
            scratch=folder,
            journal=self._journal(folder, str(first)),
        )

    def _keep_token_squares(self, folder: Path, known: Mapping[str, Tensor]) -> None:
        """Write what the loss feels of every fitting token.

        Args:
            folder: of the measurement.
            known: of the first pass's sequences; the others are run here, as many at a time.
        """
        count = self.recipe.calibrate.gradient_sequences
        others = range(count, len(self.calibration.fitting), count)
        parts = [known, *(self.gradients(folder, first=first).tokens for first in others)]
        squares = {name: torch.cat([part[name] for part in parts]) for name in known}
        self._keep(save_token_squares, squares, folder / TOKEN_SQUARES)

    def _journal(self, folder: Path, part: str = "") -> Journal:
        """Where what is finished of a measurement is noted."""
        return Journal(folder / JOURNAL / part, self.model.share)

    def _shared(self) -> _Shared:
        """What every measurement is opened with."""
        return _Shared(monitor=self.monitor, share=self.model.share)

    def _keep(self, write: Callable[..., None], *what: Any) -> None:
        """Write what all processes know."""
        if self.model.share.main:
            write(*what)

    def _hidden_features(self) -> int:
        embedding: Any = self.model.module.get_submodule(self.model.architecture.embedding)
        return int(embedding.embedding_dim)

    def _block_names(self) -> list[str]:
        return self.model.architecture.block_names(self.model.module)
