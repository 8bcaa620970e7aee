"""Options that several commands share: names, types and help, written once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Effort(StrEnum):
    """Presets of `--effort`, by how long a run may take."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Precision(StrEnum):
    """Dtypes of `eval`'s matrix products."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Estimator(StrEnum):
    """Values of `--sensitivity`; a test compares them with the recipe key's."""

    fisher = "fisher"
    fisher_exact = "fisher-exact"
    fisher_factored = "fisher-factored"
    fisher_trace = "fisher-trace"
    hawq = "hawq"
    hawq_v2 = "hawq-v2"
    empirical_fisher = "empirical-fisher"
    gram = "gram"
    measured = "measured"


class Labels(StrEnum):
    """Values of `curvature --labels`; a test compares them with the function's."""

    true = "true"
    sampled = "sampled"
    expected = "expected"


class Server(StrEnum):
    """Programs whose loading rules are known; a test compares them with the rules."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama.cpp"


class Layout(StrEnum):
    """Layouts that `convert` writes; a test compares them with the module's."""

    gptq = "gptq"
    gguf = "gguf"
    onnx = "onnx"


# What `load.documents` reads; a test compares the two.
TEXTS = ".txt, .text, .md, .jsonl, .ndjson or .parquet file, hub data set (owner/name)"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Recipe name or .yaml, Hugging Face folder, .gguf file, or hub id (owner/name).",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        show_default=False,
        help="Stored bits a weight (3bit, 3.25bpw), bytes of the whole checkpoint (120MB, 0.4x of "
        "bfloat16), memory with keys and values (vram:8GB@4096), or the fewest bits measured to "
        "lose no more (kl:0.05, ppl:+2%, cosine:0.99 of an encoder, acc:-0.5% of a classifier), or "
        "time of a decoding step in these weights (latency:-25%, latency:12ms@1, with "
        "--latency-device; a convolutional network's layers are timed here), or bit operations of "
        "such (bops:-50%); several "
        "joined by commas. Not needed with --plan, or where the recipe says it or leaves nothing "
        "to search.",
    ),
]
Activations = Annotated[
    list[int] | None,
    typer.Option(
        min=2, max=8, metavar="BITS",
        help="Width of a convolutional network's activations; given again, one to choose among. "
        "Default: 8.",
    ),
]  # fmt: skip
Plan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        show_default=False,
        help="plan.json to follow instead of a budget; its specs may be edited.",
    ),
]
EffortOption = Annotated[Effort, typer.Option(help="How much time to spend on quality.")]
Sensitivity = Annotated[
    Estimator | None,
    typer.Option(
        "--sensitivity",
        metavar="NAME",
        show_default=False,
        help=f"How losses are predicted: {', '.join(Estimator)}; short for "
        "--set calibrate.estimator=.., default: fisher.",
    ),
]
ServerOption = Annotated[
    Server | None,
    typer.Option(
        "--server",
        show_default=False,
        help="Only plans that this program loads; short for --set search.server=..",
    ),
]
Parts = Annotated[
    int | None,
    typer.Option(
        "--tp",
        min=1,
        metavar="N",
        show_default=False,
        help="Devices among which vLLM will split every layer; --set search.tensor_parallel=..",
    ),
]
TrainMinutes = Annotated[
    float | None,
    typer.Option(
        "--train-minutes",
        min=0.0,
        metavar="N",
        show_default=False,
        help="Train for so many minutes after quantizing; short for --set training.minutes=..",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=f"Calibration text: {TEXTS}, 'self' (sampled from the model), 'pydoc' (Python's "
        "manual) or 'mix'; default: self.",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where to compute: cpu, cuda, cuda:1.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set any recipe key, e.g. search.solver=uniform."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output folder that exists.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: use nothing of earlier runs.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model ships.")
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        "--include-embeddings",
        metavar="SPEC",
        show_default=False,
        help="Quantize the token embedding and the head: a spec (8bit, 8b-g64), 'plan' to search "
        "theirs with the layers', 'keep' for 16 bits; default: plan under budgets in bytes, x and "
        "vram: without a part in bits, else keep. Only quantforge.load reads such embeddings.",
    ),
]
LatencyDevice = Annotated[
    str | None,
    typer.Option(
        "--latency-device",
        metavar="NAME",
        show_default=False,
        help="What latency is about: a100, h100, mi300x, 4090, cpu-avx512 (rooflines), or a .json "
        "that `quantforge profile` wrote.",
    ),
]
Override = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Folder, .gguf or hub id for a recipe."),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder to read.", show_default=False)
]
