"""Block reconstruction: rounding is learned on the output of a block (BRECQ, QDrop).

A block gets what the quantized network has there, and is to output what the float network has
(Li et al. 2021, arXiv 2102.05426). Its codes, biases and activation scales are learned together, by
descent on the squared error at its output; while they are, inputs and sites are left unrounded at
random (Wei et al. 2022, arXiv 2203.05740). Blocks go in forward order, each behind those that are
done.

Codes are learned by one of two methods, both from where error feedback left them: AdaRound, or
signed descent on latents, which also moves the scales (`methods.rounding`). What is learned is kept
only where it lowers the block's error on pictures that it was not learned on, with every site
rounded; else the block stays as it was, and its report says so.

What differs from the published code: a few hundred steps from compensated codes in place of 20,000
from plain rounding; biases are learned; an activation scale is learned with the block that all of
its grid's sites lie in, and stays where other blocks share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from quantforge.methods.activation import dropped, rounded_to_step
from quantforge.methods.adaround import RelaxedWeight, annealed_beta
from quantforge.methods.rounding import TrainableWeight
from quantforge.vision.block_run import BlockData, BlockRun, BlockState, block_error
from quantforge.vision.network import QuantizedNetwork, weight_matrix
from quantforge.vision.streams import Stream, site_grids

Rounding = Literal["signed", "adaround"]
ROUNDINGS: tuple[Rounding, ...] = ("signed", "adaround")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionConfig:
    """How blocks are learned.

    Attributes:
        rounding: "signed" or "adaround".
        steps: a block.
        batch: pictures a step.
        held_out: share of the pictures that judge, at least one.
        drop: share of the rows of inputs and sites that stay unrounded.
        cell: how far from its code a weight starts at most, in codes: half a code away it
            would flip. Compensated codes are good together, and few pictures cannot tell which
            of them to take back.
        latent_step: of signed descent, in codes; falls linearly to 0, as all steps do.
        scale_step: of signed descent, relative to the weights' scales.
        momentum: of signed descent.
        logit_step: of AdaRound's Adam.
        decision: weight of AdaRound's regulariser against the loss, which starts at 1.
        bias_step: of Adam, relative to the deviation of a layer's outputs; 0 keeps biases.
        range_step: of Adam, relative to the activation scales; 0 keeps them.
        seed: of the order of pictures and of what is dropped.
    """

    rounding: Rounding = "signed"
    steps: int = 200
    batch: int = 16
    held_out: float = 0.125
    drop: float = 0.5
    cell: float = 0.25
    latent_step: float = 0.003
    scale_step: float = 0.0005
    momentum: float = 0.8
    logit_step: float = 0.03
    decision: float = 1.0
    bias_step: float = 0.002
    range_step: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {ROUNDINGS}, got {self.rounding!r}")
        if self.steps < 0 or self.batch < 1 or not 0.0 <= self.drop < 1.0:
            raise ValueError("steps and batch must be positive, and drop in 0..1")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must be in 0..1, got {self.held_out}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What learning a block was worth.

    Attributes:
        block: its name.
        before: mean squared error at its output on held-out pictures, relative to the float
            output's mean square.
        after: the same with what was learned.
        kept: what was learned is used.
    """

    block: str
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether what was learned is better, and used."""
        return self.after < self.before


class _Learner:
    """Everything of one block that moves."""

    def __init__(
        self, run: BlockRun, state: BlockState, own_grids: frozenset[str],
        spread: Mapping[str, float], config: ReconstructionConfig,
    ) -> None:  # fmt: skip
        """Start where the state is.

        Args:
            run: the block.
            state: what is known of it.
            own_grids: names of the grids whose scales may move.
            spread: layer name → deviation of its outputs.
            config: how.
        """
        network = run.network
        self._state, self._config, self._spread = state, config, spread
        floats = {name: weight_matrix(network.layer(name)) for name in state.weights}
        kind = RelaxedWeight if config.rounding == "adaround" else TrainableWeight
        self._weights = {
            n: kind.start(floats[n], one, config.cell) for n, one in state.weights.items()
        }
        self._moves = {
            name: torch.zeros_like(state.biases[name], requires_grad=True) for name in state.weights
        }
        sites = {site.node: site.grid for site in network.sites if site.node in state.grids}
        self._changes = {g: torch.zeros((), requires_grad=True) for g in sorted(own_grids)}
        self._grid_of = sites
        groups = [
            {"params": list(self._moves.values()), "base": config.bias_step},
            {"params": list(self._changes.values()), "base": config.range_step},
        ]
        logits = [one.logits for one in self._weights.values() if isinstance(one, RelaxedWeight)]
        groups.append({"params": logits, "base": config.logit_step})
        self._adam = torch.optim.Adam([g for g in groups if g["params"] and g["base"]], lr=0.0)

    def _bias(self, name: str) -> Tensor:
        return self._state.biases[name] + self._moves[name] * self._spread[name]

    def _step_of(self, node: str) -> Tensor:
        scale = torch.tensor(self._state.grids[node].scale)
        change = self._changes.get(self._grid_of[node])
        return scale if change is None else scale * change.exp()

    def output(self, run: BlockRun, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The block's output as it is now, with some of its sites left unrounded."""

        def rounding(node: fx.Node, made: Tensor) -> Tensor:
            grid = self._state.grids.get(node.name)
            if grid is None:
                return made
            rounded = rounded_to_step(made, self._step_of(node.name), grid.zero, grid.top)
            last = node is run.nodes[-1]
            return rounded if last else dropped(made, rounded, self._config.drop, generator)

        weights = {name: one.weight() for name, one in self._weights.items()}
        return run(inputs, weights, {name: self._bias(name) for name in weights}, rounding)

    def step(self, loss: Tensor, index: int) -> None:
        """Move along the gradients of a loss that is about 1 at the start."""
        config = self._config
        beta = annealed_beta(index, config.steps)
        relaxed = [one for one in self._weights.values() if isinstance(one, RelaxedWeight)]
        if relaxed and beta is not None:
            loss = loss + config.decision * sum(one.undecided(beta) for one in relaxed)
        loss.backward()  # type: ignore[no-untyped-call]
        left = 1.0 - index / config.steps
        for group in self._adam.param_groups:
            group["lr"] = group["base"] * left
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for one in self._weights.values():
            if isinstance(one, TrainableWeight):
                one.step(config.latent_step * left, config.scale_step * left, config.momentum)

    @torch.no_grad()
    def finish(self) -> BlockState:
        """What was learned, as it is stored."""
        grids = {
            node: replace(grid, scale=float(self._step_of(node)))
            for node, grid in self._state.grids.items()
        }
        return BlockState(
            weights={name: one.finish() for name, one in self._weights.items()},
            biases={name: self._bias(name).detach() for name in self._weights},
            grids=grids,
        )


