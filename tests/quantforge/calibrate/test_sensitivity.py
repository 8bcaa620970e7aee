"""Two estimates of the same losses as one: against closed forms and a made-up truth."""

import pytest
import torch

from quantforge.calibrate.sensitivity import (
    combined_losses,
    exact_losses,
)

KINDS = ["q", "k", "v", "o"] * 10
LENGTH = 8


def made_up(sequences, *, layer=0.3, own=0.3, seed=0):
    """A truth, a factored estimate of it and products of so many sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factored = (normal(40, 6) - 4).exp()
    by_kind = (0.5 * normal(4, 6)).exp().repeat(10, 1)
    truth = factored * by_kind * (layer * normal(40, 1)).exp() * (own * normal(40, 6)).exp()
    products = normal(sequences, 40, 6) * (2 * LENGTH * truth).sqrt()
    return truth, factored, products


def distance(found, truth):
    """Root mean square of the logarithm of the ratio, a common factor aside."""
    logs = (found / truth).log()
    return float((logs - logs.mean()).square().mean().sqrt())


def test_exact_losses_are_half_the_mean_square_a_token():
    products = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]], dtype=torch.float64)
    loss, error = exact_losses(products, 4)
    torch.testing.assert_close(loss, torch.tensor([[10 / 16, 4 / 16]], dtype=torch.float64))
    # samples 1/8, 9/8 and 4/8, 0: half their difference is the error of the mean of two
    torch.testing.assert_close(error, torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    assert exact_losses(products[:1], 4)[1].isinf().all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("layer", "own"), [(0.3, 0.3), (0.3, 0.0), (0.0, 0.0), (0.6, 0.6)])
def test_the_combination_is_nearer_to_the_truth_than_either(layer, own, seed):
    truth, factored, products = made_up(32, layer=layer, own=own, seed=seed)
    exact, _ = exact_losses(products, LENGTH)
    combined, error = combined_losses(factored, products, LENGTH, KINDS)
    found = distance(combined, truth)
    assert found < 0.8 * distance(factored, truth)
    assert found < (0.98 if own > 0.5 else 0.85) * distance(exact, truth)
    if layer == own == 0.0:  # what is left is noise, which is all shrunk away
        assert found < 0.45 * distance(exact, truth)
    stated = float((error / combined).square().mean().sqrt())
    assert stated == pytest.approx(found, rel=0.6, abs=0.03)


def test_with_many_sequences_it_is_the_exact_estimate_and_with_one_each_kind_is_scaled():
    _, factored, products = made_up(4000)
    combined, error = combined_losses(factored, products, LENGTH, KINDS)
    exact, exact_error = exact_losses(products, LENGTH)
    torch.testing.assert_close(combined, exact, rtol=0.02, atol=0.0)
    torch.testing.assert_close(error, exact_error, rtol=0.4, atol=0.0)
    combined, _ = combined_losses(factored, products[:1], LENGTH, KINDS)
    exact, _ = exact_losses(products[:1], LENGTH)
    for first in range(4):
        rows = slice(first, None, 4)
        factor = exact[rows].sum(0) / factored[rows].sum(0)
        torch.testing.assert_close(combined[rows], factored[rows] * factor)


def test_candidates_that_do_not_fit_stay_infinite_and_touch_no_other():
    _, factored, products = made_up(32)
    narrow = factored[:, :5].clone(), products[:, :, :5]
    factored[:, 5] = torch.inf
    combined, error = combined_losses(factored, products, LENGTH, KINDS)
    assert combined[:, 5].isinf().all()
    assert error[:, 5].isinf().all()
    expected = combined_losses(*narrow, LENGTH, KINDS)
    torch.testing.assert_close((combined[:, :5], error[:, :5]), expected)
