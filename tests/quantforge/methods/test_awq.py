"""Channel scaling leaves the float network alone, and finds what a known problem needs."""

import math

import pytest
import torch

from quantforge.methods.awq import (
    channel_scale,
    clip_groups,
    diagonal_blocks,
    divide_outputs,
    multiply_inputs,
    rounding_error,
    search_clip,
    search_scale,
)
from quantforge.methods.gptq import fit_grid
from quantforge.methods.rtn import minmax_grid, minmax_scale, round_to_nearest
from quantforge.numerics import factorize, output_error
from quantforge.testing import markov_tokens, tiny_llama
from quantforge.types import QuantSpec


def magnitudes(size, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).double() ** 4 * 10


def test_channel_scale_by_hand():
    magnitude = torch.tensor([1.0, 4.0, 16.0, 0.0])
    powers = torch.tensor([1.0, 2.0, 4.0, 0.01])
    assert torch.allclose(channel_scale(magnitude, 0.5), powers / math.sqrt(4.0 * 0.01))
    assert torch.equal(channel_scale(magnitude, 0.0), torch.ones(4))


@torch.no_grad()
def test_folded_scales_leave_the_network_as_it_was():
    model = tiny_llama(heads=4, kv_heads=4).double()
    tokens = markov_tokens(2, 16)
    expected = model(input_ids=tokens).logits
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        folds = (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
            (attention.v_proj, (attention.o_proj,)),
        )
        for number, (previous, readers) in enumerate(folds):
            size = readers[0].in_features
            scale = channel_scale(magnitudes(size, seed=10 * index + number), 0.5)
            assert scale.max() / scale.min() > 10
            previous.weight.copy_(divide_outputs(previous.weight, scale))
            for reader in readers:
                reader.weight.copy_(multiply_inputs(reader.weight, scale))
    found = model(input_ids=tokens).logits
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_outputs_and_bias_are_divided_alike():
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=generator) for size in ((5, 3), (5,)))
    inputs, scale = torch.randn(7, 3, generator=generator), torch.rand(5, generator=generator) + 0.5
    found = inputs @ divide_outputs(weight, scale).T + divide_outputs(bias, scale)
    assert torch.allclose(found, (inputs @ weight.T + bias) / scale, atol=1e-6)


def problem(rows=64, columns=64, seed=0):
    """Weights, and a gram with a few channels of large activations; mean |x|."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4000, columns, generator=generator)
    inputs[:, ::16] *= 20.0
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs / len(inputs), inputs.abs().mean(0)


def plain_loss(weight, gram, spec):
    """Output error of plain rounding as a function of the channel scale."""

    def loss(scale):
        scaled = multiply_inputs(weight, scale)
        rounded = round_to_nearest(scaled, minmax_scale(scaled, spec), spec).dequantize()
        return float(output_error(rounded / scale - weight, gram).sum())

    return loss


def test_search_finds_the_exponent_of_least_loss():
    weight, gram, magnitude = problem()
    loss = plain_loss(weight, gram, QuantSpec(3, 32))
    found = search_scale(magnitude, loss)
    losses = [loss(channel_scale(magnitude, i / 20)) for i in range(20)]
    assert found.exponent == losses.index(min(losses)) / 20
    assert found.loss == min(losses)
    assert found.unscaled_loss == losses[0]
    assert torch.equal(found.scale, channel_scale(magnitude, found.exponent))
    assert found.loss < 0.7 * found.unscaled_loss


@pytest.mark.parametrize("grid", ["minmax", "diagonal", "conditional"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_error_is_that_of_the_layer_on_divided_inputs(grid, symmetric):
    spec = QuantSpec(3, 16, symmetric)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight = torch.randn(12, 32, generator=generator)
    scale = torch.rand(32, generator=generator) + 0.5
    gram = inputs.T @ inputs / 500
    # neither damping nor the order of columns goes along with a scaling: leave both out
    plain = {"damping": 1e-7, "act_order": False}
    found = rounding_error(weight, gram, factorize(gram, **plain), spec, grid, scale)
    divided = inputs / scale
    factor = factorize(divided.T @ divided / 500, **plain)
    steps, zero = fit_grid(weight * scale, factor, spec, grid)
    rounded = round_to_nearest(weight * scale, steps, spec, zero).dequantize()
    expected = float((divided @ rounded.T - inputs @ weight.T).square().mean(0).sum())
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_scale_that_makes_rounding_exact_is_found():
    """Weights on the grid, but a quarter where inputs are 16 instead of 1: r = 1/2 undoes that."""
    weight = torch.randint(-2, 2, (6, 16), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 1] = -2.0  # every row reaches the end of the grid
    magnitude = torch.ones(16)
    weight[:, ::4] /= 4.0
    magnitude[::4] = 16.0
    gram, spec = torch.diag(magnitude.square()), QuantSpec(2)
    factor = factorize(gram)
    found = search_scale(
        magnitude, lambda scale: rounding_error(weight, gram, factor, spec, "mse", scale)
    )
    assert found.exponent == 0.5
    assert torch.equal(found.scale, torch.where(magnitude > 1, 2.0, 0.5))
    assert found.loss < 1e-9
    assert found.unscaled_loss > 10.0


def test_search_keeps_ones_where_scaling_does_not_help():
    unchanged = search_scale(magnitudes(8), lambda scale: float((scale - 1.0).square().sum()))
    assert (unchanged.exponent, unchanged.loss) == (0.0, 0.0)
    broken = search_scale(magnitudes(8), lambda _: math.nan)
    assert torch.equal(broken.scale, torch.ones(8, dtype=torch.float64))


def test_diagonal_blocks_are_the_groups_own_grams():
    matrix = torch.arange(36.0).view(6, 6)
    assert torch.equal(diagonal_blocks(matrix, 3)[1], matrix[2:4, 2:4])


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_is_the_best_of_all_trials(symmetric):
    spec = QuantSpec(3, 16, symmetric)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 48, generator=generator) ** 3
    inputs = torch.randn(300, 48, generator=generator)
    inputs += 0.5 * inputs.roll(1, 1)
    gram = inputs.T @ inputs / 300
    limit = search_clip(weight, gram, spec)
    for row in range(6):
        for group in range(3):
            part = weight[row : row + 1, 16 * group : 16 * group + 16]
            seen = inputs[:, 16 * group : 16 * group + 16]
            errors = []
            for step in range(10):
                bound = float(part.abs().max()) * (1 - step / 20)
                clipped = part.clamp(-bound, bound)
                whole = QuantSpec(3, -1, symmetric)
                grid = (minmax_scale(clipped, whole), None)
                if not symmetric:
                    grid = minmax_grid(clipped, whole)
                made = round_to_nearest(clipped, grid[0], whole, grid[1]).dequantize()
                errors.append(float(((made - part) @ seen.T).square().mean()))
            best = float(part.abs().max()) * (1 - errors.index(min(errors)) / 20)
            assert float(limit[row, group]) == pytest.approx(best)


def test_clipping_lowers_the_error_of_heavy_tailed_weights():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) ** 3
    _, gram, _ = problem()
    spec = QuantSpec(3, 32)
    clipped = clip_groups(weight, search_clip(weight, gram, spec))
    assert (clipped.abs() <= weight.abs()).all()
    errors = [
        output_error(
            round_to_nearest(values, minmax_scale(values, spec), spec).dequantize() - weight, gram
        ).sum()
        for values in (weight, clipped)
    ]
    assert errors[1] < 0.9 * errors[0]
