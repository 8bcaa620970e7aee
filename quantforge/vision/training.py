"""Training a quantized convolutional network end to end, towards the float network's predictions.

The loop of language models (`quantforge.train`) on pictures: every layer's weight is drawn to its
grid by a softmax that hardens (Hestia), or rounded with gradients passed straight through; weight
scales, biases and activation steps (LSQ) are trained too. The loss is the divergence from the float
network, mixed with the cross-entropy of labels where there are some. What is measured on the way is
the network as it would be stored, and the best state is the result: the start is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from quantforge.methods.activation import rounded_to_step
from quantforge.progress import Monitor
from quantforge.results import TrainingOutcome, TrainingPoint
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear, first_weight
from quantforge.train.optimizers import parameter_groups, set_rates
from quantforge.train.quantizers import HARD, QUANTIZERS, Hardness
from quantforge.train.schedule import Schedules
from quantforge.vision.network import QuantizedNetwork, kernel_of
from quantforge.vision.recipe import TrainingOptions
from quantforge.vision.streams import compute

STAGE = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What a network is trained on.

    Attributes:
        pictures: [n, channels, height, width].
        logits: [n, classes] of the float network.
        labels: [n] int64 classes; None where they are not known.
    """

    pictures: Tensor
    logits: Tensor
    labels: Tensor | None


class TrainedNetwork(nn.Module):
    """A quantized network all of whose numbers can be trained.

    Attributes:
        layers: layer name → weight and scales; names have "/" for ".".
        biases: layer name → bias, likewise.
        steps: name of a grid → its step relative to where it started, less 1.
    """

    def __init__(self, quantized: QuantizedNetwork, quantizer: str) -> None:
        super().__init__()
        self.quantized, network = quantized, quantized.network
        self.layers, self.biases = nn.ModuleDict(), nn.ParameterDict()
        self.steps = nn.ParameterDict()
        for name, weight in quantized.weights.items():
            first = first_weight(None, weight, "dequantized")
            key = name.replace(".", "/")
            self.layers[key] = TrainedLinear(weight, first, QUANTIZERS[quantizer], None)
            self.biases[key] = nn.Parameter(quantized.biases[name].clone())
        for name in quantized.grids:
            self.steps[name] = nn.Parameter(torch.zeros(()))
        self._sites = {x.node: x.grid for x in network.sites if x.grid in quantized.grids}

    def prepare(self, hardness: Mapping[str, Hardness]) -> None:
        """Form the weights for the passes that follow."""
        for key, layer in self._each():
            layer.prepare(hardness.get(key, HARD), torch.float32)

    def collect(self) -> None:
        """Take the gradients of all passes since `prepare` to weights and scales."""
        for _, layer in self._each():
            layer.collect()

    def forward(self, pictures: Tensor) -> Tensor:
        """[batch, classes] logits."""
        network = self.quantized.network
        used = {key.replace("/", "."): layer.used for key, layer in self._each()}
        known: dict[fx.Node, Any] = {}
        for node in network.graph.graph.nodes:
            if node.op == "output":
                made: Tensor = known[node.all_input_nodes[0]]
                return made
            name, replaced = str(node.target), None
            if node.op == "call_module" and name in used:
                bias = self.biases[name.replace(".", "/")]
                replaced = (kernel_of(network.layer(name), used[name]), bias)
            is_picture = node.op == "placeholder"
            value = pictures if is_picture else compute(network.graph, node, known, replaced)
            known[node] = self._rounded(node, value)
        raise ValueError("a canonical graph has an output")

    def finish(self) -> QuantizedNetwork:
        """The integers and grids as they are stored."""
        return replace(
            self.quantized,
            weights={key.replace("/", "."): layer.finish() for key, layer in self._each()},
            biases={key.replace("/", "."): x.detach().clone() for key, x in self.biases.items()},
            grids={
                name: replace(grid, scale=float(grid.scale * (1.0 + self.steps[name].detach())))
                for name, grid in self.quantized.grids.items()
            },
        )

    def groups(self, options: TrainingOptions) -> list[dict[str, Any]]:
        """What the optimizer trains, with rates at their highest."""
        layers = dict(self._each())
        made = parameter_groups(layers, [], config_of(options))
        for parameters, rate in (
            (list(self.biases.values()), options.bias_rate),
            (list(self.steps.values()), options.range_rate),
        ):
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
            if rate > 0 and parameters:
                made.append({"params": parameters, "base": rate, "weight_decay": 0.0, "size": 1.0})
        return made

    def schedules(self, options: TrainingOptions, multipliers: Mapping[str, float]) -> Schedules:
        """How hard, warm and fast at a progress."""
        named = {name.replace(".", "/"): value for name, value in multipliers.items()}
        return Schedules(dict(self._each()), config_of(options), named)

    def _each(self) -> list[tuple[str, TrainedLinear]]:
        return [(k, x) for k, x in self.layers.items() if isinstance(x, TrainedLinear)]

    def _rounded(self, node: fx.Node, value: Any) -> Any:
        name = self._sites.get(node.name)
        if name is None:
            return value
        grid = self.quantized.grids[name]
        step = grid.scale * (1.0 + self.steps[name])
        return rounded_to_step(value, step, grid.zero, grid.top)


