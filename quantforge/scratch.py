"""Memory that lies in files, for what grows with a network's depth.

A network's float weights, their copies while other networks are put together, and finished integers
are in shared maps of scratch files in the cache. The system keeps as much of them in memory as
there is room for and writes the rest to disk; none of it is anonymous memory, and none of it counts
against RLIMIT_DATA. The tensors are ordinary ones, read, changed in place and differentiated like
others: nothing that works on them knows, and results are the same to the bit.

Files lose their name as soon as they are mapped, so that nothing is left of them however the
process ends, and go with the last tensor in them. Their room is reserved when they are made: a map
of a file with holes ends the process where the disk is full.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quantforge.errors import ResourceError
from quantforge.files import CACHE_VARIABLE, cache_root
from quantforge.memory import available_bytes, limited_data, trim_heap, without_gaps
from quantforge.types import QuantizedWeight

# Networks up to this size in float32 are in memory as they are: a fraction of what torch takes.
SMALL_BYTES = 1 << 24
# Scratch files of a run over the bytes of its float network: that, its copy, integers and scales.
COPIES = 2.5
_LEAST_FILE = 1 << 24
_ALIGNMENT = 64  # bytes, as of torch's own memory: products may depend on it in their last digits
_FULL = (errno.ENOSPC, errno.EDQUOT)
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Scratch:
    """Makes tensors in scratch files; without a folder, in memory.

    Attributes:
        folder: of the files; None is memory.
        file_bytes: least size of a file, which many tensors share.
        run_bytes: what a run takes of the disk at its peak.
    """

    folder: Path | None = None
    file_bytes: int = _LEAST_FILE
    run_bytes: int = 0
    _file: mmap.mmap | None = field(default=None, repr=False)
    _used: int = field(default=0, repr=False)

    @property
    def on_disk(self) -> bool:
        """Whether there are files."""
        return self.folder is not None

    def trim(self) -> None:
        """Called after every block: where depth shall cost no memory, gaps must not add up."""
        if self.folder is not None:
            trim_heap()

    def reserve(self, size: int) -> None:
        """Make a file of `size` bytes, for tensors that come next.

        Raises:
            ResourceError: there is no room for it, or the cache cannot be written.
        """
        if self.folder is not None:
            self._file, self._used = _new_file(self.folder, size), 0

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor on the CPU, of any values.

        Raises:
            ResourceError: as of `reserve`.
        """
        count = prod(shape)
        size = aligned(count * dtype.itemsize)
        if self.folder is None or not size:
            return torch.empty(shape, dtype=dtype)
        if self._file is None or self._used + size > len(self._file):
            self.reserve(max(size, self.file_bytes))
        start, self._used = self._used, self._used + size
        # The tensor holds the map, and the map the file.
        return torch.frombuffer(self._file, dtype=dtype, count=count, offset=start).view(shape)

    @torch.no_grad()
    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, wherever copies go."""
        if self.folder is None:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values for a long time: a copy in a file, or the tensor itself."""
        return tensor if self.folder is None else self.copy(tensor)

    def keep_weight(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same weight with everything kept."""
        if self.folder is None:
            return weight
        zero = None if weight.zero is None else self.copy(weight.zero)
        return replace(
            weight, codes=self.copy(weight.codes), scale=self.copy(weight.scale), zero=zero
        )


IN_MEMORY = Scratch()


def aligned(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in a file."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What is to be had beside a network's own bytes before it is loaded.

    Attributes:
        copies: scratch files of the run over those bytes; a network that is only run takes 1.
        processes: of the run that share the disk and the memory.
        first: this one loads before the others.
    """

    copies: float = 1.0
    processes: int = 1
    first: bool = True

    def of(self, size: int) -> tuple[int, int]:
        """Bytes that this process takes in all, and that must be free for it and the others.

        Those that load together after the first one may have reserved their networks already.

        Args:
            size: bytes of the network.
        """
        own = int(self.copies * size)
        return own, own * self.processes - (0 if self.first else size * (self.processes - 1))


ONLY_RUN = Claims()
WHOLE_RUN = Claims(copies=COPIES)


def scratch_for(size: int, claims: Claims = WHOLE_RUN) -> Scratch:
    """Where a network of `size` bytes in float32 goes: files, or memory where it is small.

    Where files are not to be had it goes to memory if that is large enough, which is said.

    Args:
        size: bytes.
        claims: of the run, and of others beside it.

    Raises:
        ResourceError: there is room for it nowhere.
    """
    if size <= SMALL_BYTES or os.name != "posix":
        return IN_MEMORY
    folder, (own, wanted) = cache_root() / "scratch", claims.of(size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        made = Scratch(folder, max(_LEAST_FILE, size // 16), own)
        if free >= wanted:
            made.reserve(size)
            if limited_data():
                without_gaps()
            return made
        reason = f"whose disk has {free / 1e9:.2f} GB left"
    except (OSError, ResourceError) as error:
        reason = f"which cannot be used ({error})"
    memory = available_bytes(claims.processes)
    if memory is None or memory >= own:
        logger.warning("the float network is held in memory, not in %s, %s", folder, reason)
        return IN_MEMORY
    each = f" for each of {claims.processes} processes" if claims.processes > 1 else ""
    raise ResourceError(
        f"the float network takes {own / 1e9:.2f} GB of scratch files{each} in the cache "
        f"{cache_root()}, {reason}, or as much memory, of which {memory / 1e9:.2f} GB are left: "
        f"free the disk or set {CACHE_VARIABLE} to another folder"
    )


def _new_file(folder: Path, size: int) -> mmap.mmap:
    """A shared map of a new file without a name, whose room on the disk is its own."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder)
        try:
            Path(path).unlink()
            _allocate(descriptor, size)
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            reason = f"{reason}, {size / 1e9:.2f} GB are wanted"
        raise ResourceError(
            f"the cache {cache_root()} cannot hold scratch files ({reason}): free the disk or set "
            f"{CACHE_VARIABLE} to another folder"
        ) from error


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its room on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    piece = bytes(1 << 20)
    for start in range(0, size, len(piece)):
        os.write(descriptor, piece[: min(len(piece), size - start)])
