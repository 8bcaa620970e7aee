"""The trained layer: where it starts, what it becomes, and that a step's gradient is exact."""

import pytest
import torch

from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.train.layer import TrainedLinear, first_weight
from quantforge.train.quantizers import HARD, QUANTIZERS, Hardness
from quantforge.types import QuantSpec

SPECS = [QuantSpec(2, 16), QuantSpec(3, 32, symmetric=False), QuantSpec(4), QuantSpec(8, 16)]
each = pytest.mark.parametrize("spec", SPECS, ids=str)
# "absmean" is of ternary grids alone: see test_levels.py
every = pytest.mark.parametrize(
    "quantizer", [name for name, one in QUANTIZERS.items() if one.learns_scales]
)


def example(spec, seed=0):
    """A float weight and codes that rounding would not give: every seventh is moved by one."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    scale, zero = minmax_grid(weight, spec)
    made = round_to_nearest(weight, scale, spec, zero)
    codes = made.codes.clone()
    codes.view(-1)[::7] = (codes.view(-1)[::7].int() + 1).clamp(max=(1 << spec.bits) - 1).byte()
    return weight, type(made)(codes=codes, scale=made.scale, zero=made.zero, spec=spec)


def layer(spec, quantizer="hestia", start="compensated", bias=None):
    weight, quantized = example(spec)
    return TrainedLinear(
        quantized, first_weight(weight, quantized, start), QUANTIZERS[quantizer], bias
    )


@each
@every
def test_it_starts_at_the_compensated_codes(spec, quantizer):
    made, (_, quantized) = layer(spec, quantizer), example(spec)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made(x), x @ quantized.dequantize().T)
    made.prepare(HARD, torch.float32)
    assert torch.equal(made(x), x @ quantized.dequantize().T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made.release()
        low = x.bfloat16() @ quantized.dequantize(torch.bfloat16).T
        assert torch.equal(made(x), low)
    finished = made.finish()
    assert torch.equal(finished.codes, quantized.codes)
    assert torch.equal(finished.scale, quantized.scale)
    assert (finished.zero is None) == spec.symmetric
    assert spec.symmetric or torch.equal(finished.zero, quantized.zero)


@each
def test_without_pressure_it_is_the_float_weight_as_far_as_the_codes_allow(spec):
    weight, quantized = example(spec)
    made = layer(spec)
    made.prepare(Hardness(temperature=0.3, pressure=0.0), torch.float32)
    x = torch.eye(64)
    scale = quantized.scale.float().repeat_interleave(64 // quantized.scale.shape[1], 1)
    away = ((made(x).T - weight) / scale).abs()
    # float weights inside 0.9 of their cell are kept; a moved code takes its weight along
    inside = ((weight - quantized.dequantize()) / scale).abs() <= 0.45
    assert inside.float().mean() > 0.7
    assert away[inside].max() < 1e-4
    expected = ((weight - quantized.dequantize()) / scale).abs() - 0.45
    assert torch.allclose(away[~inside], expected[~inside], atol=1e-3)


def test_the_other_starts_are_what_they_say():
    weight, quantized = example(SPECS[0])
    assert torch.equal(first_weight(weight, quantized, "dequantized"), quantized.dequantize())
    first = first_weight(weight, quantized, "float")
    assert torch.equal(first, weight)
    assert first.data_ptr() != weight.data_ptr()  # training must not write into the caller's


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
@every
def test_gradients_of_several_passes_are_those_of_one_graph(spec, quantizer):
    made, hardness = layer(spec, quantizer), Hardness(temperature=0.4, pressure=0.7)
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(5, 64, generator=generator) for _ in range(3)]
    toward = [torch.randn(5, 24, generator=generator) for _ in range(3)]
    made.prepare(hardness, torch.float32)
    for x, g in zip(inputs, toward, strict=True):
        (made(x) * g).sum().backward()
    assert made.weight.grad is None  # nothing is taken back before it is collected
    made.collect()
    found = made.weight.grad.clone(), made.change.grad.clone()

    weight, quantized = example(spec)
    first = first_weight(weight, quantized, "compensated").requires_grad_()
    scale = quantized.scale.float().requires_grad_()
    used = QUANTIZERS[quantizer].quantize(
        first, scale, spec, quantized.zero, hardness, torch.float32
    )
    sum((x @ used.T * g).sum() for x, g in zip(inputs, toward, strict=True)).backward()
    assert torch.allclose(found[0], first.grad, atol=1e-5)
    # the change is relative: its gradient is the scale's times the scale
    assert torch.allclose(found[1], scale.grad * scale.detach(), rtol=1e-4, atol=1e-5)
    assert found[0].abs().sum() > 0 < found[1].abs().sum()


def test_a_scale_that_would_vanish_stays_and_bias_is_added():
    bias = torch.nn.Parameter(torch.arange(24.0))
    made = layer(SPECS[0], bias=bias)
    with torch.no_grad():
        made.change[3, 1] = -1.0
    finished = made.finish()
    assert finished.scale[3, 1] == made.quantized.scale[3, 1] != 0
    assert torch.equal(made(torch.zeros(1, 64))[0], bias.detach())


def test_moved_weights_and_scales_are_rounded_as_they_run():
    made = layer(SPECS[1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.weight.add_(torch.randn(24, 64, generator=generator), alpha=0.3)
        made.change.add_(torch.randn(made.change.shape, generator=generator), alpha=0.1)
    x = torch.eye(64)
    assert torch.equal(made(x).T, made.finish().dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_first_temperature_is_the_one_of_the_grid(bits):
    from quantforge.methods.temperature import optimal_temperature, relative_spread

    made = layer(QuantSpec(bits, 16))
    spread = relative_spread(made.weight, made.base)
    exact = optimal_temperature(top=(1 << bits) - 1, zero=float(1 << (bits - 1)), spread=spread)
    assert made.first_temperature() == pytest.approx(exact, rel=0.05)
