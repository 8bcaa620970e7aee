"""Where a run writes: a staging folder that becomes the output at the very end.

Nothing half-written is ever left under a final name. A run works in a hidden sibling of its output
folder and renames it when every check has passed; an error or an interrupt removes it. What a run
that was killed could not remove, the next run to the same output does. Of two runs to one output
the second ends before it has done anything.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from quantforge.errors import ResourceError, UsageError
from quantforge.files import atomic_path


def check_output(output: Path, *, force: bool, mark: str = "plan.json") -> None:
    """Refuse an output that exists and is not empty, before any work is done.

    Args:
        output: folder to write.
        force: replace one that holds `mark`.
        mark: file by which a folder of ours is known.

    Raises:
        UsageError: it is a file, or a folder with something in it and `force` is not given, or a
            folder that does not look like a checkpoint although `force` is given.
    """
    if output.is_file():
        raise UsageError(f"{output} is a file; give a folder that does not exist to --output")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise UsageError(f"{output} exists; give another --output, or --force to replace it")
    if not (output / mark).is_file():
        raise UsageError(f"{output} was not written by quantforge; --force does not replace it")


def check_file(path: Path, *, force: bool, suffix: str = ".json") -> None:
    """Refuse a result's file of another kind or that is there already, before any work is done.

    Raises:
        UsageError: it is.
    """
    if path.suffix != suffix or path.is_dir():
        raise UsageError(f"{path} is no {suffix} file; give e.g. -o result{suffix}")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another file, or --force to replace it")


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Keep other runs from writing `output` while the body runs.

    It rests on a lock beside the output, which the system gives back when the process ends, however
    it ends. Where the body writes nothing until its end, this is how a second run finds out about
    the first at its start.

    Raises:
        UsageError: another run writes it.
        ResourceError: the lock cannot be made.
    """
    output = output.absolute()
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UsageError(
            f"another run is writing {output}: wait for its end or give another --output"
        ) from None
    except OSError as error:
        raise ResourceError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else's
        lock.release()


@contextmanager
def staging(output: Path, *, force: bool, mark: str = "plan.json") -> Iterator[Path]:
    """Yield a fresh folder beside `output`; rename it to `output` if the body succeeds.

    Before that, what killed runs left beside `output` is removed, or put back if it is the only
    copy of what `output` held.

    Args:
        output: folder to write.
        force: replace one that holds `mark`.
        mark: file by which a folder of ours is known.

    Raises:
        UsageError: the output may not be written (see `check_output`), or another run writes it.
        ResourceError: the folder cannot be made.
    """
    output = output.absolute()
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    with reserved(output):
        try:
            _recover(output)
            check_output(output, force=force, mark=mark)
            folder.mkdir(parents=True)
        except OSError as error:
            raise ResourceError(f"cannot write beside {output}: {error.strerror}") from error
        try:
            yield folder
            check_output(output, force=force, mark=mark)
            _swap(folder, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging_file(output: Path, *, force: bool, suffix: str) -> Iterator[Path]:
    """Yield a path beside the file `output`; rename it to `output` if the body succeeds.

    Before that, what killed runs left beside `output` is removed.

    Args:
        output: file to write.
        force: replace one that exists.
        suffix: that its name must have.

    Raises:
        UsageError: the output may not be written (see `check_file`), or another run writes it.
        ResourceError: nothing can be written beside it.
    """
    output = output.absolute()
    with reserved(output):
        check_file(output, force=force, suffix=suffix)
        for left in _leftovers(output, "partial"):
            left.unlink(missing_ok=True)
        with atomic_path(output) as temporary:
            yield temporary
            check_file(output, force=force, suffix=suffix)


def _recover(output: Path) -> None:
    """Undo what runs to `output` that are dead left beside it.

    A run killed between the two renames of `_swap` left the output's former content under its
    `.old` name only: it becomes the output again.
    """
    old = _leftovers(output, "old")
    if old and not (output.is_dir() and any(output.iterdir())):
        latest = max(old, key=lambda folder: folder.stat().st_mtime)
        old.remove(latest)
        if output.is_dir():
            output.rmdir()
        latest.replace(output)
    for folder in (*old, *_leftovers(output, "partial")):
        shutil.rmtree(folder, ignore_errors=True)


def _leftovers(output: Path, kind: str) -> list[Path]:
    """Folders or files `.NAME.PID.kind` beside `output` whose process is gone."""
    start, end = f".{output.name}.", f".{kind}"
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    found = []
    for one in beside:
        process = one.name.removeprefix(start).removesuffix(end)
        named = one.name == f"{start}{process}{end}" and process.isdecimal()
        if named and _has_ended(int(process)):
            found.append(one)
    return found


def _has_ended(process: int) -> bool:
    """Whether the run that had this number is gone; unknown, hence no, on Windows."""
    if process == os.getpid():  # this run has made nothing yet, an earlier one had its number
        return True
    if sys.platform == "win32":  # where asking would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _swap(folder: Path, output: Path) -> None:
    """Give `folder` the name `output`; what had it before is removed only after that."""
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    replaced = output.is_dir()
    if replaced:
        output.replace(old)
    try:
        folder.replace(output)
    except OSError:
        if replaced:
            old.replace(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
