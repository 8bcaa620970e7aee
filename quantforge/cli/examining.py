"""The commands that look at what is there and change nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quantforge.cli.commands import recipe_keys, watched
from quantforge.cli.options import (
    TEXTS,
    Calibration,
    Checkpoint,
    Device,
    Force,
    Json,
    Labels,
    Model,
    Override,
    Precision,
    Seed,
    Server,
    Settings,
    Trust,
)
from quantforge.cli.output import print_result


def evaluate(
    checkpoint: Checkpoint,
    *,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Float model to compare with; default: its source."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=f"Text to measure on: {TEXTS}; default: the end of Python's manual ('pydoc').",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to measure.")] = 40,
    window_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens a window; default: 1024, 128 for an encoder."),
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="PICTURES",
            help="Of a convolutional network: folder, .zip, .parquet, .npy or .npz file, hub data "
            "set, or 'synthetic' (made from the float network's statistics), the default.",
        ),
    ] = None,
    match: Annotated[
        str, typer.Option(metavar="PATTERN", help="Names of pictures in a folder or archive.")
    ] = "*",
    count: Annotated[
        int | None,
        typer.Option(min=2, help="Most pictures; default: 512, 32 that have to be made."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Second checkpoint, compared window by window or picture by picture.",
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Dtype of the matrix products.")
    ] = Precision.float32,
    device: Device = "cpu",
    json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Compare a checkpoint with its float model on a text, or on pictures."""
    from quantforge.cli import render_vision

    with watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.evaluate(
            checkpoint,
            reference=reference,
            text=text,
            windows=windows,
            window_length=window_length,
            pictures=pictures,
            match=match,
            count=count,
            against=against,
            precision=precision.value,
            device=device,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("eval", report, json, partial(render_vision.show_measured, report))


def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="List every layer, as is done of convolutional networks."),
    ] = False,
    json: Json = False,
) -> None:
    """Say what a checkpoint holds; reads files, runs nothing."""
    from quantforge.cli import render_vision

    with watched():
        from quantforge import pipeline

        report = pipeline.inspect(checkpoint)
    show = partial(render_vision.show_inspected, report, layers=layers)
    print_result("inspect", report, json, show)


def curvature(
    model: Model,
    *,
    layers: Annotated[
        str, typer.Option(metavar="PATTERN", help="Layers to look at, e.g. '*.5.mlp.*'.")
    ] = "*",
    labels: Annotated[
        Labels,
        typer.Option(
            help="What the loss compares with: the text's next tokens, the network's distribution "
            "(the Fisher information, never negative), or tokens drawn from it."
        ),
    ] = Labels.true,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of text.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Lanczos steps a start.")] = 6,
    starts: Annotated[int, typer.Option(min=2, help="Random starts.")] = 2,
    heads: Annotated[
        bool,
        typer.Option(
            "--heads", help="Query projections head by head too; not with the text's labels."
        ),
    ] = False,
    activations: Annotated[
        bool,
        typer.Option("--activations", help="What layers read too; takes --sequences 2 or more."),
    ] = False,
    spec: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Give HAWQ's order of fine-tuning at e.g. 3b-g64."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The .json to write.")
    ] = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    device: Device = "cpu",
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Measure the loss's curvature by layer: traces, top eigenvalues, distance from a minimum."""
    from quantforge.cli import render_machine

    with watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.curvature(
            model,
            layers=layers,
            labels=labels.value,
            sequences=sequences,
            tokens=tokens,
            steps=steps,
            starts=starts,
            heads=heads,
            activations=activations,
            spec=spec,
            calibration=calibration,
            output=output,
            seed=seed,
            device=device,
            settings=recipe_keys(settings, {"model": override}),
            force=force,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("curvature", report, json, partial(render_machine.show_curvature, report))


def check(
    checkpoint: Checkpoint,
    *,
    server: Annotated[
        Server | None, typer.Option(help="Whose rules; default: vllm.", show_default=False)
    ] = None,
    tp: Annotated[
        int, typer.Option(min=1, metavar="N", help="Devices that share every layer.")
    ] = 1,
    json: Json = False,
) -> None:
    """Say whether a server loads a checkpoint; reads files, needs no server.

    Of a convolutional network it says whether the folder is whole. Exit code 3 where it is not.
    """
    from quantforge.cli import render_vision
    from quantforge.errors import InputError

    with watched():
        from quantforge import pipeline

        report = pipeline.check(
            checkpoint, server=None if server is None else server.value, tensor_parallel=tp
        )
    print_result("check", report, json, partial(render_vision.show_checked, report))
    if not report.loads:
        raise typer.Exit(InputError.exit_code)


def doctor(json: Json = False) -> None:
    """Say what this machine offers and what is wrong with it; loads no model.

    Exit code 5 where quantforge cannot run.
    """
    from quantforge.cli import render_machine
    from quantforge.errors import ResourceError

    with watched():
        from quantforge.doctor import examine

        report = examine()
    print_result("doctor", report, json, partial(render_machine.show_doctor, report))
    if not report.usable:
        raise typer.Exit(ResourceError.exit_code)


def tasks(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", show_default=False, help="Folder to read, or any float model."
        ),
    ],
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...",
            show_default=False,
            help="Names that lm-eval knows, or .jsonl files: questions with choices and the right "
            "one's index (query, choices, gold), or texts (context, continuation).",
        ),
    ],
    *,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of every task; default: all.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before a question.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 1,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Second network, compared question by question."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Score a checkpoint on zero-shot tasks, through lm-eval (the extra 'tasks')."""
    from quantforge.cli import render_machine

    with watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.evaluate_tasks(
            checkpoint,
            names,
            limit=limit,
            shots=shots,
            batch_size=batch,
            against=against,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("tasks", report, json, partial(render_machine.show_tasks, report))
