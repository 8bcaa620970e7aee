"""The stages of a convolutional network's compilation, each done once.

    pictures ─ observe → ranges ─ candidates → sensitivities ─ search → plan ─ quantize → network

Candidates and sensitivities are measured on the float network; a plan's network is put together in
forward order, every layer on what the quantized layers before it make, and then reconstructed block
by block. Everything that is compared or chosen is measured on pictures that nothing was fitted on.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from quantforge.progress import Monitor
from quantforge.results import TargetOutcome, TrainingOutcome
from quantforge.search.budget import Budget, Target
from quantforge.targets import is_inside, outcomes
from quantforge.types import LayerInfo, QuantSpec
from quantforge.vision.choosing import Chooser, Found
from quantforge.vision.compensation import CompensationConfig, quantize_layers
from quantforge.vision.correction import correct_biases
from quantforge.vision.costs import Costs, beside_bytes, file_cost, multiplications
from quantforge.vision.equalisation import equalised_if_better
from quantforge.vision.network import QuantizedNetwork, Simulation, VisionNetwork
from quantforge.vision.pictures import Pictures
from quantforge.vision.quality import VisionQuality, compare, logits_of
from quantforge.vision.ranges import Histogram, activation_grids, observe
from quantforge.vision.recipe import VisionRecipe
from quantforge.vision.reconstruction import BlockReport, reconstruct
from quantforge.vision.search import (
    FLOAT_BITS,
    Table,
    VisionPlan,
    uniform_plans,
)
from quantforge.vision.sensitivity import (
    ActivationSensitivity,
    Candidates,
    candidates,
    measured_losses,
    sensitivities,
)
from quantforge.vision.sites import layer_grids
from quantforge.vision.streams import in_batches
from quantforge.vision.traces import activation_losses, network_traces, weight_losses
from quantforge.vision.training import Examples, train

PROBE_BITS = 4  # of the uniform networks that judge equalisation, where they can be


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A finished network.

    Attributes:
        quantized: integers, biases and grids.
        quality: of it, on held-out pictures.
        before: without reconstruction and training; None where there is none.
        blocks: what learning each block was worth.
        reconstructed: whether that is in it.
        training: how training end to end went; None without.
        targets: how it meets the budget's targets.
    """

    quantized: QuantizedNetwork
    quality: VisionQuality
    before: VisionQuality | None = None
    blocks: tuple[BlockReport, ...] = ()
    reconstructed: bool = False
    training: TrainingOutcome | None = None
    targets: tuple[TargetOutcome, ...] = ()


