"""Block-wise learned rounding: the block's output on quantized inputs, against the float network's.

After a block has been compensated layer by layer, its rounding and scales are trained together so
that the whole block's output is near what the float block gives in the float network. Updates to
the latents are signed with a step that falls linearly (SignRound), so a latent travels a bounded
way whatever the gradient's size; scales take signed steps too, relative to their own size.

The outputs' channels differ by orders of magnitude in how much the loss depends on them, and a few
carry most of the energy, so the squared error is weighted by the mean squared gradient of the
log-likelihood in each channel (`calibrate.fisher`): the weighted error is the increase in KL to
second order, up to correlations.

The state with the least error on sequences that are not trained on is kept, the starting point
included: this never makes a block worse on them. Training may end early when such states no longer
come (`patience`); the step sizes fall as if it did not, so that what is kept does not depend on it
until then.

A step sees few sequences, one by default, so several processes do not share these. They share the
layers: each has the latents and the gradients of a run of them, and gets the other weights from
whoever has theirs. The forward pass is everybody's; the backward pass of a process ends at its
first layer, so the last runs are longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.capture import Precision, compute_in, frozen, product_dtype
from quantforge.methods.rounding import TrainableWeight
from quantforge.parallel import ALONE, Share
from quantforge.quantize.config import RoundingConfig
from quantforge.types import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some sequences of one batch.

    Attributes:
        batch: index of the batch.
        rows: which of its sequences.
    """

    batch: int
    rows: slice


