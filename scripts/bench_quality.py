"""Measures uniform networks and plans on evaluation texts, under the protocol of the peers' table.

    python scripts/bench_quality.py llama --calibration wiki2_valid.txt --text wiki2_test.txt \
        --text lambada.jsonl --rows rtn:3b-pc gptq:3b-pc gptq:3b-g64 plan:3bit --json rows.json

Linears only: embeddings, norms and the head stay float on both sides. A row is

    METHOD[+OPTION...]:SPEC   sequential compensation without tuning; METHOD is rtn or a member of
                              the family (gptq, gptaq, foem, foem-gptaq, qep, qronos), an OPTION a
                              grid (minmax, mse, diagonal, conditional; rtn alone has minmax),
                              refit, magr (with the paper's strength), awq, stagewise (a layer
                              sees the quantized layers before it in its block) or choose
                              (coefficients chosen for each layer on held-out tokens)
    tuned:SPEC, plan:BUDGET   all that the recipe does; an asymmetric SPEC ("3b-g64-asym") adds
                              asymmetric candidates to all rows that choose among them
    fast:BUDGET               one-pass integers, without tuning

The last columns are the paired difference to the first row, in KL, on each text. Matrix products of
networks and reference run in `--precision`. CPU seconds are process time of all threads; the load
average is printed beside them because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from quantforge.compilation import Job, Measurement, open_job
from quantforge.evaluate.quality import ReferenceOutputs, measure, paired
from quantforge.files import fingerprint
from quantforge.load.text import describe_windows, evaluation_windows
from quantforge.progress import Monitor, ProgressEvent
from quantforge.quantize.config import CROSS_METHODS, QuantizeConfig, TuningConfig
from quantforge.quantize.sequential import quantize_sequentially
from quantforge.results import Quality
from quantforge.search.allocate import search, uniform_plans
from quantforge.search.budget import Budget
from quantforge.testing import offgrid
from quantforge.types import PER_CHANNEL, BitPlan, QuantSpec

# Rows that need sensitivities and candidates.
MEASURED = ("plan:", "fast:", "tuned:")
CHOICES: dict[str, object] = {"mismatch": (0.0, 0.25, 0.5, 0.75, 1.0), "pull": (0.0, 0.1)}
# What MagR's paper takes.
MAGR_PER_CHANNEL, MAGR_GROUPS = 1e-3, 1e-4


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
            settings=candidates(options.rows) | json.loads(options.settings),
            trust_remote_code=False,
            tokenizer=None,
            monitor=Monitor(progress=show),
        )
        if options.offgrid is not None:
            offgrid(job.model.module, seed=options.offgrid)
            changed = fingerprint(job.model.source.fingerprint, "offgrid", options.offgrid)
            job.model.source = replace(job.model.source, fingerprint=changed)
    texts = {text: reference(job, text, options) for text in options.text}
    print(f"load and text {shared[0]:.0f} CPU s")
    with ExitStack() as held:
        measured = None
        if any(name.startswith(MEASURED) for name in options.rows):
            with cpu_timer() as calibrated:
                measured = held.enter_context(job.measure(fresh=options.fresh))
            print(f"calibration {calibrated[0]:.0f} CPU s")
        rows = measure_rows(job, texts, measured, options)
    print(table(rows, options.text, rows[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GB, load average {os.getloadavg()[0]:.1f}")


def measure_rows(
    job: Job,
    texts: Mapping[str, ReferenceOutputs],
    measured: Measurement | None,
    options: argparse.Namespace,
) -> list[Row]:
    """Make every network that was asked for and measure it on every text; prints as it goes."""
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
        print(table(rows[-1:], options.text, rows[0]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def candidates(rows: Sequence[str]) -> dict[str, bool]:
    """Settings without which a row finds no integers in the store."""
    asymmetric = any(row.startswith(MEASURED) and row.endswith("-asym") for row in rows)
    return {"search.asymmetric": True} if asymmetric else {}


def make(job: Job, name: str, measured: Measurement | None) -> BitPlan:
    """Put the named network's weights into the job's model; return its plan."""
    kind, _, what = name.partition(":")
    if kind not in ("plan", "fast", "tuned") or measured is None:
        return compensated(job, kind.split("+"), QuantSpec.parse(what))
    if kind == "tuned":
        wanted = f"uniform {QuantSpec.parse(what)}"
        plan = next(p for p in uniform_plans(measured.sensitivity) if p.budget == wanted)
    else:
        plan = search(measured.sensitivity, Budget.parse(what), job.recipe.search)
    recipe = job.recipe
    if kind == "fast":
        update = {"tuning": TuningConfig(steps=0), "sequential": False}
        changed = recipe.quantize.model_copy(update=update)
        job.recipe = recipe.model_copy(update={"quantize": changed})
    for _ in job.quantize(plan, measured):
        pass
    job.recipe = recipe
    return plan


def compensated(job: Job, words: Sequence[str], spec: QuantSpec) -> BitPlan:
    """One spec for all layers, by one member of the family; needs no sensitivities."""
    method, *extras = words
    update: dict[str, object] = {"method": method}
    if method == "rtn":
        update["grid"] = "minmax"
    for extra in extras:
        if extra == "choose":
            update |= CHOICES if method in CROSS_METHODS else {"pull": CHOICES["pull"]}
        elif extra == "stagewise":
            update["true_sequential"] = True
        elif extra == "magr":
            update["magr"] = MAGR_PER_CHANNEL if spec.group_size == PER_CHANNEL else MAGR_GROUPS
        else:
            update |= {extra: True} if extra in ("awq", "refit") else {"grid": extra}
    layers = job.model.layers
    cost = sum(spec.stored_bits(layer.out_features, layer.in_features) for layer in layers)
    plan = BitPlan(
        assignment=dict.fromkeys((layer.name for layer in layers), spec),
        budget=f"uniform {spec}",
        stored_bits=cost / sum(layer.numel for layer in layers),
        code_bits=spec.bits,
        predicted_loss=0.0,
        solver="uniform",
    )
    hidden = job.model.module.get_input_embeddings().embedding_dim
    blocks = job.model.architecture.block_names(job.model.module)
    for _ in quantize_sequentially(
        job.model,
        plan,
        job.calibration,
        dict.fromkeys(plan.assignment, 0.0),
        QuantizeConfig.model_validate(job.recipe.quantize.model_dump() | update),
        channel_weights=[torch.ones(hidden)] * len(blocks),
        generator=torch.Generator().manual_seed(job.seed),
        monitor=job.monitor,
    ):
        pass
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


def table(rows: Sequence[Row], texts: Sequence[str], first: Row) -> str:
    """Markdown rows: bits, CPU seconds and per text KL ± standard error, perplexity, top-1.

    Behind them, per text, the paired difference in KL to `first`.
    """
    lines = []
    for row in rows:
        cells = [row.name, f"{row.stored_bits:.3f}", f"{row.cpu_seconds:.0f}"]
        for text in texts:
            q = row.qualities[text]
            cells += [f"{q.kl:.4f} ± {q.kl_stderr:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.3f}"]
        for text in texts if row is not first else ():
            found = paired(row.qualities[text], first.qualities[text])
            cells.append(f"{found.kl:+.4f} ± {found.kl_stderr:.4f}")
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
