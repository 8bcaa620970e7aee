"""The command line: options in, one pipeline call, results on stdout, progress on stderr.

No maths and no model code here. What `--help` reaches imports typer and rich only; everything
heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `quantforge` command: runs it and ends the process with its exit code."""
    from quantforge.cli.app import application
    from quantforge.cli.outcome import quiet_libraries, run

    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow encoding is no reason to fail
    quiet_libraries(debug="--debug" in words)
    sys.exit(run(application(), words))
