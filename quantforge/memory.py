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


def release_freed() -> None:
    """Hand freed memory back to the system where the C library can (glibc); costs milliseconds."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


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
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int | None:
    """What this process holds now; None where the system does not tell."""
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return peak_bytes()


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
