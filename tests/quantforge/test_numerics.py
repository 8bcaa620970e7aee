"""Grams against explicit loops, factors against dense inverses."""

import pytest
import torch

from quantforge.errors import InputError
from quantforge.numerics import (
    CrossAccumulator,
    GramAccumulator,
    draw_categorical,
    factorize,
    output_error,
    row_products,
    token_weights,
)


@pytest.mark.parametrize("features", [1, 3, 10, 64])
def test_gram_is_the_mean_outer_product(features):
    inputs = torch.randn(5, 7, features, generator=torch.Generator().manual_seed(0))
    accumulator = GramAccumulator(features)
    accumulator.add(inputs[:2])
    accumulator.add(inputs[2:].double())
    expected = sum(torch.outer(x, x) for x in inputs.reshape(-1, features)) / 35
    assert torch.allclose(accumulator.mean(), expected, atol=1e-6)
    assert torch.equal(accumulator.mean(), accumulator.mean().T)


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_is_the_root_of_the_inverse(act_order):
    inputs = torch.randn(12, 50, generator=torch.Generator().manual_seed(0))
    gram = inputs @ inputs.T / 50
    factor = factorize(gram, damping=0.02, act_order=act_order)
    exact = gram.double() + 0.02 * gram.diagonal().double().mean() * torch.eye(12)
    inverse = torch.linalg.inv(exact)[factor.order][:, factor.order]
    upper = factor.upper.double()
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-4, atol=1e-5)
    assert torch.equal(upper, upper.triu())
    if act_order:
        assert (gram.diagonal()[factor.order].diff() <= 0).all()


def test_groups_of_columns_stay_together_by_decreasing_mean():
    gram = torch.diag(torch.tensor([1.0, 5.0, 2.0, 9.0, 4.0, 4.0, 8.0, 0.5, 3.0]))
    assert factorize(gram, group_width=3).order.tolist() == [3, 4, 5, 6, 8, 7, 1, 2, 0]


def test_conditional_importance_is_the_variance_left_by_later_columns():
    inputs = torch.randn(9, 60, generator=torch.Generator().manual_seed(2))
    gram = inputs @ inputs.T / 60
    factor = factorize(gram, damping=1e-9)
    exact = gram.double()[factor.order][:, factor.order]
    importance = factor.conditional_importance()[factor.order]
    for j in range(9):
        later = exact[j + 1 :, j + 1 :]
        explained = exact[j, j + 1 :] @ torch.linalg.solve(later, exact[j + 1 :, j])
        assert float(importance[j]) == pytest.approx(float(exact[j, j] - explained), rel=1e-3)


def test_dead_and_duplicate_inputs_are_survived():
    inputs = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    inputs[2] = 0
    inputs[4] = inputs[1]
    factor = factorize(inputs @ inputs.T / 30)
    assert factor.dead.tolist() == [False, False, True, False, False, False]
    assert torch.isfinite(factor.upper).all()


def test_damping_grows_until_a_singular_gram_can_be_factored():
    direction = torch.randn(8, generator=torch.Generator().manual_seed(1))
    factor = factorize(torch.outer(direction, direction) - 1e-3 * torch.eye(8), damping=1e-6)
    assert factor.damping > 1e-6
    assert torch.isfinite(factor.upper).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gram_is_refused(value):
    gram = torch.eye(3)
    gram[1, 2] = value
    with pytest.raises(InputError, match="1 of 9 values are NaN or Inf; the model overflows"):
        factorize(gram)


def test_overflowing_half_precision_inputs_are_refused():
    inputs = torch.full((4, 3), 60000.0, dtype=torch.float16)
    accumulator = GramAccumulator(3)
    accumulator.add(inputs * 2)
    with pytest.raises(InputError, match="9 of 9 values are NaN or Inf"):
        factorize(accumulator.mean())


def test_tiny_inputs_are_lifted_to_the_floor_and_no_further():
    gram = torch.diag(torch.tensor([1.0, 1e-3, 1e-12, 0.0]))
    factor = factorize(gram, damping=0.0, act_order=False)
    mean = 1.001 / 3
    expected = torch.tensor([1.0, 1e-3, 1e-6 * mean, mean])
    assert torch.allclose(factor.conditional_importance(), expected, rtol=1e-5)
    assert factor.dead.tolist() == [False, False, False, True]
    assert not factor.fallback


@pytest.mark.parametrize("act_order", [False, True])
def test_gram_that_cannot_be_factored_becomes_its_damped_diagonal(act_order):
    gram = torch.diag(torch.tensor([1.0, 3.0, 2.0])) + 1e9 * (1 - torch.eye(3))
    factor = factorize(gram, act_order=act_order)
    assert factor.fallback
    assert torch.equal(factor.upper, factor.upper.diagonal().diag())
    expected = torch.tensor([1.02, 3.02, 2.02])
    assert torch.allclose(factor.conditional_importance(), expected)
    assert not factorize(torch.eye(3)).fallback


