"""The stages of a convolutional network's compilation, each done once.

    pictures ─ observe → ranges ─ candidates → sensitivities ─ search → plan ─ quantize → network

Candidates and sensitivities are measured on the float network; a plan's network is put together in
forward order, every layer on what the quantized layers before it make, and then reconstructed block
by block. Everything that is compared or chosen is measured on pictures that nothing was fitted on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import UsageError
from quantforge.progress import Monitor
from quantforge.results import TargetOutcome, TrainingOutcome
from quantforge.search.allocate import planned_weights, stored_cost
from quantforge.search.budget import Budget, Limit
from quantforge.targets import meet
from quantforge.types import LayerInfo, QuantSpec
from quantforge.vision.compensation import CompensationConfig, quantize_layers
from quantforge.vision.costs import multiplications
from quantforge.vision.network import QuantizedNetwork, Simulation, VisionNetwork
from quantforge.vision.outcome import VisionPoint
from quantforge.vision.pictures import Pictures
from quantforge.vision.quality import VisionQuality, compare, logits_of
from quantforge.vision.ranges import Histogram, activation_grids, observe
from quantforge.vision.recipe import VisionRecipe
from quantforge.vision.reconstruction import BlockReport, reconstruct
from quantforge.vision.search import (
    FLOAT_BITS,
    Limits,
    Table,
    VisionPlan,
    operations,
    search,
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

WHOLE = QuantSpec(8)  # what "bops:-50%" is less than, with 8-bit activations
OF_FLOAT = 32  # bits of a float weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan and what it was compared with.

    Attributes:
        plan: what is made.
        curve: uniform networks, and the plan's, without reconstruction; empty where nothing was
            searched.
        targets: how the budget's targets were met.
    """

    plan: VisionPlan
    curve: tuple[VisionPoint, ...] = ()
    targets: tuple[TargetOutcome, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A finished network.

    Attributes:
        quantized: integers, biases and grids.
        quality: of it, on held-out pictures.
        before: without reconstruction and training; None where there is none.
        blocks: what learning each block was worth.
        training: how training end to end went; None without.
    """

    quantized: QuantizedNetwork
    quality: VisionQuality
    before: VisionQuality | None = None
    blocks: tuple[BlockReport, ...] = ()
    training: TrainingOutcome | None = None

    @property
    def undone(self) -> bool:
        """Whether reconstruction was of no use, and is not in it."""
        return bool(self.blocks) and self.before is not None and self.quality.kl >= self.before.kl


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
    def macs(self) -> dict[str, int]:
        """Layer name → multiplications of a picture."""
        return multiplications(self.network)

    @cached_property
    def reads(self) -> dict[str, str]:
        """Layer name → grid of its input; "" where that is no site."""
        return layer_grids(self.network)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The layers as plans see them: fixed where the policy gives them a spec."""
        fixed = self.edges
        return tuple(replace(one, fixed=one.name in fixed) for one in self.network.layers)

    @property
    def edges(self) -> dict[str, QuantSpec]:
        """The first and the last layer's own spec; empty where they are searched for."""
        if self.recipe.search.edges == "plan":
            return {}
        spec = QuantSpec.parse(self.recipe.search.edges)
        ends = (self.network.layers[0], self.network.layers[-1])
        return {one.name: spec for one in ends if spec.divides(one.in_features)}

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
            grids, loss, rounding = self._predicted(specs, widths)
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
            macs=self.macs,
        )

    def _predicted(
        self, specs: tuple[QuantSpec, ...], widths: tuple[int, ...]
    ) -> tuple[tuple[str, ...], Tensor, Tensor]:
        """Grids, and the losses of weights and of activations."""
        with self._timed("candidates"):
            tried = candidates(self.network, self.batches, specs, self.compensation)
        with self._timed("sensitivities"):
            made, activations = sensitivities(
                self.network, self.fitting.inputs, tried, self.histograms,
                [bits for bits in widths if bits != FLOAT_BITS],
                method=self.recipe.activations.method, seed=self.seed,
            )  # fmt: skip
            loss, rounding = made.loss, activations.loss
            if self.recipe.search.sensitivity == "measured":
                loss, rounding = measured_losses(
                    self.network, self.fitting.inputs, tried, activations.candidates
                )
            elif self.recipe.search.sensitivity == "hawq":
                loss, rounding = self._by_traces(tried, activations)
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

    def limits(self, budget: Budget) -> Limits:
        """A budget's limits in stored bits and in bit operations.

        Raises:
            UsageError: a part is not about convolutional networks.
        """
        weights = planned_weights(self.layers)
        bits = float(budget.total_bits(weights)) if budget.bits < 16 else math.inf
        for limit in budget.sizes:
            if limit.kind == "vram":
                raise UsageError(f"{budget.text}: a convolutional network keeps no keys and values")
            share = limit.amount * self.float_bytes if limit.kind == "share" else limit.amount
            bits = min(bits, float(share * 8) - self.beside_bits)
        if budget.latency:
            raise UsageError(
                f"{budget.text}: latency is of language models; give bops:-50% or a size"
            )
        most = [
            float(x.amount * (self.whole_operations if x.kind == "operations-share" else 1))
            for x in budget.operations
        ]
        return Limits(bits=bits, operations=min(most, default=math.inf))

    @property
    def whole_operations(self) -> int:
        """Bit operations of a picture with 8-bit weights and activations."""
        every = dict.fromkeys((layer.name for layer in self.layers), WHOLE)
        widths = dict.fromkeys(self.reads.values(), WHOLE.bits)
        return operations(self.layers, self.macs, self.reads, every, widths)

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weights and biases."""
        return sum(4 * (one.numel + one.out_features) for one in self.layers)

    @property
    def beside_bits(self) -> int:
        """Bits that a file holds beside the planned weights: biases, and layers of a fixed spec."""
        fixed = sum(stored_cost(one, self.edges[one.name]) for one in self.layers if one.fixed)
        return fixed + sum(OF_FLOAT * one.out_features for one in self.layers)

    def find(self, budget: Budget) -> Found:
        """The plan within a budget, and the uniform networks beside it.

        Raises:
            BudgetError: there is none.
            UsageError: a part of the budget is not about classifiers.
        """
        for target in budget.targets:
            if target.kind not in ("acc", "kl"):
                raise UsageError(
                    f"{target.text}: {self.network.name} is a classifier; give acc:-0.5% or kl:0.05"
                )
        if self.recipe.search.solver == "uniform":
            return Found(plan=self._best_uniform(budget))
        self._within(budget)  # a budget out of reach ends it before any network is made
        curve = [self._point(plan) for plan in uniform_plans(self.table, self.edges)]
        if not budget.targets:
            plan = self._within(budget)
            return Found(plan=plan, curve=(*curve, self._point(plan, "plan")))
        met = self._meet(budget)
        return Found(plan=met.plan, curve=tuple(curve), targets=met.outcomes)

    def _within(self, budget: Budget) -> VisionPlan:
        return search(self.table, self.limits(budget), budget=budget.text)

    def _best_uniform(self, budget: Budget) -> VisionPlan:
        """The uniform plan of most bits within a budget's sizes."""
        limits, weights = self.limits(budget), planned_weights(self.layers)
        plans = [
            plan
            for plan in uniform_plans(self.table, self.edges)
            if plan.stored_bits * weights <= limits.bits and plan.operations <= limits.operations
        ]
        if not plans:
            self._within(budget)  # says what the least is
            raise UsageError(f"budget {budget.text}: no uniform plan is within it; search instead")
        best = max(plans, key=lambda plan: plan.stored_bits)
        return replace(best, budget=budget.text, predicted_loss=None)

    def _meet(self, budget: Budget) -> Any:
        """The plan of fewest bits whose measured network is inside the targets."""
        weights = planned_weights(self.layers)
        costs = [
            [
                stored_cost(layer, spec)
                for spec, loss in zip(self.table.specs, row.tolist(), strict=True)
                if math.isfinite(loss)
            ]
            for layer, row in zip(self.layers, self.table.loss, strict=True)
            if not layer.fixed
        ]
        low = Fraction(sum(min(one) for one in costs), weights)
        high = min(Fraction(sum(max(one) for one in costs), weights), budget.bits)

        def find(bits: Fraction) -> VisionPlan:
            return self._within(replace(budget, limits=(*budget.limits, Limit("bits", bits))))

        right = compare(
            self.reference, self.reference, pictures="", labels=self.held_out.labels
        ).scores
        also = [replace(one, budget=budget.text) for one in uniform_plans(self.table, self.edges)]
        return meet(
            budget.targets, find, lambda plan: self.measure(self.one_pass(plan)), right,
            bits=(low, high), also=also,
        )  # fmt: skip

    def _point(self, plan: VisionPlan, name: str = "") -> VisionPoint:
        return VisionPoint(
            name=name or plan.budget,
            stored_bits=plan.stored_bits,
            operations=plan.operations,
            quality=self.measure(self.one_pass(plan)),
        )

    def one_pass(self, plan: VisionPlan) -> QuantizedNetwork:
        """A plan's network, compensated and with corrected biases, without reconstruction."""
        key = plan.identity
        if key not in self._made:
            count = len(self.layers)
            with self._timed("quantize"):
                grids = activation_grids(
                    {name: self.histograms[name] for name in plan.widths}, dict(plan.widths),
                    self.recipe.activations.method,
                )  # fmt: skip
                done = iter(range(1, count + 1))
                self._made[key] = quantize_layers(
                    self.network, self.batches, plan.assignment, grids, self.compensation,
                    on_layer=lambda layer, _: self.monitor.step(
                        "quantize", next(done), count, layer.name
                    ),
                )  # fmt: skip
        return self._made[key]

    @cached_property
    def _made(self) -> dict[Any, QuantizedNetwork]:
        return {}

    def finish(self, plan: VisionPlan) -> Finished:
        """A plan's network, reconstructed and trained where that brings held-out KL down."""
        start = self.one_pass(plan)
        before = self.measure(start)
        made, blocks = start, tuple[BlockReport, ...]()
        if self.recipe.reconstruction.steps:
            made, blocks = self._reconstructed(start)
        after = self.measure(made)
        if after.kl >= before.kl:
            made, after = start, before
        outcome = None
        if self.recipe.training.steps:
            made, outcome = self._trained(made)
            after = self.measure(made)
        return Finished(
            quantized=made, quality=after, before=before, blocks=blocks, training=outcome
        )

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
