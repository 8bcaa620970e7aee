"""What is done with finished folders, whichever kind of network they hold.

Here alone a folder's kind decides: language models and encoders go to `evaluation`, `checking` and
`converting`, convolutional networks to `vision.finished`. What is asked for in the manner of the
other kind is refused in one line that says what to do instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from quantforge import benchmark, checking, converting, evaluation, landscape, profiling
from quantforge.errors import UsageError
from quantforge.evaluation import Precision
from quantforge.outcomes import CheckReport, ConvertReport, EvaluationReport, InspectReport
from quantforge.progress import Monitor, ProgressEvent
from quantforge.vision.entry import takes
from quantforge.vision.finished import (
    check_folder,
    convert_folder,
    evaluate_folder,
    inspect_folder,
    is_vision_folder,
)
from quantforge.vision.outcome import VisionCheck, VisionEvaluation, VisionInspection

Progress = Callable[[ProgressEvent], None]
P = ParamSpec("P")
R = TypeVar("R")

WINDOWS = 40
LAYOUTS = (*converting.FORMATS, "onnx")


def evaluate(
    checkpoint: str | Path,
    *,
    reference: str | Path | nn.Module | None = None,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    window_length: int | None = None,
    pictures: str | Path | None = None,
    match: str = "*",
    count: int | None = None,
    against: str | Path | None = None,
    precision: Precision = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> EvaluationReport | VisionEvaluation:
    """Compare a checkpoint with its float model, on a text or on pictures.

    Args:
        checkpoint: folder written by `quantize`, or any float language model.
        reference: the float model; None takes the one the checkpoint was made from. A module
            in memory for a convolutional network alone.
        text: of a language model, see `evaluation.evaluate`, like the next two.
        windows: non-overlapping windows to measure.
        window_length: tokens a window.
        pictures: of a convolutional network, see `vision.finished.evaluate_folder`, like the next
            two.
        match: pattern of file names.
        count: most pictures.
        against: a second network, compared on the same windows or pictures.
        precision: of matrix products.
        device: where the networks run.
        trust_remote_code: let a hub model bring its own code.
        progress: called after every step.
        cancel: once set, stops with `CancelledError`.

    Raises:
        InputError: a folder, model, text or picture is missing, broken or too short.
        UsageError: an option of the other kind of network.
    """
    if is_vision_folder(checkpoint):
        _refuse(
            checkpoint,
            {
                "--text": text is not None,
                "--windows": windows != WINDOWS,
                "--window-length": window_length is not None,
                "--precision": precision != "float32",
                "--device": device != "cpu",
                "--trust-remote-code": trust_remote_code,
            },
            "is a convolutional network, which is measured on --pictures",
        )
        return evaluate_folder(
            checkpoint, reference=reference, pictures=pictures, match=match, count=count,
            against=against, monitor=Monitor(progress=progress, cancel=cancel),
        )  # fmt: skip
    given = {"--pictures": pictures is not None, "--match": match != "*", "--count": bool(count)}
    _refuse(checkpoint, given, "is no convolutional network; it is measured on a --text")
    if isinstance(reference, nn.Module):
        raise UsageError("a reference in memory is for convolutional networks: give a folder")
    return evaluation.evaluate(
        checkpoint, reference=reference, text=text, windows=windows, window_length=window_length,
        against=against, precision=precision, device=device, trust_remote_code=trust_remote_code,
        progress=progress, cancel=cancel,
    )  # fmt: skip


def inspect(checkpoint: str | Path) -> InspectReport | VisionInspection:
    """What a quantized folder holds, from its files alone.

    Raises:
        InputError: the folder is not a whole quantized checkpoint.
    """
    if is_vision_folder(checkpoint):
        return inspect_folder(checkpoint)
    return evaluation.inspect(checkpoint)


def check(
    checkpoint: str | Path, *, server: str | None = None, tensor_parallel: int = 1
) -> CheckReport | VisionCheck:
    """Hold a language model's folder against a server's rules, or see that another is whole.

    Args:
        checkpoint: folder written by `quantize`.
        server: "transformers", "vllm" (where None) or "llama.cpp".
        tensor_parallel: devices that share every layer.

    Raises:
        InputError: the folder is not a whole quantized checkpoint; of a convolutional network this
            is a problem in the report.
        UsageError: an unknown server, or one that is not for this network.
    """
    if is_vision_folder(checkpoint):
        _refuse(
            checkpoint,
            {"--server": server is not None, "--tp": tensor_parallel != 1},
            "is a convolutional network, which no server's rules are about",
        )
        return check_folder(checkpoint)
    return checking.check(checkpoint, server=server or "vllm", tensor_parallel=tensor_parallel)


def convert(
    checkpoint: str | Path,
    *,
    output: str | Path,
    layout: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> ConvertReport:
    """Write a finished folder in another layout.

    Args:
        checkpoint: folder written by `quantize`.
        output: folder to write, for "gguf" a .gguf and for "onnx" an .onnx file.
        layout: "gptq" or "gguf" of a language model, "onnx" of a convolutional network; None takes
            "gptq" or "onnx".
        force: replace an output that an earlier call wrote.
        progress: called after every layer.
        cancel: once set, stops with `CancelledError` and writes nothing.

    Raises:
        InputError: the folder is not a whole quantized checkpoint, or the layout cannot hold it.
        UsageError: a layout that is unknown or of the other kind, or an output that may not be
            written.
        ResourceError: a package that the layout needs is not installed.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if is_vision_folder(checkpoint):
        if layout not in (None, "onnx"):
            raise UsageError(
                f"{checkpoint} is a convolutional network, which {layout} does not hold: give "
                "--layout onnx"
            )
        return convert_folder(
            checkpoint, output=output, force=force,
            monitor=Monitor(progress=progress, cancel=cancel),
        )  # fmt: skip
    if layout == "onnx":
        raise UsageError(
            f"{checkpoint} is no convolutional network, and ONNX is written of those alone: give "
            f"--layout {' or '.join(converting.FORMATS)}"
        )
    return converting.convert(
        checkpoint, output=output, layout=layout or "gptq", force=force, progress=progress,
        cancel=cancel,
    )  # fmt: skip


