"""Breaks every kind of input thousands of times and looks how quantforge ends.

    python scripts/fuzz_inputs.py --count 5000
    python scripts/fuzz_inputs.py --only 1234        # one input again, with its traceback

An input may be read all the same (`ok`), or be refused by one of the library's own errors with one
line (`refused`). Everything else is a failure: another exception, more than `--seconds`, more than
`--megabytes` of memory, something written that is no finished output, anything changed that is not
below the input's own folder or the cache, a file outside that was opened, a pickle or code of the
input's that ran, a process or a connection that was started, or a library that printed. All inputs
are read in this process; the seed alone decides an input.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import fuzz_targets as targets

from quantforge.cli.outcome import quiet_libraries
from quantforge.errors import CancelledError, QuantforgeError

LONGEST_MESSAGE = 1_500
FORBIDDEN_EVENTS = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "socket.connect", "socket.getaddrinfo",
)  # fmt: skip
# Audit events that change a file or folder: which arguments are the paths, and which are the
# descriptors of the folders that these are relative to.
CHANGING_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.symlink": ((1, 2),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.truncate": ((0, None),),
    "shutil.rmtree": ((0, 1),),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class HangError(BaseException):
    """An input took too long; no library's handler of exceptions catches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one input may take.

    Attributes:
        seconds: of time.
        megabytes: of memory beyond what the process had before.
    """

    seconds: float = 20.0
    megabytes: float = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an input ended.

    Attributes:
        seed: of the input.
        kind: of the input.
        result: "ok", "refused" or "failed".
        detail: the messages, or what went wrong.
        seconds: that it took.
    """

    seed: int
    kind: str
    result: str
    detail: str
    seconds: float


@dataclass(slots=True)
class Watch:
    """Notes what an input makes the process do that no input may.

    Python tells its audit hooks what it opens, changes and starts; a hook stays for good, so this
    one only looks while `inside` is set.

    Attributes:
        allowed: folders below which an input may change files.
        inside: an input is read.
        found: what was noted.
    """

    allowed: tuple[Path, ...] = ()
    inside: bool = False
    found: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        if not self.inside:
            return
        if event in FORBIDDEN_EVENTS:
            self.found.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = _absolute(arguments[0], None)
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & WRITING and not path.startswith(("/dev/", "/proc/")):
                self._note(path, "opened for writing")
            if path.startswith("/etc/passwd") or path.endswith((".bin", "secret.safetensors")):
                self.found.append(f"{path} opened")
        elif event in CHANGING_EVENTS:
            for place, folder in CHANGING_EVENTS[event]:
                beside = None if folder is None else (*arguments, None)[folder]
                path = _absolute(arguments[place], beside)
                if event != "os.mkdir" or not Path(path).is_dir():  # what is there does not change
                    self._note(path, event)

    def _note(self, path: str, what: str) -> None:
        """Note a change that is not below the allowed folders."""
        if not any(Path(path).is_relative_to(folder) for folder in self.allowed):
            self.found.append(f"{path} {what}")


