"""The command that writes a finished checkpoint in the layout of another program."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quantforge.cli.commands import watched
from quantforge.cli.options import Checkpoint, Force, Json, Layout
from quantforge.cli.output import print_result


def convert(
    checkpoint: Checkpoint,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="Folder to write; with gguf a .gguf file, with onnx an .onnx file.",
        ),
    ],
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Whose layout; default: gptq, of a convolutional network onnx.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a checkpoint as GGUF, one of 4 or 8 bits as GPTQ, a convolutional one as ONNX."""
    from quantforge.cli import render_machine

    with watched() as watch:
        from quantforge import pipeline

        report = pipeline.convert(
            checkpoint,
            output=output,
            layout=None if layout is None else layout.value,
            force=force,
            **watch,
        )
    print_result("convert", report, json, partial(render_machine.show_convert, report))
