"""Tensors in scratch files: the same values, no memory of the process, nothing left behind."""

import errno
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from quantforge import scratch as module
from quantforge.errors import ResourceError
from quantforge.memory import _status, anonymous_bytes, available_bytes
from quantforge.scratch import (
    COPIES,
    IN_MEMORY,
    ONLY_RUN,
    SMALL_BYTES,
    Claims,
    Scratch,
    scratch_for,
)
from quantforge.testing import random_weight
from quantforge.types import QuantSpec

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 1 << 20


@linux
def test_tensors_are_neither_anonymous_memory_nor_data_and_leave_no_file(tmp_path):
    data, anonymous = _status("VmData"), anonymous_bytes()
    made = Scratch(tmp_path, 80 * MIB).empty((16, MIB), torch.float32)
    made.fill_(3.0)
    made[5].mul_(2.0)
    assert made.sum(dtype=torch.float64) == 3.0 * 17 * MIB
    assert _status("VmData") < data + 8 * MIB
    assert anonymous_bytes() < anonymous + 8 * MIB
    assert list(tmp_path.iterdir()) == []


@linux
def test_the_disk_has_its_room_back_with_the_last_tensor(tmp_path):
    def maps():
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        return sum(str(tmp_path) in line for line in lines)

    scratch = Scratch(tmp_path, MIB)
    first, second = (scratch.empty((1000,), torch.float32) for _ in range(2))
    other = scratch.empty((MIB,), torch.float32)  # has no room in the first file
    assert maps() == 2
    del first, scratch
    assert maps() == 2
    del second
    assert maps() == 1
    assert other.fill_(1.0).sum() == MIB
    del other
    assert maps() == 0


def test_copies_have_the_values_and_places_of_their_own(tmp_path):
    scratch = Scratch(tmp_path, MIB)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(7, 5, generator=generator).T,  # not contiguous
        torch.randn(33, generator=generator).bfloat16(),
        torch.randint(0, 255, (3, 3, 3), generator=generator, dtype=torch.uint8),
        torch.tensor(2.5),
        torch.empty(0, 4),
    ]
    copies = [scratch.copy(one) for one in tensors]
    for one, copy in zip(tensors, copies, strict=True):
        assert torch.equal(one, copy)
        assert one.dtype == copy.dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
    for copy in copies:
        copy.zero_()
    assert all(not copy.any() for copy in copies)
    assert tensors[0].any()
    weight = torch.nn.Parameter(tensors[0])
    assert not scratch.copy(weight).requires_grad


def test_memory_keeps_the_tensor_itself_and_copies_where_a_copy_is_asked_for():
    tensor = torch.randn(4, 3).T
    assert IN_MEMORY.keep(tensor) is tensor
    copy = IN_MEMORY.copy(tensor)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() != tensor.data_ptr()
    weight = random_weight(8, 32, QuantSpec(3, 16))
    assert IN_MEMORY.keep_weight(weight) is weight
    assert not IN_MEMORY.on_disk


def test_a_weight_is_kept_with_its_zero_points(tmp_path):
    for spec in (QuantSpec(3, 16), QuantSpec(4, 16, symmetric=False)):
        weight = random_weight(8, 32, spec)
        kept = Scratch(tmp_path).keep_weight(weight)
        assert kept.spec == spec
        assert torch.equal(kept.dequantize(), weight.dequantize())
        assert kept.codes.data_ptr() != weight.codes.data_ptr()
        assert (kept.zero is None) == (weight.zero is None)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Says how much disk and memory there is."""
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))

    def say(disk, memory):
        usage = shutil.disk_usage(tmp_path)._replace(free=disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(module, "available_bytes", lambda processes: memory // processes)

    return say


def test_small_networks_stay_in_memory_and_others_go_where_there_is_room(room, caplog):
    size = 2 * SMALL_BYTES
    wanted = int(COPIES * size)
    room(wanted, 0)
    assert scratch_for(SMALL_BYTES) is IN_MEMORY
    assert scratch_for(size).on_disk
    room(wanted - 1, wanted)
    with caplog.at_level(logging.WARNING):
        assert scratch_for(size) is IN_MEMORY
    assert "held in memory" in caplog.text
    room(wanted - 1, wanted - 1)
    with pytest.raises(ResourceError, match=r"takes 0.08 GB of scratch .* QUANTFORGE_CACHE"):
        scratch_for(size)


def test_a_network_that_is_only_run_takes_its_own_size(room):
    size = 2 * SMALL_BYTES
    room(size, 0)
    made = scratch_for(size, ONLY_RUN)
    assert (made.on_disk, made.run_bytes) == (True, size)
    room(size - 1, size - 1)
    with pytest.raises(ResourceError, match=r"takes 0.03 GB of scratch files in the cache"):
        scratch_for(size, ONLY_RUN)


def test_all_processes_of_a_machine_are_counted(room):
    """The first one looks at an empty disk, the others when their networks may have their room."""
    size = 2 * SMALL_BYTES
    for first, wanted in ((True, 3 * int(2.5 * size)), (False, 3 * int(2.5 * size) - 2 * size)):
        claims = Claims(copies=2.5, processes=3, first=first)
        room(wanted, 0)
        assert scratch_for(size, claims).run_bytes == int(2.5 * size)
        room(wanted - 1, 3 * int(2.5 * size))
        assert scratch_for(size, claims) is IN_MEMORY
        room(wanted - 1, 3 * int(2.5 * size) - 1)
        with pytest.raises(ResourceError, match="scratch files for each of 3 processes"):
            scratch_for(size, claims)


def test_a_disk_that_is_full_is_said_when_a_file_is_made(room, monkeypatch):
    room(1 << 40, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"scratch files \(No space left on device, 0.02 GB"):
        Scratch(module.cache_root() / "scratch").empty((4,), torch.float32)
    with pytest.raises(ResourceError, match="which cannot be used"):
        scratch_for(2 * SMALL_BYTES)


def test_without_the_system_call_files_get_their_room_by_writing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    made = Scratch(tmp_path, 3 * MIB + 5).empty((1000,), torch.int64)
    assert made.fill_(7).sum() == 7000


@linux
def test_available_memory_knows_the_limit_of_data():
    import resource

    free = available_bytes()
    assert free > 100 * MIB
    assert available_bytes(4) < free / 3
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + 64 * MIB, limits[1]))
        assert 32 * MIB < available_bytes() <= 64 * MIB
        assert 32 * MIB < available_bytes(2) <= 64 * MIB  # a limit is each process's own
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
