"""The command line put together: commands by name with their examples, and the global options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from quantforge.cli import commands, converting, examining
from quantforge.cli.output import write
from quantforge.errors import UsageError
from quantforge.launcher import is_alone

_COMMANDS: tuple[tuple[Callable[..., None], str, tuple[str, ...]], ...] = (
    (
        commands.plan,
        "plan",
        (
            "quantforge plan llama --budget 3bit",
            "quantforge plan ./my-model --budget 3.25bpw --json > plan.json",
            "quantforge plan llama --budget 2.5bit --set search.group_sizes='[64, 128]'",
            "quantforge plan llama --budget vram:1GB@4096 -o planned",
            "quantforge plan llama --budget latency:-25% --latency-device a100",
        ),
    ),
    (
        commands.pareto,
        "pareto",
        (
            "quantforge pareto llama",
            "quantforge pareto ./my-model --measure 5 -o frontier",
        ),
    ),
    (
        commands.quantize,
        "quantize",
        (
            "quantforge quantize llama --budget 3bit -o out",
            "quantforge quantize ./my-model --budget 4bit --effort fast",
            "quantforge quantize llama --model org/name --budget 4bit --calibration text.txt",
            "quantforge quantize ./my-model --budget kl:0.05,90MB",
            "quantforge quantize ./my-model --plan plan.json -o out",
            "quantforge quantize gptq-w4g128 --model ./my-model -o out",
        ),
    ),
    (
        examining.evaluate,
        "eval",
        (
            "quantforge eval out --text wiki.txt",
            "quantforge eval out --against other --text wiki.txt --windows 10 --json",
            "quantforge eval out --reference ./my-model --precision bfloat16",
            "quantforge eval out-of-pictures --pictures ./photos --match '*.jpg'",
        ),
    ),
    (
        examining.tasks,
        "tasks",
        (
            "quantforge tasks out arc_easy lambada_openai --limit 200",
            "quantforge tasks out my-questions.jsonl --against llama",
        ),
    ),
    (
        commands.generate,
        "generate",
        (
            "quantforge generate out 'The capital of France is'",
            "echo 'Once upon a time' | quantforge generate out - --temperature 0.7 --seed 1",
        ),
    ),
    (
        examining.inspect,
        "inspect",
        ("quantforge inspect out", "quantforge inspect out --layers --json"),
    ),
    (
        commands.profile,
        "profile",
        (
            "quantforge profile llama -o here.json",
            "quantforge profile ./my-model -o batch4.json --batch 4 --dtype float32",
        ),
    ),
    (
        commands.bench,
        "bench",
        ("quantforge bench out", "quantforge bench out --head-bits 8 --threads 2 --json"),
    ),
    (
        converting.convert,
        "convert",
        (
            "quantforge convert out --layout gptq -o out-gptq",
            "quantforge convert out --layout gguf -o out.gguf",
            "quantforge convert out-of-pictures -o out.onnx",
        ),
    ),
    (
        examining.curvature,
        "curvature",
        (
            "quantforge curvature llama -o curvature.json",
            "quantforge curvature ./my-model --layers '*.0.self_attn.*' --labels expected --heads",
        ),
    ),
    (
        examining.check,
        "check",
        ("quantforge check out --server vllm --tp 2", "quantforge check out --json"),
    ),
    (examining.doctor, "doctor", ("quantforge doctor", "quantforge doctor --json")),
    (commands.fetch, "fetch", ("quantforge fetch llama",)),
)


# Commands whose work several processes of `accelerate launch` or torchrun do together.
_SHARED = ("plan", "pareto", "quantize", "eval")


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

        write(f"quantforge {quantforge.__version__}\n")
        raise typer.Exit


def _global_options(
    context: typer.Context,
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
    command = context.invoked_subcommand
    if command and command not in _SHARED and not is_alone():
        shared = ", ".join(_SHARED[:-1])
        raise UsageError(
            f"quantforge {command} runs in one process: start it without a launcher; "
            f"{shared} and {_SHARED[-1]} share their work"
        )
