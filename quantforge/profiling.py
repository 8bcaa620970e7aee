"""Times of every shape and candidate of a network on this machine, as a table for budgets."""

from __future__ import annotations

import platform
import statistics
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from quantforge.errors import UsageError
from quantforge.format.manifest import KEPT
from quantforge.latency import ProfileReport, TimedLayer, write_table
from quantforge.loading import load_source
from quantforge.machine import machine_traits
from quantforge.progress import Monitor, ProgressEvent
from quantforge.recipe import compose, resolve_target
from quantforge.runtime.profile import Shape, time_layers
from quantforge.search.vocabulary import planned_candidates, vocabulary_candidates
from quantforge.types import QuantSpec
from quantforge.workspace import check_file

Progress = Callable[[ProgressEvent], None]
Dtype = Literal["bfloat16", "float32"]


def profile(
    model: str | Path,
    *,
    output: str | Path,
    batch: int = 1,
    dtype: Dtype = "bfloat16",
    backend: str = "auto",
    repeats: int = 15,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> ProfileReport:
    """Time every shape of a network in every candidate, and in 16 bits, through the kernels.

    Args:
        model: recipe name, recipe file, folder, .gguf file or hub id.
        output: .json file to write; `device` of a recipe reads it.
        batch: sequences a decoding step.
        dtype: of inputs and plain weights.
        backend: kernels to run on.
        repeats: rounds that the medians are taken over.
        device: where to measure.
        settings: recipe keys, e.g. the candidates.
        force: replace the file.
        trust_remote_code: let a hub model bring its own code.
        progress: called after every step.
        cancel: once set, stops with `CancelledError`.

    Raises:
        InputError: the model is missing or broken.
        UsageError: the file is there or no .json, or kernels cannot run a candidate.
    """
    path = Path(output)
    check_file(path, force=force)
    if batch < 1 or repeats < 1:
        raise UsageError(f"batch and repeats must be 1 or more, got {batch} and {repeats}")
    monitor = Monitor(progress=progress, cancel=cancel)
    recipe = compose(resolve_target(model), settings=settings)
    loaded = load_source(recipe, device, trust_remote_code=trust_remote_code, monitor=monitor)
    specs = recipe.search.candidates({layer.in_features for layer in loaded.layers})
    wanted: dict[Shape, set[QuantSpec]] = {}
    for layer in loaded.layers:
        wanted.setdefault((layer.out_features, layer.in_features), set()).update(specs)
    matrices = loaded.architecture.vocabulary(loaded.module)
    for layer in matrices:
        if layer.kind != "embedding":  # of which a step looks up a row
            found = planned_candidates(layer, recipe.embeddings)
            wanted.setdefault((layer.out_features, layer.in_features), set()).update(found)
    for layer, asked in vocabulary_candidates(
        matrices, recipe.embeddings, recipe.search, None
    ).items():
        if layer.kind != "embedding":
            wanted[layer.out_features, layer.in_features].update(asked)
    taken = time_layers(
        {shape: sorted(found) for shape, found in wanted.items()},
        batch=batch,
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        backend=backend,
        repeats=repeats,
        monitor=monitor,
    )
    report = ProfileReport(
        model=loaded.source.name,
        output=str(output),
        machine=(platform.processor() or platform.machine(), *machine_traits()),
        backend=backend,
        dtype=dtype,
        batch=batch,
        threads=torch.get_num_threads(),
        repeats=repeats,
        rows=tuple(_row(shape, spec, times) for (shape, spec), times in taken.items()),
    )
    write_table(report, path)
    return report


def _row(shape: Shape, spec: QuantSpec | None, times: list[float]) -> TimedLayer:
    ordered = sorted(times)
    return TimedLayer(
        out_features=shape[0],
        in_features=shape[1],
        spec=KEPT if spec is None else str(spec),
        median=statistics.median(ordered),
        p20=ordered[len(ordered) // 5],
        p80=ordered[-1 - len(ordered) // 5],
    )
