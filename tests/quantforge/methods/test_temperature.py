"""The first temperature (identity 23) and the multipliers of the layers."""

from __future__ import annotations

import math

import pytest
import torch

from quantforge.errors import InputError
from quantforge.methods.hestia import soft_weight
from quantforge.methods.rtn import minmax_scale
from quantforge.methods.temperature import (
    TERNARY_SPREAD,
    optimal_temperature,
    relative_spread,
    sensitivity_scores,
    soft_error,
    temperature_multipliers,
)
from quantforge.types import QuantSpec

TERNARY = {"top": 2, "zero": 1.0, "spread": TERNARY_SPREAD}


def test_identity_23_the_first_temperature_of_ternary_weights():
    temperature = optimal_temperature()
    assert temperature == pytest.approx(0.35089, abs=1e-4)
    assert soft_error(temperature, **TERNARY) == pytest.approx(0.36759, abs=1e-5)
    for other in (temperature - 0.01, temperature + 0.01):
        assert soft_error(other, **TERNARY) > soft_error(temperature, **TERNARY)


def test_identity_23_rounding_is_the_cold_end():
    assert soft_error(1e-3, **TERNARY) == pytest.approx(0.41369, abs=2e-3)


@pytest.mark.parametrize(
    # The best uniform steps of a Gaussian (methods.md, section 0), a level of 0, and an
    # independent quadrature with all levels.
    ("bits", "step", "temperature", "error"),
    [(2, 0.9957, 0.39, 0.0849), (3, 0.586, 0.46, 0.0403), (4, 0.3352, 0.55, 0.0238)],
)
def test_finer_grids_start_warmer(bits, step, temperature, error):
    given = {"top": (1 << bits) - 1, "zero": 2.0 ** (bits - 1), "spread": 1 / step}
    found = optimal_temperature(**given)
    assert found == pytest.approx(temperature, abs=0.02)
    assert soft_error(found, **given) == pytest.approx(error, abs=2e-4)


def test_the_error_is_that_of_random_weights():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    spec, scale = QuantSpec(3), torch.full((64, 1), 0.6)
    spread = relative_spread(weight, scale)
    assert spread == pytest.approx(1 / 0.6, rel=0.02)
    soft = soft_weight(weight, scale, spec, temperature=0.5)
    measured = float(((soft - weight) / 0.6).square().mean())
    assert measured == pytest.approx(soft_error(0.5, top=7, zero=4.0, spread=spread), rel=0.03)


def test_the_spread_is_in_steps_of_each_group():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(4, 16)
    scale = minmax_scale(weight, spec)
    assert relative_spread(3 * weight, -3 * scale) == pytest.approx(relative_spread(weight, scale))


def test_multipliers_of_the_published_formula():
    traces = [1.0, 10.0, 100.0]
    deviation = math.log(10.0) * math.sqrt(2.0 / 3.0)
    score = 1 / (1 + math.exp(-math.log(10.0) / deviation))
    assert sensitivity_scores(traces) == pytest.approx([1 - score, 0.5, score])
    multipliers = temperature_multipliers(traces, strength=0.4)
    expected = [math.exp(-0.4 * s) for s in (1 - score, 0.5, score)]
    assert multipliers == pytest.approx(expected)


def test_both_signs_of_the_strength():
    traces = [0.1, 3.0, 40.0, 41.0]
    earlier = temperature_multipliers(traces, strength=0.5)
    later = temperature_multipliers(traces, strength=-0.5)
    assert earlier == sorted(earlier, reverse=True)  # large traces are cooler
    assert later == sorted(later)
    assert all(a * b == pytest.approx(1.0) for a, b in zip(earlier, later, strict=True))
    assert all(math.exp(-0.5) < one < 1 for one in earlier)
    assert temperature_multipliers(traces, strength=0.0) == [1.0] * 4
    steep = sensitivity_scores(traces, gain=100.0)
    assert (steep[0], steep[-1]) == pytest.approx((0.0, 1.0))


def test_equal_traces_and_a_single_one_are_in_the_middle():
    assert sensitivity_scores([0.3] * 5) == [0.5] * 5
    assert sensitivity_scores([7.0]) == [0.5]


def test_a_negative_estimate_does_not_spoil_the_others():
    clean = sensitivity_scores([1.0, 1.0, 2.0, 4.0])
    assert sensitivity_scores([-0.5, 1.0, 2.0, 4.0]) == pytest.approx(clean)
    for wrong in ([0.0, -1.0], [], [1.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(InputError, match="traces are not finite or none is positive"):
            sensitivity_scores(wrong)


@pytest.mark.parametrize("spread", [0.0, -1.0, math.nan, math.inf])
def test_a_spread_that_is_none_is_refused(spread):
    with pytest.raises(ValueError, match="a spread must be positive and finite"):
        optimal_temperature(spread=spread)


def test_weights_that_have_no_spread_are_refused():
    for weight, scale in ((torch.zeros(0, 8), torch.ones(0, 2)), (torch.ones(2, 8), torch.ones(2))):
        with pytest.raises(ValueError, match="no spread"):
            relative_spread(weight, scale)
    with pytest.raises(ValueError, match="have no rows of 3 groups"):
        relative_spread(torch.ones(2, 8), torch.ones(2, 3))
