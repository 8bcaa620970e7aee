"""Every error a user can meet, with the exit code the command line ends in.

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

LONGEST_MESSAGE = 1000
_LONGEST_END = 300


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