def _refuse(checkpoint: str | Path, given: dict[str, bool], reason: str) -> None:
    """Refuse the options that are given."""
    named = [name for name, is_given in given.items() if is_given]
    if named:
        raise UsageError(f"{checkpoint} {reason}: leave {', '.join(named)} out")


def _of_language_models(
    function: Callable[P, R], does: str, other: Callable[[Any], bool], instead: str
) -> Callable[P, R]:
    """The same function, which refuses a convolutional network.

    Args:
        function: whose first argument is a folder or a model.
        does: what it does not do for those.
        other: whether such an argument is one.
        instead: what to do.
    """

    @wraps(function)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        first: Any = arguments[0] if arguments else next(iter(options.values()), "")
        if other(first):
            name = first if isinstance(first, str | Path) else type(first).__name__
            raise UsageError(f"{name} is a convolutional network, {does}: {instead}")
        return function(*arguments, **options)

    return checked


_RUN = "quantforge.vision.checkpoint.load_vision runs it, quantforge eval measures it"
load = _of_language_models(
    evaluation.load, "which this function does not load", is_vision_folder, _RUN
)
generate = _of_language_models(
    evaluation.generate, "which continues no text", is_vision_folder, _RUN
)
evaluate_tasks = _of_language_models(
    evaluation.evaluate_tasks, "which answers no tasks", is_vision_folder, _RUN
)
bench = _of_language_models(
    benchmark.bench, "which bench does not time", is_vision_folder,
    "scripts/bench_vision.py does",
)  # fmt: skip
curvature = _of_language_models(
    landscape.curvature, "whose curvature has no table", takes,
    "quantforge plan with --sensitivity hawq uses its traces",
)  # fmt: skip
profile = _of_language_models(
    profiling.profile, "for which there are no budgets of latency", takes,
    "scripts/bench_vision.py times one",
)  # fmt: skip
