"""Stochastic Lanczos quadrature against dense spectra, and the criteria against closed forms."""

import math

import pytest
import torch

from quantforge.errors import UsageError
from quantforge.methods.curvature.density import SpectralDensity, spectral_density
from quantforge.methods.curvature.trace import hutchinson

DOUBLE = torch.float64


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(size, seed=0):
    matrix = torch.randn(size, size, generator=random(seed), dtype=DOUBLE)
    return matrix + matrix.T


def density_of(nodes, weights, dimension=10):
    return SpectralDensity(
        nodes=torch.tensor(nodes, dtype=DOUBLE),
        weights=torch.tensor(weights, dtype=DOUBLE),
        dimension=dimension,
        products=0,
    )


def test_weights_sum_to_one_and_the_first_moment_is_hutchinsons_trace():
    matrix = symmetric(30)
    found = spectral_density(
        lambda v: matrix @ v, 30, generator=random(5), steps=6, starts=10, dtype=DOUBLE
    )
    assert found.products == 60
    torch.testing.assert_close(found.weights.sum(1), torch.ones(10, dtype=DOUBLE))
    plain = hutchinson(
        lambda v: matrix @ v, 30, generator=random(5), tolerance=0.0, max_probes=10, dtype=DOUBLE
    )
    trace = found.trace()
    assert trace.value == pytest.approx(plain.value, rel=1e-10)
    assert trace.standard_error == pytest.approx(plain.standard_error, rel=1e-10)


def test_moments_are_exact_for_a_start_up_to_twice_the_steps():
    matrix = symmetric(20, seed=2)
    found = spectral_density(
        lambda v: matrix @ v, 20, generator=random(), steps=4, starts=2, dtype=DOUBLE
    )
    generator = random()
    for row in range(2):
        start = torch.empty(20, dtype=DOUBLE).bernoulli_(0.5, generator=generator) * 2 - 1
        start /= start.norm()
        for power in range(8):
            exact = float(start @ torch.linalg.matrix_power(matrix, power) @ start)
            moment = float((found.nodes[row] ** power * found.weights[row]).sum())
            assert moment == pytest.approx(exact, rel=1e-8)


def test_all_steps_recover_all_eigenvalues_and_functions_of_them():
    matrix = symmetric(12)
    exact = torch.linalg.eigvalsh(matrix)
    found = spectral_density(
        lambda v: matrix @ v, 12, generator=random(), steps=40, starts=400, kind="gaussian",
        dtype=DOUBLE,
    )  # fmt: skip
    assert float((found.nodes - exact).abs().max()) < 1e-6
    for function in (torch.sigmoid, torch.square, lambda x: (x < 0).double()):
        estimate = found.mean_of(function)
        true = float(function(exact).mean())
        assert abs(estimate.value - true) < 3.5 * estimate.standard_error
        assert estimate.standard_error < 0.1 * true


def test_a_start_that_ends_early_has_no_weight_left_over():
    diagonal = torch.tensor([1.0] * 6 + [4.0] * 2, dtype=DOUBLE)
    found = spectral_density(
        lambda v: diagonal * v, 8, generator=random(), steps=5, starts=3, dtype=DOUBLE
    )
    assert found.products == 6
    torch.testing.assert_close(found.weights[:, :2], torch.tensor([[0.75, 0.25]] * 3, dtype=DOUBLE))
    assert (found.weights[:, 2:] == 0).all()
    assert float(found.nodes.max()) == pytest.approx(4.0)
    assert found.trace().value == pytest.approx(14.0)
    assert found.trace().standard_error == pytest.approx(0.0, abs=1e-12)


def test_smoothed_density_is_a_mixture_of_gaussians_with_mass_one():
    found = density_of([[0.0, 3.0], [0.0, 1.0]], [[0.25, 0.75], [0.5, 0.5]])
    points = torch.linspace(-4, 7, 20_001, dtype=DOUBLE)
    curve = found.smoothed(points, variance=0.04)
    assert float(torch.trapezoid(curve, points)) == pytest.approx(1.0, abs=1e-9)
    at_three = float(found.smoothed(torch.tensor([3.0]), variance=0.04))
    assert at_three == pytest.approx(0.375 / math.sqrt(2 * math.pi * 0.04), rel=1e-9)
    # by default the variance is 1e-5 of the range, 3
    at_one = float(found.smoothed(torch.tensor([1.0])))
    assert at_one == pytest.approx(0.25 / math.sqrt(2 * math.pi * 3e-5), rel=1e-9)


def test_criteria_by_hand():
    found = density_of([[-1.0, 0.0, 4.0], [-4.0, 0.0, 16.0]], [[0.25, 0.5, 0.25]] * 2)
    criteria = found.criteria()
    assert (criteria.lowest, criteria.highest) == (-4.0, 16.0)
    assert criteria.extreme_ratio == pytest.approx(0.25)
    assert criteria.extreme_ratio_error == pytest.approx(0.0)
    # √(1 · ¼) / √(4 · ¼) = ½ for the first start and the same for the second
    assert criteria.negative_weight == pytest.approx(0.5)
    assert criteria.negative_weight_error == pytest.approx(0.0)
    first_order = density_of([[-1.0, 4.0], [-1.0, 1.0]], [[0.5, 0.5]] * 2).criteria(power=1.0)
    assert first_order.negative_weight == pytest.approx((0.25 + 1.0) / 2)
    assert first_order.negative_weight_error == pytest.approx(0.375)
    assert first_order.extreme_ratio == pytest.approx(0.25)


def test_criteria_of_spectra_with_one_sign_and_of_nothing():
    positive = density_of([[1e-12, 2.0]] * 2, [[0.9, 0.1]] * 2).criteria()
    assert positive.negative_weight == 0.0
    assert positive.extreme_ratio == 0.0
    # rounding errors of a null space are no negative curvature
    null = density_of([[-1e-9, 2.0]] * 2, [[0.9, 0.1]] * 2).criteria()
    assert null.negative_weight == 0.0
    negative = density_of([[-2.0, -1.0]] * 2, [[0.5, 0.5]] * 2).criteria()
    assert negative.negative_weight == math.inf
    assert negative.extreme_ratio == 2.0
    nothing = density_of([[0.0]] * 2, [[1.0]] * 2).criteria()
    assert (nothing.negative_weight, nothing.extreme_ratio) == (0.0, 0.0)


def test_one_start_has_no_spread():
    with pytest.raises(UsageError, match="number of starts is 1"):
        spectral_density(lambda v: v, 3, generator=random(), starts=1)
