"""The whole compiler: each arrow of the design is one call here.

    source ─ load → Model ─ calibrate → Sensitivity ─ search → BitPlan ─ quantize → layers ─ export

Everything a caller needs is a function of this module, re-exported from `quantforge`. Nothing
prints and nothing is global: progress goes to a callback, cancellation comes from an event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from quantforge.borrowing import in_float32, restored_on_error
from quantforge.delivery import deliver, dry_run
from quantforge.errors import UsageError
from quantforge.estimate import require_memory
from quantforge.folders import (
    bench,
    check,
    convert,
    curvature,
    evaluate,
    evaluate_tasks,
    generate,
    inspect,
    load,
    profile,
)
from quantforge.frontier import frontier_report, write_frontier
from quantforge.models.linears import with_linears
from quantforge.opening import Source, configure, limit_of, open_job, share_of, target_of
from quantforge.outcomes import ParetoReport, PlanReport, Report
from quantforge.plan_file import GivenPlan
from quantforge.progress import Monitor, ProgressEvent
from quantforge.runtime.transformers_plugin import use_in_transformers
from quantforge.vision import entry as vision
from quantforge.vision.flags import vision_settings
from quantforge.vision.outcome import VisionReport
from quantforge.workspace import check_output, reserved, staging

__all__ = [
    "bench",
    "check",
    "convert",
    "curvature",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "inspect",
    "load",
    "pareto",
    "plan",
    "profile",
    "quantize",
    "use_in_transformers",
]

Progress = Callable[[ProgressEvent], None]


def quantize(
    model: Source,
    *,
    budget: str | None = None,
    plan: GivenPlan | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    output: str | Path | None = None,
    effort: str = "balanced",
    seed: int = 0,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Report | VisionReport:
    """Compile a float network to mixed-precision low-bit weights within a budget.

    Args:
        model: recipe name, recipe file, Hugging Face folder, .gguf file, hub id, or a network in
            memory, which afterwards is what the checkpoint would be: linears hold the dequantized
            weights, norms what tuning made of them, all else is rounded to 16 bits, in its own
            dtype; one in half precision takes the memory of float32 meanwhile.
        budget: "3bit" or "3.25bpw", stored bits a weight over the planned weights; "120MB" or
            "0.4x", of the whole checkpoint; "vram:8GB@4096", weights and keys and values in memory;
            "kl:0.05" or "ppl:+2%", the fewest bits measured to lose no more, "cosine:0.99" for an
            encoder; "latency:-25%" or "latency:12ms@1", a decoding step's time by
            `settings["device"]`; several joined by a comma. None takes the recipe's, and needs none
            where that leaves nothing to search.
        plan: in the place of a budget: a `plan.json`, maybe edited, its contents, or layer name →
            spec ("3b-g64", "kept").
        calibration: text file (.txt, .jsonl, .parquet), hub id, "pydoc", "self", or an iterable of
            token batches; None takes the recipe's.
        output: folder to write; `./<name>-<budget>` for a source on disk (`./<name>-quantized`
            without a budget), nothing for a network in memory.
        effort: "fast", "balanced" or "best".
        seed: of everything random.
        device: where the network runs.
        settings: recipe keys, e.g. {"search.bits": [2, 4]}.
        force: replace an output folder that an earlier run wrote.
        fresh: start over instead of going on from what earlier runs left in the cache.
        trust_remote_code: let a hub model bring its own code.
        tokenizer: of a network in memory.
        progress: called after every step.
        cancel: once set, the run stops with `CancelledError` and leaves nothing behind; a network
            in memory gets its float weights back after this or any other error.

    Returns:
        What was decided, written and measured; the same as `report.html` shows.

    Raises:
        UsageError: a wrong or missing budget, a wrong recipe, setting or output.
        InputError: a model, text or plan that is missing, broken or does not fit.
        BudgetError: the budget is below what the candidates can reach.
        CancelledError: `cancel` was set.
        ResourceError: memory or the disk are too small for the run, or ran out.
    """
    monitor = Monitor(progress=progress, cancel=cancel)
    other = trust_remote_code or tokenizer is not None
    asked = {"plan": plan, "device": device, "fresh": fresh, "language": other}
    if (own := _vision_settings(model, settings, **asked)) is not None:
        return vision.quantize(
            model, budget=budget, calibration=calibration, output=output, effort=effort,
            seed=seed, settings=own, force=force, monitor=monitor,
        )  # fmt: skip
    asked_for: dict[str, Any] = {"budget": budget, "calibration": calibration, "effort": effort}
    recipe = configure(model, settings=settings, **asked_for)
    limit = limit_of(recipe, budget, plan)
    folder = None if output is None else Path(output)
    if folder is None and not isinstance(model, nn.Module):
        folder = target_of(model).output(None if limit is None else limit.text)
    share = share_of(model, device)
    stage = staging(folder, force=force) if folder and share.main else nullcontext()
    # The journal goes when the output has its name, and not before.
    with share.together(), ExitStack() as at_the_end, stage as staged, _borrowed(model):
        job = open_job(
            model,
            recipe,
            limit=limit,
            plan=plan,
            calibration=calibration,
            effort=effort,
            seed=seed,
            device=device,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            monitor=monitor,
            share=share,
        )
        require_memory(job.model, job.calibration, job.recipe)
        with job.measure(fresh=fresh) as measured:
            chosen = job.search(measured, limit)
            journal = at_the_end.enter_context(
                job.journal(chosen.plan, chosen.measured, fresh=fresh)
            )
            layers = job.quantize(chosen.plan, chosen.measured, journal)
            return deliver(job, layers, chosen, staged, folder)


def plan(
    model: Source,
    *,
    budget: str | None = None,
    plan: GivenPlan | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    output: str | Path | None = None,
    effort: str = "balanced",
    seed: int = 0,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> PlanReport | VisionReport:
    """Find the plan for a budget and what it costs; quantize nothing.

    What is measured for it is kept in the cache, so a plan for another budget, or `quantize` after
    it, starts from there; where there is nothing to search, nothing is measured. Arguments and
    errors are those of `quantize`; `output` receives `plan.json`, which may be edited and given to
    `quantize`, and, if there was a search, `sensitivity.json`.
    """
    monitor = Monitor(progress=progress, cancel=cancel)
    other = trust_remote_code or tokenizer is not None
    asked = {"plan": plan, "device": device, "fresh": fresh, "language": other}
    if (own := _vision_settings(model, settings, **asked)) is not None:
        return vision.plan(
            model, budget=budget, calibration=calibration, output=output, effort=effort,
            seed=seed, settings=own, force=force, monitor=monitor,
        )  # fmt: skip
    recipe = configure(
        model, budget=budget, calibration=calibration, effort=effort, settings=settings
    )
    limit = limit_of(recipe, budget, plan)
    share = share_of(model, device)
    folder = Path(output) if output is not None and share.main else None
    with share.together(), _destination(folder, force=force), _borrowed(model):
        if folder and (folder / "quantforge.json").is_file():
            raise UsageError(f"{folder} holds a checkpoint; give plan another --output")
        job = open_job(
            model,
            recipe,
            limit=limit,
            plan=plan,
            calibration=calibration,
            effort=effort,
            seed=seed,
            device=device,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            monitor=monitor,
            share=share,
        )
        if job.settled:
            return dry_run(job, None, limit, folder)
        with job.measure(fresh=fresh) as measured:
            return dry_run(job, measured, limit, folder)


def pareto(
    model: Source,
    *,
    points: int = 41,
    measure: int = 0,
    calibration: str | Path | Iterable[Any] | None = None,
    output: str | Path | None = None,
    effort: str = "balanced",
    seed: int = 0,
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> ParetoReport:
    """The plans worth having at every size, from the smallest to about six bits.

    `points` budgets are tried, evenly spread, and `measure` of the plans put together and measured.
    `output` receives `pareto.json`, the figure as `.svg` and `.png`, and `pareto.html`. The other
    arguments and the errors are those of `quantize`; it is a `UsageError` where there is nothing to
    search.
    """
    if vision.takes(model):
        raise UsageError(
            "frontiers are of language models: quantforge plan shows a convolutional network's "
            "uniform networks beside the plan"
        )
    if points < 2 or measure < 0:
        raise UsageError(
            f"a frontier needs two points or more and no negative number of "
            f"measurements, got {points} and {measure}"
        )
    recipe = configure(model, calibration=calibration, effort=effort, settings=settings)
    if recipe.search.settled is not None:
        raise UsageError("search has one candidate: there is one plan and no frontier")
    share = share_of(model, device)
    folder = Path(output) if output is not None and share.main else None
    reserve = _destination(folder, force=force, mark="pareto.json")
    with share.together(), reserve, _borrowed(model):
        job = open_job(
            model,
            recipe,
            calibration=calibration,
            effort=effort,
            seed=seed,
            device=device,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            monitor=Monitor(progress=progress, cancel=cancel),
            share=share,
        )
        with job.measure(fresh=fresh) as measured:
            report = frontier_report(job, measured, points, measure)
        if folder:
            write_frontier(report, folder)
    return report


def _vision_settings(
    model: Source, settings: Mapping[str, Any] | None, **asked: Any
) -> dict[str, Any] | None:
    """The settings of a call about a convolutional network; None where it is about another one.

    Args:
        model: of the call.
        settings: recipe keys.
        asked: see `vision.flags.vision_settings`.

    Raises:
        UsageError: it asks for what is of the other kind.
    """
    if vision.takes(model):
        return vision_settings(settings, **asked)
    if any(key.startswith("activations") for key in settings or {}):
        raise UsageError(
            "activations are rounded in convolutional networks alone: leave --activations out"
        )
    return None


@contextmanager
def _destination(folder: Path | None, *, force: bool, mark: str = "plan.json") -> Iterator[None]:
    """A folder that the body may write at its end, and nobody else meanwhile; maybe none."""
    if folder is None:
        yield
        return
    check_output(folder, force=force, mark=mark)
    with reserved(folder):
        yield


@contextmanager
def _borrowed(model: Source) -> Iterator[None]:
    """A network in memory is float32 inside, and as it was before if the body fails.

    Inside it has a linear for every matrix, after it the modules of its class.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with restored_on_error(model), in_float32(model), with_linears(model):
        yield
