"""Every error a user can meet, with the exit code the command line ends in.

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class QuantforgeError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


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
