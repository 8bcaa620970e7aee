"""Block-wise training: weights and scales of one block at a time, towards the float block's output.

The first phase of EfficientQAT (Chen et al., arXiv 2407.11062), Block-AP: what compensation solved
for layer by layer, on grams, follows gradients here on the block as a whole, which needs the memory
of one block only. A block reads what the quantized blocks before it give and is to give what the
float network has there; errors count by channel as they do in learned rounding (`quantize.refine`),
which moves roundings by bounded steps where this moves the float weights behind them.

As published every weight is rounded and gradients pass straight through; any quantizer of training
does. Norms are not trained: the scales that enter them are the next phase's. The state with the
least error on sequences that are not trained on is kept, the start included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantforge.capture import BlockWalk, compute_in, frozen, product_dtype
from quantforge.format.store import weight_from, weight_tensors
from quantforge.journal import NO_JOURNAL, Journal, numbered
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.scratch import Scratch
from quantforge.stand_ins import put_weights, stand_ins
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear, first_weight
from quantforge.train.optimizers import OPTIMIZERS, parameter_groups, set_rates
from quantforge.train.quantizers import QUANTIZERS
from quantforge.train.schedule import Schedules
from quantforge.types import QuantizedWeight

STAGE, ENTRY = "train blocks", "training-block"
CHECKS = 5  # measurements of a block on held-out sequences, beside that of the start


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockwiseTask:
    """A compensated network, and what its blocks are brought near to.

    Attributes:
        model: the network, which holds `weights`; its norms are the float network's.
        weights: layer name → integers and scales, of layers in blocks.
        originals: layer name → [out, in] float weight.
        fitting: [sequences, length] int64 to train on.
        held_out: [sequences, length] int64 to choose on.
        channel_weights: per block [hidden], how much an output channel counts.
    """

    model: Model
    weights: Mapping[str, QuantizedWeight]
    originals: Mapping[str, Tensor]
    fitting: Tensor
    held_out: Tensor
    channel_weights: Sequence[Tensor]


def train_blocks(
    task: BlockwiseTask,
    config: TrainingConfig,
    *,
    seed: int,
    monitor: Monitor,
    journal: Journal = NO_JOURNAL,
) -> dict[str, QuantizedWeight]:
    """Train block after block; the network holds the result.

    Args:
        task: network and text.
        config: `block_steps`, and everything about a step.
        seed: of the order of sequences; each block has its own.
        monitor: progress and cancellation.
        journal: gets every block as it is finished, and gives those it has.

    Returns:
        layer name → integers and scales.
    """
    module, architecture = task.model.module, task.model.architecture
    size = config.at_once
    tokens = torch.cat([task.fitting, task.held_out])
    sizes = _sizes(len(task.fitting), size) + _sizes(len(task.held_out), size)
    walks = [
        BlockWalk(module, architecture, tokens, batch_size=sizes, precision=config.precision)
        for _ in range(2)
    ]
    native, quantized = walks
    fitted = len(_sizes(len(task.fitting), size))
    finished: dict[str, QuantizedWeight] = {}
    for index, block in enumerate(quantized.blocks):
        prefix = f"{architecture.blocks}.{index}."
        start = {
            name.removeprefix(prefix): weight
            for name, weight in task.weights.items()
            if name.startswith(prefix)
        }
        floats = {path: task.originals[prefix + path] for path in start}
        whole = {f"{path}.weight": weight for path, weight in floats.items()}
        native.hidden = [native.output(block, batch, whole) for batch in range(len(native.hidden))]
        made = _noted(journal, index, start, task.model.device)
        if made is None:
            counts = task.channel_weights[index]
            run = _Block(block, quantized, native.hidden, counts, fitted, task.model.scratch)
            generator = torch.Generator().manual_seed(seed + index)
            made = run.train(start, floats, config, generator) if start else {}
            tensors: dict[str, Tensor] = {}
            for path, weight in made.items():
                tensors |= weight_tensors(weight, path)
            journal.write(numbered(ENTRY, index), tensors)
        put_weights(block, made)
        quantized.advance(block)
        keep = task.model.scratch.keep_weight
        finished |= {prefix + path: keep(weight) for path, weight in made.items()}
        monitor.step(STAGE, index + 1, len(quantized.blocks))
    return finished


def _sizes(sequences: int, at_once: int) -> list[int]:
    """How many of some sequences go together, batch by batch."""
    return [min(at_once, sequences - first) for first in range(0, sequences, at_once)]


def _noted(
    journal: Journal, index: int, start: Mapping[str, QuantizedWeight], device: torch.device
) -> dict[str, QuantizedWeight] | None:
    """A finished block's weights; None where it is still to be trained."""
    entry = journal.read(numbered(ENTRY, index))
    if entry is None:
        return None
    return {
        path: weight_from(
            entry.tensors.__getitem__, path, weight.spec, weight.codes.shape[1], device
        )
        for path, weight in start.items()
    }


