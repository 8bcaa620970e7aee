"""Looking at finished networks: load, measure, continue a prompt, read what a folder holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantforge.delivery import planned_layer
from quantforge.errors import InputError, UsageError
from quantforge.evaluate.generate import stream
from quantforge.evaluate.reference import AnyReference, collect, measure, paired
from quantforge.evaluate.tasks import compared, require_tasks, run_tasks
from quantforge.files import fingerprint, parse_json
from quantforge.format.checkpoint import TensorReader, open_checkpoint, read_shape
from quantforge.format.manifest import MANIFEST_NAME, read_manifest, tool_versions
from quantforge.format.sizes import size_report
from quantforge.load.batches import token_digest
from quantforge.load.huggingface import load_tokenizer
from quantforge.load.text import (
    DEFAULT_EVALUATION,
    ENCODER_LENGTH,
    check_vocabulary,
    describe_windows,
    evaluation_windows,
)
from quantforge.loading import load_source
from quantforge.models import Architecture, shape_of
from quantforge.models.sizes import context_length
from quantforge.outcomes import EvaluationReport, InspectReport, TasksReport
from quantforge.parallel import Share
from quantforge.progress import Monitor, ProgressEvent
from quantforge.recipe import compose, resolve_target
from quantforge.results import AnyQuality, SizeReport, TaskScore
from quantforge.runtime.decode import Decoder, obstacle
from quantforge.runtime.load import load as load_packed
from quantforge.types import LayerInfo

Progress = Callable[[ProgressEvent], None]
Precision = Literal["float32", "bfloat16"]

WINDOW_LENGTH = 1024  # of a decoder


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    mode: str = "exact",
    head_bits: int | None = None,
) -> nn.Module:
    """A checkpoint as a network whose linears stay packed.

    Args:
        path: folder written by `quantize`.
        device: where to put it.
        dtype: of activations and kept tensors; None takes the checkpoint's.
        backend: kernels to run on.
        mode: "exact", or "a8" for inputs rounded to int8 by group: faster, and not exact.
        head_bits: 8 runs a head kept in 16 bits through an 8-bit copy.

    Raises:
        InputError: the folder is not a whole checkpoint.
        UsageError: the backend cannot run here; the message says why.
    """
    return load_packed(
        path, device=device, dtype=dtype, backend=backend, mode=mode, head_bits=head_bits
    )


def evaluate(
    checkpoint: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    windows: int = 40,
    window_length: int | None = None,
    against: str | Path | None = None,
    precision: Precision = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> EvaluationReport:
    """Compare a checkpoint with its float model on a text, window by window.

    Args:
        checkpoint: folder written by `quantize`, or any float model.
        reference: the float model; None takes the one the checkpoint was made from.
        text: .txt, .jsonl or .parquet file or hub data set; None takes the end of the manual that
            every Python carries.
        windows: non-overlapping windows to measure.
        window_length: tokens a window; None takes 1024, and 128 of an encoder.
        against: a second network, compared on the same windows.
        precision: of matrix products.
        device: where the networks run.
        trust_remote_code: let a hub model bring its own code.
        progress: called after every step.
        cancel: once set, stops with `CancelledError`.

    Raises:
        InputError: a folder, model or text is missing, broken or too short.
    """
    monitor = Monitor(progress=progress, cancel=cancel)
    share = Share.of_this_process(torch.device(device))
    with share.together():
        name = str(reference) if reference is not None else _source_of(Path(checkpoint))
        tokens, description, outputs = _reference(
            name, text, (windows, window_length), precision, device, trust_remote_code, monitor,
            share,
        )  # fmt: skip

        def measured(path: str | Path) -> AnyQuality:
            module, architecture, key = _network(path, device, trust_remote_code, monitor, share)
            share.require_equal(key, f"network {path}")
            return measure(
                module, architecture, tokens, outputs,
                text=description, precision=precision, monitor=monitor, share=share,
            )  # fmt: skip

        quality = measured(checkpoint)
        other = None if against is None else measured(against)
    return EvaluationReport(
        model=str(checkpoint),
        reference=name,
        quality=quality,
        sizes=_sizes(Path(checkpoint)),
        against="" if against is None else str(against),
        against_quality=other,
        difference=None if other is None else paired(quality, other),
        precision=precision,
        versions=tool_versions(),
    )


def evaluate_tasks(
    checkpoint: str | Path,
    tasks: Sequence[str | Path],
    *,
    limit: int | None = None,
    shots: int = 0,
    batch_size: int = 1,
    against: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> TasksReport:
    """Score a network on zero-shot tasks, through lm-eval.

    Args:
        checkpoint: folder written by `quantize`, or any float model.
        tasks: names that lm-eval knows, or .jsonl files (`quantforge.evaluate.tasks`).
        limit: questions of every task; None takes all.
        shots: solved examples before every question.
        batch_size: sequences a forward pass.
        against: a second network, on the same questions; the float model shows what is lost.
        seed: of the choice of examples.
        device: where the networks run.
        trust_remote_code: let a hub model bring its own code.
        progress: called after every step.
        cancel: once set, stops with `CancelledError`.

    Raises:
        InputError: a folder, model or task is missing, unknown or broken.
        UsageError: lm-eval is not installed, or no task is named.
    """
    if not tasks:
        raise UsageError("no task is named; give names that lm-eval knows, or .jsonl files")
    monitor = Monitor(progress=progress, cancel=cancel)

    def scored(path: str | Path) -> tuple[TaskScore, ...]:
        module, tokenizer = _with_tokenizer(path, device, trust_remote_code, monitor)
        return run_tasks(
            module, tokenizer, [str(task) for task in tasks],
            limit=limit, shots=shots, batch_size=batch_size, seed=seed, monitor=monitor,
        )  # fmt: skip

    require_tasks([str(task) for task in tasks], shots)  # before a network is loaded
    scores = scored(checkpoint)
    others = () if against is None else scored(against)
    return TasksReport(
        model=str(checkpoint),
        scores=scores,
        against="" if against is None else str(against),
        against_scores=others,
        differences=compared(scores, others) if others else (),
        versions=tool_versions(),
    )


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[str]:
    """Continue a prompt with the packed network, yielding text as it is made.

    Args:
        checkpoint: folder written by `quantize`.
        prompt: text to continue.
        tokens: most tokens to add.
        temperature: 0 takes the likeliest token.
        top_p: probability mass that is sampled from.
        seed: of the sampling.
        device: where it runs.
        backend: kernels to run on.
        progress: called after every token.
        cancel: once set, stops with `CancelledError`.
    """
    monitor = Monitor(progress=progress, cancel=cancel)
    module = load(checkpoint, device=device, backend=backend)
    _require_decoder(module, "which continues no text")
    tokenizer = load_tokenizer(Path(checkpoint))
    if tokenizer is None:
        raise InputError(f"{checkpoint} has no tokenizer, which a prompt needs; add its files")
    fast = not obstacle(module)
    pieces = stream(
        module, tokenizer, prompt,
        tokens=tokens, temperature=temperature, top_p=top_p, seed=seed,
        continuation=(lambda capacity: Decoder(module, capacity).logits) if fast else None,
    )  # fmt: skip
    for index, piece in enumerate(pieces):
        yield piece
        monitor.step("generate", index + 1, tokens)


def inspect(checkpoint: str | Path) -> InspectReport:
    """What a quantized folder holds, from its files alone.

    Raises:
        InputError: the folder is not a whole quantized checkpoint.
    """
    opened = open_checkpoint(checkpoint)
    manifest = read_manifest(Path(checkpoint))
    reader = TensorReader()
    rows = []
    for name, spec in opened.specs().items():
        out_features, in_features = read_shape(opened, name, spec, reader)
        layer = LayerInfo(
            name=name,
            out_features=out_features,
            in_features=in_features,
            block=-1,
            stage=0,
            fused_group=name,
        )
        rows.append(planned_layer(layer, spec))
    kept = [name.removesuffix(".weight") for name in opened.entries if name.endswith(".weight")]
    return InspectReport(
        path=str(checkpoint),
        model=_classes(opened.config),
        format="compressed-tensors pack-quantized",
        budget="" if manifest is None else manifest.plan.budget,
        layers=tuple(rows),
        kept=tuple(kept),
        sizes=size_report(Path(checkpoint)),
        versions={} if manifest is None else manifest.versions,
    )


def _classes(config: Mapping[str, Any]) -> str:
    """The model's classes as config.json names them."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return "unknown"
    return ", ".join(map(str, names))


