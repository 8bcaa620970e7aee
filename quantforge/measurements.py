"""The cache of measurements: one folder for each calibration, shared by all runs on a machine.

A folder is named by the fingerprint of everything that made it. The first run that needs it fills
it, others that come meanwhile wait and then use what they find; any number of runs read it at one
time, and none is removed under a reader.

That rests on claims. A claim is a lock that a run holds on a file of its own from the moment it
wants a measurement until it has read the last of it. Claims are made, and looked for, only by
whoever holds the registry's lock, which nobody holds for long; so an incomplete folder that another
run claims is being filled, a complete one is being read, and one without claims may go. Locks are
the operating system's and end with their process, however it ends: what a killed run leaves is a
file that nobody has locked, which the next run removes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from quantforge.errors import ResourceError
from quantforge.files import CACHE_VARIABLE, cache_root
from quantforge.progress import Monitor

KEPT_MEASUREMENTS = 6
POLL_S = 0.5
_CLAIM = ".claim"


@contextmanager
def measurement(
    key: str, make: Callable[[Path], None], *, complete: str, fresh: bool, monitor: Monitor
) -> Iterator[Path]:
    """Yield the folder of one calibration, filled; it stays while the body runs.

    Older ones beyond a few are removed, except those in use.

    Args:
        key: fingerprint of everything that made it.
        make: fills the folder; called only if no run has, or is about to.
        complete: file in the folder that `make` writes last.
        fresh: forget what is there; waits for those who still read it.
        monitor: told once if another run has to be waited for; its cancel event ends that.

    Raises:
        CancelledError: the monitor was cancelled while waiting.
        ResourceError: the cache cannot be written.
    """
    root, locks = cache_root() / "measurements", cache_root() / "locks"
    folder = root / key[:32]
    with _written(everything=True):
        claim = _claimed(folder, locks, complete, fresh, monitor)
    try:
        with _written(everything=True):
            _remove_oldest(root, locks, monitor)
        if not (folder / complete).is_file():
            with _written(everything=False):
                make(folder)
        yield folder
    finally:
        claim.release()
        Path(claim.lock_file).unlink(missing_ok=True)


@contextmanager
def _written(*, everything: bool) -> Iterator[None]:
    """Say of an error that comes from writing the cache which folder that is and how to move it.

    Args:
        everything: the body touches nothing but the cache; otherwise errors of files elsewhere
            pass.
    """
    root = cache_root()
    try:
        yield
    except SafetensorError as error:  # where a tensor file could not be written, e.g. disk full
        reason = str(error)
    except OSError as error:
        named = error.filename is not None and Path(error.filename).is_relative_to(root)
        if not (everything or named):
            raise
        reason = error.strerror or str(error)
    else:
        return
    raise ResourceError(
        f"the cache {root} cannot be written ({reason}): free the disk or set {CACHE_VARIABLE} to "
        "another folder"
    )


def _claimed(folder: Path, locks: Path, complete: str, fresh: bool, monitor: Monitor) -> FileLock:
    """A claim on `folder`, once nobody else fills it or, if it is to be made anew, reads it."""
    locks.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        with _registry(locks, monitor):
            others = _claimed_names(locks)
            if folder.name not in others or (not fresh and (folder / complete).is_file()):
                if fresh and folder.is_dir():
                    _set_aside(folder)
                folder.mkdir(parents=True, exist_ok=True)
                os.utime(folder)
                claim = FileLock(locks / f"{folder.name}.{secrets.token_hex(8)}{_CLAIM}")
                claim.acquire(blocking=False)
                return claim
        if not told:
            what = (
                "uses this measurement" if fresh else "makes this measurement; its result is used"
            )
            monitor.step("wait", 0, 0, f"another run {what}")
            told = True
        monitor.check("wait")
        time.sleep(POLL_S)


@contextmanager
def _registry(locks: Path, monitor: Monitor) -> Iterator[None]:
    """Hold the lock under which claims are made and looked for."""
    lock = FileLock(locks / "registry.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_S)
        except Timeout:
            monitor.check("wait")
    try:
        yield
    finally:
        lock.release()


def _claimed_names(locks: Path) -> set[str]:
    """Names of the folders that a living run claims; files of ended runs are removed."""
    names = set()
    for path in locks.glob(f"*{_CLAIM}"):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            names.add(path.name.partition(".")[0])
            continue
        lock.release()
        path.unlink(missing_ok=True)
    return names


def _remove_oldest(root: Path, locks: Path, monitor: Monitor) -> None:
    """Remove all but the latest measurements, and what was set aside."""
    with _registry(locks, monitor):
        claimed = _claimed_names(locks)
        doomed = [path for path in root.iterdir() if path.name.startswith(".")]
        found = [path for path in root.iterdir() if not path.name.startswith(".")]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        old = [path for path in found[KEPT_MEASUREMENTS:] if path.name not in claimed]
        doomed += [_set_aside(path) for path in old]
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Give a folder a name that is not looked up, so that its removal may be interrupted."""
    return folder.replace(folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old"))
