"""Correction factors from measured uniform networks."""

import math

import pytest
import torch

from quantforge.search.correction import (
    corrected,
    correction_factors,
    distance,
    relative_error,
)
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SPECS = (QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(3, 128), QuantSpec(3, -1), QuantSpec(8))


def table():
    layers = tuple(
        LayerInfo(name=n, out_features=4, in_features=256, block=0, stage=0, fused_group=n)
        for n in "ab"
    )
    loss = torch.tensor([[0.6, 0.1, 0.12, 0.2, 1e-5], [0.4, 0.1, torch.inf, 0.2, 1e-5]])
    return Sensitivity(
        layers=layers, specs=SPECS, loss=loss.double(), error=loss, estimator="", fingerprint=""
    )


def test_factors_are_measured_over_predicted_and_reach_to_the_nearest_spec():
    measured = {SPECS[0]: 1.5, SPECS[1]: 0.22, SPECS[3]: 0.6, SPECS[4]: 1e-4}
    factors = correction_factors(table(), measured)
    assert factors[SPECS[0]] == pytest.approx(1.5)
    assert factors[SPECS[1]] == pytest.approx(1.1)
    assert factors[SPECS[3]] == pytest.approx(1.5)
    assert factors[SPECS[2]] == factors[SPECS[1]]  # 128 is nearer to 64 than to the whole row
    assert factors[SPECS[4]] == factors[SPECS[3]]  # too small to measure: nearest is 3b-pc
    fixed = corrected(table(), factors)
    assert float(fixed.loss[:, 0].sum()) == pytest.approx(1.5)
    assert float(fixed.loss[:, 1].sum()) == pytest.approx(0.22)
    assert torch.isinf(fixed.loss[1, 2])


def test_nothing_measured_changes_nothing():
    assert set(correction_factors(table(), {}).values()) == {1.0}


def test_zero_points_count_less_than_twice_the_group():
    sym, asym = QuantSpec(3, 64), QuantSpec(3, 64, symmetric=False)
    assert 0 < distance(sym, asym) < distance(sym, QuantSpec(3, 128))
    measured = {QuantSpec(3, 128): 0.5, QuantSpec(3, 128, symmetric=False): 0.7}
    nearest = {s: min(measured, key=lambda other, s=s: distance(s, other)) for s in (sym, asym)}
    assert measured[nearest[sym]] == 0.5
    assert measured[nearest[asym]] == 0.7


def test_bits_count_more_than_groups():
    assert distance(QuantSpec(3, 64), QuantSpec(3, 128)) < distance(
        QuantSpec(3, 64), QuantSpec(2, 64)
    )


def test_the_relative_error_adds_up_jumps_residuals_and_noise():
    raw = table()
    measured = {SPECS[0]: (1.5, 0.03), SPECS[1]: (0.22, 0.011), SPECS[4]: (1e-4, 1e-5)}
    factors = correction_factors(raw, {spec: kl for spec, (kl, _) in measured.items()})
    jump = math.log(1.5 / 1.1) ** 2  # each is the other's neighbour; the last is too small
    noise = (0.02**2 + 0.05**2) / 2
    fixed = relative_error(corrected(raw, factors), factors, measured)
    assert fixed == pytest.approx(math.sqrt(jump + noise))
    misses = (math.log(1.5) ** 2 + math.log(1.1) ** 2) / 2
    uncorrected = relative_error(raw, dict.fromkeys(SPECS, 1.0), measured)
    assert uncorrected == pytest.approx(math.sqrt(misses + noise))
    assert relative_error(raw, factors, {SPECS[0]: (1.5, 0.03)}) is None
    assert relative_error(raw, factors, {}) is None
