"""Hestia's soft weights: identities 22 and 23, exact ends, and the published ternary form."""

from __future__ import annotations

import pytest
import torch
from quantforge_kernels.soft_grid import SoftGrid, soft_grid_reference

from quantforge.methods import hestia
from quantforge.methods.hestia import mean_magnitude, soft_codebook, soft_ternary, soft_weight
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.types import QuantSpec

SPECS = [
    QuantSpec(2, 16), QuantSpec(2, 37, symmetric=False), QuantSpec(3), QuantSpec(4, 32),
    QuantSpec(5, 16, symmetric=False), QuantSpec(8, symmetric=False),
]  # fmt: skip
# Codewords of unequal distances, as a normal distribution would have them.
UNEVEN = (-1.0, -0.52, -0.2, 0.0, 0.26, 0.7, 1.0)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grid_of(spec, out=6):
    """A weight of an odd number of rows or columns, and its grid with scales of both signs."""
    columns = 74 if spec.group_size == 37 else 96
    weight = drawn(out, columns) + (0.0 if spec.symmetric else 0.4)
    scale, zero = minmax_grid(weight, spec)
    if spec.symmetric:
        scale = scale * (torch.arange(scale.numel()).view_as(scale) % 2 * 2 - 1)
    return weight, scale, zero


def published(weight, groups, temperature, pressure):
    """The published quantizer, of its formula, without the 1e-6 beside the temperature."""
    grouped = weight.view(len(weight), groups, -1)
    mean = grouped.abs().mean(-1, keepdim=True)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=weight.dtype)
    chance = torch.softmax(-(((grouped / mean).unsqueeze(-1) - levels) ** 2) / temperature, -1)
    return torch.lerp(weight, ((chance * levels).sum(-1) * mean).view_as(weight), pressure)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_identity_22_cold_weights_are_rounded_away_from_thresholds(spec):
    weight, scale, zero = grid_of(spec)
    hard = round_to_nearest(weight, scale, spec, zero).dequantize()
    soft = soft_weight(weight, scale, spec, temperature=1e-3, zero=zero)
    width = spec.width(weight.shape[1])
    step = scale.repeat_interleave(width, 1)
    centre = -spec.code_min if zero is None else zero.repeat_interleave(width, 1)
    code = weight / step + centre
    inside = (code > 0) & (code < (1 << spec.bits) - 1)
    clear = ((code - code.floor() - 0.5).abs() > 0.1) | ~inside
    assert int(clear.sum()) > 0.7 * clear.numel()
    assert float(((soft - hard) / step)[clear].abs().max()) < 1e-6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_identity_22_midway_is_the_mean_of_both_neighbours(sign):
    for bits in (2, 3, 8):
        spec = QuantSpec(bits)
        middles = torch.arange(spec.code_min, spec.code_max) + 0.5
        scale = torch.tensor([[0.25 * sign]])
        soft = soft_weight((middles * scale[0, 0]).unsqueeze(0), scale, spec, temperature=1e-3)
        assert torch.equal(soft[0], middles * scale[0, 0])
    ternary = soft_codebook(
        torch.tensor([[-0.5, 0.5]]), torch.ones(1, 1), hestia.TERNARY, temperature=1e-3
    )
    assert ternary.tolist() == [[-0.5, 0.5]]


def test_identity_22_hot_weights_are_the_codebooks_mean():
    weight, one = drawn(3, 20), torch.ones(3, 1)
    for temperature, error in ((1e3, 1e-2), (1e6, 1e-5), (1e9, 1e-6)):
        ternary = soft_codebook(weight, one, hestia.TERNARY, temperature=temperature)
        assert float(ternary.abs().max()) < error
        two_bits = soft_weight(weight, 0.5 * one, QuantSpec(2), temperature=temperature)
        assert float((two_bits + 0.25).abs().max()) < error


