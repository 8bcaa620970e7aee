"""Power iteration and Lanczos against `eigvalsh`."""

import pytest
import torch

from quantforge.errors import UsageError
from quantforge.methods.curvature.eigen import (
    extreme_eigenvalues,
    lanczos,
    power_iteration,
    top_by_power,
)

DOUBLE = torch.float64


def with_spectrum(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE)).Q
    return (basis * torch.tensor(values, dtype=DOUBLE)) @ basis.T


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def residuals(matrix, pairs):
    images = pairs.vectors @ matrix
    return (images - pairs.values.unsqueeze(1) * pairs.vectors).norm(dim=1)


SPECTRUM = [-6.0, -0.5, -0.1, 0.0, 0.3, 1.0, 2.0, 4.0, 9.0]


def test_power_iteration_with_deflation_finds_the_largest_magnitudes_in_order():
    matrix = with_spectrum(SPECTRUM)
    found = power_iteration(
        lambda v: matrix @ v, 9, generator=random(), count=4, tolerance=1e-7, max_iterations=500,
        dtype=DOUBLE,
    )  # fmt: skip
    assert found.values.tolist() == pytest.approx([9.0, -6.0, 4.0, 2.0], abs=1e-9)
    assert found.converged
    torch.testing.assert_close(found.residuals, residuals(matrix, found), atol=1e-12, rtol=1e-6)
    # an eigenvalue lies within the residual; what is deflated is itself known to 1e-7 of 9
    assert float(found.residuals.max()) < 2e-6
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(4, dtype=DOUBLE))


def test_power_iteration_stops_by_the_residual_and_says_where_it_does_not():
    """Of +1 and −1 it cannot choose: the Rayleigh quotient stands still, the residual does not."""
    diagonal = torch.tensor([1.0, -1.0, 0.2], dtype=DOUBLE)
    found = power_iteration(
        lambda v: diagonal * v, 3, generator=random(), tolerance=1e-2, max_iterations=40,
        dtype=DOUBLE,
    )  # fmt: skip
    assert not found.converged
    assert found.products == 40
    assert float(found.residuals) > 0.1
    ends = extreme_eigenvalues(
        lambda v: diagonal * v, 3, generator=random(), tolerance=1e-6, dtype=DOUBLE
    )
    assert ends.converged
    assert ends.values.tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_top_by_power_is_the_largest_by_sign(sign):
    matrix = sign * with_spectrum(SPECTRUM)
    found = top_by_power(
        lambda v: matrix @ v, 9, generator=random(), tolerance=1e-6, max_iterations=300,
        dtype=DOUBLE,
    )  # fmt: skip
    assert found.values.tolist() == pytest.approx([9.0 if sign > 0 else 6.0], abs=1e-8)
    assert found.converged
    torch.testing.assert_close(found.residuals, residuals(matrix, found), atol=1e-12, rtol=1e-6)


def test_top_by_power_of_a_negative_definite_matrix():
    found = top_by_power(lambda v: -2 * v, 5, generator=random())
    assert found.values.tolist() == pytest.approx([-2.0])
    assert (found.products, found.converged) == (2, True)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-5])
def test_error_of_an_eigenvalue_is_within_its_residual(tolerance):
    matrix = with_spectrum(SPECTRUM, seed=4)
    options = {"generator": random(2), "tolerance": tolerance, "dtype": DOUBLE}
    exact = torch.linalg.eigvalsh(matrix)
    power = power_iteration(lambda v: matrix @ v, 9, count=2, **options)
    ends = extreme_eigenvalues(lambda v: matrix @ v, 9, count=2, **options)
    for found in (power, ends):
        nearest = (found.values.unsqueeze(1) - exact).abs().min(1).values
        assert (nearest <= found.residuals + 1e-12).all()
        assert found.converged
    assert (power.residuals[:1] <= tolerance * power.values.abs()[:1]).all()
    assert (ends.residuals <= tolerance * ends.values.abs().max()).all()


