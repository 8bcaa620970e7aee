"""One compilation: the loaded model, its calibration text, and each stage as a method.

The order of the calls is in `pipeline.py`; what each of them needs from the others is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.calibrate.artefact import (
    load_curve,
    load_output_gram,
    load_sensitivity,
    load_traces,
    save_curve,
    save_output_grams,
    save_sensitivity,
    save_traces,
)
from quantforge.calibrate.candidates import measure
from quantforge.calibrate.fisher import OutputGram, output_gradient_moments
from quantforge.decision import Chosen, Measurement, choose
from quantforge.errors import InputError
from quantforge.evaluate.generate import greedy
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.evaluate.quality import measure as measure_quality
from quantforge.files import fingerprint
from quantforge.format.manifest import tool_versions
from quantforge.format.store import CandidateStore
from quantforge.load.huggingface import from_module
from quantforge.load.text import calibration_set, from_batches
from quantforge.loading import load_source
from quantforge.measurements import measurement
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
from quantforge.recipe import Recipe, Target, compose, resolve_target
from quantforge.results import CurvePoint, Generation, Quality
from quantforge.search.allocate import search, uniform_plans
from quantforge.search.budget import Budget
from quantforge.search.correction import corrected, correction_factors
from quantforge.types import BitPlan, CalibrationSet, QuantSpec, Sensitivity
from quantforge.workspace import machine_traits

# Raised with every change of what calibration computes: older measurements are then not used.
MEASUREMENT_VERSION = 5
CANDIDATES = "candidates"
TRACES = "traces.safetensors"
OUTPUT_GRAMS = "output_grams.safetensors"
UNIFORM = "uniform.json"
SENSITIVITY = "sensitivity.json"


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

    @contextmanager
    def measure(self, *, fresh: bool) -> Iterator[Measurement]:
        """Sensitivities and candidates, from the cache where everything that made them is equal.

        The candidates are on disk and can be read while the body runs.
        """
        specs = self.recipe.search.candidates({layer.in_features for layer in self.model.layers})
        if not specs:
            raise InputError("none of the candidates' group sizes divides any layer; add -1")
        key = fingerprint(
            self.model.source.fingerprint,
            self.calibration.fingerprint,
            self.recipe.calibrate.model_dump(mode="json"),
            [str(spec) for spec in specs],
            self.recipe.evaluate.model_dump(mode="json", exclude={"prompts", "tokens"}),
            self.recipe.quantize.needs_output_grams,
            MEASUREMENT_VERSION,
            self.seed,
            self.model.device.type,
            tool_versions(),
            machine_traits(),
        )
        make = partial(self._calibrate, specs, key)
        with measurement(
            key, make, complete=SENSITIVITY, fresh=fresh, monitor=self.monitor
        ) as folder:
            yield self._measurement(folder)

    def _calibrate(self, specs: Sequence[QuantSpec], key: str, folder: Path) -> None:
        """Fill a measurement's folder."""
        store = CandidateStore(folder / CANDIDATES, self.model.device)
        with self._timed("calibrate"):
            moments, grams = self.gradient_moments()
            save_output_grams(grams, folder / OUTPUT_GRAMS)
            release_freed()
            sensitivity, final = measure(
                self.model,
                self.calibration.fitting,
                moments,
                specs,
                self.recipe.calibrate,
                store=store,
                fingerprint=key,
                monitor=self.monitor,
            )
            weights = [moments[name] for name in self._block_names()]
            save_traces(weights, final, folder / TRACES)
            save_curve(self._measure_uniform(sensitivity, store), folder / UNIFORM)
        save_sensitivity(sensitivity, folder / SENSITIVITY)  # last: says that all is there

    def _measurement(self, folder: Path) -> Measurement:
        """What a filled folder holds, with predictions corrected by the uniform networks."""
        raw, uniform = load_sensitivity(folder / SENSITIVITY), load_curve(folder / UNIFORM)
        known = {QuantSpec.parse(p.name.removeprefix("uniform ")): p.quality.kl for p in uniform}
        factors = correction_factors(raw, known if self.recipe.search.correct else {})
        channels, final = load_traces(folder / TRACES)
        return Measurement(
            sensitivity=corrected(raw, factors),
            store=CandidateStore(folder / CANDIDATES, self.model.device),
            channel_weights=tuple(weight.to(self.model.device) for weight in channels),
            final_hidden=final,
            uniform=uniform,
            output_grams=partial(load_output_gram, folder / OUTPUT_GRAMS),
        )

    def _measure_uniform(
        self, sensitivity: Sensitivity, store: CandidateStore
    ) -> tuple[CurvePoint, ...]:
        """Uniform networks of the widths that budgets are likely to be near."""
        widths = self.recipe.evaluate.curve_bits
        plans = [
            plan
            for plan in uniform_plans(sensitivity)
            if QuantSpec.parse(plan.budget.removeprefix("uniform ")).bits in widths
        ]
        qualities = self._measure_plans(plans, store, "measure uniform networks")
        return tuple(
            CurvePoint(name=plan.budget, stored_bits=plan.stored_bits, quality=quality)
            for plan, quality in zip(plans, qualities, strict=True)
        )

    def _block_names(self) -> list[str]:
        return self.model.architecture.block_names(self.model.module)

    def gradient_moments(self) -> tuple[dict[str, Tensor], dict[str, OutputGram]]:
        """E[g²] at the outputs of all layers and blocks, and output grams where they are used."""
        options = self.recipe.calibrate
        features = {layer.name: layer.out_features for layer in self.model.layers}
        coupled = set(features) if self.recipe.quantize.needs_output_grams else set()
        embedding: Any = self.model.module.get_submodule(self.model.architecture.embedding)
        features.update(dict.fromkeys(self._block_names(), int(embedding.embedding_dim)))
        return output_gradient_moments(
            self.model,
            features,
            self.calibration.fitting[: options.gradient_sequences],
            batch_size=options.gradient_batch,
            precision=options.precision,
            generator=torch.Generator(self.model.device).manual_seed(self.seed),
            monitor=self.monitor,
            coupled=coupled,
            recompute=options.recompute,
        )

    def search(self, measured: Measurement, budget: Budget) -> Chosen:
        """The plan for a budget, measured beside the uniform networks.

        Never worse than uniform: where a uniform plan that fits is better on held-out tokens, it is
        taken instead and the report says so.
        """
        with self._timed("search"):
            plan = search(measured.sensitivity, budget, self.recipe.search)
            (quality,) = self._measure_plans([plan], measured.store, "measure the plan")
        return choose(plan, quality, measured, budget)

    def quantize(self, plan: BitPlan, measured: Measurement) -> Iterator[QuantizedLayer]:
        """Quantized layers in forward order; the network holds the dequantized weights after."""
        _ = self.reference  # of the float network: nothing may have changed it yet
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
        predicted = measured.row(measured.sensitivity.loss, plan)
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
        errors = measured.row(measured.sensitivity.error, plan)
        return quantize_from_store(
            self.model, plan, measured.store, predicted, errors, monitor=self.monitor
        )

    def _tune(
        self, layers: list[QuantizedLayer], measured: Measurement
    ) -> Iterator[QuantizedLayer]:
        """The same layers with tuned scales, if that lowers the KL on held-out tokens."""
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


