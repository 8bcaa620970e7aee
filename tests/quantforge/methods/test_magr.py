"""MagR's prox against sorting and brute force, its result against the conditions of a minimum."""

import pytest
import torch

from quantforge.methods.gptq import gptq
from quantforge.methods.magr import magr, shrink_largest, spectral_norm
from quantforge.numerics import factorize, output_error
from quantforge.types import QuantSpec


def l1_projection(vector, radius):
    """Projection onto the l1 ball by sorting (Duchi et al. 2008)."""
    size = vector.abs()
    if size.sum() <= radius:
        return vector.clone()
    if radius == 0.0:
        return torch.zeros_like(vector)
    ordered = size.sort(descending=True).values
    thresholds = (ordered.cumsum(0) - radius) / torch.arange(1, len(vector) + 1)
    level = thresholds[int((ordered > thresholds).nonzero().max())]
    return vector.sign() * (size - level).clamp_min(0.0)


@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.3, 2.0, 1e3])
@pytest.mark.parametrize("length", [1, 2, 7, 200])
def test_prox_is_what_the_l1_projection_leaves(length, radius):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(20, length, generator=generator, dtype=torch.float64)
    values[0] = 0.5  # all alike
    found = shrink_largest(values, radius)
    expected = torch.stack([row - l1_projection(row, radius) for row in values])
    assert torch.allclose(found, expected, atol=1e-12)
    if radius == 0.0:
        assert torch.equal(found, values)


@pytest.mark.parametrize("radius", [0.1, 1.0, 10.0])
def test_prox_minimises_its_objective(radius):
    """The minimiser clips: the best level by a dense scan of one number."""
    values = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def objective(trial):
        return 0.5 * (trial - values).square().sum(-1) + radius * trial.abs().amax(-1)

    levels = torch.linspace(0.0, float(values.abs().max()), 5001, dtype=torch.float64)
    scanned = objective(torch.minimum(values.abs(), levels[:, None]) * values.sign())
    least = objective(shrink_largest(values, radius))
    assert scanned.min() - 1e-6 <= least <= scanned.min()


def correlated_gram(columns, tokens=None):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    spectrum = torch.logspace(0, -2, columns)
    inputs = torch.randn(tokens or 8 * columns, columns, generator=generator) @ (
        mixing * spectrum
    ).T  # fmt: skip
    return inputs.T @ inputs / len(inputs)


def heavy_tailed(rows, columns):
    generator = torch.Generator().manual_seed(1)
    return 0.05 * torch.randn(rows, columns, generator=generator) ** 3


@pytest.mark.parametrize("group_size", [16, -1])
def test_result_is_stationary(group_size):
    """V = prox(V − gradient): at a minimum a proximal step goes nowhere."""
    gram, weight, strength = correlated_gram(48), heavy_tailed(12, 48), 0.01
    spec = QuantSpec(2, group_size)
    found = magr(weight, gram, spec, strength=strength, iterations=5000)
    gradient = (found - weight) @ (gram / spectral_norm(gram))
    again = shrink_largest((found - gradient).view(12, spec.groups(48), -1), strength)
    moved = (found - weight).norm()
    assert (again.view_as(found) - found).norm() < 0.01 * moved


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.4), (3, 0.4)])
def test_range_shrinks_outputs_stay_and_covering_grids_gain(bits, gain):
    gram, weight = correlated_gram(64), heavy_tailed(32, 64)
    spec, factor = QuantSpec(bits), factorize(gram)
    found = magr(weight, gram, spec, strength=0.02)
    assert found.abs().amax(1).sum() < 0.6 * weight.abs().amax(1).sum()
    assert output_error(found - weight, gram).sum() < 0.01 * output_error(weight, gram).sum()
    errors = [
        output_error(gptq(w, factor, spec, grid="minmax").dequantize() - weight, gram).sum()
        for w in (weight, found)
    ]
    assert errors[1] < (1 - gain) * errors[0]


def test_no_strength_or_no_inputs_change_nothing():
    weight = heavy_tailed(4, 16)
    assert torch.equal(magr(weight, correlated_gram(16), QuantSpec(2), strength=0.0), weight)
    assert torch.equal(magr(weight, torch.zeros(16, 16), QuantSpec(2), strength=0.1), weight)


def test_a_step_too_long_is_taken_again(monkeypatch):
    """With the spectral norm far too small, plain steps diverge; the guard must not."""
    gram, weight = correlated_gram(32), heavy_tailed(8, 32)
    exact = magr(weight, gram, QuantSpec(2), strength=1e-2, iterations=2000)
    norm = spectral_norm(gram)
    monkeypatch.setattr("quantforge.methods.magr.spectral_norm", lambda _: norm / 50.0)
    # the same objective, fifty times over
    guarded = magr(weight, gram, QuantSpec(2), strength=0.5, iterations=2000)
    assert torch.isfinite(guarded).all()
    assert (guarded - exact).norm() < 0.05 * (exact - weight).norm()


@pytest.mark.parametrize("columns", [1, 5, 64])
def test_spectral_norm_meets_the_largest_eigenvalue_from_below(columns):
    gram = correlated_gram(columns)
    largest = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert 0.98 * largest <= spectral_norm(gram) <= largest * (1 + 1e-5)


def test_spectral_norm_of_separate_parts():
    assert spectral_norm(torch.diag(torch.tensor([3.0, 2.0, 2.0]))) == pytest.approx(3.0)
    assert spectral_norm(torch.zeros(3, 3)) == 0.0
