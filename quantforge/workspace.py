"""Where a run writes: a staging folder that becomes the output at the very end.

Nothing half-written is ever left under a final name. A run works in a hidden sibling of its output
folder and renames it when every check has passed; an error or an interrupt removes it.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from quantforge.errors import ResourceError, UsageError


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that exists and is not empty, before any work is done.

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
    if not (output / "plan.json").is_file():
        raise UsageError(f"{output} was not written by quantforge; --force does not replace it")


@contextmanager
def staging(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a fresh folder beside `output`; rename it to `output` if the body succeeds.

    Raises:
        UsageError: the output may not be written (see `check_output`).
        ResourceError: the folder cannot be made.
    """
    check_output(output, force=force)
    output = output.absolute()
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ResourceError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        yield folder
        check_output(output, force=force)
        _swap(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def machine_traits() -> tuple[str, ...]:
    """What beside inputs and seed decides the bytes: threads, instruction set, torch."""
    return (
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        torch.__version__,
    )
