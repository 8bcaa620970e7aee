"""Second moments of output gradients: the output side of the Fisher information.

For a layer y = W x the increase of the token loss caused by a weight error D is, to second order,
½ E[(Σ_t g_tᵀ D x_t)²] a sequence, where g_t is the gradient of the log-likelihood of labels sampled
from the network itself (so that the expectation is the Fisher information, which equals the
curvature of the KL divergence). Gradients are of the sum over a sequence's tokens, so an error's
effect on later tokens counts in full. Units are nats; divided by the length, nats a token.

Two estimates rest on one backward pass. The **exact** one evaluates that expression for every
candidate as it really is: G = Σ_t g_t x_tᵀ is the layer's weight gradient of one sequence, and
Σ_t g_tᵀ D x_t its inner product with D. It is unbiased, and as noisy as squares of so many normal
numbers are. The **factored** one takes outputs as uncorrelated, and g as independent of x and from
token to token,

    ½ Σ_o E[g_o²] · d_o gram d_oᵀ        d_o: row o of D

which averages over all tokens, so it has little noise, but is off by a factor that depends on the
kind of layer and on the grid: 1.4 for gates at 3 bits, 0.5 for values at 2 (SmolLM2-135M).
`sensitivity.combined_losses` takes the best of both.

Where rows answer for each other, all of E[g gᵀ] is wanted, the output gram, whose diagonal the
moments are: error feedback between rows rests on it (`methods.output_feedback`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantforge.calibrate.backward import BlockGradients, backward_blocks
from quantforge.calibrate.token_loss import HeadGradient, following_tokens
from quantforge.capture import Precision, frozen, product_dtype
from quantforge.journal import NO_JOURNAL, Journal
from quantforge.models import Model
from quantforge.numerics import GramAccumulator, row_products
from quantforge.parallel import Tally
from quantforge.progress import Monitor, resumed
from quantforge.types import LayerInfo

# Rows beyond this do not answer for each other: an output gram has that many squared entries.
LARGEST_OUTPUT_BLOCK = 4096
ENTRY = "gradients"
_TABLES = ("products", "energies", "traces")
_CHANNEL = ""  # among the names of a block's layers: the block's own output


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStatistics:
    """What one backward pass over some sequences tells.

    Attributes:
        moments: layer name → [out] float32 E[g²] in (nats / output unit)² a token, on the network's
            device.
        channels: per block [hidden] float32, the same at the block's output.
        tokens: layer name → [sequences, length] float32 ‖g_t‖², of all outputs of the layer.
        products: [sequences, layers, candidates] float64 Σ_t g_tᵀ D x_t in nats; None where no
            candidates were given.
        energies: [sequences, layers, candidates] float64 Σ_t Σ_o g_to² d_o gram d_oᵀ in nats²; None
            likewise.
        traces: [sequences, layers] float64 ‖Σ_t g_t x_tᵀ‖² in (nats / weight)²; None likewise.
    """

    moments: dict[str, Tensor]
    channels: tuple[Tensor, ...]
    tokens: Mapping[str, Tensor]
    products: Tensor | None = None
    energies: Tensor | None = None
    traces: Tensor | None = None

    @property
    def squares(self) -> Tensor:
        """[sequences, layers] float64 Σ_t ‖g_t‖²."""
        return torch.stack([one.double().sum(1) for one in self.tokens.values()], 1)


class _Squares:
    """Accumulates g² of gradients [..., out]."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, device=device)
        self.tokens = 0

    def add(self, gradient: Tensor, _: torch.dtype) -> None:
        """Add a batch of gradients."""
        self.total.add_(gradient.float().flatten(0, -2).square().sum(0))
        self.tokens += gradient[..., 0].numel()

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [self.total, torch.tensor(self.tokens)]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        self.total, self.tokens = sums[0], int(sums[1])

    def squares(self) -> Tensor:
        """[out] E[g²] a token."""
        return self.total / self.tokens


