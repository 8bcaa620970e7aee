"""Which candidates the embedding and the head have: all, the one that was asked for, or none.

Under a budget in bits they are kept, because stock loaders know no quantized embedding. A budget in
bytes is about the whole checkpoint, of which they can be a third: there they are layers of the
search, unless bits are limited as well. A spec that was asked for is theirs whatever the budget
says, and budgets in bits, which are averages over what is searched, do not count them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor, cat
from torch.nn.functional import pad

from quantforge.errors import InputError, UsageError
from quantforge.search.budget import Budget
from quantforge.search.config import EmbeddingsConfig, SearchConfig
from quantforge.types import Interactions, LayerInfo, QuantSpec, Sensitivity

Candidates = Mapping[LayerInfo, tuple[QuantSpec, ...]]
"""Layers outside the blocks that a plan covers → their specs; of a fixed one there is one."""


def vocabulary_candidates(
    layers: Sequence[LayerInfo],
    config: EmbeddingsConfig,
    search: SearchConfig,
    budget: Budget | None,
) -> Candidates:
    """The candidates of embedding and head under a budget.

    Args:
        layers: embedding and head, or the one matrix that is both.
        config: says what becomes of them.
        search: says whether anything is searched.
        budget: decides where `config` does not; None where there is none.

    Raises:
        InputError: the groups of the spec that was asked for do not divide the rows, or there is no
            matrix to give it to.
        UsageError: they are to be planned, but nothing is searched.
    """
    include = config.include
    if include not in (None, "keep") and not layers:
        raise InputError(
            "embeddings.include: this network's embedding does more than look up rows, so it "
            "cannot be quantized; leave the option out"
        )
    if include is None:
        kinds = {limit.kind for limit in (() if budget is None else budget.limits)}
        whole = bool(kinds & {"bytes", "share", "vram"}) and "bits" not in kinds
        whole = whole and search.settled is None
        include = "plan" if whole else "keep"
    if include == "keep":
        return {}
    if include == "plan":
        if search.settled is not None:
            raise UsageError(
                "embeddings.include=plan needs a search, but search has one candidate; "
                "give embeddings a spec, e.g. --include-embeddings 8bit"
            )
        return {layer: planned_candidates(layer, config) for layer in layers}
    return {replace(layer, fixed=True): (_asked(layer, include, config),) for layer in layers}


def given_candidates(
    layers: Sequence[LayerInfo],
    given: Mapping[str, QuantSpec | None],
    fixed: Sequence[str],
    config: EmbeddingsConfig,
) -> Candidates:
    """Embedding and head under a plan that a user gives: what it says, or else what was asked for.

    Args:
        layers: embedding and head, or the one matrix that is both.
        given: layer name → spec, maybe theirs too.
        fixed: names that the plan says were fixed.
        config: says what becomes of those that the plan does not name.

    Raises:
        InputError: the groups of the spec that was asked for do not divide the rows.
        UsageError: both say something.
    """
    asked = config.include not in (None, "keep", "plan")
    named = [layer for layer in layers if layer.name in given]
    if named and asked:
        raise UsageError(
            f"the plan says what {named[0].name} gets, and embeddings.include says "
            f"{config.include}; give one"
        )
    found: dict[LayerInfo, tuple[QuantSpec, ...]] = {}
    for layer in layers:
        spec = given.get(layer.name)
        if layer.name in given:
            key = replace(layer, fixed=layer.name in fixed and spec is not None)
            found[key] = () if spec is None else (spec,)
        elif asked and config.include is not None:
            found[replace(layer, fixed=True)] = (_asked(layer, config.include, config),)
    return found


def planned_candidates(layer: LayerInfo, config: EmbeddingsConfig) -> tuple[QuantSpec, ...]:
    """The specs of one matrix where it is planned."""
    specs = {QuantSpec(*pair) for pair in product(config.bits, config.group_sizes)}
    return tuple(sorted(spec for spec in specs if spec.divides(layer.in_features)))


def _asked(layer: LayerInfo, text: str, config: EmbeddingsConfig) -> QuantSpec:
    """The spec that was asked for."""
    width = re.fullmatch(r"(\d+)bit", text)
    if width is None:
        specs = [QuantSpec.parse(text)]
    else:
        specs = [QuantSpec(int(width[1]), size) for size in config.group_sizes]
    for spec in specs:
        if spec.divides(layer.in_features):
            return spec
    raise InputError(
        f"{layer.name}: {specs[0]} does not divide rows of {layer.in_features}; "
        f"give --include-embeddings another group size, or {specs[0].bits}b-pc"
    )


def fixed_specs(candidates: Candidates) -> dict[str, QuantSpec]:
    """Layer name → the spec it has whatever the plan."""
    return {layer.name: specs[0] for layer, specs in candidates.items() if layer.fixed}


def outside_specs(
    layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]
) -> dict[str, QuantSpec | None]:
    """What a plan gives the layers outside the blocks."""
    return {layer.name: assignment[layer.name] for layer in layers if layer.outside}


def inside_blocks(
    sensitivity: Sensitivity, specs: Sequence[QuantSpec] | None = None
) -> Sensitivity:
    """The rows of the layers of the blocks alone, and the columns of `specs` (None: all)."""
    rows = [row for row, layer in enumerate(sensitivity.layers) if not layer.outside]
    kept = sensitivity.specs if specs is None else tuple(specs)
    columns = [sensitivity.specs.index(spec) for spec in kept]
    stderr, pairs = sensitivity.stderr, sensitivity.interactions
    if pairs is not None:
        pairs = Interactions(
            projections=pairs.projections[:, rows][:, :, columns],
            weights=pairs.weights[rows][:, rows],
        )
    return replace(
        sensitivity,
        layers=tuple(sensitivity.layers[row] for row in rows),
        specs=kept,
        loss=sensitivity.loss[rows][:, columns],
        error=sensitivity.error[rows][:, columns],
        stderr=None if stderr is None else stderr[rows][:, columns],
        interactions=pairs,
    )


def joined(first: Sensitivity, second: Sensitivity) -> Sensitivity:
    """One table of two tables' layers, with the candidates of both; +inf where one has none.

    Layers of the second do not interact with any.
    """
    specs = tuple(sorted({*first.specs, *second.specs}))

    def wide(one: Sensitivity, table: Tensor | None) -> Tensor:
        found = one.loss.new_full((len(one.layers), len(specs)), math.inf)
        if table is not None:
            found[:, [specs.index(spec) for spec in one.specs]] = table
        return found

    def both(a: Tensor | None, b: Tensor | None) -> Tensor:
        return cat([wide(first, a), wide(second, b)])

    pairs = first.interactions
    if pairs is not None:
        samples, more = len(pairs.projections), len(second.layers)
        projections = pairs.projections.new_zeros(samples, len(first.layers) + more, len(specs))
        columns = [specs.index(spec) for spec in first.specs]
        projections[:, : len(first.layers), columns] = pairs.projections
        pairs = Interactions(
            projections=projections, weights=pad(pairs.weights, (0, more, 0, more))
        )
    return replace(
        first,
        layers=(*first.layers, *second.layers),
        specs=specs,
        loss=both(first.loss, second.loss),
        error=both(first.error, second.error),
        stderr=None if first.stderr is None else both(first.stderr, second.stderr),
        interactions=pairs,
    )
