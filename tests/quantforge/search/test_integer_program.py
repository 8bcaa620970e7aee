"""The integer program: several limits, infeasible ones, and a clock that runs out."""

import os

import numpy as np
import pytest

from quantforge.search.integer_program import _nothing_on_stdout, integer_program
from quantforge.search.knapsack import solve


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_equals_brute_force_with_several_limits(resources, share, tables, brute_force):
    met = 0
    for seed in range(12):
        loss, costs = tables(seed, 5, 4, resources=resources)
        limits = (costs.mean(axis=2).sum(axis=1) * share).astype(int)
        expected = brute_force(loss, costs, limits)
        result = integer_program(loss, costs, limits)
        if expected is None:
            assert (result.status, result.choice) == ("infeasible", None)
            continue
        met += 1
        assert result.status == "optimal"
        assert result.choice.exact
        assert result.choice.loss == pytest.approx(expected, rel=1e-9)
        assert (np.array(result.choice.costs) <= limits).all()
    assert met >= 1


def test_equals_the_dynamic_program_with_one_limit():
    # losses over eight orders of magnitude, costs of hundreds of millions of bits
    generator = np.random.default_rng(7)
    for scale in (1e-6, 1.0, 1e4):
        bits = np.array([2, 3, 4, 5, 6, 8])
        size = generator.integers(1, 9, (40, 1)) * 1_000_003
        loss = scale * 4.0**-bits * np.exp(generator.normal(0, 1.5, (40, 6)))
        cost = size * bits
        for mean in (2.3, 3.0, 4.7, 7.9):
            budget = int(mean * size.sum())
            expected = solve(loss, cost, budget)
            result = integer_program(loss, cost[None], [budget])
            assert result.status == "optimal"
            assert result.choice.loss == pytest.approx(expected.loss, rel=1e-8)
            assert result.choice.bound <= expected.loss
            assert result.choice.cost <= budget


def test_a_limit_is_kept_to_the_last_unit():
    # one unit below what the unlimited optimum takes, of half a billion
    loss = np.array([[1.0, 0.0], [1.0, 0.1]])
    costs = np.array([[[0, 250_000_000], [0, 250_000_001]]])
    exactly = integer_program(loss, costs, [500_000_001]).choice
    assert exactly.picks == (1, 1)
    below = integer_program(loss, costs, [500_000_000]).choice
    assert below.picks == (1, 0)
    assert below.cost == 250_000_000


def test_limits_that_contradict_each_other_are_infeasible():
    loss = np.zeros((2, 2))
    costs = np.array([[[0, 9], [0, 9]], [[9, 0], [9, 0]]])
    assert integer_program(loss, costs, [9, 9]).choice.costs == (9.0, 9.0)
    assert integer_program(loss, costs, [9, 8]).status == "infeasible"
    assert integer_program(loss, costs, [18, np.inf]).status == "optimal"
    missing = np.array([[np.inf, np.inf], [0.0, 0.0]])
    assert integer_program(missing, costs, [99, 99]).status == "infeasible"


def test_a_clock_that_runs_out_says_so_and_bounds_what_it_found():
    generator = np.random.default_rng(2)
    costs = generator.integers(10**5, 10**6, (4, 60, 8))
    loss = 10.0**6 - costs.mean(axis=0)  # limits that fight over every layer
    limits = (costs.mean(axis=2).sum(axis=1) * 0.9).astype(int)
    result = integer_program(loss, costs, limits, time_limit=0.3)
    assert result.status == "time limit"
    if result.choice is not None:
        assert result.choice.bound < result.choice.loss
        assert not result.choice.exact
        assert (np.array(result.choice.costs) <= limits).all()
    nothing = integer_program(loss, costs, limits, time_limit=0.0)
    assert (nothing.status, nothing.choice) == ("time limit", None)


def test_tables_that_do_not_belong_together_are_refused():
    loss, costs = np.zeros((2, 3)), np.zeros((1, 2, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="1 limits"):
        integer_program(loss, costs[0], [1])
    with pytest.raises(ValueError, match="2 limits"):
        integer_program(loss, costs, [1, 1])
    with pytest.raises(ValueError, match="numbers"):
        integer_program(np.full((2, 3), np.nan), costs, [1])
    with pytest.raises(ValueError, match="non-negative"):
        integer_program(loss, costs - 1, [1])


def test_stray_lines_of_compiled_code_do_not_reach_standard_output(capfd):
    with _nothing_on_stdout():
        os.write(1, b"stray\n")
    os.write(1, b"result\n")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("result\n", "stray\n")
