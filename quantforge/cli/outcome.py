"""How a command ends: one line on stderr and a documented exit code, whatever happened.

| code | meaning |
| ---- | ------- |
| 0    | done |
| 1    | a bug in quantforge |
| 2    | the command is wrong |
| 3    | a file or model is missing, damaged or not what it claims |
| 4    | no plan meets the budget |
| 5    | memory, disk or a needed program ran out |
| 130  | interrupted (SIGINT, SIGTERM) |
| 141  | whoever read our output went away |
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

import typer

from quantforge.cli.text import one_line
from quantforge.errors import (
    CancelledError,
    ElsewhereError,
    QuantforgeError,
    UsageError,
    explained,
)
from quantforge.launcher import is_alone, is_main

# The launcher ends all processes when one ended: the first one's words come before that.
_LAST_WORDS_S = 1.0
# It also passes on the signal that it got, which the terminal sent to all: so long that is one.
_PASSED_ON_S = 5.0


class OutputClosedError(QuantforgeError):
    """Nobody reads our stdout any more; nothing is said about it."""

    exit_code = 141  # what a shell shows for a process that SIGPIPE ended


def run(application: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; prints the error line if there is one.

    `--debug` may stand anywhere before `--`.
    """
    words, rest = _split_at_separator(list(arguments))
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] + rest
    try:
        code = application(words or ["--help"], standalone_mode=False, prog_name="quantforge")
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, debug)
    except SystemExit as error:  # the option parser's way of saying that stdout is closed
        cause = error.__context__
        return _report(cause if isinstance(cause, BrokenPipeError) else error, debug)
    if code == CancelledError.exit_code:  # its way of passing on Ctrl-C
        return _report(KeyboardInterrupt(), debug=False)
    return code if isinstance(code, int) else 0


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception that ended a command."""
    if isinstance(error, BrokenPipeError):
        error = OutputClosedError()
    if isinstance(error, typer.TyperException):  # what the option parser raises
        code, text = UsageError.exit_code, error.format_message().replace("Value error, ", "")
    else:
        interrupted = isinstance(error, typer.Abort)
        code, text = explained(KeyboardInterrupt() if interrupted else error)
    return code, one_line(text)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into a set cancel event and a KeyboardInterrupt.

    The event stops workers at their next step; the exception unwinds the main thread, so that
    whoever owns a staging folder removes it. A second signal has its default effect.
    """
    cancel = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    heard: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        cancel.set()
        heard.append(time.monotonic())
        # Beside others the next step stops it: an exchange must not break off.
        if not is_alone() and heard[-1] - heard[0] < _PASSED_ON_S:
            return
        for other in previous:
            signal.signal(other, signal.SIG_DFL)
        if not is_alone():
            signal.raise_signal(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    for number in previous:
        signal.signal(number, stop)
    try:
        yield cancel
    except KeyboardInterrupt:
        raise CancelledError("interrupted") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quiet_libraries(*, debug: bool) -> None:
    """Set this process up: warnings of our own become one line, the libraries' are not shown.

    Threads that wait for each other sleep instead of spinning: on two cores that another program
    shares, spinning made a training step take 60 s instead of 8 s. The products' library keeps the
    code of fewer shapes than its own choice of 1024: decoding makes new shapes at every step, which
    are never used again and take 170 MB. Both are read when torch loads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    logging.basicConfig(level=logging.ERROR, format="warning: %(message)s", stream=sys.stderr)
    for name in ("quantforge", "quantforge_kernels"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main() else logging.CRITICAL)
    # These libraries read their own settings when they are imported, which is later than this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    if is_main():
        warnings.filterwarnings("default", module=r"quantforge")
    warnings.showwarning = _show_warning


def _report(error: BaseException, debug: bool) -> int:
    code, text = explain(error)
    if not is_main() and not (isinstance(error, ElsewhereError) and error.gone):
        time.sleep(_LAST_WORDS_S)
        return code
    try:
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        if code != OutputClosedError.exit_code:
            print(f"error: {text}", file=sys.stderr, flush=True)  # noqa: T201
        sys.stdout.flush()
    except OSError:
        _silence(sys.stderr)
        _silence(sys.stdout)
    return code


def _split_at_separator(words: list[str]) -> tuple[list[str], list[str]]:
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut:]


def _silence(stream: TextIO) -> None:
    """Point a broken stream at nothing, so that the interpreter's last flush is quiet."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {one_line(str(message))}", file=file or sys.stderr)
