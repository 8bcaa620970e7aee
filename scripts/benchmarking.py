"""What the quality benchmarks share: opening a model, texts to measure on, timing, progress."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from quantforge.compilation import Job
from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.files import fingerprint
from quantforge.load.text import describe_windows, evaluation_windows
from quantforge.opening import configure, open_job
from quantforge.progress import Monitor, ProgressEvent
from quantforge.results import Quality
from quantforge.testing import offgrid

# Names the calibration's held-out tokens in the place of a text.
HELD_OUT = "held-out"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options about the model, the texts and where numbers go."""
    parser.add_argument("model", help="recipe, folder or .gguf")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, help="may be given again")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--offgrid", type=int, metavar="SEED", help="rescale channels first")
    parser.add_argument("--settings", default="{}", help="recipe keys as JSON")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--json", help="file for all numbers")


def opened(options: argparse.Namespace, settings: Mapping[str, Any]) -> Job:
    """The float network, off its source's grid if asked, with its outputs on held-out tokens."""
    recipe = configure(options.model, calibration=options.calibration, settings=settings)
    job = open_job(options.model, recipe, monitor=Monitor(progress=show))
    if options.offgrid is not None:
        offgrid(job.model.module, seed=options.offgrid)
        changed = fingerprint(job.model.source.fingerprint, "offgrid", options.offgrid)
        job.model.source = replace(job.model.source, fingerprint=changed)
    _ = job.reference
    return job


def references(job: Job, options: argparse.Namespace) -> dict[str, ReferenceOutputs]:
    """The float network on every text; `HELD_OUT` names the calibration's own."""
    return {
        text: job.reference if text == HELD_OUT else _reference(job, text, options)
        for text in options.text
    }


def _reference(job: Job, text: str, options: argparse.Namespace) -> ReferenceOutputs:
    windows = evaluation_windows(
        text, job.model.tokenizer, windows=options.windows, length=options.window_length
    )
    print(describe_windows(text, job.model.tokenizer, windows))
    return ReferenceOutputs.collect(
        job.model.module,
        job.model.architecture,
        windows,
        precision=options.precision,
        keep_head_copy=True,
        monitor=job.monitor,
    )


def on_texts(
    job: Job, texts: Mapping[str, ReferenceOutputs], options: argparse.Namespace
) -> dict[str, Quality]:
    """The network as it now stands, on every text."""
    return {
        text: measure(
            job.model.module, job.model.architecture, outputs.windows, outputs,
            text=text, precision=options.precision,
        )
        for text, outputs in texts.items()
    }  # fmt: skip


@contextmanager
def cpu_timer() -> Iterator[list[float]]:
    """Yields a list that holds the process time of the body once it has run."""
    spent: list[float] = []
    began = time.process_time()
    yield spent
    spent.append(time.process_time() - began)


@contextmanager
def parameters_restored(job: Job) -> Iterator[None]:
    """Every parameter is afterwards what it was before, norms included."""
    parameters = dict(job.model.module.named_parameters())
    floats = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(floats[name])


def show(event: ProgressEvent) -> None:
    """Progress on stderr, one line a stage."""
    end = "\n" if event.done == event.total else "\r"
    said = f" {event.message}" if event.message else ""
    print(f"{event.stage} {event.done}/{event.total}{said}", end=end, file=sys.stderr, flush=True)