def _reference(
    name: str,
    text: str | Path | None,
    shape: tuple[int, int | None],
    precision: Precision,
    device: str,
    trust_remote_code: bool,
    monitor: Monitor,
    share: Share,
) -> tuple[Tensor, str, AnyReference]:
    """Windows of a text, their description, and what the float model says; it is freed again."""
    recipe = compose(resolve_target(name))
    model = load_source(
        recipe, device, trust_remote_code=trust_remote_code, monitor=monitor, share=share
    )
    where = DEFAULT_EVALUATION if text is None else str(text)
    windows, length = shape
    framed = model.architecture.encodes
    if length is None:
        length = ENCODER_LENGTH if framed else WINDOW_LENGTH
    _check_context(model.module, length)
    tokens = evaluation_windows(
        where, model.tokenizer, windows=windows, length=length, framed=framed
    )
    check_vocabulary(tokens, model, where)
    share.require_equal(
        fingerprint(model.source.fingerprint, token_digest(tokens), precision),
        "reference, text or precision",
    )
    outputs = collect(
        model.module,
        model.architecture,
        tokens,
        precision=precision,
        keep_head_copy=True,
        monitor=monitor,
        share=share,
    )
    return tokens, describe_windows(where, model.tokenizer, tokens, framed=framed), outputs