class OutputGram:
    """Accumulates G of one layer, or its diagonal blocks where the layer has very many rows.

    Attributes:
        blocks: accumulators of consecutive rows, each of at most `LARGEST_OUTPUT_BLOCK`.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        count = -(-features // LARGEST_OUTPUT_BLOCK)
        sizes = [len(part) for part in torch.arange(features).tensor_split(count)]
        self.blocks = [GramAccumulator(size, device) for size in sizes]

    def add(self, gradient: Tensor, dtype: torch.dtype) -> None:
        """Add gradients [..., out], rounded to `dtype`."""
        sizes = [len(block.total) for block in self.blocks]
        for block, part in zip(self.blocks, torch.split(gradient, sizes, -1), strict=True):
            block.add(part, dtype)

    def sums(self) -> list[Tensor]:
        """Everything that adds up over batches."""
        return [one for block in self.blocks for one in block.sums()]

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take other sums."""
        for index, block in enumerate(self.blocks):
            block.replace_sums(sums[2 * index : 2 * index + 2])

    def squares(self) -> Tensor:
        """[out] E[g²] a token."""
        return torch.cat([block.total.diagonal() / block.tokens for block in self.blocks])

    def mean(self) -> list[Tensor]:
        """The blocks of G, [rows, rows] float32 each."""
        return [block.mean() for block in self.blocks]


