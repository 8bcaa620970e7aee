"""The process's memory: what it holds at most, and giving back what it no longer needs.

The C library keeps freed blocks for itself, and blocks of changing sizes do not fit into each
other's gaps: after a stage with large activations half of the resident memory can be such gaps.
Between stages they are handed back to the system, so that the peak is that of the largest stage and
not the sum of all that came before.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def release_freed() -> None:
    """Hand freed memory back to the system where the C library can (glibc); costs milliseconds."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """`release_freed` without what only the collector frees: cheap enough for every block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def without_gaps() -> None:
    """Let the C library (glibc) give freed blocks of a MiB and more back at once, from here on.

    It costs a little time. Where RLIMIT_DATA is set, gaps count whether or not they are in memory.
    """
    if sys.platform == "linux":
        choose = getattr(ctypes.CDLL(None), "mallopt", None)
        if choose is not None:
            choose(_MMAP_THRESHOLD, 1 << 20)


def limited_data() -> bool:
    """Whether RLIMIT_DATA limits this process."""
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def reset_peak() -> bool:
    """Let `peak_bytes` start from what is held now; False where the system cannot forget."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    if (found := _status("VmHWM")) is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int | None:
    """What this process holds now; None where the system does not tell."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def anonymous_bytes() -> int | None:
    """What of that is in no file, so that it cannot leave memory; None where nothing tells."""
    return _status("RssAnon")


def available_bytes(processes: int = 1) -> int | None:
    """Anonymous memory that this process may still take; None where the system does not tell.

    The least of what the machine has, what its control group allows and what RLIMIT_DATA leaves.

    Args:
        processes: that share the machine and the group, and want as much each; a limit of data is
            each one's own.
    """
    if sys.platform != "linux":
        return None
    import resource

    left = [_field(_SYSTEM, "MemAvailable")]
    with suppress(OSError, ValueError):  # version 2, as a container sees its own
        most = int((_GROUP / "memory.max").read_text(encoding="ascii"))
        held = _field(_GROUP / "memory.stat", "anon", unit=1)
        left.append(None if held is None else most - held)
    known = [one // processes for one in left if one is not None]
    if limited_data():
        limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
        known.append(limit - (_status("VmData") or 0))
    return max(min(known), 0) if known else None


def _status(name: str) -> int | None:
    """Bytes that the system says of this process under a name; None where it does not."""
    return _field(_STATUS, name)


def _field(path: Path, name: str, unit: int = 1024) -> int | None:
    """Bytes that a file of the system says under a name; None where it does not."""
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words and words[0].rstrip(":") == name:
                return unit * int(words[1])
    return None


@dataclass(slots=True)
class StageTimer:
    """Adds the wall time of its body to a table, and gives freed memory back after it.

    Attributes:
        table: stage → seconds.
        stage: which.
    """

    table: dict[str, float]
    stage: str
    _began: float = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        release_freed()
        spent = time.perf_counter() - self._began
        self.table[self.stage] = self.table.get(self.stage, 0.0) + spent
