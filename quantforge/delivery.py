"""The end of a compilation: the checkpoint, the checks on it, and what is told about it.

The checkpoint is written as layers arrive, opened again by a strict reader that decodes every
tensor and compares it with what was meant, and measured on held-out tokens exactly as it stands in
the file (kept tensors rounded to 16 bits) before it may take its final name.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantforge import strict_yaml
from quantforge.calibrate.artefact import save_sensitivity
from quantforge.calibrate.estimators import ESTIMATORS, Extent
from quantforge.calibration import Needs
from quantforge.compilation import Job
from quantforge.decision import Chosen, Decided, Measurement
from quantforge.estimate import Shape, estimate, states_bytes
from quantforge.export.servers import server_support
from quantforge.export.verify import verify_checkpoint
from quantforge.export.writer import CheckpointWriter
from quantforge.files import write_json
from quantforge.format.manifest import plan_to_dict, tool_versions
from quantforge.load.huggingface import (
    described,
    generation_config,
    model_config,
    save_tokenizer,
)
from quantforge.machine import machine_traits
from quantforge.memory import peak_bytes, release_freed
from quantforge.models.experts import LEAST_TOKENS, routers
from quantforge.models.linears import WITHOUT_LINEARS
from quantforge.outcomes import (
    LatencyReport,
    PlannedLayer,
    PlanReport,
    Report,
    UniformPlan,
)
from quantforge.quantize.sequential import FEW_TOKENS, QuantizedLayer
from quantforge.report.card import model_card
from quantforge.report.html import render
from quantforge.results import AnyQuality, EstimatorCost, LayerReport, SizeReport
from quantforge.search.allocate import (
    candidate_bytes,
    known_errors,
    known_losses,
    reachable_bits,
    stored_cost,
    uniform_plans,
)
from quantforge.search.budget import Budget
from quantforge.search.latency import plan_seconds
from quantforge.search.vocabulary import outside_specs
from quantforge.targets import bound
from quantforge.types import BitPlan, LayerInfo, QuantizedWeight, QuantSpec, Sensitivity

KEPT_DTYPE = torch.bfloat16
_MOST_NAMES = 16  # of experts, in one warning


def deliver(
    job: Job,
    layers: Iterable[QuantizedLayer],
    chosen: Chosen,
    staged: Path | None,
    output: Path | None,
) -> Report:
    """Consume the quantized layers; write and check the checkpoint; report.

    Args:
        job: the compilation.
        layers: from `Job.quantize`.
        chosen: the plan and its comparisons.
        staged: folder to write; None writes nothing.
        output: final name of that folder, for the report.
    """
    if staged is None:
        rows = [layer.report for layer in layers]
        sizes = job.footprint.sizes(chosen.plan.assignment)
    else:
        rows, sizes = write_checkpoint(job, layers, chosen.plan, staged)
    release_freed()  # the layers' integers, and what training them took
    round_kept_tensors(job, chosen.plan)
    quality = job.measure_held_out(text=f"held-out part of: {job.calibration.description}")
    report = Report(
        model=job.model.source.name,
        source=job.model.source.description,
        output="" if output is None else str(output),
        plan=chosen.plan,
        layers=tuple(rows),
        sizes=sizes,
        quality=quality,
        curve=chosen.curve,
        hull_kl=chosen.hull_kl,
        cheapest_uniform=chosen.cheapest_uniform,
        generations=job.generations(),
        calibration=job.calibration.description,
        settings=job.recipe.model_dump(mode="json"),
        versions=tool_versions(),
        warnings=(
            *chosen.warnings,
            *job.notes,
            *loading_warnings(job, chosen.plan),
            *layer_warnings(rows),
            *held_out_warnings(quality),
            *target_warnings(job, chosen, quality),
        ),
        targets=chosen.targets,
        refinement=chosen.refinement,
        training=job.training,
    )
    if staged is not None:
        write_documents(job, report, chosen.measured.sensitivity, staged)
    return replace(report, timings=dict(job.timings))


def write_checkpoint(
    job: Job, layers: Iterable[QuantizedLayer], plan: BitPlan, folder: Path
) -> tuple[list[LayerReport], SizeReport]:
    """Stream layers and kept tensors into `folder`, then open and compare every tensor."""
    module = job.model.module
    planned = set(plan.assignment)
    linears = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    rows: list[LayerReport] = []
    expected: dict[str, QuantizedWeight] = {}
    with CheckpointWriter(
        folder,
        model_config=model_config(module),
        generation_config=generation_config(module),
        plan=plan,
        ignore=[*(name for name in linears if name not in planned), *routers(module)],
        seed=job.seed,
        shard_bytes=job.recipe.export.shard_bytes,
        dtype=KEPT_DTYPE,
        head=job.model.architecture.head,
        stock_readable=not loading_warnings(job, plan),
    ) as writer:
        for one in layers:
            rows.append(one.report)
            if one.weight is not None:
                bias: Any = getattr(module.get_submodule(one.layer.name), "bias", None)
                kind: Any = "linear" if one.layer.kind == "linear" else "embedding"
                writer.add_layer(one.layer.name, one.weight, bias, kind=kind)
                expected[one.layer.name] = one.weight
        for name, tensor in module.state_dict().items():
            if name.rpartition(".")[0] not in expected:
                writer.add_tensor(name, tensor)
        sizes = writer.finish()
    verify_checkpoint(folder, expected)
    return rows, sizes


def round_kept_tensors(job: Job, plan: BitPlan) -> None:
    """Give tensors that the plan does not quantize the values of the checkpoint, in place."""
    quantized = {f"{name}.weight" for name, spec in plan.assignment.items() if spec is not None}
    job.keep_float_head()
    with torch.no_grad():
        for name, parameter in job.model.module.named_parameters():
            if name not in quantized:
                parameter.copy_(parameter.to(KEPT_DTYPE))


def write_documents(
    job: Job, report: Report, sensitivity: Sensitivity | None, folder: Path
) -> None:
    """Tokenizer, plan, sensitivities if any, effective recipe, report, card; and `run.json`.

    Only `run.json` holds times, the date and the machine; the rest is the same for the same seed.
    """
    if job.model.tokenizer is not None:
        save_tokenizer(job.model.source, folder, tokenizer=job.model.tokenizer)
    write_json(folder / "plan.json", plan_to_dict(report.plan))
    if sensitivity is not None:
        save_sensitivity(sensitivity, folder / "sensitivity.json")
    (folder / "recipe.yaml").write_text(strict_yaml.dump(dict(report.settings)), encoding="utf-8")
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    (folder / "README.md").write_text(
        model_card(report, obstacle=class_obstacle(job)), encoding="utf-8"
    )
    source = job.model.source
    local = source.kind in ("folder", "gguf")  # absolute: `eval` may run in another folder
    location = str(source.path.absolute()) if local else source.location
    run = {
        "source": {"kind": source.kind, "location": location},
        "effort": job.effort,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": job.timings,
        "cpu_seconds": time.process_time(),
        "peak_memory_bytes": peak_bytes(),
        "machine": [platform.processor() or platform.machine(), *machine_traits()],
    }
    write_json(folder / "run.json", run)


def dry_run(
    job: Job, measured: Measurement | None, budget: Budget | None, output: Path | None
) -> PlanReport:
    """What `quantize` would do, with `plan.json` written to `output` if given.

    Args:
        job: the compilation.
        measured: None where the recipe leaves nothing to search.
        budget: likewise.
        output: folder for the plan.
    """
    if measured is None:
        decided = Decided(plan=job.plans.find(None, budget))
    else:
        decided = job.plans.decide(measured, budget)
    plan, rivals = decided.plan, tuple[str, ...]()
    if measured is not None and not decided.targets:
        rivals = job.plans.rivals(plan, measured, budget)
    sensitivity = None if measured is None else measured.sensitivity
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "plan.json", plan_to_dict(plan))
        if sensitivity is not None:
            save_sensitivity(sensitivity, output / "sensitivity.json")
    layers, assignment = job.layers, plan.assignment
    losses: dict[str, float | None] = dict.fromkeys(assignment)
    errors = dict(losses)
    shape = Shape.of(job.model, job.calibration, job.recipe)
    needs = Needs.of(job.recipe, vocabulary=bool(job.vocabulary))
    if sensitivity is not None:
        losses = known_losses(sensitivity, assignment)
        errors = known_errors(sensitivity, assignment)
        scratch = candidate_bytes(sensitivity) + states_bytes(shape, job.recipe)
    else:
        scratch = states_bytes(
            shape, job.recipe, gradients=needs.gradients, hidden=needs.final_hidden
        )
        scratch += sum(stored_cost(x, s) for x, specs in job.vocabulary.items() for s in specs) // 8
    scratch += job.model.scratch.run_bytes * job.model.share.here
    memory = [x for x in (() if budget is None else budget.sizes) if x.kind == "vram"]
    searched = sensitivity is not None and job.given is None
    unmade = sensitivity is None and needs.gradients
    work = estimate(job.model, job.calibration, job.recipe, gradients=unmade)
    return PlanReport(
        model=job.model.source.name,
        source=job.model.source.description,
        plan=plan,
        layers=tuple(
            planned_layer(x, assignment[x.name], losses[x.name], errors[x.name]) for x in layers
        ),
        reachable=reachable_bits(sensitivity, job.recipe.search)
        if sensitivity is not None and searched
        else (plan.stored_bits, plan.stored_bits),
        sizes=job.footprint.sizes(assignment),
        uniform=uniform_rows(job, sensitivity, plan, budget),
        scratch_bytes=scratch,
        calibration=job.calibration.description,
        settings=job.recipe.model_dump(mode="json"),
        warnings=(*loading_warnings(job, plan), *rivals),
        predicted_error=None if measured is None else measured.predicted_error(plan),
        memory=job.footprint.memory_bytes(assignment, memory[0].context) if memory else None,
        targets=decided.targets,
        servers=server_support(layers, assignment, described(job.model.module)),
        work=work,
        latency=latency_rows(job, assignment, budget),
        sensitivity=None if sensitivity is None else estimator_cost(job, sensitivity, work.rate),
        refinement=decided.refinement,
        measure=job.model.architecture.measure,
    )


def estimator_cost(job: Job, sensitivity: Sensitivity, rate: float) -> EstimatorCost:
    """What the job's estimator takes, at so many multiply-adds a second."""
    calibration = job.calibration
    extent = Extent(
        config=job.recipe.calibrate,
        layers=len(sensitivity.layers),
        candidates=int(sensitivity.loss.isfinite().sum()),
        length=calibration.fitting.shape[1],
        held_out=calibration.held_out[: job.recipe.evaluate.curve_windows].numel(),
    )
    cost = ESTIMATORS[sensitivity.estimator].cost(extent)
    weights = sum(layer.numel for layer in sensitivity.layers)
    return EstimatorCost(
        name=sensitivity.estimator,
        what=cost.what,
        seconds=cost.forward_tokens * weights / rate,
    )


