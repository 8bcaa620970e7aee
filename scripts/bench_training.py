"""Recovery by training: its speed beside plain fine-tuning, and its variants from one start.

    python scripts/bench_training.py llama --calibration wiki2_valid.txt --text wiki2_test.txt \
        --budget 3bit --tokens 500000 --variant hestia+traces '{"alpha": 0.5}' --json training.json

Speed (`--rounds`; 0 leaves it out): so many steps of fine-tuning the float network, then as many of
training the quantized one, and so on in turns, in one process: the same batches, loss, precision,
optimizer and recomputation. Tokens a second are those of the wall clock and of the processor (all
threads together, which a neighbour's load changes less); the ratio is the median over rounds of the
ratio within a round. Memory is the peak of a turn: the network and all that training adds, without
libraries, calibration and a copy of the float weights to go back to.

Variants (`--tokens`; 0 leaves them out): the plan is searched and compensated once, and everything
up to tuning is taken from one journal, so that all variants start from the same integers, scales
and norms, and train on the same sequences in the same order. Where blocks are trained by themselves
(`block_steps`), tuning comes after that and is made anew. A variant is a name and settings of
`training` as JSON; those in VARIANTS come by themselves unless `--only` is given. Columns: held-out
KL of the start and of the best state, the step that was best, what rounding costs at the end,
seconds of training, and per text KL with its standard error and the paired difference to tuning
alone. Rows are printed as they come and written to `--json` after each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import add_common_arguments, on_texts, opened, parameters_restored, references
from torch import Tensor

from quantforge.capture import product_dtype, recomputed
from quantforge.compilation import Job
from quantforge.decision import Measurement
from quantforge.evaluate.quality import ReferenceOutputs, paired
from quantforge.journal import Journal
from quantforge.memory import peak_bytes, release_freed, reset_peak, resident_bytes
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.parallel import Share
from quantforge.results import Quality
from quantforge.search.budget import Budget
from quantforge.train.config import TrainingConfig
from quantforge.train.loop import Task, objective_of
from quantforge.train.objective import Objective
from quantforge.train.optimizers import OPTIMIZERS, set_rates
from quantforge.train.quantizers import Hardness
from quantforge.train.teacher import HiddenTeacher
from quantforge.types import BitPlan, QuantSpec

BASE = "tuning only"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "hestia": {},
    "hestia, large traces first": {"alpha": 0.5},
    "hestia, large traces last": {"alpha": -0.5},
    "straight-through": {"quantizer": "straight-through"},
    "lsq": {"quantizer": "lsq"},
}
# Half way: soft, and with all of the pressure.
MIDDLE = Hardness(temperature=0.3, pressure=1.0)
WARM_STEPS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One turn of one way.

    Attributes:
        wall: tokens a second of the wall clock.
        processor: tokens a second of processor time.
        memory: bytes of the network and of what training added, at the peak; None where the system
            does not tell.
    """

    wall: float
    processor: float
    memory: int | None


def timed_steps(objective: Objective, steps: int, before: int) -> Speed:
    """Take some steps of the optimizer; the first ones warm up."""
    config = objective.config
    groups = [{"params": objective.parameters, "base": 1e-6, "size": 1.0}]
    optimizer = OPTIMIZERS[config.optimizer](groups, config)
    set_rates(optimizer, 1.0)
    hardness = dict.fromkeys(objective.layers, MIDDLE)
    counted = reset_peak()
    walls, processors = [], []
    for step in range(WARM_STEPS + steps):
        first = step * config.batch
        chosen = [(first + index) % len(objective.tokens) for index in range(config.batch)]
        wall, processor = time.perf_counter(), time.process_time()
        objective.gradient(chosen, hardness)
        torch.nn.utils.clip_grad_norm_(objective.parameters, config.clip)
        optimizer.step()
        objective.clear()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    tokens = steps * config.batch * objective.tokens.shape[1]
    peak = peak_bytes()
    return Speed(
        wall=tokens / sum(walls[WARM_STEPS:]),
        processor=tokens / sum(processors[WARM_STEPS:]),
        memory=None if peak is None or not counted else peak - before,
    )


