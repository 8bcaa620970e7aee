"""The training loop: every weight, scale and norm, towards the float network, on the plan's bits.

Compensation answers for one layer's error at a time and scale tuning leaves the integers alone;
here all of them follow the gradient of the divergence at the logits. A step makes every layer's
weight anew, between float and integer as far as pressure and temperature say (Hestia), or rounded
(straight-through). What is measured on the way, on held-out sequences, is always the network as it
would be stored, and the best state that was measured is the result: the start is one of them.

Nothing counts steps but the loop: schedules are functions of progress, which is taken in the middle
of a step, so that the first has a rate and the last a temperature.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantforge.capture import product_dtype, recomputed
from quantforge.claims import require_room
from quantforge.journal import NO_JOURNAL, Journal
from quantforge.methods.sophia import Sophia
from quantforge.models import Model
from quantforge.parallel import Share
from quantforge.progress import Monitor, resumed
from quantforge.results import TrainingOutcome, TrainingPoint
from quantforge.stand_ins import stand_ins, trainable_norms
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear, first_weight
from quantforge.train.objective import Objective
from quantforge.train.optimizers import (
    OPTIMIZERS,
    Groups,
    parameter_groups,
    set_rates,
    update_curvature,
)
from quantforge.train.quantizers import HARD, QUANTIZERS
from quantforge.train.resume import LENGTH, BestState, Progress, read_state, write_state
from quantforge.train.schedule import Schedules
from quantforge.train.teacher import Teacher
from quantforge.types import QuantizedWeight

STAGE = "train"
NOTED = 12  # bytes of a state a parameter: itself and two running means, float32
TIMED_STEPS = 3  # that turn minutes into tokens, the first of which warms up


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training gives.

    Attributes:
        weights: layer name → integers and scales of the best state; the network has its norms.
        outcome: how it went.
    """

    weights: dict[str, QuantizedWeight]
    outcome: TrainingOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be trained, and what it is judged by.

    Attributes:
        model: the quantized network, which holds `weights`; its norms are changed in place, its
            planned layers are not.
        weights: layer name → integers and scales.
        originals: gives a layer's [out, in] float weight by its name, before compensation.
        tokens: [sequences, length] int64 to train on.
        teacher: what they are pulled towards.
        measure: held-out loss of the network as it stands.
        multipliers: layer name → of its temperature; 1 where there is none.
    """

    model: Model
    weights: Mapping[str, QuantizedWeight]
    originals: Callable[[str], Tensor]
    tokens: Tensor
    teacher: Teacher
    measure: Callable[[], float]
    multipliers: Mapping[str, float]


def train(
    task: Task,
    config: TrainingConfig,
    *,
    seed: int,
    monitor: Monitor,
    share: Share | None = None,
    journal: Journal = NO_JOURNAL,
) -> Trained:
    """Train a quantized network; its layers hold the untrained weights again afterwards.

    Args:
        task: network, text and measure.
        config: everything else.
        seed: of the order of sequences, and of drawn labels.
        monitor: progress and cancellation.
        share: of the batches, where several processes train together (they all end in the same
            state); None is one process alone.
        journal: gets the state at every measurement; where it has one, training goes on from
            there, and ends in the same bits.
    """
    with objective_of(task, config, share or Share()) as objective:
        return _Run(task, config, objective, seed=seed, monitor=monitor, journal=journal).train()


@contextmanager
def objective_of(task: Task, config: TrainingConfig, share: Share) -> Iterator[Objective]:
    """The loss of a network whose planned layers are trained ones inside, and itself again after.

    Args:
        task: network and text.
        config: quantizer, start and loss.
        share: of the batches.
    """
    quantizer, module = QUANTIZERS[config.quantizer], task.model.module

    start = config.start or "dequantized"

    def stand_in(name: str, bias: nn.Parameter | None) -> TrainedLinear:
        quantized = task.weights[name]
        original = None if start == "dequantized" else task.originals(name)
        return TrainedLinear(quantized, first_weight(original, quantized, start), quantizer, bias)

    architecture = task.model.architecture
    with (
        stand_ins(module, task.weights, stand_in, task.model.scratch) as layers,
        trainable_norms(module, layers, architecture.behind(module)) as norms,
        recomputed(architecture.block_list(module), config.recompute),
    ):
        yield Objective(
            model=task.model,
            layers=layers,
            norms=norms,
            output=architecture.output(module).rounded(product_dtype(config.precision)),
            tokens=task.tokens,
            teacher=task.teacher,
            config=config,
            share=share,
        )


class _Run:
    """One training run while the stand-ins are in the network."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        objective: Objective,
        *,
        seed: int,
        monitor: Monitor,
        journal: Journal,
    ) -> None:
        self.task, self.config, self.objective = task, config, objective
        self.seed, self.monitor, self.journal = seed, monitor, journal
        self.groups: Groups = parameter_groups(objective.layers, objective.norms, config)
        self.optimizer = OPTIMIZERS[config.optimizer](self.groups, config)
        self.schedules = Schedules(objective.layers, config, task.multipliers)
        self.tokens_a_step = config.batch * task.tokens.shape[1]

    def train(self) -> Trained:
        """All steps, from where the journal is."""
        share, parameters = self.objective.share, self.objective.parameters
        generator = torch.Generator().manual_seed(self.seed)
        best = BestState(self.journal, self.task.weights, writes=share.main)
        self._require_room()
        steps = self._steps()
        progress = read_state(self.journal, parameters, self.optimizer, generator)
        if progress is None:
            progress = Progress(step=0, order=[], points=[])
            self._measure(progress, None, 0.0, best)
        else:
            self.monitor.step(STAGE, progress.step, steps, resumed("step", progress.step, steps))
        every = max(1, round(self.config.evaluate_every / self.tokens_a_step))
        losses: list[float] = []
        note = ""
        for step in range(progress.step, steps):
            place = (step + 0.5) / steps
            losses.append(self._step(self._batch(progress, generator), place, step))
            if not math.isfinite(losses[-1]):
                note = f"training diverged at step {step + 1} and was ended there"
                break
            progress.step = step + 1
            message = ""
            if progress.step % every == 0 or progress.step == steps:
                self._measure(progress, math.fsum(losses) / len(losses), place, best)
                losses.clear()
                message = f"held-out loss {progress.points[-1].kl:.4f}"
                if share.main:
                    write_state(self.journal, progress, parameters, self.optimizer, generator)
            self.monitor.step(STAGE, progress.step, steps, message)
        return self._taken(best, progress, note)

    def _require_room(self) -> None:
        """Refuse to start where the state could not be noted: twice, while one replaces another."""
        folder = self.journal.folder
        if folder is None or not self.objective.share.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        numbers = sum(parameter.numel() for parameter in self.objective.parameters)
        require_room(2 * NOTED * numbers, folder, folder, what="training")

    def _taken(self, best: BestState, progress: Progress, note: str) -> Trained:
        """The best state, with its norms put into the network."""
        self.objective.share.wait()  # for the process that writes it
        found = best.take(self.task.model.device)
        if found is None:
            raise ValueError("training measured nothing")
        weights, norms = found
        with torch.no_grad():
            for norm, value in zip(self.objective.norms, norms, strict=True):
                norm.copy_(value)
        points = tuple(progress.points)
        outcome = TrainingOutcome(
            tokens=progress.step * self.tokens_a_step,
            steps=progress.step,
            points=points,
            best=min(range(len(points)), key=lambda index: points[index].kl),
            note=note,
        )
        return Trained(weights=weights, outcome=outcome)

    def _batch(self, progress: Progress, generator: torch.Generator) -> list[int]:
        """The sequences of a step, without repetition until all were seen."""
        chosen = []
        for _ in range(self.config.batch):
            if not progress.order:
                count = len(self.task.tokens)
                progress.order = torch.randperm(count, generator=generator).tolist()
            chosen.append(progress.order.pop())
        return chosen

    def _step(self, sequences: Sequence[int], place: float, step: int) -> float:
        """One step of the optimizer at a progress; the mean loss before it."""
        config, hardness = self.config, self.schedules.hardness(place)
        if isinstance(self.optimizer, Sophia) and step % config.curvature_every == 0:
            seed = self.seed + step
            update_curvature(self.optimizer, self.objective, sequences, hardness, seed)
        loss = self.objective.gradient(sequences, hardness)
        parameters = self.objective.parameters
        largest = config.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, largest))
        if not math.isfinite(norm):
            self.objective.clear()
            return math.nan
        set_rates(self.optimizer, self.schedules.rate(place))
        self.optimizer.step()
        self.objective.clear()
        return loss

    @torch.no_grad()
    def _measure(
        self, progress: Progress, loss: float | None, place: float, best: BestState
    ) -> None:
        """Measure the network as it would be stored and as it is trained; keep the best."""
        layers, norms = self.objective.layers, self.objective.norms
        with _as_stored(norms):
            kl = soft = self.task.measure()
            if not progress.points or kl < min(point.kl for point in progress.points):
                best.put({name: layer.finish() for name, layer in layers.items()}, norms)
        hardness = self.schedules.hardness(place)
        if set(hardness.values()) != {HARD}:
            self.objective.prepare(hardness)
            soft = self.task.measure()
            self.objective.release()
        point = TrainingPoint(step=progress.step, loss=loss, kl=kl, soft_kl=soft)
        progress.points.append(point)

    def _steps(self) -> int:
        """How many: what the tokens ask for, or what the minutes were found to be enough for."""
        tokens = self.config.tokens
        if not tokens:
            entry = self.journal.read(LENGTH)
            if entry is None:
                tokens = round(self.objective.share.agree(self._affordable()))
                if self.objective.share.main:
                    self.journal.write(LENGTH, {}, {"tokens": tokens})
            else:
                tokens = int(entry.facts["tokens"])
        return max(1, round(tokens / self.tokens_a_step))

    def _affordable(self) -> float:
        """Tokens that the minutes are enough for, by a few steps that change nothing."""
        config, optimizer = self.config, OPTIMIZERS[self.config.optimizer]
        began = time.perf_counter()
        self.task.measure()
        measuring = time.perf_counter() - began
        sequences = [index % len(self.task.tokens) for index in range(config.batch)]
        set_rates(self.optimizer, 0.0)
        taken = []
        for _ in range(TIMED_STEPS):
            began = time.perf_counter()
            self.objective.gradient(sequences, self.schedules.hardness(0.5))
            nn.utils.clip_grad_norm_(self.objective.parameters, config.clip or math.inf)
            self.optimizer.step()
            self.objective.clear()
            taken.append(time.perf_counter() - began)
        self.optimizer = optimizer(self.groups, config)  # without what it gathered
        a_step = min(taken[1:])
        if isinstance(self.optimizer, Sophia):
            passes = 1 if config.curvature == "bartlett" else 2
            a_step *= 1.0 + passes / config.curvature_every
        measured = 2 if self.schedules.soft else 1
        between = max(config.evaluate_every, self.tokens_a_step)
        return (
            60.0 * config.minutes / (a_step / self.tokens_a_step + measured * measuring / between)
        )


@contextmanager
def _as_stored(norms: Sequence[nn.Parameter]) -> Iterator[None]:
    """Norms are rounded to 16 bits inside, as the checkpoint will hold them."""
    kept = [norm.detach().clone() for norm in norms]
    try:
        for norm in norms:
            norm.copy_(norm.bfloat16())
        yield
    finally:
        for norm, value in zip(norms, kept, strict=True):
            norm.copy_(value)