class BlockTask:
    """One block to be brought near its targets.

    Attributes:
        block: the module; its float weights are replaced while a loss is computed.
        inputs: per batch [batch, length, hidden], from the quantized blocks before.
        targets: per batch, what the float network has at the block's exit.
        kwargs: per batch, the block's other arguments.
        channel_weight: [hidden] importance of an output channel, mean 1.
        held_out: number of batches at the end that are not trained on.
        precision: of matrix products.
        share: of the batches.
        own: batches whose states this process has; None has all.
        sizes: sequences of every batch; None where this process has all.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        kwargs: Sequence[dict[str, Any]],
        *,
        channel_weight: Tensor,
        held_out: int,
        precision: Precision,
        share: Share = ALONE,
        own: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.block, self.precision, self.held_out = block, precision, held_out
        self.share, self.own = share, list(range(len(inputs))) if own is None else list(own)
        self.sizes = [len(one) for one in inputs] if sizes is None else list(sizes)
        self.inputs, self.targets, self.kwargs = inputs, targets, kwargs
        self.channel_weight = channel_weight / channel_weight.mean()

    def error(self, weights: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Weighted mean squared error of the block's output on some sequences, a scalar.

        Of sequences that this process has.
        """
        hidden = self.inputs[piece.batch][piece.rows]
        return self._error(weights, piece, hidden, self.targets[piece.batch][piece.rows])

    def common_error(self, weights: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """The same for all processes at once, on sequences that one of them has."""
        if self.share.count == 1:
            return self.error(weights, piece)
        given: dict[str, Tensor] = {}
        if piece.batch in self.own:
            given = {
                "hidden": self.inputs[piece.batch][piece.rows],
                "target": self.targets[piece.batch][piece.rows],
            }
        device = self.channel_weight.device
        states = {name: one.to(device) for name, one in self.share.joined(given).items()}
        return self._error(weights, piece, states["hidden"], states["target"])

    def _error(
        self, weights: Mapping[str, Tensor], piece: Piece, hidden: Tensor, target: Tensor
    ) -> Tensor:
        """The error on some sequences, whose states are given."""
        count = self.sizes[piece.batch]
        kwargs = _rows(self.kwargs[piece.batch], piece.rows, count)
        with compute_in(self.precision, self.block, hidden.device):
            output = torch.func.functional_call(
                self.block, dict(weights), args=(hidden,), kwargs=kwargs
            )
        states: Tensor = output[0] if isinstance(output, tuple) else output
        difference = states.float() - target
        return (difference.square() * self.channel_weight).mean()

    def pieces(self, sequences: int) -> list[Piece]:
        """What is trained on, in parts of at most so many sequences."""
        batches = range(len(self.inputs) - self.held_out)
        return [
            Piece(batch=batch, rows=slice(start, start + sequences))
            for batch in batches
            for start in range(0, self.sizes[batch], sequences)
        ]

    @torch.no_grad()
    def held_out_error(self, weights: Mapping[str, Tensor]) -> float:
        """Mean error over the batches that are not trained on."""
        batches = range(len(self.inputs) - self.held_out, len(self.inputs))
        mine = {
            str(batch): float(self.error(weights, Piece(batch=batch, rows=slice(None))))
            for batch in batches
            if batch in self.own
        }
        found = {b: e for given in self.share.exchange(facts=mine) for b, e in given.facts.items()}
        return float(sum(found[str(batch)] for batch in batches)) / self.held_out


def _rows(value: Any, rows: slice, count: int) -> Any:
    """The same sequences of a block's other arguments, where they differ from one to another."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 0 and len(value) == count > 1 else value
    if isinstance(value, tuple):
        return tuple(_rows(one, rows, count) for one in value)
    if isinstance(value, dict):
        return {name: _rows(one, rows, count) for name, one in value.items()}
    return value


def refine_block(
    task: BlockTask,
    floats: Mapping[str, Tensor],
    start: Mapping[str, QuantizedWeight],
    config: RoundingConfig,
    generator: torch.Generator,
) -> dict[str, QuantizedWeight]:
    """Learn the rounding and the scales of one block's layers.

    Args:
        task: what to come near to.
        floats: layer path inside the block → [out, in] float weight.
        start: layer path → the compensated weight to start from.
        config: steps and step sizes.
        generator: orders the sequences.

    Returns:
        layer path → the weight with the least error on the held-out batches, which may be `start`.
    """
    best = dict(start)
    pieces, product = task.pieces(config.batch), product_dtype(task.precision)
    least = task.held_out_error(_dequantized(start, product))
    trained = _Shared(floats, start, task.share)
    order: list[int] = []
    waited = 0
    for step in range(config.steps):
        if config.patience and waited >= config.patience:
            break
        if not order:
            order = torch.randperm(len(pieces), generator=generator).tolist()
        with frozen(task.block), torch.enable_grad():
            loss = task.common_error(trained.weights(product), pieces[order.pop()])
        if loss.requires_grad:  # else this process has no layer
            torch.autograd.backward(loss)
        remaining = 1.0 - step / config.steps
        for one in trained.own.values():
            one.step(config.latent_step * remaining, config.scale_step * remaining, config.momentum)
        if (step + 1) % config.check_every == 0 or step + 1 == config.steps:
            reached = trained.finish()
            error = task.held_out_error(_dequantized(reached, product))
            waited = 0 if error < least else waited + 1
            if error < least:
                best, least = reached, error
    return best


class _Shared:
    """The layers of a block while their rounding is learned, each in one process.

    Attributes:
        own: layer path → what this process learns.
    """

    def __init__(
        self, floats: Mapping[str, Tensor], start: Mapping[str, QuantizedWeight], share: Share
    ) -> None:
        self._start, self._share = start, share
        first, last = layer_runs([w.codes.numel() for w in start.values()], share.count)[share.rank]
        self.own = {
            name: TrainableWeight.start(floats[name], start[name])
            for name in list(start)[first:last]
        }

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameter path → weight as it stands; own ones are leaves that collect gradients."""
        own = {f"{name}.weight": one.weight(dtype) for name, one in self.own.items()}
        if self._share.count == 1:
            return own
        given = self._share.joined({name: one.detach() for name, one in own.items()})
        found = {}
        for name, begun in self._start.items():
            path = f"{name}.weight"
            found[path] = own[path] if path in own else given[path].to(begun.codes.device)
        return found

    def finish(self) -> dict[str, QuantizedWeight]:
        """Layer path → the integers and scales that were learned, of all processes."""
        own = {name: one.finish() for name, one in self.own.items()}
        if self._share.count == 1:
            return own
        given = self._share.joined(
            {f"{n}.codes": one.codes for n, one in own.items()}
            | {f"{n}.scale": one.scale for n, one in own.items()}
        )
        found = {}
        for name, begun in self._start.items():
            device = begun.codes.device
            codes, scale = (given[f"{name}.{kind}"].to(device) for kind in ("codes", "scale"))
            found[name] = replace(begun, codes=codes, scale=scale)
        return found


def _dequantized(weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameter path → weight of layers in a block."""
    return {f"{name}.weight": one.dequantize(dtype) for name, one in weights.items()}


def layer_runs(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Runs of a block's layers for so many processes, first and one after the last; maybe empty.

    The dearest process is as cheap as can be: one with layers makes their gradients and takes the
    backward pass through all layers behind its first.

    Args:
        sizes: weights of the layers, in forward order.
        count: of processes.
    """
    behind = [sum(sizes[place:]) for place in range(len(sizes) + 1)]

    @cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Cost of the dearest of `left` processes for layers from `first` on, and their ends."""
        if first == len(sizes):
            return 0, (first,) * left
        through = behind[first + 1]
        if left == 1:
            return through + behind[first], (len(sizes),)
        found = []
        for end in range(first, len(sizes) + 1):
            rest, ends = best(end, left - 1)
            own = through + behind[first] - behind[end] if end > first else 0
            found.append((max(own, rest), (end, *ends)))
        return min(found)

    ends = best(0, count)[1]
    return list(zip((0, *ends[:-1]), ends, strict=True))