def latency_rows(
    job: Job, assignment: Mapping[str, QuantSpec | None], budget: Budget | None
) -> tuple[LatencyReport, ...]:
    """Predicted times of a plan for every batch that the budget names, or for one sequence."""
    if job.latency is None:
        return ()
    batches = {limit.context for limit in (() if budget is None else budget.latency)} or {1}
    kept: dict[str, QuantSpec | None] = dict.fromkeys(assignment)
    return tuple(
        LatencyReport(
            device=job.latency.label,
            batch=batch,
            seconds=plan_seconds(job.latency, job.layers, assignment, batch),
            reference=plan_seconds(job.latency, job.layers, kept, batch),
        )
        for batch in sorted(batches)
    )


def uniform_rows(
    job: Job, sensitivity: Sensitivity | None, plan: BitPlan, budget: Budget | None
) -> tuple[UniformPlan, ...]:
    """Uniform plans beside a plan, and whether they are within the limits of the budget."""
    if sensitivity is None:
        return ()
    if budget is None or job.given is not None:
        budget = Budget.parse(plan.budget)
    outside = outside_specs(sensitivity.layers, plan.assignment)
    fitting = {one.budget for one in job.plans.fitting_uniform(sensitivity, budget, outside)}
    return tuple(
        UniformPlan(
            name=one.budget,
            stored_bits=one.stored_bits,
            predicted_loss=one.predicted_loss,
            fits=one.budget in fitting,
        )
        for one in uniform_plans(sensitivity, outside)
    )