def _absolute(path: Any, folder: Any) -> str:
    """A path of an audit event, which may be a descriptor or relative to one; links are kept."""
    descriptors = Path("/proc/self/fd")
    if isinstance(path, int):
        return str((descriptors / str(path)).readlink())
    relative = isinstance(folder, int) and folder >= 0
    beside = (descriptors / str(folder)).readlink() if relative else Path()
    return os.path.abspath(beside / os.fsdecode(path))  # noqa: PTH100 - no link followed


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Interrupt the body after a time, and let it have no more than 8 · `megabytes` of new memory.

    The limit counts what is reserved (VmData), which is more than what is used and measured.

    Where the body is in native code that never returns, the process ends with its traceback.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    room = int((_status("VmData") + 8 * limits.megabytes) * 1e6)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (room, hard))
    faulthandler.dump_traceback_later(6 * limits.seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def caught_output(path: Path) -> Iterator[None]:
    """Send what anything prints to a file, native code included."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("wb") as sink:
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def _status(name: str) -> float:
    """A size of this process in megabytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1e3
    raise KeyError(name)


def _listing(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Target, size and time of every file, folder and link below a folder.

    Folders have neither: their time is that of anything that came and went in them.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        plain = (0, 0) if stat.S_ISDIR(about.st_mode) else (about.st_size, about.st_mtime_ns)
        target = str(path.readlink()) if path.is_symlink() else oct(about.st_mode)
        found[str(path)] = (target, *plain)
    return found


def _judge(error: BaseException) -> str:
    """What is wrong with the error that an entry ended in; empty if it is a refusal."""
    if not isinstance(error, QuantforgeError) or isinstance(error, CancelledError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error!s:.200} ({last.filename}:{last.lineno})"
    text = str(error)
    if "\n" in text or len(text) > LONGEST_MESSAGE or not text:
        return f"a message of {len(text)} characters, {text.count(chr(10))} line breaks: {text:.80}"
    return ""


class Fuzzer:
    """Runs inputs under watch.

    Args:
        root: an empty folder; everything is made below it.
        limits: of one input.
    """

    def __init__(self, root: Path, limits: Limits = Limits()) -> None:
        self.root, self.limits = root.resolve(), limits
        os.environ["QUANTFORGE_CACHE"] = str(self.root / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        self.workshop = targets.Workshop.open(self.root)
        self.valid = _listing(self.root / "valid")
        self.watch = Watch()
        sys.addaudithook(self.watch)

    def run(self, seed: int, *, broken: bool = True, show: bool = False) -> Outcome:
        """Break and read the input of one seed.

        Args:
            seed: of the input.
            broken: False reads the valid input of the seed's kind.
            show: print tracebacks of every error.
        """
        started = time.perf_counter()
        kind, case = targets.make_case(self.workshop, seed, broken=broken)
        room = case.folder.parent
        before, faults, messages = _listing(room), list[str](), list[str]()
        for entry in targets.KINDS[kind].entries:
            name = entry.__name__.strip("_")
            error, problems = self._call(entry, case)
            if error is not None and show:
                traceback.print_exception(error)
            if error is None:
                shutil.rmtree(case.output, ignore_errors=True)
            if (now := _listing(room)) != before:
                left = sorted(now.keys() ^ before.keys()) or ["a changed input"]
                problems.append(f"left behind: {', '.join(left)}")
                before = now
            fault = "" if error is None else _judge(error)
            faults += [f"{name}: {problem}" for problem in (fault, *problems) if problem]
            messages += [f"{name}: {error}"] if error is not None and not fault else []
        faults += self._leftovers()
        shutil.rmtree(room, ignore_errors=True)
        result = "failed" if faults else "refused" if messages else "ok"
        detail = "; ".join(faults or messages)
        seconds = time.perf_counter() - started
        return Outcome(seed=seed, kind=kind, result=result, detail=detail, seconds=seconds)

    def _call(self, entry: targets.Entry, case: targets.Case) -> tuple[Any, list[str]]:
        """The error that an entry ended in, and what it did that it must not."""
        printed = self.root / "printed"
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest VmHWM
        memory, error = _status("VmRSS"), None
        self.watch.found.clear()
        with caught_output(printed):
            self.watch.allowed = (case.folder.parent, self.root / "cache")
            self.watch.inside = True
            try:
                with limited(self.limits):
                    entry(case)
            except KeyboardInterrupt:
                raise
            except BaseException as caught:
                error = caught
            finally:
                self.watch.inside = False
        found = list(self.watch.found)
        grown = _status("VmHWM") - memory
        if grown > self.limits.megabytes:
            found.append(f"took {grown:.0f} MB")
        if text := printed.read_text(encoding="utf-8", errors="replace").strip():
            found.append(f"printed {text[-200:]!r}")
        return error, found

    def _leftovers(self) -> Iterator[str]:
        """Marks of code that ran, changes of the valid inputs, unfinished folders in the cache."""
        if (self.root / "ran").exists():
            (self.root / "ran").unlink()
            yield "code or a pickle of the input ran"
        if (now := _listing(self.root / "valid")) != self.valid:
            changed = sorted(dict(now.items() ^ self.valid.items()))
            yield f"changed the valid {', '.join(changed)}"
            self.valid = now
        converted = self.root / "cache" / "converted"
        if converted.is_dir():
            yield from (f"left {one}" for one in converted.iterdir() if one.name.startswith("."))
            shutil.rmtree(converted)


def seeds_of(count: int, first: int, kinds: Sequence[str]) -> Iterable[int]:
    """So many seeds from `first` on whose inputs are of these kinds."""
    names = list(targets.KINDS)
    seed = first
    for _ in range(count):
        while names[seed % len(names)] not in kinds:
            seed += 1
        yield seed
        seed += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--kinds", nargs="+", choices=list(targets.KINDS), metavar="KIND")
    parser.add_argument("--only", type=int, metavar="SEED")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--megabytes", type=float, default=256.0)
    options = parser.parse_args(arguments)
    quiet_libraries(debug=False)
    sys.dont_write_bytecode = True
    limits = Limits(seconds=options.seconds, megabytes=options.megabytes)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), limits)
        if options.only is not None:
            print(fuzzer.run(options.only, show=True))
            return 0
        counts: Counter[tuple[str, str]] = Counter()
        slowest = Outcome(seed=-1, kind="", result="", detail="", seconds=0.0)
        for seed in seeds_of(options.count, options.seed, options.kinds or list(targets.KINDS)):
            outcome = fuzzer.run(seed)
            counts[outcome.kind, outcome.result] += 1
            slowest = max(slowest, outcome, key=lambda one: one.seconds)
            if outcome.result == "failed":
                print(f"seed {seed} {outcome.kind}: {outcome.detail}", flush=True)
    for kind in targets.KINDS:
        row = (f"{counts[kind, result]:6} {result}" for result in ("ok", "refused", "failed"))
        print(f"{kind:20}{' '.join(row)}")
    failed = sum(number for (_, result), number in counts.items() if result == "failed")
    print(
        f"{counts.total()} inputs, {failed} failures, slowest {slowest.seconds:.1f} s "
        f"(seed {slowest.seed}, {slowest.kind})"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
