"""Every error a user can meet, with the exit code the command line ends in.

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import errno
import sys

EXIT_BUG = 1
LONGEST_MESSAGE = 1000
_LONGEST_END = 300
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG}
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")


class QuantforgeError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns.

    A message is one line whatever it quotes: line breaks become spaces, and of a very long one,
    which quotes a very long name or value, beginning and end are kept.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        text = " ".join(message.split())
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE - _LONGEST_END]} … {text[-_LONGEST_END:]}"
        super().__init__(text)


class UsageError(QuantforgeError):
    """The command or call is wrong: an unknown option, recipe, budget or name."""

    exit_code = 2


class InputError(QuantforgeError):
    """A file or model that was given is missing, truncated, empty or not what it claims."""

    exit_code = 3


class BudgetError(QuantforgeError):
    """No plan meets the budget; the message names the reachable range."""

    exit_code = 4


class ResourceError(QuantforgeError):
    """Memory, disk or a required program ran out or is missing."""

    exit_code = 5


class CancelledError(QuantforgeError):
    """The run was interrupted by the user or by the caller's cancel event."""

    exit_code = 130


class ElsewhereError(QuantforgeError):
    """Another process of the same run failed: its message and exit code, or that it is gone.

    Attributes:
        gone: it ended without a word.
    """

    exit_code = ResourceError.exit_code

    def __init__(self, message: str = "", *, exit_code: int | None = None, gone: bool = False):
        super().__init__(message)
        self.gone = gone
        if exit_code is not None:
            self.exit_code = exit_code


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception that ended a call."""
    if isinstance(error, QuantforgeError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return CancelledError.exit_code, "interrupted"
    if is_out_of_memory(error):
        detail = f": {error}" if str(error) else ""
        return ResourceError.exit_code, f"out of memory{detail}"
    if isinstance(error, OSError) and error.errno in _FULL:
        place = f"{error.filename}: " if error.filename else ""
        return ResourceError.exit_code, f"{place}{error.strerror}"
    if isinstance(error, OSError) and error.filename is not None:
        return InputError.exit_code, f"{error.filename}: {error.strerror or error}"
    kind = type(error).__name__
    return EXIT_BUG, f"this is a bug in quantforge: {kind}: {error} (--debug shows where)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # not imported: it cannot have raised then
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # On CPUs torch raises a plain RuntimeError from its allocator, and Python one without threads.
    said = str(error)
    return isinstance(error, RuntimeError) and any(sign in said for sign in _OUT_OF_MEMORY)
