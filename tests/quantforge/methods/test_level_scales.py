"""Scales of few levels against the table of Gaussian errors, brute force, and their one scale."""

import math

import pytest
import torch

from quantforge.methods.gptq import fit_grid, gptq
from quantforge.methods.level_scales import level_scales, mean_scales
from quantforge.methods.rtn import minmax_scale, round_to_nearest
from quantforge.numerics import factorize
from quantforge.types import QuantSpec

TERNARY, BALANCED = QuantSpec(2, -1, grid="ternary"), QuantSpec(2, -1, grid="balanced")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight, scale, spec):
    made = round_to_nearest(weight, scale, spec).dequantize()
    return float((made - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize(
    # Gaussian weights, methods.md section 0: error and step of the best uniform grid of 3 and 4
    ("spec", "step", "error"), [(TERNARY, 1.2240, 0.190174), (BALANCED, 0.9957, 0.118846)]
)  # fmt: skip
def test_gaussian_weights_lose_what_the_table_says(spec, step, error):
    weight = drawn(4, 60_000)
    scale = level_scales(weight, torch.ones(60_000), spec)
    assert torch.allclose(scale, torch.full_like(scale, step), rtol=0.02)
    assert relative_error(weight, scale, spec) == pytest.approx(error, rel=0.01)


def test_bitnets_scale_is_the_mean_and_loses_more():
    weight = drawn(4, 60_000)
    scale = mean_scales(weight, TERNARY)
    assert torch.equal(scale[:, 0], weight.abs().mean(1).bfloat16().float())
    # identity 23: 0.41369 of squares that are π/2
    expected = 0.41369 / (math.pi / 2)
    assert relative_error(weight, scale, TERNARY) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("grid", ["ternary", "balanced"])
@pytest.mark.parametrize("size", [-1, 0, 12])
def test_no_scale_is_much_better(grid, size):
    spec = QuantSpec(2, size, grid=grid)
    weight, importance = drawn(6, 24, seed=3), drawn(24, seed=4).abs()
    weight[2] *= 3.0
    found = level_scales(weight, importance, spec)

    def errors(scale):
        made = round_to_nearest(weight, scale, spec).dequantize()
        lost = (importance * (made - weight).square()).view(6, found.shape[1], -1).sum(-1)
        return lost.sum().expand_as(lost) if size == 0 else lost

    tried = torch.linspace(0.01, 8.0, 4000).bfloat16().float()
    best = torch.stack([errors(torch.full_like(found, float(one))) for one in tried]).amin(0)
    assert bool((errors(found) <= 1.02 * best).all())
    if size == 0:
        assert len(found.unique()) == 1
        assert len(minmax_scale(weight, spec).unique()) == 1
        assert len(mean_scales(weight, spec).unique()) == 1


def test_groups_of_zeros_have_a_scale():
    weight = torch.zeros(2, 8)
    for spec in (TERNARY, BALANCED):
        assert torch.equal(level_scales(weight, torch.ones(8), spec), torch.ones(2, 1))
    assert torch.equal(mean_scales(weight, TERNARY), torch.ones(2, 1))


@pytest.mark.parametrize("grid", ["ternary", "balanced"])
@pytest.mark.parametrize("fit", ["diagonal", "minmax", "mse"])
def test_error_feedback_keeps_to_the_levels_and_gains(grid, fit):
    spec = QuantSpec(2, 16, grid=grid)
    weight, inputs = drawn(24, 64), drawn(64, 400, seed=1)
    inputs = drawn(64, 64, seed=2) @ inputs
    gram = inputs @ inputs.T / 400
    factor = factorize(gram, damping=0.01)
    scale, zero = fit_grid(weight, factor, spec, fit)
    assert zero is None
    errors = []
    for made in (gptq(weight, factor, spec, grid=fit), round_to_nearest(weight, scale, spec)):
        assert int(made.codes.max()) == spec.top
        difference = made.dequantize() - weight
        errors.append(float((difference @ gram * difference).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_the_mean_is_of_ternary_grids():
    factor = factorize(torch.eye(8), damping=0.01)
    with pytest.raises(ValueError, match="absmean is of ternary grids, not of 3b-pc"):
        fit_grid(drawn(2, 8), factor, QuantSpec(3), "absmean")
    scale, _ = fit_grid(drawn(2, 8), factor, TERNARY, "absmean")
    assert torch.equal(scale, mean_scales(drawn(2, 8), TERNARY))
