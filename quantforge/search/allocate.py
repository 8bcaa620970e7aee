"""From a sensitivity table and a budget to a plan; and the uniform plans it must not lose to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantforge.errors import BudgetError
from quantforge.search.budget import Budget
from quantforge.search.choice import Choice
from quantforge.search.config import SearchConfig
from quantforge.search.interactions import pair_loss, pairwise_objective
from quantforge.search.pairwise import local_search
from quantforge.search.solvers import SOLVERS
from quantforge.types import KEPT_BITS, BitPlan, LayerInfo, QuantSpec, Sensitivity


def stored_cost(layer: LayerInfo, spec: QuantSpec | None) -> int:
    """Stored bits of one layer; 16 a weight where it is kept."""
    if spec is None:
        return KEPT_BITS * layer.numel
    return spec.stored_bits(layer.out_features, layer.in_features)


def candidate_bytes(sensitivity: Sensitivity) -> int:
    """Disk that the integers of all candidates of all layers take."""
    fits = sensitivity.loss.isfinite()
    bits = sum(
        stored_cost(layer, spec)
        for row, layer in enumerate(sensitivity.layers)
        for column, spec in enumerate(sensitivity.specs)
        if bool(fits[row, column])
    )
    return math.ceil(bits / 8)


def average_bits(
    layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]
) -> tuple[float, float]:
    """Average (stored, code) bits a weight of an assignment."""
    weights = sum(layer.numel for layer in layers)
    stored = sum(stored_cost(layer, assignment[layer.name]) for layer in layers)
    code = 0
    for layer in layers:
        spec = assignment[layer.name]
        code += layer.numel * (spec.bits if spec is not None else KEPT_BITS)
    return stored / weights, code / weights


def table_row(
    sensitivity: Sensitivity, table: Tensor, assignment: Mapping[str, QuantSpec | None]
) -> dict[str, float]:
    """Layer name → the entry of `table` [layers, specs] for its spec; 0 where it is kept."""
    column = {spec: index for index, spec in enumerate(sensitivity.specs)}
    found = {}
    for index, layer in enumerate(sensitivity.layers):
        spec = assignment[layer.name]
        found[layer.name] = 0.0 if spec is None else float(table[index, column[spec]])
    return found


def known_losses(
    sensitivity: Sensitivity, assignment: Mapping[str, QuantSpec | None]
) -> dict[str, float | None]:
    """Layer name → predicted loss of its spec; 0 where kept, None where it is no candidate."""
    candidates = set(sensitivity.specs)
    known = {n: s for n, s in assignment.items() if s is None or s in candidates}
    losses = table_row(sensitivity, sensitivity.loss, {**dict.fromkeys(assignment), **known})
    return {name: losses[name] if name in known else None for name in assignment}


def make_plan(
    sensitivity: Sensitivity,
    assignment: Mapping[str, QuantSpec | None],
    *,
    budget: str,
    solver: str,
    gap: float | None = None,
) -> BitPlan:
    """A plan from an assignment, with its bits and predicted loss filled in."""
    predicted = sum(table_row(sensitivity, sensitivity.loss, assignment).values())
    predicted += interaction_loss(sensitivity, assignment)
    stored, code = average_bits(sensitivity.layers, assignment)
    return BitPlan(
        assignment=dict(assignment),
        budget=budget,
        stored_bits=stored,
        code_bits=code,
        predicted_loss=predicted,
        solver=solver,
        gap=gap,
    )


def interaction_loss(sensitivity: Sensitivity, assignment: Mapping[str, QuantSpec | None]) -> float:
    """What the pairs of layers of an assignment add, in nats a token; all specs are candidates."""
    column = {spec: index for index, spec in enumerate(sensitivity.specs)}
    specs = [assignment[layer.name] for layer in sensitivity.layers]
    return pair_loss(
        sensitivity.interactions, [None if spec is None else column[spec] for spec in specs]
    )


def tied_rows(sensitivity: Sensitivity, config: SearchConfig) -> list[list[int]]:
    """Rows of the table that must share a spec, in forward order."""
    groups: dict[str, list[int]] = {}
    for row, layer in enumerate(sensitivity.layers):
        key = layer.name if config.independent else layer.fused_group
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def cost_tables(
    sensitivity: Sensitivity, items: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[items, specs + 1] losses and costs; the last column keeps the item in 16 bits."""
    specs = sensitivity.specs
    loss = np.zeros((len(items), len(specs) + 1))
    cost = np.zeros((len(items), len(specs) + 1), dtype=np.int64)
    table = sensitivity.loss.numpy()
    for item, rows in enumerate(items):
        members = [sensitivity.layers[row] for row in rows]
        loss[item, :-1] = table[list(rows)].sum(axis=0)
        cost[item, -1] = sum(stored_cost(layer, None) for layer in members)
        for column, spec in enumerate(specs):
            if math.isfinite(loss[item, column]):
                cost[item, column] = sum(stored_cost(layer, spec) for layer in members)
    return loss, cost