def open_job(
    model: str | Path | nn.Module,
    *,
    calibration: str | Path | Iterable[Any] | None,
    effort: str,
    seed: int,
    device: str,
    settings: Mapping[str, Any] | None,
    trust_remote_code: bool,
    tokenizer: Any,
    monitor: Monitor,
) -> Job:
    """Resolve the recipe, load the model and read the calibration text."""
    changes = dict(settings or {})
    if isinstance(calibration, str | Path):
        changes["calibration.source"] = str(calibration)
        calibration = None
    target = Target(name="in-memory") if isinstance(model, nn.Module) else resolve_target(model)
    recipe = compose(target, effort=effort, settings=changes)
    if isinstance(model, nn.Module):
        loaded = from_module(model, tokenizer=tokenizer)
    else:
        loaded = load_source(recipe, device, trust_remote_code=trust_remote_code, monitor=monitor)
    if calibration is None:
        if loaded.tokenizer is None:
            raise InputError("a network in memory needs a tokenizer, or batches as calibration")
        data = calibration_set(recipe.calibration, loaded, seed=seed, monitor=monitor)
    else:
        embedding: Any = loaded.module.get_submodule(loaded.architecture.embedding)
        data = from_batches(
            calibration,
            held_out_share=recipe.calibration.held_out_share,
            vocabulary=int(embedding.num_embeddings),
        )
    return Job(
        model=loaded,
        calibration=data,
        recipe=recipe,
        effort=effort,
        seed=seed,
        monitor=monitor,
    )
