"""Every registered solver against exhaustive search: within the limits, never below the bound."""

from typing import get_args

import numpy as np
import pytest

from quantforge.errors import ResourceError, UsageError
from quantforge.search import solvers
from quantforge.search.config import SolverName
from quantforge.search.frontier import sweep
from quantforge.search.integer_program import ProgramResult
from quantforge.search.solvers import SOLVERS, solver_for

EXACT = ("dynamic-program", "integer-program", "pareto")


def test_the_recipe_names_every_solver():
    assert sorted(get_args(SolverName)) == sorted(SOLVERS)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_keeps_the_limit_and_reports_a_bound(name, tables, brute_force):
    reached = 0
    for seed in range(25):
        loss, costs = tables(seed, 5, 4)
        low, high = costs[0].min(axis=1).sum(), costs[0].max(axis=1).sum()
        for limit in (low, (2 * low + high) // 3, (low + 2 * high) // 3, high):
            best = brute_force(loss, costs, [limit])
            choice = SOLVERS[name](loss, costs, [limit])
            if best is None:
                assert choice is None
                continue
            if choice is None:
                # alone allowed to the one that looks at no mixture
                fits = (costs[0].sum(axis=0) <= limit) & np.isfinite(loss).all(axis=0)
                assert name == "uniform" and not fits.any()
                continue
            rows = np.arange(5)
            assert choice.costs == (costs[0][rows, list(choice.picks)].sum(),)
            assert choice.cost <= limit
            assert choice.loss == pytest.approx(loss[rows, list(choice.picks)].sum())
            assert choice.bound <= best + 1e-9 and best <= choice.loss + 1e-9
            if name in EXACT:
                assert choice.exact
                assert choice.loss == pytest.approx(best)
            reached += choice.loss <= best + 1e-9
    assert reached >= {"uniform": 0, "lagrangian": 50, "ordering": 50}.get(name, 90)


def test_lagrangian_is_within_one_step_of_the_best(tables, brute_force):
    for seed in range(25):
        loss, costs = tables(seed, 5, 4)
        frontier = sweep(loss, costs[0])
        for limit in np.linspace(frontier.cost[0], frontier.cost[-1], 5).astype(int):
            best = brute_force(loss, costs, [limit])
            corner = frontier.corner(limit)
            step = frontier.loss[corner] - frontier.loss[min(corner + 1, len(frontier.loss) - 1)]
            assert SOLVERS["lagrangian"](loss, costs, [limit]).loss - best <= step + 1e-12


def test_uniform_is_the_best_of_one_candidate_for_all():
    loss = np.array([[3.0, 1.0, 0.2], [3.0, 1.0, 0.1]])
    costs = np.array([[[1, 2, 4], [1, 2, 4]], [[5, 4, 1], [5, 4, 1]]])
    assert SOLVERS["uniform"](loss, costs, [5, 9]).picks == (1, 1)
    assert SOLVERS["uniform"](loss, costs, [8, 9]).picks == (2, 2)
    assert SOLVERS["uniform"](loss, costs, [3, 9]) is None
    loss[0, 1] = np.inf
    assert SOLVERS["uniform"](loss, costs, [5, 10]).picks == (0, 0)


@pytest.mark.parametrize("name", ["lagrangian", "pareto", "ordering"])
def test_a_solver_of_one_limit_names_the_one_of_several(name):
    assert solver_for(name, 1) == name
    with pytest.raises(UsageError, match=f"{name} takes one limit, not 2.*integer-program"):
        solver_for(name, 2)


def test_the_dynamic_program_leaves_several_limits_to_the_integer_program():
    assert solver_for("dynamic-program", 1) == "dynamic-program"
    assert solver_for("dynamic-program", 2) == "integer-program"
    assert solver_for("integer-program", 3) == "integer-program"


def test_a_program_that_finds_nothing_in_time_is_an_error(monkeypatch, tables):
    ended = ProgramResult(status="time limit", choice=None)
    monkeypatch.setattr(solvers, "integer_program", lambda *_, **__: ended)
    with pytest.raises(ResourceError, match="found no plan in 60 s"):
        SOLVERS["integer-program"](*tables(0, 3, 3), [10])