@dataclass(kw_only=True)
class VisionJob:
    """One compilation.

    Attributes:
        network: the float network.
        fitting: what everything is fitted on.
        held_out: what every choice is made on.
        recipe: effective configuration.
        seed: of everything random.
        monitor: progress and cancellation.
        timings: seconds by stage.
    """

    network: VisionNetwork
    fitting: Pictures
    held_out: Pictures
    recipe: VisionRecipe
    seed: int = 0
    monitor: Monitor = field(default_factory=Monitor)
    timings: dict[str, float] = field(default_factory=dict)
    _last: tuple[Hashable, QuantizedNetwork] | None = field(default=None, init=False, repr=False)
    _qualities: dict[Hashable, VisionQuality] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The fitting pictures as they go through the network."""
        return in_batches(self.fitting.inputs, self.recipe.calibration.batch)

    @cached_property
    def reference(self) -> Tensor:
        """[pictures, classes] the float network's logits of the held-out pictures."""
        return logits_of(self.network.graph, self.held_out.inputs)

    @cached_property
    def histograms(self) -> dict[str, Histogram]:
        """`Site.grid` → what the float network has there."""
        with self._timed("observe"):
            return observe(self.network, self.batches)

    @cached_property
    def reads(self) -> dict[str, str]:
        """Layer name → grid of its input; "" where that is no site."""
        return layer_grids(self.network)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The layers as plans see them: fixed where the policy gives them a spec."""
        fixed = self.edges
        return tuple(replace(one, fixed=one.name in fixed) for one in self.network.layers)

    @cached_property
    def costs(self) -> Costs:
        """What plans are counted by."""
        return Costs(
            layers=self.layers, macs=multiplications(self.network), reads=self.reads,
            beside=beside_bytes(self.network),
        )  # fmt: skip

    @property
    def edges(self) -> dict[str, QuantSpec]:
        """The first and the last layer's own spec; empty where they are searched for."""
        if self.recipe.search.edges == "plan":
            return {}
        spec = QuantSpec.parse(self.recipe.search.edges)
        ends = (self.network.layers[0], self.network.layers[-1])
        return {one.name: spec for one in ends}

    @cached_property
    def table(self) -> Table:
        """What all widths of weights and activations are predicted to lose, and what they cost."""
        options = self.recipe.search
        edges = self.edges
        rows = {layer.in_features for layer in self.network.layers}
        specs = tuple(sorted({*options.candidates(rows), *edges.values()}))
        widths, grids = self._widths(), tuple(dict.fromkeys(x.grid for x in self.network.sites))
        if options.solver == "uniform":  # nothing is predicted: the widest that fits is taken
            loss = torch.zeros(len(self.layers), len(specs), dtype=torch.float64)
            rounding = torch.zeros(len(grids), len(widths), dtype=torch.float64)
        else:
            rounded, loss, rounding = self._predicted(specs, widths)
            grids = rounded or grids  # none is rounded where activations stay float
        loss = loss.clone()
        for row, layer in enumerate(self.layers):
            own = edges.get(layer.name)
            for column, spec in enumerate(specs):
                if spec != own if own else spec not in options.candidates({layer.in_features}):
                    loss[row, column] = torch.inf
        if "" in self.reads.values():
            grids = (*grids, "")
        return Table(
            layers=self.layers,
            specs=specs,
            loss=loss,
            grids=grids,
            widths=widths,
            activation_loss=self._allowed(grids, widths, rounding),
            reads=self.reads,
            macs=self.costs.macs,
            file=torch.tensor(
                [
                    [file_cost(x, s) if s.divides(x.in_features) else 0 for s in specs]
                    for x in self.layers
                ],
                dtype=torch.float64,
            ),
        )

    def _predicted(
        self, specs: tuple[QuantSpec, ...], widths: tuple[int, ...]
    ) -> tuple[tuple[str, ...], Tensor, Tensor]:
        """Grids, and the losses of weights and of activations, on held-out pictures.

        Feedback fits a layer of more inputs than there are pictures to these (a classifier's 1280
        to 64 at 2 bits: KL 0.0002 on them, 0.08 on others), so they say nothing of what it loses.
        """
        pictures = self.held_out.inputs
        with self._timed("candidates"):
            tried = candidates(self.network, self.batches, specs, self.compensation)
        with self._timed("sensitivities"):
            made, activations = sensitivities(
                self.network, pictures, tried, self.histograms,
                [bits for bits in widths if bits != FLOAT_BITS],
                method=self.recipe.activations.method, seed=self.seed,
            )  # fmt: skip
            loss, rounding = made.loss, activations.loss
            if self.recipe.search.sensitivity == "measured":
                loss, rounding = measured_losses(
                    self.network, pictures, tried, activations.candidates
                )
            elif self.recipe.search.sensitivity == "hawq":
                loss, rounding = self._by_traces(tried, activations)
            else:
                # Its errors are logits': large ones are far from second order, and exact is cheap.
                last = self.network.layers[-1:]
                exact, _ = measured_losses(self.network, pictures, tried, {}, layers=last)
                loss = torch.cat([loss[:-1], exact])
        return activations.grids, loss, rounding

    def _by_traces(
        self, tried: Candidates, activations: ActivationSensitivity
    ) -> tuple[Tensor, Tensor]:
        """HAWQ-V2's predictions, of the same candidates."""
        part = self.batches[0]
        found = network_traces(self.network, part, seed=self.seed)
        loss = weight_losses(self.network, found, tried)
        return loss, activation_losses(self.network, found, part, activations.candidates)

    def _widths(self) -> tuple[int, ...]:
        """Widths that some activation may have."""
        options = self.recipe.activations
        ends = {options.edges} if options.bits and options.edges else set()
        floating = set() if options.bits and "" not in self.reads.values() else {FLOAT_BITS}
        return tuple(sorted({*options.bits, *ends, *floating}))

    def _allowed(self, grids: Sequence[str], widths: Sequence[int], rounding: Tensor) -> Tensor:
        """[grids, widths] predicted losses; +inf where a grid may not have a width."""
        options = self.recipe.activations
        ends = {self.reads[self.network.layers[0].name], self.reads[self.network.layers[-1].name]}
        table = torch.full((len(grids), len(widths)), torch.inf, dtype=torch.float64)
        measured = [bits for bits in widths if bits != FLOAT_BITS]
        for row, grid in enumerate(grids):
            allowed = set(options.bits) or {FLOAT_BITS}
            if options.bits and options.edges and grid in ends:
                allowed = {options.edges}
            if not grid:
                allowed = {FLOAT_BITS}
            for column, bits in enumerate(widths):
                if bits in allowed:
                    known = bits != FLOAT_BITS
                    table[row, column] = rounding[row, measured.index(bits)] if known else 0.0
        return table

    @cached_property
    def compensation(self) -> CompensationConfig:
        """How layers are quantized."""
        options = self.recipe.weights
        return CompensationConfig(
            feedback=options.feedback, grid=options.grid, damping=options.damping,
            correct_bias=options.correct_bias,
        )  # fmt: skip

    @cached_property
    def right(self) -> Sequence[float]:
        """Of every held-out picture 1 where the float network is right, else 0."""
        return compare(
            self.reference, self.reference, pictures="", labels=self.held_out.labels
        ).scores

    @property
    def chooser(self) -> Chooser:
        """What finds plans and judges networks."""
        return Chooser(
            name=self.network.name, table=self.table, costs=self.costs, edges=self.edges,
            solver=self.recipe.search.solver, quality_of=self.quality_of,
            right=self.right,
        )  # fmt: skip

    def find(self, budget: Budget) -> Found:
        """The plan within a budget, and the uniform networks beside it; see `Chooser.find`."""
        return self.chooser.find(budget)

    def one_pass(self, plan: VisionPlan) -> QuantizedNetwork:
        """A plan's network, compensated and with corrected biases, without reconstruction."""
        if self._last is not None and self._last[0] == plan.identity:
            return self._last[1]
        done, count = iter(range(1, len(self.layers) + 1)), len(self.layers)
        with self._timed("quantize"):
            grids = activation_grids(
                {name: self.histograms[name] for name in plan.widths}, dict(plan.widths),
                self.recipe.activations.method,
            )  # fmt: skip
            made = quantize_layers(
                self.network, self.batches, plan.assignment, grids, self.compensation,
                on_layer=lambda layer, _: self.monitor.step(
                    "quantize", next(done), count, layer.name
                ),
            )  # fmt: skip
        self._last = (plan.identity, made)
        return made

    def quality_of(self, plan: VisionPlan) -> VisionQuality:
        """Held-out quality of a plan's network without reconstruction; measured once."""
        known = self._qualities.get(plan.identity)
        if known is None:
            known = self._qualities[plan.identity] = self.measure(self.one_pass(plan))
        return known

    def equalised(self) -> VisionJob:
        """This job, on the equalised network where that is asked for and helps.

        It is judged by uniform networks, of four bits if they may have four.
        """
        if not self.recipe.weights.equalise:
            return self
        only = self.recipe.search.model_copy(update={"solver": "uniform"})
        recipe = self.recipe.model_copy(update={"search": only})

        def loss(network: VisionNetwork) -> float:
            job = replace(self, network=network, recipe=recipe)
            plans = uniform_plans(job.table, job.edges)
            wide = [plan for plan in plans if plan.code_bits >= PROBE_BITS]
            return job.quality_of(wide[0] if wide else plans[-1]).kl

        network, before, after = equalised_if_better(self.network, loss)
        self.monitor.step("equalise", 1, 1, f"held-out KL {before:.4g} without, {after:.4g} with")
        return replace(self, network=network)

    def finish(
        self, plan: VisionPlan, targets: Sequence[Target] = (), *, tried: int = 0
    ) -> Finished:
        """A plan's network, reconstructed and trained where that brings held-out KL down.

        Args:
            plan: of the network.
            targets: that the network must be inside: what leaves them is not kept either.
            tried: plans that were measured to find this one.
        """
        start, before = self.one_pass(plan), self.quality_of(plan)
        made, after, blocks, kept = start, before, tuple[BlockReport, ...](), False
        if self.recipe.reconstruction.steps:
            learned, blocks = self._reconstructed(start)
            for one in (learned, self._corrected(learned)):
                quality = self.measure(one)
                if quality.kl < after.kl and is_inside(targets, quality, self.right):
                    made, after, kept = one, quality, True
        outcome = None
        if self.recipe.training.steps:
            trained, outcome = self._trained(made)
            quality = self.measure(trained)
            if outcome.kept and is_inside(targets, quality, self.right):
                made, after = trained, quality
            else:
                outcome = replace(outcome, kept=False)
        return Finished(
            quantized=made, quality=after, before=before, blocks=blocks, reconstructed=kept,
            training=outcome, targets=outcomes(targets, plan, after, self.right, tried),
        )  # fmt: skip

    def _corrected(self, quantized: QuantizedNetwork) -> QuantizedNetwork:
        """With means and deviations given back once more: learned codes have moved them."""
        if not self.compensation.correct_bias:
            return quantized
        deviations = self.compensation.match_deviation
        return correct_biases(quantized, self.batches, deviations=deviations)

    def _reconstructed(
        self, start: QuantizedNetwork
    ) -> tuple[QuantizedNetwork, tuple[BlockReport, ...]]:
        """With the rounding of all blocks learned."""
        count, reports = len(self.network.blocks), list[BlockReport]()

        def told(report: BlockReport) -> None:
            reports.append(report)
            self.monitor.step("reconstruct", len(reports), count, report.block)

        config = self.recipe.reconstruction.of(self.seed)
        with self._timed("reconstruct"):
            return reconstruct(start, self.batches, config, on_block=told)

    def _trained(self, start: QuantizedNetwork) -> tuple[QuantizedNetwork, TrainingOutcome]:
        """Trained end to end; the start where that is of no use."""
        examples = Examples(
            pictures=self.fitting.inputs,
            logits=logits_of(self.network.graph, self.fitting.inputs),
            labels=self.fitting.labels,
        )
        with self._timed("train"):
            return train(
                start, examples, self.recipe.training, lambda made: self.measure(made).kl,
                seed=self.seed, monitor=self.monitor,
            )  # fmt: skip

    def measure(self, quantized: QuantizedNetwork) -> VisionQuality:
        """Held-out quality of a network."""
        with self._timed("measure"):
            made = logits_of(Simulation(quantized).run, self.held_out.inputs)
        return compare(
            made, self.reference, pictures=self.held_out.description, labels=self.held_out.labels
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self.monitor.check(stage)
        began = time.perf_counter()
        yield
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began
