"""The peak is what the system says, and freed blocks go back to it."""

import sys
from pathlib import Path

import pytest
import torch

from quantforge.memory import peak_bytes, release_freed, reset_peak


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


def test_the_peak_is_forgotten_where_the_system_can():
    held = peak_bytes()
    block = torch.ones(64 * 2**20)  # 256 MiB
    high = peak_bytes()
    assert high >= max(held, 256 * 2**20)
    del block
    release_freed()
    if reset_peak():
        assert peak_bytes() < high - 200 * 2**20
    else:
        assert peak_bytes() >= high
