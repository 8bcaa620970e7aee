r"""Times quantforge against peers on one model and the same tokens: A-B-A-B, medians, ratios.

    python scripts/bench_peers.py MODEL --calibration valid.txt --rounds 3 \
        --peer-python gptqmodel=/path/to/python --peer-python autoround=/path/to/python \
        --rows gptqmodel:gptq@3b-g128 gptqmodel:foem@3b-g128 quantforge:gptq@3b-g192 \
               quantforge:foem@3b-g192 autoround:light@3b-g128 quantforge:learned@3b-g192 \
        --ratio 'quantforge:gptq@3b-g192/gptqmodel:gptq@3b-g128<=0.6' \
        --text test.txt --json rows.json

MODEL is a Hugging Face folder in float. A row is `[LABEL=]WHO:METHOD@SPEC[+JSON]`: WHO is a program
of `peers/` (`run_WHO.py`; its header lists methods and what the JSON may set), SPEC as everywhere
(`3b-g128-asym`; `pc` for whole rows). The project's groups must divide every row, a peer's need
not.

Every round runs every row once, in the order given, each in a process of its own with the same
threads, environment and token file; see `peers/task.py` for what is timed. CPU seconds are process
time of all threads, so they bear other load better than wall seconds do; the load average is the
one before a run. Peers run with `--peer-dtype auto` as they load a model by themselves. Compiled
code of `torch.compile` is kept from round to round, so that only a first round pays for it.

Each row's weights are checked: all linears and no others, finite, not the original ones, on a grid
of the width that was asked for, near enough to the original. A row that fails stops the benchmark.
With `--text` they are put into the float network and measured by `quantforge.evaluate.quality`, the
peers' and ours alike: linears only, with the paired difference of KL for every ratio.

Environments, on Python 3.11 or newer, one a peer: for AutoRound `pip install torch==2.13.0` and
then `auto-round==0.16.1`; for GPTQModel the same torch, the other requirements of
`gptqmodel==7.7.0` (whose own lower bound of torch can bring a CUDA build of several GB), and then
itself with `--no-deps --no-build-isolation`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peers.results import PROGRAMS, Result, Row, Run, ratio_table, remarks, table
from peers.task import TOKENS, Task
from peers.verify import check_weights, stored_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.load.huggingface import load_model
from quantforge.load.source import resolve_source
from quantforge.load.text import describe_windows, evaluation_windows
from quantforge.models import Model
from quantforge.quantize.sequential import put_weight

OURS = "quantforge"
RATIO = re.compile(r"(?P<first>[^/]+)/(?P<second>[^/<]+)(?:<=(?P<limit>[0-9.]+))?")


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the benchmark, print its tables and return what is in them."""
    options = parse(argv)
    rows = read_rows(options)
    model = load_model(resolve_source(options.model))
    check_groups(rows, model)
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as temporary:
        folder = Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = evaluation_windows(
            options.calibration, model.tokenizer, windows=options.sequences, length=options.length
        )
        print(f"calibration: {describe_windows(options.calibration, model.tokenizer, tokens)}")
        save_file({TOKENS: tokens}, folder / "tokens.safetensors")
        results = interleave(rows, folder, model, options)
        if options.text:
            results = evaluate(results, folder, model, options)
    print(f"\n{options.rounds} rounds, {options.threads} threads; median (smallest to largest)\n")
    print(table(results, options.text))
    if options.ratio:
        print("\n" + ratio_table(results, options.ratio, options.text))
    print("\n" + remarks(results))
    if options.json:
        numbers = [asdict(result) for result in results]
        Path(options.json).write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return results


def read_rows(options: argparse.Namespace) -> list[Row]:
    """The rows; names are unique, every peer has an interpreter, every ratio's rows are there."""
    rows = [Row.read(text) for text in options.rows]
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise SystemExit("two rows have the same name: give one a label (LABEL=WHO:METHOD@SPEC)")
    for row in rows:
        if row.who != OURS and row.who not in options.peer_python:
            raise SystemExit(f"no interpreter for {row.who}: give --peer-python {row.who}=PATH")
    for first, second, _ in options.ratio:
        for name in {first, second} - set(names):
            raise SystemExit(f"--ratio names {name!r}, which is no row; rows: {', '.join(names)}")
    return rows


def check_groups(rows: Sequence[Row], model: Model) -> None:
    """Say before anything runs that a grid does not fit."""
    for row, layer in itertools.product(rows, model.layers):
        if row.who == OURS and not row.spec.divides(layer.in_features):
            raise SystemExit(
                f"{row.name}: groups do not divide the {layer.in_features} columns of {layer.name}"
            )