def test_power_iteration_of_a_low_rank_and_of_zero():
    vector = torch.tensor([3.0, 0.0, 4.0], dtype=DOUBLE)
    matrix = torch.outer(vector, vector)
    found = power_iteration(lambda v: matrix @ v, 3, generator=random(), count=3, dtype=DOUBLE)
    assert found.values.tolist() == pytest.approx([25.0, 0.0, 0.0], abs=1e-10)
    assert found.converged
    assert found.products <= 6
    nothing = power_iteration(torch.zeros_like, 3, generator=random(), count=5, dtype=DOUBLE)
    assert nothing.values.tolist() == [0.0, 0.0, 0.0]
    assert (nothing.products, nothing.converged) == (3, True)


def test_both_ends_with_negative_curvature():
    matrix = with_spectrum(SPECTRUM)
    found = extreme_eigenvalues(
        lambda v: matrix @ v, 9, generator=random(), count=2, tolerance=1e-9, dtype=DOUBLE
    )
    assert found.values.tolist() == pytest.approx([-6.0, -0.5, 4.0, 9.0], abs=1e-8)
    assert float(residuals(matrix, found).max()) < 1e-7
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(4, dtype=DOUBLE))


def test_lanczos_stops_early_once_the_ends_have_settled():
    values = [*torch.linspace(-1, 1, 198).tolist(), -8.0, 10.0]
    matrix = with_spectrum(values)
    found = extreme_eigenvalues(
        lambda v: matrix @ v, 200, generator=random(), tolerance=1e-3, dtype=DOUBLE
    )
    assert found.values.tolist() == pytest.approx([-8.0, 10.0], abs=0.01)
    assert found.products < 15
    short = extreme_eigenvalues(
        lambda v: matrix @ v, 200, generator=random(), tolerance=1e-3, max_steps=3, dtype=DOUBLE
    )
    assert (short.products, short.converged) == (3, False)


def test_as_many_steps_as_dimensions_give_every_eigenvalue():
    matrix = with_spectrum(SPECTRUM)
    start = torch.randn(9, generator=random(), dtype=DOUBLE)
    reduced = lanczos(lambda v: matrix @ v, start, steps=50)
    assert reduced.eigen()[0].tolist() == pytest.approx(SPECTRUM, abs=1e-9)
    torch.testing.assert_close(
        reduced.basis @ matrix @ reduced.basis.T,
        torch.diag(reduced.diagonal)
        + torch.diag(reduced.off_diagonal[:-1], 1)
        + torch.diag(reduced.off_diagonal[:-1], -1),
        atol=1e-9,
        rtol=0,
    )


def test_repeated_eigenvalues_end_the_krylov_space():
    diagonal = torch.tensor([2.0] * 20 + [5.0] * 10 + [-1.0] * 10)
    found = lanczos(lambda v: diagonal * v, torch.randn(40, generator=random()), steps=40)
    assert len(found.diagonal) == 3
    assert float(found.off_diagonal[-1]) == 0.0
    assert found.eigen()[0].tolist() == pytest.approx([-1.0, 2.0, 5.0], abs=1e-5)
    one = extreme_eigenvalues(lambda v: 3 * v, 40, generator=random(), count=2)
    assert one.values.tolist() == pytest.approx([3.0])
    assert one.converged


def test_no_ghosts_in_single_precision():
    """One dominant eigenvalue settles at once; without re-orthogonalising its copies appear."""
    diagonal = torch.cat([torch.tensor([1000.0]), torch.linspace(0, 1, 299)])
    found = lanczos(lambda v: diagonal * v, torch.randn(300, generator=random()), steps=60)
    values, _ = found.eigen()
    assert int((values > 500).sum()) == 1
    assert float((found.basis @ found.basis.T - torch.eye(len(values))).abs().max()) < 1e-5


def test_bad_counts_are_refused():
    with pytest.raises(UsageError, match="number of iterations is 0"):
        power_iteration(lambda v: v, 2, generator=random(), max_iterations=0)
    with pytest.raises(UsageError, match="number of Lanczos steps is 0"):
        extreme_eigenvalues(lambda v: v, 2, generator=random(), max_steps=0)
    with pytest.raises(UsageError, match="number of eigenvalues is 0"):
        extreme_eigenvalues(lambda v: v, 2, generator=random(), count=0)