@pytest.mark.parametrize("temperature", [0.05, 0.2, 0.35089, 1.0, 3.0])
def test_identity_22_ternary_has_a_closed_form(temperature):
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).unsqueeze(0)
    one = torch.ones(1, 1, dtype=torch.float64)
    soft = soft_codebook(x, one, hestia.TERNARY, temperature=temperature)
    heat = torch.tensor(temperature, dtype=torch.float64)
    closed = torch.sinh(2 * x / heat) / (torch.cosh(2 * x / heat) + 0.5 * torch.exp(1 / heat))
    assert float((soft - closed).abs().max()) < 2e-15
    narrow = soft_codebook(x.float(), one.float(), hestia.TERNARY, temperature=temperature)
    assert float((narrow - closed).abs().max()) < 1e-6 * (1 + 1 / temperature)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0])
def test_identity_22_the_slope_is_twice_the_variance_over_the_temperature(spec, temperature):
    weight, scale, zero = (None if x is None else x.double() for x in grid_of(spec))
    weight.requires_grad_()
    (slope,) = torch.autograd.grad(
        soft_weight(weight, scale, spec, temperature=temperature, zero=zero).sum(), weight
    )
    centre = scale.new_tensor(-float(spec.code_min)) if zero is None else zero
    grid = SoftGrid(top=(1 << spec.bits) - 1, temperature=temperature)
    (found,) = torch.autograd.grad(soft_grid_reference(weight, scale, centre, grid).sum(), weight)
    codes = torch.arange(1 << spec.bits, dtype=torch.float64)
    grouped = weight.detach().view(*scale.shape, -1) / scale.unsqueeze(-1)
    position = grouped + (centre.unsqueeze(-1) if centre.ndim else centre)
    chance = torch.softmax(-((position.unsqueeze(-1) - codes) ** 2) / temperature, -1)
    variance = (chance * codes**2).sum(-1) - (chance * codes).sum(-1) ** 2
    formula = (2 * variance / temperature).view_as(weight)
    assert float((slope - found).abs().max()) < 1e-10
    assert float((slope - formula).abs().max()) < 1e-8  # the variance's own cancellation


@pytest.mark.parametrize("temperature", [0.003, 0.03, 0.2])
def test_cold_slopes_are_large_and_few(temperature):
    """What `TemperatureSchedule.coldest` is for: the root mean square of the slope is 1/√(3T)."""
    weight = torch.linspace(-3, 2, 100_001)[:-1].unsqueeze(0).requires_grad_()
    soft = soft_weight(weight, torch.ones(1, 1), QuantSpec(3), temperature=temperature)
    (slope,) = torch.autograd.grad(soft.sum(), weight)
    assert float(slope.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(slope.square().mean()) == pytest.approx(1 / (3 * temperature), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 0.35])
def test_identity_23_without_pressure_the_weight_is_the_float_one(temperature, dtype):
    weight = drawn(5, 37, dtype=dtype)
    made = soft_ternary(weight, temperature=temperature, pressure=0.0)
    assert torch.equal(made, weight)
    scale = torch.full((5, 1), 0.3)
    assert torch.equal(
        soft_weight(weight, scale, QuantSpec(3), temperature=temperature, pressure=0.0), weight
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_identity_23_with_all_pressure_and_no_heat_it_is_hard_ternary(groups):
    weight = drawn(5, 111)
    mean = weight.view(5, groups, -1).abs().mean(-1, keepdim=True)
    expected = ((weight.view(5, groups, -1) / mean).round().clamp(-1, 1) * mean).view_as(weight)
    made = soft_ternary(weight, groups, temperature=0.0)
    assert torch.allclose(made, expected, rtol=1e-6, atol=0.0)  # sums of the mean have an order
    scale = mean_magnitude(weight, groups)
    codes = (weight.view(5, groups, -1) / scale.unsqueeze(-1)).round().clamp(-1, 1)
    assert torch.equal(made, (codes * scale.unsqueeze(-1)).view_as(weight))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_pressure_and_no_heat_it_is_the_stored_weight_exactly(spec, dtype):
    weight, scale, zero = grid_of(spec)
    quantized = round_to_nearest(weight, scale, spec, zero)
    made = soft_weight(weight, scale, spec, temperature=0.0, zero=zero, dtype=dtype)
    assert torch.equal(made, quantized.dequantize(dtype))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("temperature", "pressure"), [(0.35089, 1.0), (0.1, 0.3)])
