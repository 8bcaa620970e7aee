"""What a machine offers, and what is known to go wrong on it; no model is loaded.

Pairs of libraries that are known to be bad are data, each with its symptom: what a user sees, which
rarely names the cause. They concern programs that read checkpoints beside quantforge, so they are
notes; what keeps quantforge itself from running is a problem.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from quantforge_kernels import attention, cpu_library
from quantforge_kernels.native import (
    DEFAULT,
    SOURCES,
    BuildError,
    default_folder,
    find_compiler,
    instruction_set,
    library_path,
)

from quantforge.files import CACHE_VARIABLE, cache_root
from quantforge.machine import machine_traits
from quantforge.outcomes import DoctorReport

DISTRIBUTION = "quantforge-compiler"
# Extensions of the instruction set that the native kernels gain by, as the system names them.
_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadPair:
    """Libraries that do not go together.

    Attributes:
        package: distribution that brings the trouble.
        since: first version that has it; empty: all from the start.
        before: first version without it; empty: none known.
        beside: distribution it does not go with; empty: it is bad with our checkpoints as such.
        symptom: what a user sees.
        remedy: what to do.
    """

    package: str
    since: str = ""
    before: str = ""
    beside: str = ""
    symptom: str
    remedy: str


BAD_PAIRS = (
    BadPair(
        package="compressed-tensors",
        before="0.17",
        symptom="weights of 3, 5, 6 and 7 bits are decoded by another layout, without an error",
        remedy="install compressed-tensors 0.17 or newer",
    ),
    BadPair(
        package="compressed-tensors",
        since="0.17.1",
        beside="transformers",
        symptom="from_pretrained fails on weights with zero-points (search.asymmetric)",
        remedy="read such checkpoints with quantforge.load",
    ),
    BadPair(
        package="transformers",
        since="5.23",
        beside="compressed-tensors",
        symptom="CompressedTensorsConfig(dequantize=True) decodes every layer of a mixed "
        "checkpoint with the first group's spec, without an error",
        remedy="load without that option",
    ),
    BadPair(
        package="sglang",
        symptom="checkpoints with widths other than 4 and 8 bits do not load",
        remedy="--set search.bits='[4, 8]'",
    ),
    BadPair(
        package="quantforge",
        symptom="another author's option-pricing library has the same import name",
        remedy="pip uninstall quantforge, then install this project again",
    ),
)


def examine() -> DoctorReport:
    """Look at the installation, the machine and the cache."""
    versions, problems = _requirements(metadata.requires(DISTRIBUTION) or [])
    for pair in BAD_PAIRS:  # optional packages are listed where they are there
        if (found := _version(pair.package)) is not None:
            versions.setdefault(pair.package, found)
    root = cache_root()
    problems += _cache_problems(root)
    compiler, kernels = _native()
    machine, capability, threads, _ = machine_traits()
    flags = set(instruction_set().split())
    used = [name for name in _EXTENSIONS if name in flags]
    return DoctorReport(
        versions=dict(sorted(versions.items())),
        devices=("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))),
        threads=int(threads),
        instruction_set=f"{machine}, torch uses {capability}; there is {', '.join(used) or 'none'}",
        compiler=compiler,
        kernels=kernels,
        cache=str(root),
        cache_bytes=_size(root),
        disk_free_bytes=shutil.disk_usage(_existing(root)).free,
        memory_free_bytes=_free_memory(),
        problems=tuple(problems),
        notes=tuple(known_trouble(versions)),
    )


def known_trouble(versions: Mapping[str, str]) -> list[str]:
    """One line for every known bad pair among installed versions."""
    found = []
    for pair in BAD_PAIRS:
        version = versions.get(pair.package, MISSING)
        if version == MISSING or (pair.beside and versions.get(pair.beside, MISSING) == MISSING):
            continue
        if pair.since and _parts(version) < _parts(pair.since):
            continue
        if pair.before and _parts(version) >= _parts(pair.before):
            continue
        beside = f" with {pair.beside} {versions[pair.beside]}" if pair.beside else ""
        found.append(f"{pair.package} {version}{beside}: {pair.symptom}; {pair.remedy}")
    return found


def _requirements(required: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Installed versions of what the project requires, and what is missing or too old."""
    versions, problems = {DISTRIBUTION: metadata.version(DISTRIBUTION)}, []
    for text in required:
        match = re.fullmatch(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", text)
        if match is None:  # of an extra
            continue
        name, least = match[1], match[2] or "0"
        found = _version(name)
        versions[name] = MISSING if found is None else found
        if found is None:
            problems.append(f"{name} is missing: pip install '{text}'")
        elif _parts(found) < _parts(least):
            problems.append(f"{name} {found} is older than {least}: pip install '{text}'")
    return versions, problems


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _parts(version: str) -> tuple[int, ...]:
    """The release of a version as numbers: "2.13.0+cpu" → (2, 13)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(one) for one in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _native() -> tuple[str, dict[str, str]]:
    """The compiler, and whether each native kernel is built for it and this machine."""
    sources = sorted(SOURCES.glob("*.cpp"))
    try:
        compiler = find_compiler()
    except BuildError as error:
        return f"{error}", {source.stem: "plain torch instead" for source in sources}
    folder = default_folder()
    named = {module.SOURCE: module.OPTIONS for module in (cpu_library, attention)}
    states = {}
    for source in sources:
        options = named.get(source.stem, DEFAULT)
        built = library_path(source, folder, compiler, options).is_file()
        states[source.stem] = "built" if built else "compiled on first use"
    return compiler.version, states


def _cache_problems(root: Path) -> list[str]:
    """Whether the cache can be written, without making it."""
    place = _existing(root)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return []
    return [f"the cache {root} cannot be written: set {CACHE_VARIABLE} to another folder"]


def _existing(path: Path) -> Path:
    """The nearest ancestor that exists, or the path itself."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(root: Path) -> int:
    """Bytes of the files below a folder; those that go meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except OSError:
                continue
    return total


def _free_memory() -> int | None:
    """Memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    line = next((one for one in lines if one.startswith("MemAvailable:")), None)
    return None if line is None else 1024 * int(line.split()[1])