def test_output_error_is_the_mean_squared_output():
    inputs = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    difference = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    expected = (difference @ inputs).square().mean(1)
    assert torch.allclose(output_error(difference, inputs @ inputs.T / 40), expected, rtol=1e-5)


def test_weighted_moments_are_means_of_weighted_products():
    generator = torch.Generator().manual_seed(0)
    behind, native = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    weights = torch.rand(3, 5, generator=generator)
    gram, cross = GramAccumulator(7), CrossAccumulator(7)
    for part in (slice(0, 1), slice(1, 3)):
        gram.add(behind[part], weights=weights[part])
        cross.add(native[part], behind[part], weights=weights[part])
    pairs = zip(weights.flatten(), behind.reshape(-1, 7), native.reshape(-1, 7), strict=True)
    expected = [
        torch.stack([w * torch.outer(b, b), w * torch.outer(n - b, b)]) for w, b, n in pairs
    ]
    mean = torch.stack(expected).mean(0)
    assert torch.allclose(gram.mean(), mean[0], atol=1e-6)
    assert torch.allclose(cross.mean(), mean[1], atol=1e-6)


def test_tokens_count_by_a_power_of_what_the_loss_feels():
    squares = torch.tensor([[1.0, 4.0], [0.0, 9.0]]), torch.tensor([[3.0, 0.0], [0.0, 11.0]])
    mean = torch.tensor([[2.0, 2.0], [1e-4, 10.0]])  # nothing counts nothing
    for power in (0.0, 0.5, 1.0):
        found = token_weights(squares, power)
        torch.testing.assert_close(found, mean**power / (mean**power).mean())


def test_the_weighted_error_of_one_output_is_the_first_order_loss_squared():
    """Of a layer with one row, d H dᵀ is the mean of (∂L/∂y · change of y)², with power 1."""
    generator = torch.Generator().manual_seed(1)
    inputs, gradients = (torch.randn(1, 50, n, generator=generator) for n in (8, 1))
    difference = torch.randn(8, generator=generator)
    squares = gradients.square().sum(2)
    accumulator = GramAccumulator(8)
    accumulator.add(inputs, weights=token_weights([squares / squares.mean()], 1.0))
    found = difference @ accumulator.mean() @ difference * squares.mean()
    expected = (gradients[..., 0] * (inputs @ difference)).square().mean()
    assert torch.allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_rescaled_factor_is_that_of_divided_inputs(act_order):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(200, 12, generator=generator) * torch.logspace(0, 1, 12)
    scale = torch.rand(12, generator=generator) + 0.5
    gram = inputs.T @ inputs / 200
    factor = factorize(gram, damping=0.0, act_order=act_order)
    found = factor.rescaled(scale)
    divided = gram / torch.outer(scale, scale)
    inverse = torch.linalg.inv(divided.double())[found.order][:, found.order]
    assert torch.equal(found.order, factor.order)
    assert torch.allclose(found.upper.T @ found.upper, inverse.float(), rtol=1e-3, atol=1e-5)
    assert torch.equal(found.upper, found.upper.triu())
    assert torch.allclose(found.diagonal, divided.diagonal())
    if not act_order:
        again = factorize(divided, damping=0.0, act_order=False)
        assert torch.allclose(found.upper, again.upper, rtol=1e-3, atol=1e-5)
        assert torch.allclose(
            found.conditional_importance(), again.conditional_importance(), rtol=1e-3
        )


def test_drawn_indices_have_the_frequencies_of_their_weights():
    weights = torch.tensor([0.0, 1.0, 5.0, 0.0, 2.0, 0.0]).expand(40_000, -1)
    drawn = draw_categorical(weights, torch.Generator().manual_seed(0))
    assert drawn.shape == (40_000, 1)
    shares = torch.bincount(drawn.flatten(), minlength=6) / 40_000
    expected = weights[0] / 8
    # four standard errors, and none where the weight is 0
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 40_000).sqrt()).all()


def test_drawing_inverts_the_cumulative_distribution_row_by_row():
    weights = torch.rand(50, 7, generator=torch.Generator().manual_seed(1)).square()
    drawn = draw_categorical(weights, torch.Generator().manual_seed(2)).flatten().tolist()
    points = torch.rand(50, 1, generator=torch.Generator().manual_seed(2)).flatten().tolist()
    for row, point, found in zip(weights.tolist(), points, drawn, strict=True):
        below = [sum(row[: index + 1]) <= point * sum(row) for index in range(7)]
        assert found == sum(below)


def test_products_of_long_rows_are_those_of_doubles():
    """A shape that ends the process in oneDNN's bfloat16 on processors with AMX."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 524_288, generator=generator).bfloat16() for n in (3, 2))
    expected = first.double() @ second.double().T
    assert torch.allclose(row_products(first, second).double(), expected, rtol=1e-4, atol=1e-2)
    few = first[:, :64]
    assert torch.equal(row_products(few, few), few @ few.T)
