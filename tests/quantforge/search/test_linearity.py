"""The linear model: coefficients of a quadratic, and their standard errors."""

import numpy as np
import pytest

from quantforge.errors import InputError
from quantforge.search.linearity import fit_linear


def test_isotropic_noise_on_a_quadratic_gives_half_the_trace():
    # L = ½ Δᵀ H Δ; noise of relative size t in layer l: E L = t² · ½ tr(H_ll)/n_l ‖W_l‖²
    generator = np.random.default_rng(0)
    sizes = [30, 50, 20]
    root = generator.normal(size=(100, 100))
    hessian, weights = root @ root.T / 100, generator.normal(size=100)
    parts = np.split(np.arange(100), np.cumsum(sizes)[:-1])
    exact = [0.5 * hessian[np.ix_(p, p)].trace() / len(p) * (weights[p] ** 2).sum() for p in parts]
    errors, increases = [], []
    for trial in range(600):
        layer = trial % 3
        part = parts[layer]
        noise = generator.normal(size=len(part))
        noise *= generator.uniform(0.5, 1.5) * np.linalg.norm(weights[part]) / np.linalg.norm(noise)
        errors.append(np.zeros(3))
        errors[-1][layer] = (noise**2).sum() / (weights[part] ** 2).sum()
        increases.append(0.5 * noise @ hessian[np.ix_(part, part)] @ noise)
    model = fit_linear(np.array(errors), np.array(increases))
    assert (np.abs(model.coefficients - exact) < 4 * model.stderr).all()
    assert model.coefficients == pytest.approx(exact, rel=0.1)
    assert (model.stderr < 0.05 * np.array(exact)).all()


def test_exact_measurements_give_exact_coefficients():
    generator = np.random.default_rng(1)
    # layers whose errors differ by orders of magnitude
    errors, exact = generator.random((12, 4)) * [1e-6, 1, 1e3, 1e-2], np.array([2.0, 3, 1e-3, 0.5])
    model = fit_linear(errors, errors @ exact)
    assert model.coefficients == pytest.approx(exact, rel=1e-9)
    assert model.stderr == pytest.approx(np.zeros(4), abs=1e-6)
    square = fit_linear(errors[:4], errors[:4] @ exact)
    assert square.coefficients == pytest.approx(exact, rel=1e-6)
    assert np.isnan(square.stderr).all()


def test_layers_that_were_not_measured_are_named_by_their_number():
    with pytest.raises(InputError, match="5 measurements determine 2 of 3"):
        fit_linear(np.array([[1.0, 0, 0], [0, 1.0, 0]] * 2 + [[1.0, 1.0, 0]]), np.ones(5))
    with pytest.raises(ValueError, match="measurements"):
        fit_linear(np.ones((3, 2)), np.ones(2))
