"""One process's share of the training, where `accelerate launch` or torchrun started several.

Each takes its share of every batch, gradients are added up over all of them, and every process
makes the same step: the states stay equal and none is sent around. One process is the case of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which process this is of how many.

    Attributes:
        rank: of this process.
        count: of all.
        device: where they exchange tensors.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of_this_process(cls, device: torch.device) -> Share:
        """As the launcher says; joins the others on the first call.

        Accelerate keeps one state for all that a process does, so a process that nobody launched
        beside others does not ask for it.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(device=device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(rank=state.process_index, count=state.num_processes, device=device)

    @property
    def main(self) -> bool:
        """Whether this process writes what all of them know."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all have the same of."""
        return items[self.rank :: self.count]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0.0)

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.count == 1:
            return value
        mine = value if self.main else 0.0
        told = torch.tensor([mine], dtype=torch.float64, device=self.device)
        self.add_up([told])
        return float(told)
