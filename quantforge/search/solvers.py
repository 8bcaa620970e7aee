"""Solvers of the additive problem by name: tables in, a choice out.

| name | what it does |
|---|---|
| dynamic-program | the least loss within one limit, exactly |
| integer-program | the least loss within any number of limits, by HiGHS |
| lagrangian | the corner of the frontier's hull before the limit, and single exchanges after it |
| pareto | HAWQ-V2's enumeration, thinned where it grows too large |
| ordering | steps in the order of loss saved a cost, while they fit (Schaefer et al. 2023) |
| uniform | one candidate for all items |
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from quantforge.errors import ResourceError, UsageError
from quantforge.registry import Registry
from quantforge.search.choice import (
    Choice,
    Costs,
    Limits,
    Losses,
    additive_choice,
    require_problem,
    single_exchanges,
)
from quantforge.search.frontier import additive_bound, sweep
from quantforge.search.integer_program import integer_program
from quantforge.search.knapsack import solve
from quantforge.search.ordering import additive_steps
from quantforge.search.pareto import cheapest_loss

Solver = Callable[[Losses, Costs, Limits], Choice | None]
"""Losses [items, candidates], costs [resources, items, candidates] and limits [resources] to the
choice of least loss that the solver finds; None if none of its choices is within the limits."""

SOLVERS: Registry[Solver] = Registry("solver")
INTEGER_PROGRAM_SECONDS = 60.0
# Partial plans that the Pareto enumeration may hold over all items.
PARETO_STATES = 20_000_000


# Those that cannot hold two resources at once.
_ONE_LIMIT = frozenset({"dynamic-program", "lagrangian", "pareto", "ordering"})


def solver_for(name: str, limits: int) -> str:
    """Name of the solver that is used where `name` was asked for.

    Raises:
        UsageError: there are several limits, and no other solver does the same for them.
    """
    if limits == 1 or name not in _ONE_LIMIT:
        return name
    if name == "dynamic-program":  # exact, as this one is
        return "integer-program"
    raise UsageError(
        f"search.solver={name} takes one limit, not {limits}, of which every latency is one; "
        "leave it out or use search.solver=integer-program, without interactions"
    )


def only_limit(costs: Costs, limits: Limits) -> tuple[Costs, float]:
    """The single resource of a solver that takes one, as `solver_for` has seen to."""
    (cost,), (limit,) = costs, limits
    return cost, limit


@SOLVERS.register("dynamic-program")
def dynamic_program(loss: Losses, costs: Costs, limits: Limits) -> Choice | None:
    """See `knapsack.solve`."""
    require_problem(loss, costs, limits)
    return solve(loss, *only_limit(costs, limits))


@SOLVERS.register("integer-program")
def mixed_integer_program(loss: Losses, costs: Costs, limits: Limits) -> Choice | None:
    """See `integer_program`; what it has found after a minute is taken."""
    result = integer_program(loss, costs, limits, time_limit=INTEGER_PROGRAM_SECONDS)
    if result.choice is None and result.status == "time limit":
        raise ResourceError(
            f"the integer program found no plan in {INTEGER_PROGRAM_SECONDS:g} s; loosen a limit, "
            "take fewer candidates, or use search.solver=dynamic-program with a single limit"
        )
    return result.choice


@SOLVERS.register("lagrangian")
def lagrangian(loss: Losses, costs: Costs, limits: Limits) -> Choice | None:
    """The hull's corner before the limit, and what single exchanges make of the rest."""
    require_problem(loss, costs, limits)
    cost, limit = only_limit(costs, limits)
    frontier = sweep(loss, cost)
    if frontier is None or frontier.corner(limit) < 0:
        return None
    picks = single_exchanges(loss, costs, limits, frontier.picks(frontier.corner(limit)))
    return additive_choice(loss, costs, picks, bound=frontier.bound(limit))


@SOLVERS.register("pareto")
def pareto(loss: Losses, costs: Costs, limits: Limits) -> Choice | None:
    """See `pareto.cheapest_loss`."""
    require_problem(loss, costs, limits)
    cost, limit = only_limit(costs, limits)
    return cheapest_loss(loss, cost, limit, most=max(2, PARETO_STATES // max(1, len(loss))))


@SOLVERS.register("ordering")
def ordering(loss: Losses, costs: Costs, limits: Limits) -> Choice | None:
    """See `ordering.augmented_choice`; here for losses that add up."""
    require_problem(loss, costs, limits)
    picks = additive_steps(loss, *only_limit(costs, limits))
    if picks is None:
        return None
    return additive_choice(loss, costs, picks, bound=additive_bound(loss, costs, limits))


@SOLVERS.register("uniform")
def uniform(loss: Losses, costs: Costs, limits: Limits) -> Choice | None:
    """The one candidate, the same for all items, of least loss within the limits."""
    require_problem(loss, costs, limits)
    within = (costs.sum(axis=1) <= np.asarray(limits)[:, None]).all(axis=0)
    total = np.where(within, loss.sum(axis=0), np.inf)
    pick = int(total.argmin())
    if not np.isfinite(total[pick]):
        return None
    picks = np.full(len(loss), pick)
    return additive_choice(loss, costs, picks, bound=additive_bound(loss, costs, limits))
