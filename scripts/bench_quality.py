"""Measures uniform networks and plans on evaluation texts, under the protocol of the peers' table.

    python scripts/bench_quality.py llama --calibration wiki2_valid.txt --text wiki2_test.txt \
        --text lambada.jsonl --rows rtn:3b-pc gptq:3b-pc gptq:3b-g64 plan:3bit --json rows.json

Linears only: embeddings, norms and the head stay float on both sides. A row is `rtn:SPEC`,
`gptq:SPEC` (sequential, without tuning), `tuned:SPEC` and `plan:BUDGET` (all that the recipe does)
or `fast:BUDGET` (one-pass integers, without tuning). Matrix products of networks
and reference run in `--precision`. CPU seconds are process time of all threads; the load average is
printed beside them because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from quantforge.compilation import Job, Measurement, open_job
from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.files import fingerprint
from quantforge.load.text import describe_windows, evaluation_windows
from quantforge.progress import Monitor, ProgressEvent
from quantforge.quantize.config import TuningConfig
from quantforge.results import Quality
from quantforge.search.allocate import search, uniform_plans
from quantforge.search.budget import Budget
from quantforge.testing import offgrid
from quantforge.types import BitPlan, QuantSpec


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured network.

    Attributes:
        name: as given on the command line.
        stored_bits: average stored bits a weight.
        cpu_seconds: to make it, process time of all threads, without the shared calibration.
        qualities: text → measurement.
    """

    name: str
    stored_bits: float
    cpu_seconds: float
    qualities: dict[str, Quality]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print a table; `--json` also writes every number."""
    options = parse(argv)
    with cpu_timer() as shared:
        job = open_job(
            options.model,
            calibration=options.calibration,
            effort="balanced",
            seed=options.seed,
            device="cpu",
            settings=json.loads(options.settings),
            trust_remote_code=False,
            tokenizer=None,
            monitor=Monitor(progress=show),
        )
        if options.offgrid is not None:
            offgrid(job.model.module, seed=options.offgrid)
            changed = fingerprint(job.model.source.fingerprint, "offgrid", options.offgrid)
            job.model.source = replace(job.model.source, fingerprint=changed)
    texts = {text: reference(job, text, options) for text in options.text}
    with cpu_timer() as calibrated:
        measured = job.measure(fresh=options.fresh)
    print(f"load and text {shared[0]:.0f} CPU s, calibration {calibrated[0]:.0f} CPU s")
    parameters = dict(job.model.module.named_parameters())
    floats = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    rows = []
    for name in options.rows:
        for parameter, original in zip(parameters.values(), floats.values(), strict=True):
            parameter.copy_(original)
        with cpu_timer() as spent:
            plan = make(job, name, measured)
        qualities = {}
        for text, outputs in texts.items():
            qualities[text] = measure(
                job.model.module, job.model.architecture, outputs.windows, outputs,
                text=text, precision=options.precision,
            )  # fmt: skip
        rows.append(
            Row(name=name, stored_bits=plan.stored_bits, cpu_seconds=spent[0], qualities=qualities)
        )
        print(table(rows[-1:], options.text), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows, options.text))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GB, load average {os.getloadavg()[0]:.1f}")


def make(job: Job, name: str, measured: Measurement) -> BitPlan:
    """Put the named network's weights into the job's model; return its plan."""
    kind, _, what = name.partition(":")
    if kind in ("plan", "fast"):
        plan = search(measured.sensitivity, Budget.parse(what), job.recipe.search)
    else:
        spec = QuantSpec.parse(what)
        plan = next(p for p in uniform_plans(measured.sensitivity) if p.budget == f"uniform {spec}")
    recipe = job.recipe
    if kind in ("plan", "tuned"):
        changed = recipe.quantize
    else:
        changed = recipe.quantize.model_copy(update={"tuning": TuningConfig(steps=0)})
    if kind == "rtn":
        changed = changed.model_copy(update={"method": "rtn", "grid": "minmax"})
    elif kind == "fast":
        changed = changed.model_copy(update={"sequential": False})
    job.recipe = recipe.model_copy(update={"quantize": changed})
    for _ in job.quantize(plan, measured):
        pass
    job.recipe = recipe
    return plan


def reference(job: Job, text: str, options: argparse.Namespace) -> ReferenceOutputs:
    """The float network on a text."""
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


def table(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Markdown rows: bits, CPU seconds and per text KL ± standard error, perplexity, top-1."""
    lines = []
    for row in rows:
        cells = [row.name, f"{row.stored_bits:.3f}", f"{row.cpu_seconds:.0f}"]
        for text in texts:
            q = row.qualities[text]
            cells += [f"{q.kl:.4f} ± {q.kl_stderr:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextmanager
def cpu_timer() -> Iterator[list[float]]:
    """Yields a list that holds the process time of the body once it has run."""
    spent: list[float] = []
    began = time.process_time()
    yield spent
    spent.append(time.process_time() - began)


def show(event: ProgressEvent) -> None:
    """Progress on stderr, one line a stage."""
    end = "\n" if event.done == event.total else "\r"
    print(f"{event.stage} {event.done}/{event.total}", end=end, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="recipe, folder or .gguf")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, help="may be given again")
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--offgrid", type=int, metavar="SEED", help="rescale channels first")
    parser.add_argument("--settings", default="{}", help="recipe keys as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--json", help="file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
