"""How many processes a launcher started, and which of them this is: from its environment alone."""

from __future__ import annotations

import os

# torchrun's and accelerate's names, then those of MPI implementations, which accelerate reads too.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_alone() -> bool:
    """Whether this process does the command without others of the same launcher."""
    return _first(_COUNTS, 1) < 2


def is_main() -> bool:
    """Whether this process speaks for the command: the only one, or the first of several."""
    return is_alone() or _first(_RANKS, 0) == 0


def _first(names: tuple[str, ...], otherwise: int) -> int:
    """The first variable that is a number."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), otherwise)