def planned_layer(
    layer: LayerInfo,
    spec: QuantSpec | None,
    loss: float | None = None,
    error: float | None = None,
) -> PlannedLayer:
    """One row of a plan."""
    return PlannedLayer(
        name=layer.name,
        spec="kept" if spec is None else str(spec),
        weights=layer.numel,
        stored_bits=stored_cost(layer, spec) / layer.numel,
        predicted_loss=loss,
        predicted_error=error,
    )


def asymmetric_layers(plan: BitPlan) -> list[str]:
    """Layers whose weights have zero-points, which transformers cannot load."""
    return [n for n, spec in plan.assignment.items() if spec is not None and not spec.symmetric]


def quantized_embeddings(layers: Iterable[LayerInfo], plan: BitPlan) -> list[str]:
    """The token embedding if it is quantized, which transformers cannot load; a head it can."""
    return [
        one.name for one in layers if one.kind != "linear" and plan.assignment[one.name] is not None
    ]


def class_obstacle(job: Job) -> str | None:
    """Why stock transformers loads no packed weights into the network's class; None if it does."""
    return WITHOUT_LINEARS.get(type(job.model.module).__name__)


def loading_warnings(job: Job, plan: BitPlan) -> list[str]:
    """One line for every reason why stock tools cannot load what the plan makes."""
    only = (
        "quantforge.load reads the checkpoint, stock transformers with compressed-tensors does not"
    )
    found = []
    if lacks := class_obstacle(job):
        found.append(f"{type(job.model.module).__name__}: {lacks}; {only}")
    names = [n for n, s in plan.assignment.items() if s is not None and s.grid != "uniform"]
    if names:
        spec = plan.assignment[names[0]]
        own = "they are stored in quantforge's own format, and stock loaders refuse the folder"
        found.append(f"{len(names)} layers are {spec}, first {names[0]}: {own}")
    names = asymmetric_layers(plan)
    if names:
        found.append(f"{len(names)} layers are asymmetric, first {names[0]}: {only}")
    embeddings = quantized_embeddings(job.layers, plan)
    found += [f"{x} is {plan.assignment[x]}: {only}" for x in embeddings]
    return found


