"""Pieces of one-line messages."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST_DETAIL = 300


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def one_line(error: BaseException) -> str:
    """Type and message of an error without line breaks, cut where it is long."""
    text = " ".join(str(error).split())
    detail = text if len(text) <= LONGEST_DETAIL else f"{text[:LONGEST_DETAIL]}…"
    return f"{type(error).__name__}: {detail}" if detail else type(error).__name__
