"""What the journal holds of the quantize stage: finished blocks, and how far tuning is.

A finished block is everything that its quantization left in the network and in the run: integers
and scales of its layers, the channel scales that were folded into it (from which the float block as
it was rounded can be made again), the layers' reports, and the state of the generator that orders
learned rounding, which goes on from block to block. The hidden states are not kept: both streams
walk through the finished blocks again, which takes forward passes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from quantforge.format.store import weight_from, weight_tensors
from quantforge.journal import Journal, numbered
from quantforge.optimizer_state import restore_training, training_tensors
from quantforge.results import LayerReport
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec

BLOCK, TUNING = "block", "tuning"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedBlock:
    """What the quantization of one block left.

    Attributes:
        weights: layer name → integers and scales, of the layers the plan does not keep.
        reports: layer name → what happened to it, likewise.
        scales: module path inside the block → [n] what its output channels were divided by.
        generator: state after the block.
    """

    weights: Mapping[str, QuantizedWeight]
    reports: Mapping[str, LayerReport]
    scales: Mapping[str, Tensor]
    generator: Tensor


def write_block(journal: Journal, index: int, block: FinishedBlock) -> None:
    """Note that a block is finished."""
    tensors = {"generator": block.generator}
    for name, weight in block.weights.items():
        tensors |= weight_tensors(weight, name)
    tensors |= {f"{path}.divided": scale for path, scale in block.scales.items()}
    facts = {
        "reports": {name: asdict(report) for name, report in block.reports.items()},
        "scales": list(block.scales),
    }
    journal.write(numbered(BLOCK, index), tensors, facts)


def read_block(
    journal: Journal, index: int, layers: Sequence[LayerInfo], device: torch.device
) -> FinishedBlock:
    """What `write_block` noted of a block that is there.

    Args:
        journal: of the run.
        index: of the block.
        layers: of the network.
        device: where the network is.
    """
    entry = journal.read(numbered(BLOCK, index))
    if entry is None:
        raise ValueError(f"block {index} is not in the journal")
    reports = {name: LayerReport(**fields) for name, fields in entry.facts["reports"].items()}
    columns = {layer.name: layer.in_features for layer in layers}
    weights = {
        name: weight_from(
            entry.tensors.__getitem__, name, QuantSpec.parse(report.spec), columns[name], device
        )
        for name, report in reports.items()
    }
    return FinishedBlock(
        weights=weights,
        reports=reports,
        scales={p: entry.tensors[f"{p}.divided"].to(device) for p in entry.facts["scales"]},
        generator=entry.tensors["generator"],
    )


def write_tuning(
    journal: Journal,
    step: int,
    order: Sequence[int],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Note that `step` steps of tuning are done.

    Args:
        journal: of the run.
        step: number of finished steps.
        order: sequences that are still to come of the present round.
        parameters: everything that is trained.
        optimizer: of these.
        generator: that orders the sequences.
    """
    tensors = training_tensors(parameters, optimizer)
    tensors["generator"] = generator.get_state()
    journal.write(TUNING, tensors, {"step": step, "order": list(order)})


def read_tuning(
    journal: Journal,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[int, list[int]]:
    """Put everything where `write_tuning` found it; (finished steps, sequences to come).

    Without an entry nothing is changed, and it is (0, []).
    """
    entry = journal.read(TUNING)
    if entry is None:
        return 0, []
    restore_training(entry.tensors, parameters, optimizer)
    generator.set_state(entry.tensors["generator"])
    return int(entry.facts["step"]), list(entry.facts["order"])
