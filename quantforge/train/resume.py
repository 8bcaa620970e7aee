"""What the journal holds of training: its length, how far it is, and the best state so far.

The state takes two to four times the network's size in float32, so it is noted where the network is
measured and not after every step; what was done since is done again. The best state is what would
be stored, integers and 16-bit scales, a fraction of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from quantforge.format.store import weight_from, weight_tensors
from quantforge.journal import Entry, Journal
from quantforge.optimizer_state import restore_training, training_tensors
from quantforge.results import TrainingPoint
from quantforge.types import QuantizedWeight

LENGTH, STATE, BEST = "training-length", "training", "training-best"


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far training is.

    Attributes:
        step: finished steps.
        order: sequences that are still to come of the present round.
        points: measurements so far.
    """

    step: int
    order: list[int]
    points: list[TrainingPoint]


def write_state(
    journal: Journal,
    progress: Progress,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Note how far training is.

    Args:
        journal: of the run.
        progress: what is finished.
        parameters: everything that is trained.
        optimizer: of these.
        generator: that orders the sequences.
    """
    tensors = training_tensors(parameters, optimizer)
    tensors["generator"] = generator.get_state()
    journal.write(STATE, tensors, asdict(progress))


def read_state(
    journal: Journal,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> Progress | None:
    """Put everything where `write_state` found it; None, and nothing changed, without an entry."""
    entry = journal.read(STATE)
    if entry is None:
        return None
    restore_training(entry.tensors, parameters, optimizer)
    generator.set_state(entry.tensors["generator"])
    facts = entry.facts
    points = [TrainingPoint(**point) for point in facts["points"]]
    return Progress(step=int(facts["step"]), order=list(facts["order"]), points=points)


class BestState:
    """The state that measured best, in the journal, or in memory where nothing is kept."""

    def __init__(
        self, journal: Journal, weights: Mapping[str, QuantizedWeight], *, writes: bool = True
    ) -> None:
        """Get ready.

        Args:
            journal: of the run.
            weights: layer name → what training starts from, whose grids are kept.
            writes: whether this process notes what is put here; others only read it.
        """
        self._journal, self._start, self._writes = journal, weights, writes
        self._entry: Entry | None = None

    def put(self, weights: Mapping[str, QuantizedWeight], norms: Sequence[Tensor]) -> None:
        """Keep a state in place of the one before."""
        tensors = {f"norm.{index}": norm.detach().clone() for index, norm in enumerate(norms)}
        for name, weight in weights.items():
            tensors |= weight_tensors(weight, name)
        if self._journal.folder is None:
            self._entry = Entry(tensors=tensors, facts={})
        elif self._writes:
            self._journal.write(BEST, tensors)

    def take(self, device: torch.device) -> tuple[dict[str, QuantizedWeight], list[Tensor]] | None:
        """The weights and the norms of the best state; None where there is none."""
        entry = self._entry or self._journal.read(BEST)
        if entry is None:
            return None
        weights = {
            name: weight_from(
                entry.tensors.__getitem__, name, start.spec, start.codes.shape[1], device
            )
            for name, start in self._start.items()
        }
        norms = [t for name, t in entry.tensors.items() if name.startswith("norm.")]
        ordered = [entry.tensors[f"norm.{index}"].to(device) for index in range(len(norms))]
        return weights, ordered