def without_network(job: Job) -> int:
    """Bytes that the process holds beside the network's parameters."""
    release_freed()
    return (resident_bytes() or 0) - sum(p.nbytes for p in job.model.module.parameters())


def float_turn(job: Job, teacher: HiddenTeacher, config: TrainingConfig, steps: int) -> Speed:
    """Fine-tune the layers' float weights and the norms, and put them back."""
    module, architecture = job.model.module, job.model.architecture
    layers: list[Any] = [module.get_submodule(layer.name).weight for layer in job.model.layers]
    norms = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    with parameters_restored(job), recomputed(architecture.block_list(module), config.recompute):
        before = without_network(job)
        module.requires_grad_(False)
        for parameter in (*layers, *norms):
            parameter.requires_grad_(True)
        objective = Objective(
            model=job.model,
            layers={},
            norms=[*layers, *norms],
            output=architecture.output(module).rounded(product_dtype(config.precision)),
            tokens=job.calibration.fitting,
            teacher=teacher,
            config=config,
            share=Share(),
        )
        speed = timed_steps(objective, steps, before)
        module.requires_grad_(True)
    return speed


def trained_turn(
    job: Job, teacher: HiddenTeacher, config: TrainingConfig, steps: int, spec: QuantSpec
) -> Speed:
    """Train the same network rounded to one grid, and put its weights back."""
    originals: dict[str, Tensor] = {}
    weights = {}
    with parameters_restored(job):
        before = without_network(job)
        for layer in job.model.layers:
            parameter: Any = job.model.module.get_submodule(layer.name).weight
            originals[layer.name] = parameter.detach()
            scale, zero = minmax_grid(parameter.detach(), spec)
            weights[layer.name] = round_to_nearest(parameter.detach(), scale, spec, zero)
        task = Task(
            model=job.model,
            weights=weights,
            originals=originals.pop,
            tokens=job.calibration.fitting,
            teacher=teacher,
            measure=lambda: 0.0,
            multipliers={},
        )
        with objective_of(task, config, Share()) as objective:
            return timed_steps(objective, steps, before)


def measure_speed(job: Job, teacher: HiddenTeacher, options: argparse.Namespace) -> dict[str, Any]:
    """All turns of both ways."""
    config = TrainingConfig(tokens=1, **json.loads(options.training))
    spec = QuantSpec.parse(options.speed_spec)
    ways: dict[str, list[Speed]] = {"float": [], "trained": []}
    for _ in range(options.rounds):
        ways["float"].append(float_turn(job, teacher, config, options.steps))
        ways["trained"].append(trained_turn(job, teacher, config, options.steps, spec))
        for name, turns in ways.items():
            last = turns[-1]
            memory = "unknown" if last.memory is None else f"{last.memory / 1e9:.2f} GB"
            print(
                f"{name:8} {last.wall:9.1f} tokens/s wall {last.processor:9.1f} processor "
                f"{memory:>10}  load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    pairs = list(zip(ways["trained"], ways["float"], strict=True))
    ratios = {
        "wall": statistics.median(a.wall / b.wall for a, b in pairs),
        "processor": statistics.median(a.processor / b.processor for a, b in pairs),
    }
    known = [(a.memory, b.memory) for a, b in pairs if a.memory and b.memory]
    if known:
        ratios["memory"] = statistics.median(a / b for a, b in known)
    print("trained / float:", "  ".join(f"{k} {v:.2f}" for k, v in ratios.items()), flush=True)
    return {"ratios": ratios, "turns": {k: [asdict(x) for x in v] for k, v in ways.items()}}


def start_over(journal: Journal, *, blocks: bool) -> None:
    """Forget what a variant before this one noted; with `blocks` tuning too."""
    for stem in ("training*", *(("tuning*",) if blocks else ())):
        for path in (journal.folder or Path()).glob(f"{stem}.safetensors"):
            path.unlink()


def variant_row(
    job: Job,
    plan: BitPlan,
    measured: Measurement,
    journal: Journal,
    texts: Mapping[str, ReferenceOutputs],
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Quality]]:
    """Train one variant from the journal's start; the network is float again afterwards."""
    before = dict(job.timings)
    with parameters_restored(job):
        for _ in job.quantize(plan, measured, journal):
            pass
        held_out = job.measure_held_out()
        qualities = on_texts(job, texts, options)
    row: dict[str, Any] = {
        "held_out": asdict(held_out),
        "seconds": {k: v - before.get(k, 0.0) for k, v in job.timings.items()},
        "training": None if job.training is None else asdict(job.training),
        "texts": {text: asdict(quality) for text, quality in qualities.items()},
    }
    return row, {"held-out": held_out, **qualities}