def search(sensitivity: Sensitivity, budget: Budget, config: SearchConfig) -> BitPlan:
    """The plan of least predicted loss within the budget that the configured solver finds.

    Args:
        sensitivity: predicted losses of all candidates.
        budget: limit on the average stored bits.
        config: solver and tying rules.

    Raises:
        BudgetError: all of the solver's plans exceed the budget; names the range they reach.
    """
    items = tied_rows(sensitivity, config)
    loss, cost = cost_tables(sensitivity, items)
    weights = sum(layer.numel for layer in sensitivity.layers)
    limit = budget.total_bits(weights)
    solver, choice = _solve(sensitivity, items, loss, cost, limit, config)
    if choice is None:
        low, high = reachable_bits(sensitivity, config)
        floor = math.ceil(low * 1000) / 1000
        kind = "uniform plans" if config.solver == "uniform" else "plans"
        raise BudgetError(
            f"budget {budget.text} cannot be met: {kind} reach {floor:.3f} to {high:.3f} stored "
            f"bits a weight; raise --budget to at least {floor:.3f}bit"
        )
    assignment: dict[str, QuantSpec | None] = {}
    for rows, pick in zip(items, choice.picks, strict=True):
        spec = sensitivity.specs[pick] if pick < len(sensitivity.specs) else None
        for row in rows:
            assignment[sensitivity.layers[row].name] = spec
    ordered = {layer.name: assignment[layer.name] for layer in sensitivity.layers}
    return make_plan(sensitivity, ordered, budget=budget.text, solver=solver, gap=choice.gap)


def _solve(
    sensitivity: Sensitivity,
    items: Sequence[Sequence[int]],
    loss: NDArray[np.float64],
    cost: NDArray[np.int64],
    limit: int,
    config: SearchConfig,
) -> tuple[str, Choice | None]:
    """Name of the solver that is used, and its choice."""
    if sensitivity.interactions is None:
        return config.solver, SOLVERS[config.solver](loss, cost[None], [limit])
    objective = pairwise_objective(loss, sensitivity.interactions, items)
    return "pairwise", local_search(objective, cost[None], [limit])


def reachable_bits(sensitivity: Sensitivity, config: SearchConfig) -> tuple[float, float]:
    """Lowest and highest average stored bits that plans of the configured solver can have."""
    loss, cost = cost_tables(sensitivity, tied_rows(sensitivity, config))
    feasible = np.isfinite(loss)
    weights = sum(layer.numel for layer in sensitivity.layers)
    if config.solver == "uniform":
        totals = cost.sum(axis=0)[feasible.all(axis=0)]
        return float(totals.min() / weights), float(totals.max() / weights)
    lowest = np.where(feasible, cost, np.iinfo(np.int64).max).min(axis=1).sum()
    highest = np.where(feasible, cost, 0).max(axis=1).sum()
    return float(lowest / weights), float(highest / weights)


def uniform_plans(sensitivity: Sensitivity) -> list[BitPlan]:
    """One plan for every candidate that fits all layers, by increasing stored bits."""
    plans = []
    for column, spec in enumerate(sensitivity.specs):
        if bool(sensitivity.loss[:, column].isfinite().all()):
            assignment = dict.fromkeys((layer.name for layer in sensitivity.layers), spec)
            plans.append(
                make_plan(sensitivity, assignment, budget=f"uniform {spec}", solver="uniform")
            )
    return sorted(plans, key=lambda plan: plan.stored_bits)