def _check_context(module: nn.Module, length: int) -> None:
    limit = context_length(module)
    if limit is not None and length > limit:
        raise InputError(
            f"windows of {length} tokens exceed the model's context of {limit}: lower the length "
            "of the windows (--window-length)"
        )


def _is_quantized(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        return "quantization_config" in parse_json(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config} is not JSON ({error})") from error


def _sizes(path: Path) -> SizeReport | None:
    return size_report(path) if _is_quantized(path) else None


def _network(
    path: str | Path, device: str, trust_remote_code: bool, monitor: Monitor, share: Share
) -> tuple[Any, Architecture, str]:
    """A network, its architecture and the fingerprint of what it was read from."""
    if _is_quantized(Path(path)):
        module = load(path, device=device)
        files = (Path(path) / name for name in ("config.json", MANIFEST_NAME))
        texts = [one.read_text(encoding="utf-8") if one.is_file() else "" for one in files]
        return module, shape_of(module), fingerprint(*texts)
    recipe = compose(resolve_target(path))
    model = load_source(
        recipe, device, trust_remote_code=trust_remote_code, monitor=monitor, share=share
    )
    return model.module, model.architecture, model.source.fingerprint


def _with_tokenizer(
    path: str | Path, device: str, trust_remote_code: bool, monitor: Monitor
) -> tuple[Any, Any]:
    """A network, packed where it is quantized, and its tokenizer.

    Raises:
        InputError: it has none.
    """
    if _is_quantized(Path(path)):
        module, tokenizer = load(path, device=device), load_tokenizer(Path(path))
    else:
        recipe = compose(resolve_target(path))
        model = load_source(recipe, device, trust_remote_code=trust_remote_code, monitor=monitor)
        module, tokenizer = model.module, model.tokenizer
    _require_decoder(module, "which has no likelihoods to answer tasks by")
    if tokenizer is None:
        raise InputError(f"{path} has no tokenizer, which tasks need; add its files")
    return module, tokenizer


def _require_decoder(module: nn.Module, lack: str) -> None:
    """Refuse an encoder."""
    if shape_of(module).encodes:
        raise InputError(
            f"{type(module).__name__} is an encoder, {lack}: quantforge eval compares its outputs"
        )


def _source_of(checkpoint: Path) -> str:
    """Location of the float model a checkpoint was made from, as its `run.json` remembers it."""
    record = checkpoint / "run.json"
    if not checkpoint.exists():
        raise InputError(f"{checkpoint} does not exist")
    if not record.is_file():
        raise InputError(f"{checkpoint} does not say which model it came from; give --reference")
    try:
        location = str(parse_json(record.read_text(encoding="utf-8"))["source"]["location"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record} is damaged ({error!r}); give --reference") from None
    if not location:
        raise InputError(f"{checkpoint} was made from a network in memory; give --reference")
    return location
