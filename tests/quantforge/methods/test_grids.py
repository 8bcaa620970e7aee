"""The grid itself: idempotence, the bound on the round trip, order, zero."""

import pytest
import torch

from quantforge.methods.compensation import compensate
from quantforge.methods.rtn import minmax_scale, round_to_nearest
from quantforge.numerics import factorize
from quantforge.types import QuantSpec

UNCORRELATED = factorize(torch.eye(32))


def on_grid(weight, scale, zero, spec):
    if spec.symmetric:
        return round_to_nearest(weight, scale, spec)
    return compensate(weight, UNCORRELATED, spec, scale, zero=zero)


def problem(spec, rows=50):
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(spec.bits))
    groups = weight.view(rows, spec.groups(32), -1)
    if spec.symmetric:
        return weight, minmax_scale(weight, spec), None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / ((1 << spec.bits) - 1) * 1.01).bfloat16().float()
    return weight, scale, (-low / scale).round()


SPECS = [QuantSpec(b, g, s) for b in (2, 3, 4, 8) for g in (8, -1) for s in (True, False)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip_is_within_half_a_step_and_idempotent(spec):
    weight, scale, zero = problem(spec)
    quantized = on_grid(weight, scale, zero, spec)
    step = scale.abs().repeat_interleave(spec.width(32), 1)
    error = (weight - quantized.dequantize()).abs()
    # scales are rounded to bfloat16, which can cut 2^-9 of the largest weight off the range
    assert (error <= 0.5 * step + 2**-8 * weight.abs()).all()
    assert (error <= 0.5 * step * (1 + 1e-5)).float().mean() > 0.95
    again = on_grid(quantized.dequantize(), scale, zero, spec)
    assert torch.equal(again.codes, quantized.codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rounding_keeps_the_order_and_zero(spec):
    scale = torch.full((1, spec.groups(32)), 0.25)
    zero = None if spec.symmetric else torch.full_like(scale, 1.0)
    rising = torch.linspace(-3.0, 3.0, 32).unsqueeze(0)
    values = on_grid(rising, scale, zero, spec).dequantize()
    assert (values.diff() >= 0).all()
    zeros = on_grid(torch.zeros(1, 32), scale, zero, spec)
    assert torch.equal(zeros.dequantize(), torch.zeros(1, 32))


def test_feedback_without_correlation_is_rounding():
    weight, scale, _ = problem(QuantSpec(3, 8))
    rounded = round_to_nearest(weight, scale, QuantSpec(3, 8))
    found = compensate(weight, UNCORRELATED, QuantSpec(3, 8), scale)
    assert torch.equal(found.codes, rounded.codes)
