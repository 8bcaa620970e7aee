"""Claims on folders of the cache: which runs use one, and which folders may go.

A claim is a lock that a run holds on a file of its own as long as it uses a folder. Claims are
made, and looked for, only by whoever holds the registry's lock, which nobody holds for long. Locks
are the operating system's and end with their process, however it ends: what a killed run leaves is
a file that nobody has locked, which the next run removes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from quantforge.errors import ResourceError
from quantforge.files import CACHE_VARIABLE, cache_root
from quantforge.progress import Monitor

POLL_S = 0.5
_CLAIM = ".claim"


def require_room(size: int, folder: Path, *kept: Path, what: str = "calibration") -> None:
    """Refuse work that the cache's disk has no room for, before hours are spent on it.

    Args:
        size: bytes that the work writes at its peak.
        folder: in the cache, of this run alone; scratch that a killed run left there is removed.
        kept: folders whose files are not written again.
        what: the work, for the message.

    Raises:
        ResourceError: there is too little room.
    """
    for stale in folder.glob(f"{tempfile.gettempprefix()}*"):
        shutil.rmtree(stale, ignore_errors=True)
    files = [path for one in kept for path in one.rglob("*") if path.is_file()]
    left, free = size - sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
    if left > free:
        raise ResourceError(
            f"{what} writes {left / 1e9:.2f} GB to the cache {cache_root()}, whose disk has "
            f"{free / 1e9:.2f} GB left: free the disk or set {CACHE_VARIABLE} to another folder"
        )


@contextmanager
def written(*, everything: bool) -> Iterator[None]:
    """Say of an error that comes from writing the cache which folder that is and how to move it.

    Args:
        everything: the body touches nothing but the cache; otherwise errors of files elsewhere
            pass.

    Raises:
        ResourceError: the body could not write the cache.
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


@contextmanager
def registry(monitor: Monitor) -> Iterator[Path]:
    """Hold the lock under which claims are made and looked for; yield the folder of claims."""
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / "registry.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_S)
        except Timeout:
            monitor.check("wait")
    try:
        yield locks
    finally:
        lock.release()


def claimed_names(locks: Path) -> set[str]:
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


def new_claim(folder: Path, locks: Path, *, empty: bool) -> FileLock:
    """Make `folder` and claim it; whoever calls this holds the registry and may have the folder.

    Args:
        folder: to be used; made if need be.
        locks: folder of claims.
        empty: forget what it holds.
    """
    if empty and folder.is_dir():
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    claim = FileLock(locks / f"{folder.name}.{secrets.token_hex(8)}{_CLAIM}")
    claim.acquire(blocking=False)
    return claim


def release(claim: FileLock) -> None:
    """Give a claim back."""
    claim.release()
    Path(claim.lock_file).unlink(missing_ok=True)


def remove_oldest(root: Path, kept: int, monitor: Monitor) -> None:
    """Remove all but the latest `kept` folders of `root`, and what was set aside; none in use."""
    with registry(monitor) as locks:
        claimed = claimed_names(locks)
        doomed = [path for path in root.iterdir() if path.name.startswith(".")]
        found = [path for path in root.iterdir() if not path.name.startswith(".")]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        old = [path for path in found[kept:] if path.name not in claimed]
        doomed += [set_aside(path) for path in old]
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Give a folder a name that is not looked up, so that its removal may be interrupted."""
    return folder.replace(folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old"))
