"""From a sensitivity table and a budget to a plan; and the uniform plans it must not lose to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantforge.errors import BudgetError
from quantforge.search.budget import Budget
from quantforge.search.choice import Choice, Costs, Limits, Losses
from quantforge.search.config import SearchConfig
from quantforge.search.interactions import pair_loss, pairwise_objective
from quantforge.search.latency import LatencyModel, Times
from quantforge.search.ordering import augmented_choice
from quantforge.search.pairwise import least
from quantforge.search.solvers import SOLVERS, only_limit, solver_for
from quantforge.types import KEPT_BITS, BitPlan, LayerInfo, QuantSpec, Sensitivity


def stored_cost(layer: LayerInfo, spec: QuantSpec | None) -> int:
    """Stored bits of one layer; 16 a weight where it is kept."""
    if spec is None:
        return KEPT_BITS * layer.numel
    return spec.stored_bits(layer.out_features, layer.in_features)


def block_candidate_bytes(layers: Sequence[LayerInfo], specs: Sequence[QuantSpec]) -> int:
    """Disk that the integers of all candidates take where each layer has those that divide it."""
    bits = sum(
        stored_cost(layer, spec)
        for layer in layers
        for spec in specs
        if spec.divides(layer.in_features)
    )
    return math.ceil(bits / 8)


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
    """Average (stored, code) bits a weight of an assignment, fixed layers left out."""
    weights, code = planned_weights(layers), 0.0
    for layer in layers:
        spec = assignment[layer.name]
        if not layer.fixed:
            code += layer.numel * (spec.code_bits if spec is not None else KEPT_BITS)
    return spent_bits(layers, assignment) / weights, code / weights


def planned_weights(layers: Sequence[LayerInfo]) -> int:
    """Weights that budgets in bits count."""
    return sum(layer.numel for layer in layers if not layer.fixed)


def spent_bits(layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]) -> int:
    """Stored bits that budgets in bits count."""
    return sum(stored_cost(one, assignment[one.name]) for one in layers if not one.fixed)


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
    return _known(sensitivity, sensitivity.loss, assignment)


def known_errors(
    sensitivity: Sensitivity, assignment: Mapping[str, QuantSpec | None]
) -> dict[str, float | None]:
    """Layer name → standard error of `known_losses`; None where that or the error is unknown."""
    if sensitivity.stderr is None:
        return dict.fromkeys(assignment)
    return _known(sensitivity, sensitivity.stderr, assignment)


def _known(
    sensitivity: Sensitivity, table: Tensor, assignment: Mapping[str, QuantSpec | None]
) -> dict[str, float | None]:
    """Layer name → the entry of `table` for its spec; 0 where kept, None where there is none."""
    candidates = set(sensitivity.specs)
    known = {n: s for n, s in assignment.items() if s is None or s in candidates}
    entries = table_row(sensitivity, table, {**dict.fromkeys(assignment), **known})
    return {
        name: entries[name] if name in known and math.isfinite(entries[name]) else None
        for name in assignment
    }


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
        fixed=tuple(layer.name for layer in sensitivity.layers if layer.fixed),
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
    """[items, specs + 1] losses and costs; the last column keeps the item in 16 bits.

    A fixed item is not kept and costs nothing.
    """
    specs = sensitivity.specs
    loss = np.zeros((len(items), len(specs) + 1))
    cost = np.zeros((len(items), len(specs) + 1), dtype=np.int64)
    table = sensitivity.loss.numpy()
    for item, rows in enumerate(items):
        members = [sensitivity.layers[row] for row in rows]
        loss[item, :-1] = table[list(rows)].sum(axis=0)
        if members[0].fixed:
            loss[item, -1] = np.inf
            continue
        cost[item, -1] = sum(stored_cost(layer, None) for layer in members)
        for column, spec in enumerate(specs):
            if math.isfinite(loss[item, column]):
                cost[item, column] = sum(stored_cost(layer, spec) for layer in members)
    return loss, cost


def search(
    sensitivity: Sensitivity,
    budget: Budget,
    config: SearchConfig,
    latency: LatencyModel | None = None,
) -> BitPlan:
    """The plan of least predicted loss within the budget that the configured solver finds.

    Several limits that bind at one time are an integer program, which then takes the place of the
    dynamic program; the plan names what found it.

    Args:
        sensitivity: predicted losses of all candidates.
        budget: limits on the average stored bits and on latency.
        config: solver and tying rules.
        latency: times of layers; needed where the budget limits latency.

    Raises:
        BudgetError: all of the solver's plans exceed the budget; names the range they reach.
        InputError: `latency` does not know a candidate.
    """
    items = tied_rows(sensitivity, config)
    loss, cost = cost_tables(sensitivity, items)
    limit = budget.total_bits(planned_weights(sensitivity.layers))
    times = Times.of(sensitivity, items, np.isfinite(loss), budget, latency)
    costs, limits = np.stack([cost, *times.costs]), [limit, *times.limits]
    if times.limits and limit >= np.where(np.isfinite(loss), cost, 0).max(axis=1).sum():
        costs, limits = costs[1:], limits[1:]  # bits do not bind
    solver, choice = _solve(sensitivity, items, loss, costs, limits, config)
    if choice is None:
        times.require_reachable(budget)
        low, high = reachable_bits(sensitivity, config)
        if times.limits and limit >= low * planned_weights(sensitivity.layers):
            raise BudgetError(f"budget {budget.text}: no plan is within all parts; loosen one")
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
    loss: Losses,
    costs: Costs,
    limits: Limits,
    config: SearchConfig,
) -> tuple[str, Choice | None]:
    """Name of the solver that is used, and its choice; None if no choice is within the limits.

    Args:
        sensitivity: whose layers interact or do not.
        items: rows of the layers of each.
        loss: [items, candidates].
        costs: [resources, items, candidates].
        limits: [resources].
        config: names the solver.
    """
    solver = solver_for(config.solver, len(limits))
    if sensitivity.interactions is not None:
        objective = pairwise_objective(loss, sensitivity.interactions, items)
        if solver == "ordering":
            return solver, augmented_choice(objective, *only_limit(costs, limits))
        return "pairwise", least(objective, costs, limits)
    apart = [row for row, group in enumerate(items) if sensitivity.layers[group[0]].outside]
    if solver == "uniform" and apart:
        return solver, _uniform_beside(loss, costs, limits, apart)
    return solver, SOLVERS[solver](loss, costs, limits)


def _uniform_beside(
    loss: Losses, costs: Costs, limits: Limits, apart: Sequence[int]
) -> Choice | None:
    """The best uniform choice for the blocks' layers, with any for the items that stand apart.

    Embedding and head are two at most, so every choice of theirs is tried.
    """
    inside = [row for row in range(len(loss)) if row not in apart]
    best: Choice | None = None
    options = [np.flatnonzero(np.isfinite(loss[row])).tolist() for row in apart]
    for taken in product(*options):
        spent = costs[:, list(apart), list(taken)].sum(axis=1)
        left = np.asarray(limits) - spent
        if (left < 0).any():
            continue
        choice = SOLVERS["uniform"](loss[inside], costs[:, inside], left)
        lost = float(loss[list(apart), list(taken)].sum())
        if choice is not None and (best is None or choice.loss + lost < best.loss):
            found = dict(zip([*inside, *apart], [*choice.picks, *taken], strict=True))
            best = Choice(
                picks=tuple(found[row] for row in range(len(loss))),
                loss=choice.loss + lost,
                costs=tuple((spent + choice.costs).tolist()),
                bound=choice.bound + lost,
            )
    return best


def reachable_bits(sensitivity: Sensitivity, config: SearchConfig) -> tuple[float, float]:
    """Lowest and highest average stored bits that plans of the configured solver can have."""
    items = tied_rows(sensitivity, config)
    loss, cost = cost_tables(sensitivity, items)
    feasible = np.isfinite(loss)
    weights = planned_weights(sensitivity.layers)
    low = np.where(feasible, cost, np.iinfo(np.int64).max).min(axis=1)
    high = np.where(feasible, cost, 0).max(axis=1)
    if config.solver == "uniform":
        inside = np.array([not sensitivity.layers[rows[0]].outside for rows in items])
        totals = cost[inside].sum(axis=0)[feasible[inside].all(axis=0)]
        lowest = totals.min() + low[~inside].sum()
        highest = totals.max() + high[~inside].sum()
    else:
        lowest, highest = low.sum(), high.sum()
    return float(lowest / weights), float(highest / weights)


def uniform_plans(
    sensitivity: Sensitivity, outside: Mapping[str, QuantSpec | None] | None = None
) -> list[BitPlan]:
    """One plan for every candidate that fits all layers of the blocks, by stored bits.

    Args:
        sensitivity: of all candidates.
        outside: spec of embedding and head, the same in all plans; kept where it says nothing,
            unless they are fixed.
    """
    inside = [row for row, layer in enumerate(sensitivity.layers) if not layer.outside]
    given = {**_fixed_specs(sensitivity), **(outside or {})}
    plans = []
    for column, spec in enumerate(sensitivity.specs):
        if bool(sensitivity.loss[inside, column].isfinite().all()):
            assignment = {
                layer.name: given.get(layer.name) if layer.outside else spec
                for layer in sensitivity.layers
            }
            plans.append(
                make_plan(sensitivity, assignment, budget=f"uniform {spec}", solver="uniform")
            )
    return sorted(plans, key=lambda plan: plan.stored_bits)


def _fixed_specs(sensitivity: Sensitivity) -> dict[str, QuantSpec]:
    """Layer name → the only spec it has, of fixed layers."""
    found = {}
    for row, layer in enumerate(sensitivity.layers):
        if layer.fixed:
            (column,) = sensitivity.loss[row].isfinite().nonzero().flatten().tolist()
            found[layer.name] = sensitivity.specs[column]
    return found
