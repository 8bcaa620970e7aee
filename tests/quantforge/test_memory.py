"""The peak is what the system says, and freed blocks go back to it."""

import sys
from pathlib import Path

import pytest
import torch

from quantforge.memory import peak_bytes, release_freed


def resident_bytes():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gaps_between_blocks_are_given_back():
    # Blocks below the size that gets pages of its own, every second one freed: gaps in the heap.
    blocks = [torch.ones(16 * 1024) for _ in range(2000)]
    kept = blocks[::2]
    full = resident_bytes()
    assert peak_bytes() >= full - 2**20
    del blocks
    release_freed()
    assert resident_bytes() < full - 40 * 2**20  # of the 62 MiB that were freed
    assert all(float(block.sum()) == len(block) for block in kept)
