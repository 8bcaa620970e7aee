"""The continuous optimum: equal slopes, the budget, and the conditions at its bounds."""

import numpy as np
import pytest

from quantforge.errors import BudgetError
from quantforge.search.water_filling import water_filling


def instance(seed, layers=9):
    generator = np.random.default_rng(seed)
    return np.exp(generator.normal(0, 2, layers)), generator.integers(1, 100, layers)


def test_slopes_are_equal_and_the_mean_is_the_budget():
    error, weights = instance(0)
    bits = water_filling(error, weights, 3.0)
    slope = error * 4.0**-bits / weights
    assert slope == pytest.approx(slope[0])
    assert weights @ bits == pytest.approx(3 * weights.sum())
    shift = 0.5 * np.log2(error / weights)
    assert bits == pytest.approx(3 + shift - (weights @ shift) / weights.sum())


@pytest.mark.parametrize(
    ("lowest", "highest"), [(2, 8), (2.9, 3.1), (2, np.inf), (-np.inf, 4), (3, 3), (0, 3)]
)
@pytest.mark.parametrize("seed", range(6))
def test_bounds_hold_the_budget_is_kept_and_no_trade_helps(lowest, highest, seed):
    error, weights = instance(seed)
    bits = water_filling(error, weights, 3.0, lowest=lowest, highest=highest)
    assert weights @ bits == pytest.approx(3 * weights.sum())
    assert (bits >= lowest - 1e-12).all() and (bits <= highest + 1e-12).all()
    # Karush-Kuhn-Tucker: no bit is worth more where it could be added than where it is taken from
    slope = np.log2(error / weights) - 2 * bits
    can_rise, can_fall = bits < highest - 1e-9, bits > lowest + 1e-9
    if can_rise.any() and can_fall.any():
        assert slope[can_rise].max() <= slope[can_fall].min() + 1e-9


@pytest.mark.parametrize("mean", [2.0, 2.001, 7.999, 8.0])
def test_budgets_at_the_ends_are_met(mean):
    error, weights = instance(7)
    bits = water_filling(error, weights, mean, lowest=2, highest=8)
    assert weights @ bits == pytest.approx(mean * weights.sum())


def test_impossible_budgets_and_wrong_tables_are_refused():
    error, weights = instance(1)
    with pytest.raises(BudgetError, match=r"1\.5 bits is not between 2 and 8"):
        water_filling(error, weights, 1.5, lowest=2, highest=8)
    with pytest.raises(ValueError, match="positive"):
        water_filling(np.zeros(2), np.ones(2), 3.0)