def reconstruct_block(
    run: BlockRun,
    state: BlockState,
    data: BlockData,
    held_out: BlockData,
    own_grids: frozenset[str],
    config: ReconstructionConfig,
) -> tuple[BlockState, BlockReport]:
    """Learn one block; what is returned is never worse on `held_out` than `state`.

    Args:
        run: the block.
        state: what it starts from.
        data: pictures to learn on.
        held_out: pictures to judge on.
        own_grids: names of the grids whose scales may move, as all their sites are in the block.
        config: how.
    """
    before = block_error(run, state, held_out)
    generator = torch.Generator().manual_seed(config.seed)
    learner = _Learner(run, state, own_grids, _spreads(run, data), config)
    first = max(block_error(run, state, data.part(slice(0, config.batch))), 1e-30)
    unit = first * float(data.error(torch.zeros(())))
    order: list[int] = []
    count = len(data.inputs)
    for index in range(config.steps):
        while len(order) < min(config.batch, count):
            order += torch.randperm(count, generator=generator).tolist()
        taken = torch.tensor([order.pop(0) for _ in range(min(config.batch, count))])
        part = data.part(taken)
        with torch.enable_grad():
            inputs = dropped(part.native, part.inputs, config.drop, generator)
            loss = part.error(learner.output(run, inputs, generator)) / unit
            learner.step(loss, index)
    learned = learner.finish()
    after = block_error(run, learned, held_out)
    report = BlockReport(block=run.block.name, before=before, after=after)
    return (learned if report.kept else state), report


@torch.no_grad()
def _spreads(run: BlockRun, data: BlockData) -> dict[str, float]:
    """Layer name → deviation of what the float layer outputs on a few pictures."""
    found: dict[str, float] = {}

    def watch(node: fx.Node, made: Tensor) -> Tensor:
        if node.op == "call_module":
            found[str(node.target)] = float(made.std())
        return made

    run(data.native[:4], {}, {}, watch)
    return found


def reconstruct(
    quantized: QuantizedNetwork,
    batches: Sequence[Tensor],
    config: ReconstructionConfig | None = None,
    *,
    importance: Mapping[str, Tensor] | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
) -> tuple[QuantizedNetwork, tuple[BlockReport, ...]]:
    """Learn all blocks in forward order.

    Args:
        quantized: compensated weights, corrected biases and grids: what is started from.
        batches: calibration pictures; the last of them judge.
        config: how.
        importance: name of a block → weights of its output's numbers (`sensitivity.importances`),
            [pictures, ...]; without it all count alike.
        on_block: is told of each block.
    """
    config = config or ReconstructionConfig()
    network = quantized.network
    native = Stream(network, batches)
    parameters = {
        name: (one.dequantize(), quantized.biases[name]) for name, one in quantized.weights.items()
    }
    stream = Stream(network, batches, quantized.grids, parameters)
    weights, biases = dict(quantized.weights), dict(quantized.biases)
    grids, reports = dict(quantized.grids), []
    count = sum(map(len, batches))
    learning = count - max(1, round(config.held_out * count))
    for block in network.blocks:
        inputs, originals = torch.cat(stream.value(block.source)), native.value(block.source)
        entering = torch.cat(originals)
        targets = torch.cat(native.value(block.result))
        mine = None if importance is None else importance[block.name]
        data = BlockData(inputs=inputs, native=entering, targets=targets, importance=mine)
        layers = [name for name in block.layers if name in weights]
        run = BlockRun(network, block)
        inside = {node.name for node in run.nodes}
        rounded = site_grids(network, grids)
        state = BlockState(
            weights={name: weights[name] for name in layers},
            biases={name: biases[name] for name in layers},
            grids={node: grid for node, grid in rounded.items() if node in inside},
        )
        own = frozenset(
            site.grid for site in network.sites if site.grid in grids
        ) - {site.grid for site in network.sites if site.node not in inside}  # fmt: skip
        state, report = reconstruct_block(
            run, state, data.part(slice(0, learning)), data.part(slice(learning, None)), own, config
        )
        reports.append(report)
        if on_block is not None:
            on_block(report)
        for name in layers:
            weights[name], biases[name] = state.weights[name], state.biases[name]
            stream.weights[name] = weights[name].dequantize()
            stream.biases[name] = biases[name]
        grid_of = {site.node: site.grid for site in network.sites}
        grids |= {grid_of[node]: grid for node, grid in state.grids.items() if grid_of[node] in own}
        stream.set_grids(grids)
    made = replace(quantized, weights=weights, biases=biases, grids=grids)
    return made, tuple(reports)
