"""Builds a C++ source with the system compiler on first use and loads it through ctypes.

The library is cached under a key made of the source, the headers beside it, the compiler's version
the instruction set and the options, so that a new compiler, another machine or an edited source
never meets a stale build. A library is compiled for the machine it runs on, so the choice among
AVX-512, AVX2 and portable code is the compiler's target; another target can be asked for, which is
how one machine tests them all. Where no compiler is found, or it fails, callers use the definition
in torch and say so once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

SOURCES = Path(__file__).resolve().parent / "cpu"
# The parts of -ffast-math that vectorising needs, and not the flag itself: with it, some compilers
# link code into the library that makes the whole process flush subnormal numbers to zero.
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
REASSOCIATE = (*MATH, "-ffinite-math-only")
# For sources that order their sums themselves and must pass infinities on.
IN_ORDER = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-Wno-psabi")
COMMON = ("-O3", "-fopenmp", "-std=c++17")
LINK = ("-shared", "-fPIC")


class BuildError(RuntimeError):
    """The native library could not be built; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a source is compiled.

    Attributes:
        target: `-march` of the compiler.
        math: what the compiler may do to floating point.
        extra: further flags, e.g. of a sanitizer.
    """

    target: str = "native"
    math: tuple[str, ...] = REASSOCIATE
    extra: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """As the compiler takes them."""
        return (*COMMON, f"-march={self.target}", *self.math, *self.extra, *LINK)


DEFAULT = Options()


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler and what identifies it.

    Attributes:
        path: the executable.
        version: first line of `--version`.
    """

    path: str
    version: str


def find_compiler() -> Compiler:
    """The compiler named by $CXX, else the first of c++, g++, clang++ on the path.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        path = shutil.which(name)
        if path:
            answer = subprocess.run(
                [path, "--version"], capture_output=True, text=True, check=False
            )
            return Compiler(path, answer.stdout.partition("\n")[0])
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}); install g++ or clang")


def instruction_set() -> str:
    """What `-march=native` depends on: the machine and its processor flags."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"


def headers(folder: Path) -> list[Path]:
    """Every header in `folder`, any of which a source there may include."""
    return sorted(folder.glob("*.h"))


def library_path(
    source: Path, folder: Path, compiler: Compiler, options: Options = DEFAULT
) -> Path:
    """Where in `folder` the library that `compiler` makes of `source` here is, or would be."""
    texts = [path.read_text(encoding="utf-8") for path in (source, *headers(source.parent))]
    parts = (*texts, compiler.version, instruction_set(), *options.flags)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return folder / f"{source.stem}-{key}.so"


def build(source: Path, folder: Path, options: Options = DEFAULT) -> Path:
    """Compile `source` into `folder` unless it is there already; return the library's path.

    Raises:
        BuildError: no compiler, or it failed (its first error line is in the message).
    """
    compiler = find_compiler()
    library = library_path(source, folder, compiler, options)
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    temporary = library.with_suffix(f".{os.getpid()}.partial")
    command = [compiler.path, *options.flags, str(source), "-o", str(temporary)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        temporary.unlink(missing_ok=True)
        lines = [line for line in answer.stderr.splitlines() if "error" in line]
        detail = lines[0] if lines else answer.stderr.strip()[:200]
        raise BuildError(f"{compiler.path} could not compile {source.name}: {detail}")
    temporary.replace(library)
    return library


def default_folder() -> Path:
    """Where built libraries are kept: under $QUANTFORGE_CACHE or ~/.cache/quantforge."""
    chosen = os.environ.get("QUANTFORGE_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "quantforge") / "native"


@cache
def load(name: str, options: Options = DEFAULT) -> ctypes.CDLL:
    """The library of `cpu/<name>.cpp`, built on first use.

    Raises:
        BuildError: it cannot be built or loaded here.
    """
    if sys.platform == "win32":
        raise BuildError("the native kernels are built for Linux and macOS only")
    try:
        return ctypes.CDLL(str(build(SOURCES / f"{name}.cpp", default_folder(), options)))
    except OSError as error:
        raise BuildError(f"{name} could not be built or loaded: {error}") from error


@cache
def optional(
    name: str, without: str, procedures: tuple[str, ...], options: Options = DEFAULT
) -> ctypes.CDLL | None:
    """`load`, or None after one warning where the library cannot be had.

    Args:
        name: of the source.
        without: what is then the case, for the warning.
        procedures: functions of the library that return nothing.
        options: how it is compiled.
    """
    try:
        library = load(name, options)
    except BuildError as error:
        warnings.warn(f"{without}: {error}", stacklevel=3)
        return None
    for procedure in procedures:
        getattr(library, procedure).restype = None
    return library


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous tensor's data; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