def target_warnings(job: Job, chosen: Chosen, quality: AnyQuality) -> list[str]:
    """One line for every target that the finished network does not keep, for all its tuning."""
    if not chosen.targets:
        return []
    targets = Budget.parse(chosen.plan.budget).targets
    found = []
    for target in targets:
        after = bound(target, quality, job.reference.window_nll)
        if after.upper > target.nats:
            found.append(
                f"{target.text} held for the plan before tuning, but the finished network's upper "
                f"bound is {after.upper:.4g}{quality.metric.each}, above {target.nats:.4g}"
            )
    return found


def held_out_warnings(quality: AnyQuality) -> list[str]:
    """Says where a standard error is not one over sequences."""
    if quality.windows > 1:
        return []
    return [
        "one sequence is held out: errors are over its tokens, which is less than between texts; "
        "raise calibration.sequences or calibration.held_out_share"
    ]


def layer_warnings(rows: Iterable[LayerReport]) -> list[str]:
    """One line for every kind of trouble that layers had."""
    damped = [row.name for row in rows if "needed damping" in row.note]
    rounded = [row.name for row in rows if "could not be factored" in row.note]
    dead = [row.name for row in rows if row.dead_columns]
    starved = sorted({row.name.rpartition(".")[0] for row in rows if FEW_TOKENS in row.note})
    found = []
    if rounded:
        found.append(f"{len(rounded)} layers could only be rounded to nearest, first {rounded[0]}")
    if starved:
        more = f" and {len(starved) - _MOST_NAMES} more" if len(starved) > _MOST_NAMES else ""
        found.append(
            f"experts that fewer than {LEAST_TOKENS} calibration tokens reached were rounded by "
            f"their weights alone: {', '.join(starved[:_MOST_NAMES])}{more}; give more text"
        )
    if damped:
        found.append(f"{len(damped)} layers needed more damping, first {damped[0]}")
    if dead:
        found.append(f"{len(dead)} layers have inputs that were always zero, first {dead[0]}")
    return found
