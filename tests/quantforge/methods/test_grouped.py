"""Channel groups: all at once equals one after the other, and 1x1 convolutions equal linears."""

import pytest
import torch
from torch import nn

from quantforge.methods.compensation import FEEDBACKS, Feedback
from quantforge.methods.convolution import Geometry, unfolded
from quantforge.methods.gptq import gptq
from quantforge.methods.grouped import (
    compensate_groups,
    factorize_groups,
    fit_groups,
    quantize_groups,
)
from quantforge.numerics import factorize, output_error
from quantforge.types import QuantSpec

SPECS = [QuantSpec(3), QuantSpec(4, symmetric=False), QuantSpec(2, 5), QuantSpec(2, grid="ternary")]


def problem(groups=12, rows=2, width=25, samples=200):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, width, width, generator=generator) / width**0.5
    native = torch.randn(groups, samples, width, generator=generator) @ mixing
    quantized = native + 0.2 * torch.randn(native.shape, generator=generator)
    quantized[0, :, 3] = 0.0  # a dead input
    quantized[1] = 0.0  # a group that saw nothing
    gram = quantized.transpose(1, 2) @ quantized / samples
    cross = (native - quantized).transpose(1, 2) @ quantized / samples
    return torch.randn(groups * rows, width, generator=generator), gram, cross


def test_factors_of_all_groups_are_those_of_each():
    _, gram, _ = problem()
    made = factorize_groups(gram)
    for index, one in enumerate(gram):
        alone = factorize(one)
        assert torch.equal(made.order[index], alone.order)
        assert torch.equal(made.dead[index], alone.dead)
        if not alone.fallback:
            assert torch.allclose(made.upper[index], alone.upper, rtol=1e-4, atol=1e-5)
            importance = made.conditional_importance()[index]
            assert torch.allclose(importance, alone.conditional_importance(), rtol=1e-4)


def test_an_indefinite_gram_gets_more_damping_and_a_hopeless_one_plain_rounding():
    gram = torch.eye(3).repeat(2, 1, 1)
    gram[0, 0, 1] = gram[0, 1, 0] = 1.2
    gram[1, 0, 1] = gram[1, 1, 0] = 1e9
    made = factorize_groups(gram)
    assert torch.isfinite(made.upper).all()
    assert float(made.upper[0, 0, 1].abs()) > 0.0
    assert torch.equal(made.upper[1], torch.diag(made.upper[1].diagonal()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("grid", ["minmax", "diagonal", "conditional"])
def test_all_groups_at_once_give_the_codes_of_one_after_the_other(spec, grid):
    weight, gram, _ = problem()
    apart = quantize_groups(weight, gram, spec, grid=grid, at_once=100)
    together = quantize_groups(weight, gram, spec, grid=grid, at_once=1)
    assert torch.equal(together.scale, apart.scale)
    assert torch.equal(together.codes, apart.codes)
    assert (together.zero is None) == spec.symmetric
    assert spec.symmetric or torch.equal(together.zero, apart.zero)


@pytest.mark.parametrize("name", FEEDBACKS)
def test_every_feedback_is_that_of_linear_layers(name):
    weight, gram, cross = problem()
    keywords = {"cross": cross, "feedback": FEEDBACKS[name], "grid": "mse"}
    apart = quantize_groups(weight, gram, QuantSpec(3), at_once=100, **keywords)
    together = quantize_groups(weight, gram, QuantSpec(3), at_once=1, **keywords)
    assert torch.equal(together.codes, apart.codes)
    plain = quantize_groups(weight, gram, QuantSpec(3), grid="mse", at_once=1)
    assert name == "gptq" or not torch.equal(together.codes, plain.codes)


def test_feedback_beats_rounding_on_the_output():
    weight, gram, _ = problem(groups=200, rows=1, width=9)
    spec = QuantSpec(2)
    factors = factorize_groups(gram)
    scale, _ = fit_groups(weight, factors, spec, "diagonal")
    made = compensate_groups(weight, factors, spec, scale).dequantize()
    plain = ((weight / scale).round().clamp(-2, 1) * scale - weight).view(200, 1, 9)
    errors = [
        sum(float(output_error(one, own).sum()) for one, own in zip(difference, gram, strict=True))
        for difference in ((made - weight).view(200, 1, 9), plain)
    ]
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("bits", [2, 4])
def test_identity_38_a_1x1_convolution_is_a_linear_layer_on_pixels(bits):
    layer = nn.Conv2d(16, 8, 1)
    x = torch.randn(3, 16, 5, 7, generator=torch.Generator().manual_seed(1))
    columns = unfolded(x, Geometry.of(layer))
    made = quantize_groups(
        layer.weight.flatten(1).detach(), columns.transpose(1, 2) @ columns, QuantSpec(bits)
    )
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 16)
    linear = gptq(layer.weight.flatten(1).detach(), factorize(pixels.T @ pixels), QuantSpec(bits))
    assert torch.equal(made.codes, linear.codes)
    assert torch.equal(made.scale, linear.scale)


def test_what_does_not_fit_is_refused():
    weight, gram, cross = problem()
    factors = factorize_groups(gram)
    with pytest.raises(ValueError, match="no grams"):
        quantize_groups(weight[:-1], gram, QuantSpec(3))
    with pytest.raises(ValueError, match="single scale"):
        quantize_groups(weight, gram, QuantSpec(2, 0, grid="ternary"))
    scale = torch.ones(len(weight), 1)
    with pytest.raises(ValueError, match="needs cross"):
        compensate_groups(weight, factors, QuantSpec(3), scale, feedback=FEEDBACKS["qep"])
    form = Feedback(pull=0.1, pull_form="B")
    with pytest.raises(ValueError, match="form C"):
        compensate_groups(weight, factors, QuantSpec(3), scale, cross=cross, feedback=form)