class _Block:
    """One block, its inputs and what it is to give."""

    def __init__(
        self,
        block: nn.Module,
        walk: BlockWalk,
        targets: Sequence[Tensor],
        channel_weight: Tensor,
        fitted: int,
        scratch: Scratch,
    ) -> None:
        self.scratch = scratch
        self.block, self.walk, self.targets, self.fitted = block, walk, targets, fitted
        self.channel_weight = channel_weight / channel_weight.mean()

    def train(
        self,
        start: Mapping[str, QuantizedWeight],
        floats: Mapping[str, Tensor],
        config: TrainingConfig,
        generator: torch.Generator,
    ) -> dict[str, QuantizedWeight]:
        """The weights with the least error on held-out batches, by path inside the block."""

        def stand_in(path: str, bias: nn.Parameter | None) -> TrainedLinear:
            weight = first_weight(floats[path], start[path], config.start or "compensated")
            return TrainedLinear(start[path], weight, QUANTIZERS[config.quantizer], bias)

        # of the codes in the block: training may start from others (`start: float`)
        best, least = dict(start), self._held_out_error()
        with frozen(self.block), stand_ins(self.block, start, stand_in, self.scratch) as layers:
            schedules = Schedules(layers, config, {})
            optimizer = OPTIMIZERS[config.optimizer](parameter_groups(layers, [], config), config)
            order: list[int] = []
            every = -(-config.block_steps // CHECKS)
            for step in range(config.block_steps):
                place = (step + 0.5) / config.block_steps
                batches = []
                for _ in range(-(-config.batch // config.at_once)):
                    order = order or torch.randperm(self.fitted, generator=generator).tolist()
                    batches.append(order.pop())
                self._gradient(layers, schedules, place, batches)
                parameters = [p for layer in layers.values() for p in layer.parameters()]
                if config.clip:
                    nn.utils.clip_grad_norm_(parameters, config.clip)
                set_rates(optimizer, schedules.rate(place))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if (step + 1) % every == 0 or step + 1 == config.block_steps:
                    error = self._held_out_error()
                    if error < least:
                        best = {path: layer.finish() for path, layer in layers.items()}
                        least = error
        return best

    def _gradient(
        self,
        layers: Mapping[str, TrainedLinear],
        schedules: Schedules,
        place: float,
        batches: Sequence[int],
    ) -> None:
        """The gradient of the mean error over some batches, to weights and scales."""
        dtype = product_dtype(self.walk.precision)
        for path, hardness in schedules.hardness(place).items():
            layers[path].prepare(hardness, dtype)
        for batch in batches:
            with torch.enable_grad():
                loss = self._error(batch) / len(batches)
            torch.autograd.backward(loss)
        for layer in layers.values():
            layer.collect()

    def _error(self, batch: int) -> Tensor:
        """Weighted mean squared error of the block's output on a batch, relative to the target."""
        hidden, kwargs = self.walk.hidden[batch], self.walk.arguments(self.block)[batch]
        with compute_in(self.walk.precision, self.block, hidden.device):
            output = self.block(hidden, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        target = self.targets[batch]
        size = (target.square() * self.channel_weight).mean()
        return ((states.float() - target).square() * self.channel_weight).mean() / size

    @torch.no_grad()
    def _held_out_error(self) -> float:
        """Mean error over the batches that are not trained on, of what would be stored."""
        held_out = range(self.fitted, len(self.targets))
        return sum(float(self._error(batch)) for batch in held_out) / len(held_out)