def gradient_statistics(
    model: Model,
    tokens: Tensor,
    *,
    batch_size: int,
    precision: Precision,
    head_gradient: HeadGradient,
    monitor: Monitor,
    keep_gram: Callable[[str, list[Tensor]], None] | None = None,
    errors: Callable[[LayerInfo], Tensor] | None = None,
    rows: Mapping[str, Tensor] | None = None,
    scratch: Path | None = None,
    journal: Journal = NO_JOURNAL,
) -> GradientStatistics:
    """Moments of the gradients at the layers' outputs.

    Args:
        model: the network; its parameters are frozen while this runs.
        tokens: [sequences, length] int64.
        batch_size: sequences a pass.
        precision: of the matrix products.
        head_gradient: of the loss; for the Fisher information `token_loss.sampled_labels`.
        monitor: progress and cancellation.
        keep_gram: gets the name of every layer and its output gram, [rows, rows] float32 blocks;
            without it none is made.
        errors: gives a layer's D of every candidate, [candidates, out, in].
        rows: layer name → [candidates, out] d_o gram d_oᵀ; not finite for those that do not fit,
            whose energies are then 0.
        scratch: folder for hidden states on the way; None keeps them in memory.
        journal: gets what is found so far, and the gradients, after every block; where it has that,
            the pass goes on from there.
    """
    batches = -(-len(tokens) // batch_size)
    collector = _Collector(
        model, keep_gram, errors, rows, len(tokens), batches, product_dtype(precision)
    )
    blocks = len(model.architecture.block_list(model.module))
    start = collector.restore(journal)
    total, done = len(tokens) * blocks, 0
    if start is not None:
        finished = blocks - start[0]
        done = len(tokens) * finished
        monitor.step("gradients", done, total, resumed("block", finished, blocks))
    with frozen(model.module):
        for found in backward_blocks(
            model, tokens, batch_size=batch_size, precision=precision,
            head_gradient=head_gradient, scratch=scratch, start=start,
            on_block=partial(collector.note, journal),
        ):  # fmt: skip
            collector.add(found)
            done = max(done, (blocks - 1 - found.block) * len(tokens) + found.rows.stop)
            monitor.step("gradients", done, total)
    return collector.result()


class _Collector:
    """Sums over what the backward pass of every block leaves.

    Batches of a block come one after the other, in this process's lanes. After the last of them
    what all processes have is put together and the sums are made means, so that accumulators and
    errors of one block alone are resident.
    """

    def __init__(
        self,
        model: Model,
        keep_gram: Callable[[str, list[Tensor]], None] | None,
        errors: Callable[[LayerInfo], Tensor] | None,
        rows: Mapping[str, Tensor] | None,
        sequences: int,
        batches: int,
        product: torch.dtype,
    ) -> None:
        self._product, self._layers, self._sequences = product, model.layers, sequences
        self._device, self._scratch = model.device, model.scratch
        self._share, self._batches = model.share, batches
        self._lanes = {
            batch: lane for lane, run in model.share.lanes(batches) for batch in run
        }  # fmt: skip
        self._keep_gram, self._errors, self._rows = keep_gram, errors, rows
        self._index = {layer.name: index for index, layer in enumerate(model.layers)}
        self._tokens: dict[str, Tensor] = {}
        self._block, self._lane = -1, -1
        self._tally = Tally(model.share)
        self._sums: dict[str, _Squares | OutputGram] = {}
        self._pieces: dict[str, Tensor] = {}
        self._known: dict[int, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._channels: list[Tensor] = []
        self._tables: dict[str, Tensor] = {}

    def add(self, found: BlockGradients) -> None:
        """Add one batch of one block."""
        if found.block != self._block:
            self._begin(found.block)
        if self._lanes[found.batch] != self._lane:
            self._close_lane()
            self._lane = self._lanes[found.batch]
            self._sums = self._fresh(found.block, found.output.shape[-1])
        self._sums[_CHANNEL].add(found.output, self._product)
        first = found.rows.start
        for name, gradient in found.gradients.items():
            self._sums[name].add(gradient, self._product)
            squares = gradient.float().square()
            self._pieces[f"{first} tokens {name}"] = squares.sum(2).cpu()
            if self._rows is not None:
                index, each = self._index[name], squares.sum(1)
                weights = self._rows[name].to(each.device)
                spent = each @ torch.where(weights.isfinite(), weights, 0.0).T
                self._pieces[f"{first} energies {index}"] = spent.double().cpu()
        for index, errors in self._known.items():
            gradients = weight_gradients(found, self._layers[index]).flatten(1)
            inner = row_products(gradients, errors.flatten(1))
            self._pieces[f"{first} products {index}"] = inner.double().cpu()
            lengths = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float32)
            self._pieces[f"{first} traces {index}"] = lengths.double().square().cpu()

    def _begin(self, block: int) -> None:
        """Get ready for a block."""
        self._block, self._lane = block, -1
        if self._errors is not None:
            for index, layer in enumerate(self._layers):
                if layer.block == block:
                    self._known[index] = self._errors(layer).to(self._product)

    def _fresh(self, block: int, hidden: int) -> dict[str, _Squares | OutputGram]:
        """Empty sums of a block's layers, and of its output."""
        kind = _Squares if self._keep_gram is None else OutputGram
        sums: dict[str, _Squares | OutputGram] = {
            layer.name: kind(layer.out_features, self._device)
            for layer in self._layers
            if layer.block == block
        }
        return {**sums, _CHANNEL: _Squares(hidden, self._device)}

    def _close_lane(self) -> None:
        """Hand on the sums of a lane, if there is one."""
        if self._lane >= 0:
            self._tally.put(self._lane, [t for one in self._sums.values() for t in one.sums()])
        self._lane = -1

    def _place(self, name: str, piece: Tensor) -> None:
        """Put what one batch gave where its sequences are: tokens of a layer, or a table's."""
        first, kind, what = name.split(" ", 2)
        rows = slice(int(first), int(first) + len(piece))
        if kind == "tokens":
            if what not in self._tokens:
                self._tokens[what] = torch.zeros(self._sequences, piece.shape[1])
            self._tokens[what][rows] = piece
            return
        if kind not in self._tables:
            shape = (self._sequences, len(self._layers), *piece.shape[1:])
            self._tables[kind] = torch.zeros(shape, dtype=torch.float64)
        self._tables[kind][rows, int(what)] = piece

    def note(self, journal: Journal, block: int, states: Sequence[Tensor]) -> None:
        """Turn the sums of a block into means when its last batch is in, and write all down.

        Args:
            journal: gets everything found so far.
            block: index of the finished block.
            states: per batch, the gradient at its input; of this process's batches.
        """
        self._close_lane()
        left = self._tally.total()
        for name, total in self._fresh(block, 0).items():
            size = len(total.sums())
            total.replace_sums(left[:size])
            del left[:size]
            if name == _CHANNEL:
                self._channels.append(total.squares())
                continue
            self._moments[name] = total.squares()
            if isinstance(total, OutputGram) and self._keep_gram is not None:
                self._keep_gram(name, total.mean())
        for name, piece in self._share.joined(self._pieces).items():
            self._place(name, piece)
        self._tally = Tally(self._share)
        for gathered in (self._sums, self._pieces, self._known):
            gathered.clear()
        self._scratch.trim()
        tensors: dict[str, Tensor] = {}
        if block > 0 and journal.folder is not None:  # else nobody goes on from there
            mine = {f"state.{batch:06d}": states[batch] for batch in self._lanes}
            tensors |= self._share.joined(mine)
        tensors |= {f"channel.{index:05d}": one for index, one in enumerate(self._channels)}
        tensors |= {f"moment.{name}": one for name, one in self._moments.items()}
        tensors |= {f"token.{name}": one for name, one in self._tokens.items()}
        tensors |= self._tables
        journal.write(ENTRY, tensors, {"block": block})

    def restore(self, journal: Journal) -> tuple[int, list[Tensor]] | None:
        """Take what `note` wrote down: the last block that was finished, and its states."""
        entry = journal.read(ENTRY)
        if entry is None:
            return None
        device = self._device

        def listed(kind: str) -> list[Tensor]:
            found = sorted(name for name in entry.tensors if name.startswith(f"{kind}."))
            return [entry.tensors[name].to(device) for name in found]

        def named(kind: str) -> dict[str, Tensor]:
            found = {n.partition(".")[::2]: one for n, one in entry.tensors.items()}
            return {name: one for (first, name), one in found.items() if first == kind}

        self._channels = listed("channel")
        self._moments = {name: one.to(device) for name, one in named("moment").items()}
        self._tokens = named("token")
        self._tables = {name: entry.tensors[name] for name in _TABLES if name in entry.tensors}
        return int(entry.facts["block"]), listed("state")

    def result(self) -> GradientStatistics:
        """Means of everything, once all blocks are in."""
        return GradientStatistics(
            moments={layer.name: self._moments[layer.name] for layer in self._layers},
            channels=tuple(reversed(self._channels)),
            tokens={layer.name: self._tokens[layer.name] for layer in self._layers},
            products=self._tables.get("products"),
            energies=self._tables.get("energies"),
            traces=self._tables.get("traces"),
        )


def weight_gradients(found: BlockGradients, layer: LayerInfo) -> Tensor:
    """[sequences, out, in] gradient of each sequence's loss, in the dtype of the products."""
    return found.gradients[layer.name].transpose(1, 2) @ found.inputs[layer.stage]


def diagonal_products(
    model: Model,
    tokens: Tensor,
    *,
    batch_size: int,
    precision: Precision,
    monitor: Monitor,
    errors: Callable[[LayerInfo], Tensor],
    scratch: Path | None = None,
) -> Tensor:
    """Σ_w G_w² D_w² of every sequence, [sequences, layers, candidates] float64 in nats².

    G is the gradient of a sequence's loss on its own next tokens with respect to a layer's weight.
    The mean over sequences is D's quadratic form with the diagonal of the empirical Fisher matrix
    of sequences: weights answer for themselves alone.

    Args:
        model: the float network; its parameters are frozen while this runs.
        tokens: [sequences, length] int64, two tokens at least.
        batch_size: sequences a pass.
        precision: of the matrix products.
        monitor: progress and cancellation.
        errors: gives a layer's D of every candidate, [candidates, out, in].
        scratch: folder for hidden states on the way; None keeps them in memory.
    """
    product, block = product_dtype(precision), -1
    blocks = len(model.architecture.block_list(model.module))
    pieces: dict[str, Tensor] = {}
    squared: dict[int, Tensor] = {}
    with frozen(model.module):
        for one in backward_blocks(
            model, tokens, batch_size=batch_size, precision=precision,
            head_gradient=following_tokens(tokens), scratch=scratch,
        ):  # fmt: skip
            if one.block != block:
                block = one.block
                squared = {
                    index: errors(layer).square().to(product).flatten(1)
                    for index, layer in enumerate(model.layers)
                    if layer.block == block
                }
            for index, table in squared.items():
                squares = weight_gradients(one, model.layers[index]).square()
                part = row_products(squares.flatten(1), table).double().cpu()
                pieces[f"{one.rows.start} {index}"] = part
            done = (blocks - 1 - one.block) * len(tokens) + one.rows.stop
            monitor.step("empirical gradients", done, blocks * len(tokens))
    whole = model.share.joined(pieces)
    if not whole:
        raise ValueError("there is no layer in any block")
    columns = next(iter(whole.values())).shape[1]
    found = torch.zeros(len(tokens), len(model.layers), columns, dtype=torch.float64)
    for name, part in whole.items():
        first, index = map(int, name.split())
        found[first : first + len(part), index] = part
    return found
