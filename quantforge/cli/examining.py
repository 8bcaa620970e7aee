"""The commands that look at what is there and change nothing: `check` and `doctor`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from quantforge.cli.commands import watched
from quantforge.cli.options import Checkpoint, Json, Server
from quantforge.cli.output import print_result


def check(
    checkpoint: Checkpoint,
    *,
    server: Annotated[Server, typer.Option(help="Whose rules.")] = Server.vllm,
    tp: Annotated[
        int, typer.Option(min=1, metavar="N", help="Devices that share every layer.")
    ] = 1,
    json: Json = False,
) -> None:
    """Say whether a server loads a checkpoint; reads files, needs no server.

    Exit code 3 where it does not.
    """
    from quantforge.cli import render
    from quantforge.errors import InputError

    with watched():
        from quantforge import pipeline

        report = pipeline.check(checkpoint, server=server.value, tensor_parallel=tp)
    print_result("check", report, json, partial(render.show_check, report))
    if not report.loads:
        raise typer.Exit(InputError.exit_code)


def doctor(json: Json = False) -> None:
    """Say what this machine offers and what is wrong with it; loads no model.

    Exit code 5 where quantforge cannot run.
    """
    from quantforge.cli import render
    from quantforge.errors import ResourceError

    with watched():
        from quantforge.doctor import examine

        report = examine()
    print_result("doctor", report, json, partial(render.show_doctor, report))
    if not report.usable:
        raise typer.Exit(ResourceError.exit_code)
