"""The cache of measurements: one folder for each calibration, shared by all runs on a machine.

A folder is named by the fingerprint of everything that made it. The first run that needs it fills
it, others that come meanwhile wait and then use what they find; any number of runs read it at one
time, and none is removed under a reader. That rests on claims (`claims`): a run claims a
measurement from the moment it wants it until it has read the last of it, so an incomplete folder
that another run claims is being filled, a complete one is being read, and one without claims may
go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from quantforge.claims import (
    POLL_S,
    claimed_names,
    new_claim,
    registry,
    release,
    remove_oldest,
    written,
)
from quantforge.errors import ResourceError
from quantforge.files import CACHE_VARIABLE, cache_root
from quantforge.parallel import ALONE, Share
from quantforge.progress import Monitor

KEPT_MEASUREMENTS = 6
MEANT = "model, text, configuration, threads or instruction set"


@contextmanager
def measurement(
    key: str,
    make: Callable[[Path], None],
    *,
    complete: str,
    fresh: bool,
    monitor: Monitor,
    share: Share = ALONE,
) -> Iterator[Path]:
    """Yield the folder of one calibration, filled; it stays while the body runs.

    Older ones beyond a few are removed, except those in use.

    Args:
        key: fingerprint of everything that made it.
        make: fills the folder, which may hold what a run that was killed had done of it; called
            only if no run has, or is about to.
        complete: file in the folder that `make` writes last.
        fresh: forget what is there; waits for those who still read it.
        monitor: told once if another run has to be waited for; its cancel event ends that.
        share: of the run; the first process claims the folder for all, which fill it together.

    Raises:
        CancelledError: the monitor was cancelled while waiting.
        ResourceError: the cache cannot be written.
    """
    root = cache_root() / "measurements"
    folder = root / key[:32]
    if not share.main:
        share.require_equal(key, MEANT)
        if share.agree(0.0):
            require_shared(folder)
            with written(everything=False):
                make(folder)
            share.wait()
        yield folder
        return
    share.require_equal(key, MEANT)
    with written(everything=True):
        claim = _claimed(folder, complete, fresh, monitor)
    try:
        with written(everything=True):
            remove_oldest(root, KEPT_MEASUREMENTS, monitor)
        missing = not (folder / complete).is_file()
        share.agree(float(missing))
        if missing:
            with written(everything=False):
                make(folder)
            share.wait()  # for what is written last
        yield folder
    finally:
        release(claim)


def require_shared(folder: Path) -> None:
    """Refuse a process that does not see the folder that another one has made.

    Raises:
        ResourceError: it does not.
    """
    if not folder.is_dir():
        raise ResourceError(
            f"the cache {cache_root()} is not the same folder for all processes: set "
            f"{CACHE_VARIABLE} to one on a disk that they share"
        )


def _claimed(folder: Path, complete: str, fresh: bool, monitor: Monitor) -> FileLock:
    """A claim on `folder`, once nobody else fills it or, if it is to be made anew, reads it."""
    told = False
    while True:
        with registry(monitor) as locks:
            others = claimed_names(locks)
            if folder.name not in others or (not fresh and (folder / complete).is_file()):
                return new_claim(folder, locks, empty=fresh)
        if not told:
            what = (
                "uses this measurement" if fresh else "makes this measurement; its result is used"
            )
            monitor.step("wait", 0, 0, f"another run {what}")
            told = True
        monitor.check("wait")
        time.sleep(POLL_S)