def show_row(
    name: str, row: Mapping[str, Any], qualities: Mapping[str, Quality], base: Mapping[str, Quality]
) -> None:
    """One line of the table."""
    parts = [f"{name:28}"]
    training = row["training"]
    if training is not None:
        points = training["points"]
        best, last = points[training["best"]], points[-1]
        parts.append(
            f"KL {points[0]['kl']:.4f} to {best['kl']:.4f} at step {best['step']}"
            f"{'' if training['kept'] else ' (undone)'}, "
            f"rounding {last['kl'] - last['soft_kl']:.4f}, "
            f"{row['seconds'].get('train', 0.0):.0f} s"
        )
    for text, quality in qualities.items():
        entry = f"{Path(text).name} {quality.kl:.4f} ± {quality.kl_stderr:.4f}"
        if training is not None:
            change = paired(quality, base[text])
            entry += f" ({change.kl:+.4f} ± {change.kl_stderr:.4f})"
        parts.append(entry)
    print("  ".join(parts), flush=True)


def measure_variants(
    job: Job, measured: Measurement, options: argparse.Namespace, found: dict[str, Any]
) -> None:
    """All variants; every row is written as it comes."""
    texts = references(job, options)
    variants = {} if options.only else dict(VARIANTS)
    variants |= {name: json.loads(text) for name, text in options.variant}
    shared = {"tokens": options.tokens, **json.loads(options.training)}
    plan = job.search(measured, Budget.parse(options.budget)).plan
    journal = Journal(Path(options.journal))
    base: dict[str, Quality] = {}
    trained_blocks = False
    for name, changes in ((BASE, None), *variants.items()):
        job.training = None
        config = TrainingConfig() if changes is None else TrainingConfig(**shared | changes)
        job.recipe = job.recipe.model_copy(update={"training": config})
        start_over(journal, blocks=config.block_steps > 0 or trained_blocks)
        trained_blocks = config.block_steps > 0
        row, qualities = variant_row(job, plan, measured, journal, texts, options)
        base = base or qualities
        show_row(name, row, qualities, base)
        found["variants"][name] = row
        write(options, found)


def write(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--budget", default="3bit")
    parser.add_argument("--tokens", type=int, default=0, help="of every variant")
    parser.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("NAME", "JSON"),
        help="settings of training; may be given again",
    )  # fmt: skip
    parser.add_argument("--only", action="store_true", help="leave the built-in variants out")
    parser.add_argument("--training", default="{}", help="settings of all variants, as JSON")
    parser.add_argument("--journal", default="training-journal", help="folder for the start")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way; 0: no speed")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--speed-spec", default="3b-g64", help="grid of the timed network")
    options = parser.parse_args(argv)
    settings = json.loads(options.settings)
    if options.tokens:  # so that what training reads is measured, with scales untuned too
        training = {"minutes": 0, "tokens": options.tokens, **json.loads(options.training)}
        settings |= {"training": training}
    job = opened(options, settings)
    found: dict[str, Any] = {"torch": torch.__version__, "speed": None, "variants": {}}
    with ExitStack() as stack:
        measured = stack.enter_context(job.measure(fresh=options.fresh))
        if measured.final_hidden is None:
            raise SystemExit("there is nothing to train towards: leave quantize.tuning on")
        if options.rounds:
            head = job.model.architecture.output_head(job.model.module)
            teacher = HiddenTeacher(hidden=measured.final_hidden, head=head.rounded(torch.bfloat16))
            found["speed"] = measure_speed(job, teacher, options)
            write(options, found)
        if options.tokens:
            measure_variants(job, measured, options, found)


if __name__ == "__main__":
    main()