def config_of(options: TrainingOptions) -> TrainingConfig:
    """What the parts shared with language models read."""
    return TrainingConfig(
        tokens=1, batch=options.batch, quantizer=options.quantizer, scale_rate=options.scale_rate,
        weight_rate=options.weight_rate, norm_rate=0.0,
    )  # fmt: skip


def train(
    quantized: QuantizedNetwork,
    examples: Examples,
    options: TrainingOptions,
    measure: Callable[[QuantizedNetwork], float],
    *,
    seed: int,
    monitor: Monitor | None = None,
    multipliers: Mapping[str, float] | None = None,
) -> tuple[QuantizedNetwork, TrainingOutcome]:
    """Train a quantized network; the best state that was measured, which may be the start.

    Args:
        quantized: what is started from.
        examples: to train on.
        options: everything else.
        measure: held-out loss of a network.
        seed: of the order of pictures.
        monitor: progress and cancellation.
        multipliers: layer name → of its temperature (Hestia's Hessian traces); 1 if None.
    """
    monitor = monitor or Monitor()
    network = TrainedNetwork(quantized, options.quantizer)
    schedules = network.schedules(options, multipliers or {})
    optimizer = torch.optim.AdamW(network.groups(options), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    start = measure(quantized)
    points = [TrainingPoint(step=0, loss=None, kl=start, soft_kl=start)]
    best, order, losses, note = quantized, list[int](), list[float](), ""
    for step in range(options.steps):
        if len(order) < options.batch:
            order = torch.randperm(len(examples.pictures), generator=generator).tolist()
        chosen, order = order[: options.batch], order[options.batch :]
        place = (step + 0.5) / options.steps
        losses.append(_step(network, optimizer, schedules, examples, chosen, place, options))
        if not math.isfinite(losses[-1]):
            note = f"training diverged at step {step + 1} and was ended there"
            break
        done = step + 1
        if done % options.measure_every == 0 or done == options.steps:
            made = network.finish()
            loss = measure(made)
            if loss < min(point.kl for point in points):
                best = made
            mean = math.fsum(losses) / len(losses)
            points.append(TrainingPoint(step=done, loss=mean, kl=loss, soft_kl=loss))
            losses.clear()
        monitor.step(STAGE, done, options.steps)
    index = min(range(len(points)), key=lambda i: points[i].kl)
    outcome = TrainingOutcome(
        tokens=points[-1].step * options.batch, steps=points[-1].step, points=tuple(points),
        best=index, kept=index > 0, note=note,
    )  # fmt: skip
    return best, outcome


def _step(
    network: TrainedNetwork,
    optimizer: torch.optim.Optimizer,
    schedules: Schedules,
    examples: Examples,
    chosen: list[int],
    place: float,
    options: TrainingOptions,
) -> float:
    """One step of the optimizer at a progress; the loss before it, NaN where it is not finite."""
    network.prepare(schedules.hardness(place))
    logs = network(examples.pictures[chosen]).log_softmax(-1)
    wanted = examples.logits[chosen].log_softmax(-1)
    loss = functional.kl_div(logs, wanted, reduction="batchmean", log_target=True)
    if options.cross_entropy and examples.labels is not None:
        truth = functional.nll_loss(logs, examples.labels[chosen])
        loss = (1 - options.cross_entropy) * loss + options.cross_entropy * truth
    loss.backward()  # type: ignore[no-untyped-call]
    network.collect()
    norm = float(nn.utils.clip_grad_norm_(network.parameters(), 1.0))
    value = float(loss.detach())
    if math.isfinite(norm):
        set_rates(optimizer, schedules.rate(place))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value if math.isfinite(norm) else math.nan