def interleave(
    rows: Sequence[Row], folder: Path, model: Model, options: argparse.Namespace
) -> list[Result]:
    """Run every row once a round and check what it wrote; the last round's weights stay."""
    floats = {layer.name: model.module.get_submodule(layer.name).weight for layer in model.layers}
    shapes = [tuple(weight.shape) for weight in floats.values()]
    runs: dict[str, list[Run]] = {row.name: [] for row in rows}
    for number, row in itertools.product(range(1, options.rounds + 1), rows):
        run = run_once(row, folder, floats, options)
        runs[row.name].append(run)
        print(
            f"round {number}, {row.name}: {run.cpu_seconds:.1f} CPU s, {run.wall_seconds:.1f} s, "
            f"{run.peak_bytes / 1e9:.2f} GB, load {run.load:.1f}",
            file=sys.stderr,
            flush=True,
        )
    return [
        Result(
            row=row,
            stored_bits=stored_bits(shapes, row.spec),
            runs=tuple(runs[row.name]),
            qualities={},
        )
        for row in rows
    ]


def run_once(
    row: Row, folder: Path, floats: Mapping[str, Tensor], options: argparse.Namespace
) -> Run:
    """One quantization in a process of its own, its weights checked against the float ones.

    It runs inside `folder`: some peers write logs where they stand.
    """
    folder = folder.resolve()
    task = Task(
        model=str(Path(options.model).resolve()),
        tokens=str(folder / "tokens.safetensors"),
        output=str(weights_file(row, folder)),
        method=row.method,
        bits=row.spec.bits,
        group_size=row.spec.group_size,
        symmetric=row.spec.symmetric,
        batch=options.batch,
        dtype="float32" if row.who == OURS else options.peer_dtype,
        threads=options.threads,
        settings=row.settings,
    )
    # not resolved: an environment is known by the link's own folder
    python = (
        sys.executable if row.who == OURS else str(Path(options.peer_python[row.who]).absolute())
    )
    log = weights_file(row, folder).with_suffix(".log")
    load = os.getloadavg()[0]
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            [python, str(PROGRAMS / f"run_{row.who}.py"), *task.arguments()],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(row, folder, options.threads),
            cwd=folder,
            check=False,
        )
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([*tail, f"{row.name} ended with code {done.returncode}"]))
    answer = json.loads(done.stdout)
    return Run(
        cpu_seconds=answer["cpu_seconds"],
        wall_seconds=answer["wall_seconds"],
        peak_bytes=answer["peak_bytes"],
        load=load,
        sha256=answer["sha256"],
        weight_error=check_weights(row.name, load_file(task.output), floats, row.spec),
        notes=tuple(answer["notes"]),
        versions=answer["versions"],
    )


def environment(row: Row, folder: Path, threads: int) -> dict[str, str]:
    """The same for everyone, but that a peer must not see the project's modules."""
    changed = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads would count as work
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "HF_HUB_OFFLINE": "1",
    }
    if row.who != OURS:
        changed.pop("PYTHONPATH", None)
    return changed


def weights_file(row: Row, folder: Path) -> Path:
    """Where a row's weights of the latest round are."""
    return folder / (re.sub(r"[^\w.@-]", "_", row.name) + ".safetensors")


def evaluate(
    results: Sequence[Result], folder: Path, model: Model, options: argparse.Namespace
) -> list[Result]:
    """Measure the weights of all rows in the float network, by the same code."""
    references = {}
    for text in options.text:
        windows = evaluation_windows(
            text, model.tokenizer, windows=options.windows, length=options.window_length
        )
        print(f"evaluation: {describe_windows(text, model.tokenizer, windows)}")
        references[text] = ReferenceOutputs.collect(
            model.module,
            model.architecture,
            windows,
            precision=options.precision,
            keep_head_copy=True,
        )
    measured = []
    for result in results:
        for name, weight in load_file(weights_file(result.row, folder)).items():
            put_weight(model, name, weight)
        qualities = {
            text: measure(
                model.module,
                model.architecture,
                reference.windows,
                reference,
                text=text,
                precision=options.precision,
            )
            for text, reference in references.items()
        }
        measured.append(replace(result, qualities=qualities))
    return measured


def ratio(text: str) -> tuple[str, str, float | None]:
    """`FIRST/SECOND` or `FIRST/SECOND<=LIMIT`."""
    found = RATIO.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"not FIRST/SECOND or FIRST/SECOND<=LIMIT: {text}")
    return found["first"], found["second"], float(found["limit"]) if found["limit"] else None


def interpreter(text: str) -> tuple[str, str]:
    """`WHO=PYTHON`."""
    who, equals, python = text.partition("=")
    if not equals or not Path(python).is_file():
        raise argparse.ArgumentTypeError(f"not WHO=PYTHON with an existing file: {text}")
    return who, python


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--calibration", required=True, help="text; its first windows are taken")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--ratio", type=ratio, nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", type=interpreter, action="append", default=[])
    parser.add_argument("--peer-dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--batch", type=int, default=4, help="sequences a forward pass")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--text", action="append", default=[], help="evaluate; may be repeated")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--keep", help="folder for weights and logs, instead of a temporary one")
    options = parser.parse_args(argv)
    options.peer_python = dict(options.peer_python)
    return options


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
