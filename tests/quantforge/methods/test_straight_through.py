"""Straight-through quantizers against the published formulas (identity 24), in float64."""

from __future__ import annotations

import math

import pytest
import torch

from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.methods.straight_through import (
    absmean_ternary,
    first_clip,
    first_step,
    gradient_factor,
    learned_step,
    stretched_elastic,
)
from quantforge.types import QuantSpec


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, *inputs):
    """What is made of 4 x 24 weights, and the gradients of all inputs under one of it."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    made = function(*leaves)
    made.backward(drawn(4, 24, seed=9).to(made.dtype))
    return made.detach(), *(leaf.grad for leaf in leaves)


def grouped(tensor, groups):
    return tensor.view(len(tensor), groups, -1)


@pytest.mark.parametrize("spec", [QuantSpec(2, 8), QuantSpec(3), QuantSpec(4, 12)], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_identity_24_the_gradient_of_a_learned_step(spec, sign):
    weight, groups = drawn(4, 24), spec.groups(24)
    size = torch.rand(4, groups, generator=torch.Generator().manual_seed(1)).double()
    step = sign * (0.8 + 0.4 * size) * 1.2 / (spec.code_max + 1)
    made, at_weight, at_step = gradients(lambda w, s: learned_step(w, s, spec), weight, step)
    low, high = spec.code_min, spec.code_max
    v = grouped(weight, groups) / step.unsqueeze(-1)
    expected = (v.round().clamp(low, high) * step.unsqueeze(-1)).view_as(weight)
    assert torch.equal(made, expected)
    slope = grouped(drawn(4, 24, seed=9), groups)
    inside = (v >= low) & (v <= high)
    assert 0.3 < float(inside.double().mean()) < 0.99  # both cases are there
    own = torch.where(inside, v.round() - v, v.round().clamp(low, high))
    assert set(own[~inside].tolist()) == {float(low), float(high)}
    factor = 1 / math.sqrt(spec.width(24) * high)
    assert torch.allclose(at_step, (slope * own).sum(-1) * factor, rtol=1e-12, atol=1e-14)
    assert torch.equal(at_weight, (slope * inside).view_as(weight))


def test_a_learned_step_with_zero_points():
    spec, weight = QuantSpec(3, 12, symmetric=False), drawn(4, 24) + 0.5
    scale, zero = minmax_grid(weight.float(), spec)
    step = 0.7 * scale.double()  # something is clipped
    made, _, at_step = gradients(
        lambda w, s: learned_step(w, s, spec, zero=zero.double()), weight, step
    )
    code = grouped(weight, 2) / step.unsqueeze(-1) + zero.unsqueeze(-1)
    level = code.round().clamp(0, 7) - zero.unsqueeze(-1)
    assert torch.allclose(made, (level * step.unsqueeze(-1)).view_as(weight), rtol=1e-14)
    inside = (code >= 0) & (code <= 7)
    own = level - torch.where(inside, grouped(weight, 2) / step.unsqueeze(-1), 0.0)
    expected = (grouped(drawn(4, 24, seed=9), 2) * own).sum(-1) / math.sqrt(12 * 7)
    assert torch.allclose(at_step, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_is_the_stored_weight_exactly(dtype):
    for spec in (QuantSpec(2, 8), QuantSpec(5), QuantSpec(4, 12, symmetric=False)):
        weight = drawn(5, 24, dtype=torch.float32)
        scale, zero = minmax_grid(weight, spec)
        made = learned_step(weight, scale, spec, zero=zero, dtype=dtype)
        assert torch.equal(made, round_to_nearest(weight, scale, spec, zero).dequantize(dtype))


def test_the_step_of_the_whole_tensor_is_scaled_by_its_size():
    spec, weight, step = QuantSpec(3, 8), drawn(4, 24), torch.full((4, 3), 0.4).double()
    _, _, of_group = gradients(lambda w, s: learned_step(w, s, spec), weight, step)
    _, _, of_tensor = gradients(
        lambda w, s: learned_step(w, s, spec, whole_tensor=True), weight, step
    )
    assert torch.allclose(of_group / of_tensor, torch.full_like(step, math.sqrt(96 / 8)))
    assert gradient_factor(96, 3) == 1 / math.sqrt(288)


@pytest.mark.parametrize("groups", [1, 3])
def test_bitnets_ternary_weights(groups):
    weight = drawn(4, 24)
    made, at_weight = gradients(lambda w: absmean_ternary(w, groups), weight)
    mean = grouped(weight, groups).abs().mean(-1, keepdim=True)
    expected = ((grouped(weight, groups) / mean).round().clamp(-1, 1) * mean).view_as(weight)
    assert torch.allclose(made, expected, rtol=1e-14, atol=0.0)
    assert torch.equal(at_weight, drawn(4, 24, seed=9))  # whole, outside the grid as well
    assert torch.equal(absmean_ternary(torch.zeros(2, 6)), torch.zeros(2, 6))
    half = absmean_ternary(weight.bfloat16(), groups, dtype=torch.float32)
    assert half.dtype == torch.float32


def published_stretched(weight, clip, levels, half, shift, count):
    """ParetoQ's forward pass and gradients, of their formulas, per row."""
    ratio = weight / clip
    inner = ratio.clamp(-0.99, 0.99) * half - shift
    level = (inner.round() + shift) / half
    inside = ratio.abs() <= 0.99
    end = (half - shift) / half * ratio.sign()
    if levels == 3:  # the code has 1 here, which is no level of its ternary grid
        end = level
    own = torch.where(inside, level - ratio, end)
    slope = drawn(4, 24, seed=9)
    largest = max(levels // 2 - 1, 1)
    at_clip = (own * slope).sum(-1, keepdim=True) / math.sqrt(count * largest)
    return level * clip, slope * inside, at_clip


@pytest.mark.parametrize(("levels", "half", "shift"), [(4, 2.0, 0.5), (3, 1.5, 0.0), (8, 4.0, 0.5)])
@pytest.mark.parametrize("whole", [True, False])
def test_paretoqs_balanced_grids(levels, half, shift, whole):
    weight = drawn(4, 24)
    clip = first_clip(weight).double() * torch.tensor([[1.0], [0.8], [0.5], [1.7]]).double()
    made, at_weight, at_clip = gradients(
        lambda w, c: stretched_elastic(w, c, levels, whole_tensor=whole), weight, clip
    )
    expected = published_stretched(weight, clip, levels, half, shift, 96 if whole else 24)
    assert bool((weight.abs() > 0.99 * clip).any())
    for found, wanted in zip((made, at_weight, at_clip), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)
    assert len(torch.unique(torch.round(made / clip * half * 4))) == levels
    assert bool((made == 0).any()) == (levels == 3)


def test_two_bits_are_quarters_and_three_quarters():
    weight = torch.tensor([[-5.0, -0.6, -0.4, -1e-3, 1e-3, 0.4, 0.6, 5.0]])
    made = stretched_elastic(weight, torch.ones(1, 1), 4)
    assert made.tolist() == [[-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75]]
    grouped_clip = torch.tensor([[1.0, 2.0]])
    halves = stretched_elastic(weight, grouped_clip, 4)
    assert halves.tolist() == [[-0.75, -0.75, -0.25, -0.25, 0.5, 0.5, 0.5, 1.5]]


def test_where_training_starts():
    weight = drawn(3, 20, dtype=torch.float32)
    weight[1] = 0.0
    step = first_step(weight, QuantSpec(3, 10))
    mean = weight.view(3, 2, 10).abs().mean(-1)
    assert torch.allclose(step[0], 2 * mean[0] / math.sqrt(3.0))
    assert bool((step[1] > 0).all())
    clip = first_clip(weight, 2)
    assert torch.equal(clip[2], weight[2].view(2, 10).abs().amax(-1))
    assert clip[1].tolist() == [1.0, 1.0]


def test_what_does_not_fit_is_refused():
    weight, step = drawn(4, 24), torch.ones(4, 3).double()
    with pytest.raises(ValueError, match=r"scale must be \(4, 1\)"):
        learned_step(weight, step, QuantSpec(3))
    with pytest.raises(ValueError, match="stores zero-points"):
        learned_step(weight, step, QuantSpec(3, 8, symmetric=False))
    for levels in (2, 65):
        with pytest.raises(ValueError, match="3 to 64 levels"):
            stretched_elastic(weight, step, levels)


def test_weights_of_no_rows_or_no_columns_are_weights():
    spec = QuantSpec(3)
    for shape in ((0, 8), (3, 0)):
        weight = torch.zeros(shape)
        steps = torch.ones(shape[0], 1)
        assert torch.equal(first_clip(weight), steps)
        assert first_step(weight[:, :8], spec).shape == steps.shape
        assert absmean_ternary(weight).shape == shape
        for whole in (True, False):
            assert learned_step(weight, steps, spec, whole_tensor=whole).shape == shape
            assert stretched_elastic(weight, steps, 4, whole_tensor=whole).shape == shape
    for groups in (0, 3):
        with pytest.raises(ValueError, match=f"have no rows of {groups} groups"):
            first_clip(torch.zeros(2, 8), groups)
        with pytest.raises(ValueError, match=f"have no rows of {groups} groups"):
            stretched_elastic(torch.zeros(2, 8), torch.ones(2, groups), 4)
    with pytest.raises(ValueError, match="have no half ranges"):
        stretched_elastic(torch.zeros(2, 8), torch.ones(3, 1), 4)