def test_the_published_ternary_weights_and_their_gradients(temperature, pressure, groups):
    weight, gradient = drawn(6, 32, dtype=torch.float64), drawn(6, 32, seed=1, dtype=torch.float64)
    results = []
    for function in (
        lambda w: soft_ternary(w, groups, temperature=temperature, pressure=pressure),
        lambda w: published(w, groups, temperature, pressure),
    ):
        leaf = weight.clone().requires_grad_()
        made = function(leaf)
        made.backward(gradient)
        results.append((made.detach(), leaf.grad))
    for left, right in zip(*results, strict=True):
        assert float((left - right).abs().max()) < 1e-13


def test_gradients_pass_through_the_mean_magnitude():
    weight = drawn(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: soft_ternary(w, 2, temperature=0.35, pressure=0.7), (weight,)
    )


def test_a_group_of_zeros_stays_and_harms_nothing():
    weight = drawn(2, 16)
    weight[0, :8] = 0.0
    weight.requires_grad_()
    for temperature in (0.0, 0.35):
        made = soft_ternary(weight, 2, temperature=temperature)
        assert torch.equal(made[0, :8], torch.zeros(8))
        (slope,) = torch.autograd.grad(made.sum(), weight)
        assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_the_weights_are(dtype):
    weight, gradient = drawn(4, 64, dtype=dtype), drawn(4, 64, seed=1, dtype=dtype)
    spec, results = QuantSpec(3, 32), []
    scale = torch.full((4, 2), 0.37)
    for given in (weight, weight.float()):
        leaf, step = given.clone().requires_grad_(), scale.clone().requires_grad_()
        made = soft_weight(leaf, step, spec, temperature=0.4, pressure=0.5, dtype=torch.float32)
        made.backward(gradient.float())
        results.append((made.detach(), leaf.grad.to(dtype), step.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1].float(), results[1][1].float(), rtol=1e-2, atol=1e-6)
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-4, atol=1e-4)
    assert soft_weight(weight, scale, spec, temperature=0.4).dtype == dtype


@pytest.mark.parametrize("levels", [(-0.75, -0.25, 0.25, 0.75), (0.0, 1.0), hestia.TERNARY])
def test_even_codebooks_take_the_fused_way_with_the_same_result(levels):
    weight, scale = drawn(4, 24, dtype=torch.float64), drawn(4, 2, seed=1, dtype=torch.float64)
    for temperature in (0.0, 0.1, 0.5):
        fused = soft_codebook(weight, scale, levels, temperature=temperature, pressure=0.6)
        slow = hestia._SoftCodebook.apply(
            weight, scale, torch.tensor(levels, dtype=torch.float64), temperature, 0.6
        )
        assert float((fused - slow).abs().max()) < 1e-13


def test_uneven_codebooks():
    weight, scale = drawn(4, 24, dtype=torch.float64), drawn(4, 2, seed=1, dtype=torch.float64)
    levels = torch.tensor(UNEVEN, dtype=torch.float64)
    position = weight.view(4, 2, -1, 1) / scale.view(4, 2, 1, 1)
    for temperature in (0.02, 0.3):
        chance = torch.softmax(-((position - levels) ** 2) / temperature, -1)
        expected = ((chance * levels).sum(-1) * scale.unsqueeze(-1)).view_as(weight)
        made = soft_codebook(weight, scale, UNEVEN, temperature=temperature)
        assert float((made - expected).abs().max()) < 1e-13
    nearest = levels[(position - levels).abs().argmin(-1)] * scale.unsqueeze(-1)
    hard = soft_codebook(weight, scale, UNEVEN, temperature=0.0)
    assert torch.equal(hard, nearest.view_as(weight))
    inputs = (weight[:2, :6].clone().requires_grad_(), scale[:2].clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda w, s: soft_codebook(w, s, UNEVEN, temperature=0.2, pressure=0.7), inputs
    )
    assert torch.equal(soft_codebook(weight, scale, UNEVEN, temperature=0.2, pressure=0.0), weight)


