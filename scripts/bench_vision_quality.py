"""EfficientNet-Lite0 (or another network) at few bits: agreement with the float network, and KL.

    pip download --no-deps foolbox==3.3.4 scikit-image==0.26.0 scikit-learn==1.9.1 \
        gradio==6.31.0 ultralytics==8.4.190
    python scripts/bench_vision_quality.py efficientnet-lite0 --test foolbox-*.whl \
        --match '*imagenet*' --calibration scikit_image-*.whl --calibration scikit_learn-*.whl \
        --held-out gradio-*.whl --held-out ultralytics-*.whl

Test pictures are all of the named archives or folders that match, each whole and in `--crops`
further crops of it (the crops of one picture are no independent samples: standard errors are over
pictures). Calibration: 64 crops of other pictures, and 32
crops of further ones for choices; with `--synthetic` pictures made from the
network's BatchNorm statistics instead. Rows: uniform widths and plans for budgets in stored bits,
compensated and finished, and each plan beside the best uniform network that is no larger.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quantforge.progress import Monitor
from quantforge.recipe import resolve_target
from quantforge.search.budget import Budget
from quantforge.vision.compiler import VisionJob
from quantforge.vision.network import Preprocessing, QuantizedNetwork, Simulation
from quantforge.vision.pictures import Pictures, preprocessed
from quantforge.vision.quality import compare, logits_of
from quantforge.vision.recipe import compose
from quantforge.vision.search import uniform_plans
from quantforge.vision.sources import open_source
from quantforge.vision.synthesis import synthesise

SUFFIXES = (".png", ".jpg", ".jpeg")
LEAST_SIDE = 32


def opened_pictures(source: Path, match: str) -> Iterator[Image.Image]:
    """Every picture of a folder or an archive whose name matches, in the order of names."""
    if source.is_dir():
        names = sorted(str(one) for one in source.rglob("*"))
        blobs = ((name, Path(name).read_bytes) for name in names if Path(name).is_file())
    else:
        archive = zipfile.ZipFile(source)
        blobs = ((name, lambda n=name: archive.read(n)) for name in sorted(archive.namelist()))
    for name, read in blobs:
        if name.lower().endswith(SUFFIXES) and fnmatch(name, match):
            picture = Image.open(io.BytesIO(read()))
            if picture.mode in ("RGB", "RGBA", "L", "P") and min(picture.size) >= LEAST_SIDE:
                yield picture.convert("RGB")


def crops(picture: Image.Image, count: int, generator: torch.Generator) -> Iterator[Image.Image]:
    """The picture, and random parts of it of half to all of its sides."""
    yield picture
    for _ in range(count):
        share, across, down = torch.rand(3, generator=generator).tolist()
        sides = [round(side * (0.5 + 0.5 * share)) for side in picture.size]
        left = round(across * (picture.width - sides[0]))
        top = round(down * (picture.height - sides[1]))
        yield picture.crop((left, top, left + sides[0], top + sides[1]))


def gathered(
    sources: list[Path], match: str, count: int, preprocessing: Preprocessing, seed: int
) -> tuple[Tensor, list[int]]:
    """[n, 3, h, w] inputs, and of each the number of its picture."""
    generator = torch.Generator().manual_seed(seed)
    inputs, origin = [], []
    every = [one for source in sources for one in opened_pictures(source, match)]
    for number, picture in enumerate(every):
        for part in crops(picture, count, generator):
            inputs.append(preprocessed(part, preprocessing))
            origin.append(number)
    return torch.stack(inputs), origin


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--held-out", type=Path, action="append", default=[])
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--test", type=Path, action="append", required=True)
    parser.add_argument("--match", default="*")
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--uniform", nargs="*", default=["8:8", "4:8"], metavar="W:A")
    parser.add_argument("--budgets", nargs="*", default=["4bit", "3bit"])
    parser.add_argument("--settings", default="{}", help="recipe keys as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    target = resolve_target(options.model)
    recipe = compose(target, settings=json.loads(options.settings))
    network = open_source(recipe, target, monitor=Monitor()).network
    fitting, held_out = calibration_of(options, network)
    tested, origin = gathered(
        options.test, options.match, options.crops, network.preprocessing, options.seed + 1
    )
    reference = logits_of(network.graph, tested)
    rows: list[dict[str, Any]] = []
    print(f"{len(tested)} test inputs of {origin[-1] + 1} pictures", flush=True)

    def job(settings: dict[str, Any]) -> VisionJob:
        merged = {**json.loads(options.settings), **settings}
        return VisionJob(
            network=network, fitting=fitting, held_out=held_out, seed=options.seed,
            recipe=compose(target, settings=merged),
        )  # fmt: skip

    def row(name: str, bits: float, made: QuantizedNetwork) -> float:
        quality = compare(logits_of(Simulation(made).run, tested), reference, pictures="test")
        apart: dict[int, list[float]] = {}
        for number, kl in zip(origin, quality.picture_kl, strict=True):
            apart.setdefault(number, []).append(kl)
        means = [statistics.fmean(one) for one in apart.values()]
        error = statistics.stdev(means) / math.sqrt(len(means))
        whole = [a for i, a in enumerate(quality.agrees) if i == 0 or origin[i] != origin[i - 1]]
        print(
            f"{name:34} {bits:6.3f} bits  agreement {100 * quality.agreement:5.1f} % (whole "
            f"pictures {100 * sum(whole) / len(whole):5.1f} %)  KL {quality.kl:.4f} ± {error:.4f}",
            flush=True,
        )
        share = sum(whole) / len(whole)
        rows.append(
            {"name": name, "bits": bits, "agreement": quality.agreement, "whole": share,
             "kl": quality.kl, "stderr": error}
        )  # fmt: skip
        return quality.kl

    for pair in options.uniform:
        weights, activations = map(int, pair.split(":"))
        one = job(
            {
                "search.bits": [weights],
                "search.solver": "uniform",
                "activations.bits": [activations],
            }
        )
        plan = one.find(Budget.parse("16bit")).plan
        row(f"W{weights}A{activations}, compensated", plan.stored_bits, one.one_pass(plan))
        row(f"W{weights}A{activations}, finished", plan.stored_bits, one.finish(plan).quantized)
    for text in options.budgets:
        plan_rows(job({}), text, row)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def plan_rows(
    job: VisionJob, text: str, row: Callable[[str, float, QuantizedNetwork], float]
) -> None:
    """The plan for a budget, and the best uniform network that is hardly larger."""
    began = time.process_time()
    plan = job.find(Budget.parse(text)).plan
    row(f"{text}, compensated", plan.stored_bits, job.one_pass(plan))
    mine = row(f"{text}, finished", plan.stored_bits, job.finish(plan).quantized)
    seconds = {stage: round(spent) for stage, spent in job.timings.items()}
    print(f"  {time.process_time() - began:.0f} CPU s: {seconds}", flush=True)
    near = [
        one
        for one in uniform_plans(job.table, job.edges)
        if one.stored_bits <= plan.stored_bits + 0.1
    ]
    if near:
        name = f"  {near[-1].budget}, finished"
        theirs = row(name, near[-1].stored_bits, job.finish(near[-1]).quantized)
        print(f"  {mine / theirs:.2f} of the uniform network's KL", flush=True)


def calibration_of(options: argparse.Namespace, network: Any) -> tuple[Pictures, Pictures]:
    """What is fitted on, and what choices are made on."""
    held = options.count // 2
    if options.synthetic:
        inputs = synthesise(network, options.count + held, seed=options.seed).inputs
        parts = [inputs[: options.count], inputs[options.count :]]
    else:
        generator = torch.Generator().manual_seed(options.seed)
        parts = []
        for sources, count in ((options.calibration, options.count), (options.held_out, held)):
            some, _ = gathered(sources, "*", 5, network.preprocessing, options.seed)
            parts.append(some[torch.randperm(len(some), generator=generator)[:count]])
    print(f"{len(parts[0])} calibration inputs, {len(parts[1])} held out", flush=True)
    fitting, held_out = (Pictures(inputs=x, labels=None, description="calibration") for x in parts)
    return fitting, held_out


if __name__ == "__main__":
    main()
