"""The commands that look at what is there and change nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quantforge.cli.commands import recipe_keys, watched
from quantforge.cli.options import (
    Calibration,
    Checkpoint,
    Device,
    Force,
    Json,
    Labels,
    Model,
    Override,
    Seed,
    Server,
    Settings,
    Trust,
)
from quantforge.cli.output import print_result


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
    server: Annotated[Server, typer.Option(help="Whose rules.")] = Server.vllm,
    tp: Annotated[
        int, typer.Option(min=1, metavar="N", help="Devices that share every layer.")
    ] = 1,
    json: Json = False,
) -> None:
    """Say whether a server loads a checkpoint; reads files, needs no server.

    Exit code 3 where it does not.
    """
    from quantforge.cli import render_machine
    from quantforge.errors import InputError

    with watched():
        from quantforge import pipeline

        report = pipeline.check(checkpoint, server=server.value, tensor_parallel=tp)
    print_result("check", report, json, partial(render_machine.show_check, report))
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
