"""How results reach stdout: whole, at once, and without harm to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from quantforge.cli.outcome import OutputClosedError
from quantforge.launcher import is_main

if TYPE_CHECKING:
    from rich.console import Console


def print_result(
    command: str, result: Any, json: bool, show: Callable[[Console], None] | None = None
) -> None:
    """Write the whole result to stdout at once: a JSON document, or what `show` draws."""
    if not is_main():
        return
    from quantforge.cli import drawing, render

    if json or show is None:
        write(render.json_document(command, result) + "\n")
        return
    out = drawing.console()
    with out.capture() as drawn:
        show(out)
    write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def write(text: str, out: TextIO | None = None) -> None:
    """Write text to stdout, or to `out`, and flush it.

    Raises:
        OutputClosedError: nobody reads it any more.
    """
    out = out or sys.stdout
    try:
        out.write(text)
        out.flush()
    except BrokenPipeError:
        raise OutputClosedError("whoever read the output went away") from None


def visible(piece: str) -> str:
    """Generated text without terminal controls; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
