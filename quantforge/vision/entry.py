"""`quantforge quantize` and `plan` for convolutional networks.

The arguments are those of `quantforge.pipeline`; what they mean is the same but for pictures in the
place of text. A network in memory comes with its pictures, as the network reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantforge import strict_yaml
from quantforge.errors import InputError, UsageError
from quantforge.files import write_json
from quantforge.progress import Monitor
from quantforge.recipe import Target, resolve_target
from quantforge.search.budget import Budget
from quantforge.vision.checkpoint import write_vision
from quantforge.vision.choosing import Found
from quantforge.vision.compiler import Finished, VisionJob
from quantforge.vision.network import QuantizedNetwork
from quantforge.vision.outcome import VisionLayer, VisionReport
from quantforge.vision.page import render
from quantforge.vision.pictures import Pictures
from quantforge.vision.quality import logits_of
from quantforge.vision.recipe import VisionRecipe, compose, is_vision_file
from quantforge.vision.requirements import require_candidates, require_room
from quantforge.vision.search import VisionPlan
from quantforge.vision.sources import (
    Opened,
    calibration_pictures,
    given_arrays,
    is_classifier_folder,
    open_memory,
    open_source,
)
from quantforge.workspace import check_output, reserved, staging

Source = str | Path | nn.Module


def takes(model: Source) -> bool:
    """Whether a call's first argument is a convolutional network's.

    Raises:
        InputError: its recipe file cannot be read.
        UsageError: it is nothing at all.
    """
    if isinstance(model, nn.Module):
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        return any(isinstance(one, kinds) for one in model.modules())
    target = resolve_target(model)
    return is_vision_file(target) or is_classifier_folder(target.model)


def quantize(
    model: Source,
    *,
    budget: str | None = None,
    calibration: Any = None,
    output: str | Path | None = None,
    effort: str = "balanced",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    monitor: Monitor | None = None,
) -> VisionReport:
    """Compile a convolutional network; see `quantforge.pipeline.quantize`."""
    target, recipe, limit = _asked(model, budget, calibration, effort, settings)
    folder = None if output is None else Path(output)
    if folder is None:
        if isinstance(model, nn.Module):
            raise UsageError(
                "a network in memory needs an output folder here; "
                "quantforge.vision.entry.compile_network hands the integers back instead"
            )
        folder = target.output(limit.text)
    with staging(folder, force=force) as staged:
        opened, job = _job(model, target, recipe, calibration, seed, monitor)
        found = job.find(limit)
        made = job.finish(found.plan, limit.targets, tried=found.tried)
        written = write_vision(made.quantized, staged)
        report = replace(
            _report(opened, job, found, made), output=str(folder), weight_bytes=written
        )
        _documents(report, found.plan, staged)
    return replace(report, timings=dict(job.timings))


def compile_network(
    module: nn.Module,
    pictures: Tensor,
    *,
    budget: str,
    labels: Tensor | None = None,
    effort: str = "balanced",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    monitor: Monitor | None = None,
) -> tuple[QuantizedNetwork, VisionReport]:
    """The same in memory: integers and grids, and the report.

    Args:
        module: takes pictures alone and returns logits.
        pictures: [n, channels, height, width] as it reads them; the last ones, as many as
            `calibration.held_out`, are what choices are made on.
        budget: as for `quantize`, like all others.
        labels: [n] classes of the pictures.
        effort: preset.
        seed: of everything random.
        settings: recipe keys.
        monitor: progress and cancellation.
    """
    given = (pictures, labels)
    target, recipe, limit = _asked(module, budget, given, effort, settings)
    opened, job = _job(module, target, recipe, given, seed, monitor)
    found = job.find(limit)
    made = job.finish(found.plan, limit.targets, tried=found.tried)
    return made.quantized, _report(opened, job, found, made)


def plan(
    model: Source,
    *,
    budget: str | None = None,
    calibration: Any = None,
    output: str | Path | None = None,
    effort: str = "balanced",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    monitor: Monitor | None = None,
) -> VisionReport:
    """Find the plan and what it costs, without reconstruction; see `quantforge.pipeline.plan`."""
    target, recipe, limit = _asked(model, budget, calibration, effort, settings)
    folder = None if output is None else Path(output)
    if folder is not None:
        check_output(folder, force=force)
    with nullcontext() if folder is None else reserved(folder):
        opened, job = _job(model, target, recipe, calibration, seed, monitor)
        found = job.find(limit)
        quality = job.quality_of(found.plan)
        made = Finished(quantized=job.one_pass(found.plan), quality=quality, targets=found.targets)
        report = _report(opened, job, found, made)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "plan.json", plan_to_dict(found.plan))
    return replace(report, timings=dict(job.timings))


def _asked(
    model: Source, budget: str | None, calibration: Any, effort: str, settings: Any
) -> tuple[Target, VisionRecipe, Budget]:
    """What a call means, before anything is loaded."""
    changes = dict(settings or {})
    if budget is not None:
        changes["budget"] = budget
    if isinstance(calibration, str | Path):
        changes["calibration.source"] = str(calibration)
    if isinstance(model, nn.Module):
        target = Target(name=type(model).__name__)
    else:
        target = resolve_target(model)
    recipe = compose(target, effort=effort, settings=changes)
    if recipe.budget is None:
        raise UsageError("no budget: give --budget, e.g. 4bit, bops:-50% or acc:-0.5%")
    return target, recipe, Budget.parse(recipe.budget)


def _job(
    model: Source,
    target: Target,
    recipe: VisionRecipe,
    calibration: Any,
    seed: int,
    monitor: Monitor | None,
) -> tuple[Opened, VisionJob]:
    """The network, its pictures, and the job on them."""
    monitor = monitor or Monitor()
    options = recipe.calibration
    given = given_arrays(calibration)
    if isinstance(model, nn.Module):
        if given is None:
            raise UsageError(
                "a network in memory needs its pictures: calibration=a tensor [n, channels, "
                "height, width], or (pictures, labels)"
            )
        pictures, labels = given
        opened = open_memory(model, pictures, operands=recipe.activations.operands)
        every = Pictures(inputs=pictures.float(), labels=labels, description="given pictures")
    else:
        opened = open_source(recipe, target, monitor=monitor)
        every = calibration_pictures(opened.network, options, given, seed=seed, monitor=monitor)
    require_candidates(opened.network, recipe.search)
    require_room(opened.network)
    count = len(every) - options.held_out
    if count < 1:
        raise InputError(
            f"{every.description}: {len(every)} pictures are too few for "
            f"calibration.held_out={options.held_out} of them to judge; give more, or lower it"
        )
    every = every.of_classes(logits_of(opened.network.graph, every.inputs[:1]).shape[1])
    used = min(count, options.count)
    if used < 2 and recipe.reconstruction.steps:
        raise InputError(
            f"{every.description}: one picture to fit on cannot judge what is learned from it; "
            "give more, or set reconstruction.steps=0"
        )
    fitting = _part(every, slice(0, used), f"{every.description}: {used} to fit on")
    held_out = _part(
        every,
        slice(count, None),
        f"{every.description}: the last {options.held_out}, not fitted on",
    )
    job = VisionJob(
        network=opened.network, fitting=fitting, held_out=held_out, recipe=recipe, seed=seed,
        monitor=monitor,
    )  # fmt: skip
    return opened, job.equalised()


def _part(every: Pictures, rows: slice, description: str) -> Pictures:
    labels = None if every.labels is None else every.labels[rows]
    return Pictures(inputs=every.inputs[rows], labels=labels, description=description)


def _report(opened: Opened, job: VisionJob, found: Found, made: Finished) -> VisionReport:
    chosen = found.plan
    searched = bool(found.curve)
    column = {spec: index for index, spec in enumerate(job.table.specs)} if searched else {}
    blocks = {name: block.name for block in job.network.blocks for name in block.layers}
    rows = []
    for index, layer in enumerate(job.layers):
        spec = chosen.assignment[layer.name]
        lost = None
        if searched and spec is not None:
            lost = float(job.table.loss[index, column[spec]])
        rows.append(
            VisionLayer(
                name=layer.name,
                kind=layer.kind,
                block=blocks[layer.name],
                spec="kept" if spec is None else str(spec),
                activation_bits=chosen.widths.get(job.reads[layer.name]),
                weights=layer.numel,
                macs=job.costs.macs[layer.name],
                predicted_loss=lost,
            )
        )
    return VisionReport(
        model=job.network.name,
        source=opened.description,
        output="",
        budget=chosen.budget,
        solver=chosen.solver,
        layers=tuple(rows),
        stored_bits=chosen.stored_bits,
        code_bits=chosen.code_bits,
        operations=chosen.operations,
        float_operations=job.costs.whole_operations,
        predicted_loss=chosen.predicted_loss,
        quality=made.quality,
        curve=found.curve,
        targets=made.targets,
        training=made.training,
        blocks=(sum(one.kept for one in made.blocks if made.reconstructed), len(made.blocks)),
        weight_bytes=0,
        float_bytes=job.costs.float_bytes,
        calibration=job.fitting.description,
        settings=job.recipe.model_dump(mode="json"),
        warnings=tuple(_warnings(job, found, made)),
    )


def _warnings(job: VisionJob, found: Found, made: Finished) -> list[str]:
    said = []
    if made.blocks and not made.reconstructed:
        said.append("learned rounding did not lower the held-out KL: the network is without it")
    if found.curve and found.plan.solver == "uniform" and not found.targets:
        said.append("a uniform network within the budget was nearer than the plan, and was taken")
    if len(job.held_out) < 16:
        said.append(f"only {len(job.held_out)} held-out pictures: figures are uncertain")
    return said


def plan_to_dict(plan: VisionPlan) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "budget": plan.budget,
        "solver": plan.solver,
        "stored_bits": plan.stored_bits,
        "code_bits": plan.code_bits,
        "operations": plan.operations,
        "predicted_loss": plan.predicted_loss,
        "layers": {n: "kept" if s is None else str(s) for n, s in plan.assignment.items()},
        "activations": dict(plan.widths),
    }


def _documents(report: VisionReport, plan: VisionPlan, folder: Path) -> None:
    write_json(folder / "plan.json", plan_to_dict(plan))
    (folder / "recipe.yaml").write_text(strict_yaml.dump(dict(report.settings)), encoding="utf-8")
    (folder / "report.html").write_text(render(report), encoding="utf-8")
