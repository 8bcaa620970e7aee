"""From a call's arguments to a job: the recipe, then the model and its calibration text.

The recipe comes first and alone, because it says what is wrong with a command, and what its output
is called, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quantforge.compilation import Job
from quantforge.encoders import require_answerable
from quantforge.errors import InputError, UsageError
from quantforge.files import fingerprint
from quantforge.format.footprint import Footprint
from quantforge.latency import latency_model
from quantforge.load.huggingface import described, from_module
from quantforge.load.text import calibration_set, from_batches
from quantforge.loading import load_source
from quantforge.measurements import MEANT
from quantforge.parallel import ALONE, Share
from quantforge.plan_file import GivenPlan, read_assignment, read_fixed, require_grids
from quantforge.planning import loadable_vocabulary, require_reachable, require_split
from quantforge.progress import Monitor
from quantforge.recipe import Recipe, Target, compose, resolve_target
from quantforge.runtime.load import checked_device
from quantforge.scratch import COPIES
from quantforge.search.budget import Budget
from quantforge.search.settled import needed_budget
from quantforge.search.solvers import solver_for
from quantforge.search.vocabulary import given_candidates, vocabulary_candidates

Source = str | Path | nn.Module


def target_of(model: Source) -> Target:
    """What a call's first argument means."""
    return Target(name="in-memory") if isinstance(model, nn.Module) else resolve_target(model)


def share_of(model: Source, device: str) -> Share:
    """This process's share of a call's work; joins the other processes of the run."""
    own = checked_device(device)
    if isinstance(model, nn.Module):
        own = next((parameter.device for parameter in model.parameters()), own)
    return Share.of_this_process(own)


def configure(
    model: Source,
    *,
    budget: str | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    effort: str = "balanced",
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """The effective recipe of a call; arguments that are recipe keys are set last.

    Raises:
        InputError: the recipe file or the model's folder cannot be read.
        UsageError: an unknown model, effort or key, or a bad value.
    """
    changes = dict(settings or {})
    if budget is not None:
        changes["budget"] = budget
    if isinstance(calibration, str | Path):
        changes["calibration.source"] = str(calibration)
    return compose(target_of(model), effort=effort, settings=changes)


def limit_of(recipe: Recipe, budget: str | None, plan: GivenPlan | None) -> Budget | None:
    """The budget of a call; None where a plan is given, or where none is needed.

    Args:
        recipe: holds the call's budget or its own; a plan takes the place of the latter.
        budget: as given to the call.
        plan: likewise.

    Raises:
        InputError: the plan is a file that does not exist.
        UsageError: there is both a plan and a budget, or neither though one is needed; the budget
            has a target of quality and its plan is to be refined; or it has more limits than the
            solver takes.
    """
    if plan is None:
        limit = needed_budget(recipe.budget, recipe.search)
        if limit is not None:
            solver_for(recipe.search.solver, 1 + len(limit.latency))
        if limit is not None and limit.targets and recipe.search.refine:
            raise UsageError(
                f"search.refine={recipe.search.refine} does not go with {limit.text}: plans for a "
                "target are measured as they are; set search.refine=0 or give a size"
            )
        return limit
    if budget is not None:
        raise UsageError("there is a plan and a budget; a plan says what it takes: give one")
    if isinstance(plan, str | Path) and not Path(plan).is_file():
        raise InputError(f"the plan {plan} is not a file")
    return None


def open_job(
    model: Source,
    recipe: Recipe,
    *,
    limit: Budget | None = None,
    plan: GivenPlan | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    effort: str = "balanced",
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    monitor: Monitor | None = None,
    share: Share = ALONE,
) -> Job:
    """Load the model and read the calibration text.

    Args:
        model: as given to the call.
        recipe: from `configure`.
        limit: the call's budget: decides whether embedding and head are planned, and is refused
            before a text is read if no plan meets it.
        plan: the user's own plan, if there is one.
        calibration: batches of tokens; anything else is in the recipe already.
        effort: what the recipe was made with, for the record.
        seed: of everything random.
        device: where the network runs.
        fresh: sample a text from the model anew, even if it is in the cache.
        trust_remote_code: let a hub model bring its own code.
        tokenizer: of a network in memory.
        monitor: progress and cancellation.
        share: of the work, where several processes do it together.

    Raises:
        BudgetError: not even the smallest plan is within the limits.
        InputError: a model or text that is missing, broken or empty, or a plan that does not fit.
        UsageError: the budget limits latency and no device is named, or an unknown one is; or the
            server does not load the network in so many parts; or other processes of the run were
            given something else.
    """
    monitor = monitor or Monitor()
    latency = latency_model(recipe.device, limit)
    if isinstance(model, nn.Module):
        loaded = from_module(model, tokenizer=tokenizer)
    else:
        loaded = load_source(
            recipe, device, trust_remote_code=trust_remote_code, monitor=monitor, copies=COPIES,
            share=share,
        )  # fmt: skip
    loaded.share = share
    require_answerable(loaded, recipe, limit)
    folder = loaded.source.path if loaded.source.kind == "folder" else None
    require_split(described(loaded.module), recipe.search, folder)
    given = None  # before the text, which may have to be sampled
    matrices = loaded.architecture.vocabulary(loaded.module)
    if plan is None:
        vocabulary = vocabulary_candidates(matrices, recipe.embeddings, recipe.search, limit)
        vocabulary = loadable_vocabulary(vocabulary, recipe.search)
    else:
        layers = (*loaded.layers, *matrices)
        given = read_assignment(plan, layers, independent=recipe.search.independent)
        require_grids(given, layers, recipe.search)
        vocabulary = given_candidates(matrices, given, read_fixed(plan), recipe.embeddings)
        given |= {layer.name: specs[0] for layer, specs in vocabulary.items() if specs}
    if limit is not None:
        footprint = Footprint.of(loaded, shard_bytes=recipe.export.shard_bytes)
        require_reachable(loaded.layers, limit, footprint, recipe.search, vocabulary)
    if calibration is None or isinstance(calibration, str | Path):
        data = calibration_set(recipe.calibration, loaded, seed=seed, monitor=monitor, fresh=fresh)
    else:
        embedding: Any = loaded.module.get_submodule(loaded.architecture.embedding)
        data = from_batches(
            calibration,
            held_out_share=recipe.calibration.held_out_share,
            vocabulary=int(embedding.num_embeddings),
        )
    share.require_equal(
        fingerprint(
            loaded.source.fingerprint, data.fingerprint, recipe.model_dump(mode="json"), seed,
            None if limit is None else limit.text,
            None if given is None else {name: str(spec) for name, spec in given.items()},
        ),
        MEANT,
    )  # fmt: skip
    return Job(
        model=loaded,
        calibration=data,
        recipe=recipe,
        effort=effort,
        seed=seed,
        monitor=monitor,
        given=given,
        vocabulary=vocabulary,
        latency=latency,
    )