def test_what_does_not_fit_is_refused():
    weight, scale = drawn(4, 24), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"scale must be \(4, 2\) for 3b-g12, got \(4, 3\)"):
        soft_weight(weight, scale, QuantSpec(3, 12), temperature=0.1)
    with pytest.raises(ValueError, match="3b-g8-asym stores zero-points"):
        soft_weight(weight, scale, QuantSpec(3, 8, symmetric=False), temperature=0.1)
    with pytest.raises(ValueError, match="3b-g8 stores no zero-points"):
        soft_weight(weight, scale, QuantSpec(3, 8), temperature=0.1, zero=scale)
    for levels in ((0.0,), (0.0, 0.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="increasing levels"):
            soft_codebook(weight, scale, levels, temperature=0.1)
    with pytest.raises(ValueError, match="have no rows of 5 groups"):
        soft_codebook(weight, torch.ones(4, 5), UNEVEN, temperature=0.1)
    with pytest.raises(ValueError, match="temperature"):
        soft_codebook(weight, scale, UNEVEN, temperature=-0.1)
    with pytest.raises(ValueError, match="no temperature"):
        soft_codebook(weight, scale, UNEVEN, temperature=float("nan"))
    for groups in (0, 5):
        with pytest.raises(ValueError, match=rf"\(4, 24\) have no rows of {groups} groups"):
            mean_magnitude(weight, groups)
    with pytest.raises(ValueError, match="have no rows of 0 groups"):
        soft_codebook(weight, torch.ones(4, 0), UNEVEN, temperature=0.1)


@pytest.mark.parametrize("levels", [UNEVEN, (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_what_is_no_number_stays_so_and_spoils_nothing_else(levels, temperature):
    weight = drawn(2, 8)
    clean = soft_codebook(weight, torch.ones(2, 1), levels, temperature=temperature)
    weight[0, 3] = float("nan")
    found = soft_codebook(weight, torch.ones(2, 1), levels, temperature=temperature)
    assert found.isnan().nonzero().tolist() == [[0, 3]]
    assert torch.equal(found[1], clean[1])


@pytest.mark.parametrize("levels", [UNEVEN, (-1.0, 0.0, 1.0)])
def test_without_pressure_a_scale_of_zero_does_no_harm(levels):
    weight, scale = drawn(2, 8).requires_grad_(), torch.zeros(2, 1, requires_grad=True)
    made = soft_codebook(weight, scale, levels, temperature=0.2, pressure=0.0)
    made.backward(torch.full_like(made, 3.0))
    assert torch.equal(made, weight)
    assert (weight.grad == 3.0).all()
    assert (scale.grad == 0.0).all()


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
@pytest.mark.parametrize("levels", [UNEVEN, (-1.0, 0.0, 1.0)])
def test_the_coldest_weights_are_the_rounded_ones(levels, temperature):
    weight, scale = drawn(3, 40), torch.full((3, 1), 0.9, requires_grad=True)
    cold = soft_codebook(weight, scale, levels, temperature=temperature)
    assert torch.equal(cold, soft_codebook(weight, scale, levels, temperature=0.0))
    cold.sum().backward()
    codes = cold.detach() / 0.9  # no slope: the scale has the codewords' gradient
    assert torch.allclose(scale.grad, codes.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("levels", [UNEVEN, (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_scales_that_are_far_too_small_take_the_end_levels(levels, temperature):
    weight, scale = drawn(3, 40, seed=3), torch.full((3, 2), 1e-39, requires_grad=True)
    made = soft_codebook(weight, scale, levels, temperature=temperature)
    assert torch.equal(made, weight.sign() * scale.detach()[0, 0])
    made.backward(torch.ones_like(made))
    assert torch.equal(scale.grad, weight.sign().view(3, 2, 20).sum(2))


def test_weights_of_no_rows_or_no_columns_are_weights():
    for shape, groups in (((0, 8), 2), ((3, 0), 1)):
        weight = torch.zeros(shape, requires_grad=True)
        assert torch.equal(mean_magnitude(weight, groups), torch.ones(shape[0], groups))
        for levels in (UNEVEN, (-1.0, 0.0, 1.0)):
            for temperature in (0.0, 0.2):
                scale = torch.ones(shape[0], groups, requires_grad=True)
                made = soft_codebook(weight, scale, levels, temperature=temperature)
                assert made.shape == shape
                made.sum().backward()
                assert torch.equal(scale.grad, torch.zeros_like(scale))
