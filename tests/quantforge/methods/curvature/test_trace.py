"""Trace estimators against dense matrices: means, variances, exact cases, stopping."""

import itertools
import math

import pytest
import torch

from quantforge.errors import InputError, UsageError
from quantforge.methods.curvature.operator import draw_probe, restricted
from quantforge.methods.curvature.scores import mean_trace_scores
from quantforge.methods.curvature.trace import (
    LEAST_PROBES,
    BlockTraces,
    balanced_hutchinson_blocks,
    hutch_plus_plus,
    hutchinson,
    hutchinson_blocks,
)

DOUBLE = torch.float64


def symmetric(size, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or size, generator=generator, dtype=DOUBLE)
    signs = torch.randn(rank or size, generator=generator, dtype=DOUBLE).sign()
    return (factor * signs) @ factor.T


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def squares(matrix):
    return float(matrix.square().sum())


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_have_mean_zero_and_variance_one(kind):
    probe = draw_probe(200_000, random(), kind=kind, dtype=DOUBLE)
    assert abs(float(probe.mean())) < 0.01
    assert float(probe.square().mean()) == pytest.approx(1.0, abs=0.01)
    assert (set(probe.unique().tolist()) == {-1.0, 1.0}) is (kind == "rademacher")


def test_one_probe_of_signs_is_exact_for_a_diagonal():
    diagonal = torch.tensor([3.0, -1.0, 0.5, 7.0], dtype=DOUBLE)
    traces = hutchinson_blocks(lambda v: diagonal * v, [1, 3], generator=random(), dtype=DOUBLE)
    assert traces.samples[0].tolist() == [3.0, 6.5]
    assert traces.standard_errors.tolist() == [0.0, 0.0]
    assert traces.products == LEAST_PROBES
    assert traces.converged


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_mean_and_variance_of_a_probe(kind):
    matrix = symmetric(10)
    off_diagonal = squares(matrix) - squares(matrix.diagonal())
    variance = 2 * (off_diagonal if kind == "rademacher" else squares(matrix))
    traces = hutchinson_blocks(
        lambda v: matrix @ v, [10], generator=random(1), tolerance=0.0, max_probes=2000, kind=kind,
        dtype=DOUBLE,
    )  # fmt: skip
    assert float(traces.samples.var()) == pytest.approx(variance, rel=0.12)
    assert float(traces.standard_errors) == pytest.approx(math.sqrt(variance / 2000), rel=0.06)
    assert abs(float(traces.values) - float(matrix.trace())) < 3 * math.sqrt(variance / 2000)


@pytest.mark.parametrize("scales", [None, [1.0, 3.0, 0.5]])
def test_joint_probe_is_unbiased_for_every_block_with_the_stated_variance(scales):
    matrix, sizes = symmetric(9, seed=3), [2, 4, 3]
    count = 2500
    traces = hutchinson_blocks(
        lambda v: matrix @ v, sizes, generator=random(2), tolerance=0.0, max_probes=count,
        scales=scales, dtype=DOUBLE,
    )  # fmt: skip
    edges = list(itertools.pairwise(torch.tensor([0, *sizes]).cumsum(0).tolist()))
    factors = scales or [1.0] * 3
    for index, (start, end) in enumerate(edges):
        block = matrix[start:end, start:end]
        variance = 2 * (squares(block) - squares(block.diagonal()))
        for other, (begin, stop) in enumerate(edges):
            if other != index:
                ratio = factors[other] / factors[index]
                variance += ratio**2 * squares(matrix[start:end, begin:stop])
        assert float(traces.samples[:, index].var()) == pytest.approx(variance, rel=0.12)
        error = abs(float(traces.values[index] - block.trace()))
        assert error < 3.5 * math.sqrt(variance / count)


def test_balanced_probes_know_small_blocks_as_well_as_large_ones():
    """Traces fall by a thousand from block to block, entries between them by its root."""
    factor = torch.randn(60, 60, generator=random(), dtype=DOUBLE)
    factor *= torch.tensor([1.0, 10**-1.5, 1e-3], dtype=DOUBLE).repeat_interleave(20).unsqueeze(1)
    matrix, sizes = factor @ factor.T, [20, 20, 20]
    exact = matrix.diagonal().view(3, 20).sum(1)
    options = {"tolerance": 0.0, "max_probes": 50, "dtype": DOUBLE}
    plain = hutchinson_blocks(lambda v: matrix @ v, sizes, generator=random(), **options)
    found = balanced_hutchinson_blocks(lambda v: matrix @ v, sizes, generator=random(), **options)
    assert found.products == 50
    assert len(found.samples) == 42
    assert (plain.standard_errors[1:] > torch.tensor([0.3, 10.0]) * exact[1:]).all()
    assert (found.standard_errors < 0.25 * exact).all()
    assert ((found.values - exact).abs() < 3.5 * found.standard_errors).all()


def test_balanced_probes_end_early_where_nothing_is_left_to_balance():
    diagonal = torch.tensor([1.0, 0.0, 1e-8])
    easy = balanced_hutchinson_blocks(lambda v: diagonal * v, [1, 1, 1], generator=random())
    assert (easy.products, easy.converged) == (LEAST_PROBES, True)
    matrix = torch.zeros(6, 6)  # a block of nothing must not turn into infinite scales
    matrix[:4, :4] = symmetric(4).float()
    found = balanced_hutchinson_blocks(
        lambda v: matrix @ v, [4, 2], generator=random(), max_probes=30
    )
    assert torch.isfinite(found.samples).all()
    assert float(found.values[1]) == 0.0
    few = balanced_hutchinson_blocks(
        lambda v: matrix @ v, [4, 2], generator=random(), tolerance=0.0, max_probes=9
    )
    assert (few.products, len(few.samples)) == (9, 9)


def test_errors_of_a_sum_count_that_blocks_share_probes():
    matrix = symmetric(8, seed=5)
    traces = hutchinson_blocks(
        lambda v: matrix @ v, [4, 4], generator=random(), tolerance=0.0, max_probes=500,
        dtype=DOUBLE,
    )  # fmt: skip
    whole = hutchinson(
        lambda v: matrix @ v, 8, generator=random(), tolerance=0.0, max_probes=500, dtype=DOUBLE
    )
    together = traces.combined(torch.ones(2))
    assert together.value == pytest.approx(whole.value, rel=1e-12)
    assert together.standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    apart = float(traces.standard_errors.square().sum().sqrt())
    assert abs(together.standard_error / apart - 1) > 0.1  # as independent it would be wrong
    weighted = traces.combined(torch.tensor([2.0, 0.0]))
    assert weighted.value == pytest.approx(2 * float(traces.values[0]))
    assert weighted.standard_error == pytest.approx(2 * float(traces.standard_errors[0]))


def test_stops_on_the_standard_error_and_not_before_eight_probes():
    matrix = torch.eye(30, dtype=DOUBLE) + 0.05 * symmetric(30)
    found = hutchinson(lambda v: matrix @ v, 30, generator=random(), tolerance=0.1, dtype=DOUBLE)
    assert found.converged
    assert LEAST_PROBES <= found.products < 50
    assert found.standard_error <= 0.1 * abs(found.value)
    tight = hutchinson(lambda v: matrix @ v, 30, generator=random(), tolerance=1e-6, dtype=DOUBLE)
    assert not tight.converged
    assert tight.products == 50


def test_two_equal_samples_do_not_end_it():
    """Samples 1, 1, 9, 1, 1, 9 ..: a running mean stands still after two, at a wrong value."""
    calls = iter(range(100))

    def product(vector):
        return vector * (9.0 if next(calls) % 3 == 2 else 1.0)

    found = hutchinson(product, 1, generator=random(), tolerance=1e-3, max_probes=30)
    assert found.products == 30
    assert found.value == pytest.approx(11 / 3)


@pytest.mark.parametrize("rank", [1, 3])
def test_hutch_plus_plus_is_exact_where_the_sketch_holds_the_range(rank):
    matrix = symmetric(12, seed=rank, rank=rank)
    found = hutch_plus_plus(lambda v: matrix @ v, 12, sketch=3, generator=random(), dtype=DOUBLE)
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert found.standard_error < 1e-10 * abs(found.value)
    assert found.products == 2 * 3 + LEAST_PROBES
    assert found.converged


def test_hutch_plus_plus_needs_no_probes_where_the_sketch_is_everything():
    matrix = symmetric(4)
    found = hutch_plus_plus(lambda v: matrix @ v, 4, sketch=9, generator=random(), dtype=DOUBLE)
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert (found.products, found.standard_error) == (8, 0.0)


def test_hutch_plus_plus_beats_hutchinson_on_a_falling_spectrum_and_knows_its_error():
    basis = torch.linalg.qr(symmetric(40)).Q
    matrix = (basis * 0.7 ** torch.arange(40, dtype=DOUBLE)) @ basis.T
    trace, runs = float(matrix.trace()), 200
    plain, better, claimed = [], [], []
    for seed in range(runs):
        options = {"generator": random(seed), "tolerance": 0.0, "dtype": DOUBLE}
        plain.append(hutchinson(lambda v: matrix @ v, 40, max_probes=22, **options).value - trace)
        found = hutch_plus_plus(lambda v: matrix @ v, 40, sketch=6, max_probes=10, **options)
        better.append(found.value - trace)
        claimed.append(found.standard_error)
        assert found.products == 22
    rms = torch.tensor([plain, better]).square().mean(1).sqrt()
    assert rms[1] < 0.35 * rms[0]
    assert float(torch.tensor(claimed).square().mean().sqrt()) == pytest.approx(
        float(rms[1]), rel=0.2
    )


def test_hutch_plus_plus_without_a_sketch_is_hutchinson():
    matrix = symmetric(7)
    options = {"tolerance": 0.0, "max_probes": 9, "dtype": DOUBLE}
    plain = hutchinson(lambda v: matrix @ v, 7, generator=random(), **options)
    found = hutch_plus_plus(lambda v: matrix @ v, 7, sketch=0, generator=random(), **options)
    assert found.value == pytest.approx(plain.value)
    assert found.standard_error == pytest.approx(plain.standard_error)


def test_trace_of_a_regression_is_known_and_hawq_v2_is_the_mean_of_isotropic_errors():
    """1/2N ‖X Wᵀ − Y‖² has Hessian I ⊗ XᵀX/N; ½ E[Dᵀ H D] = ½ (tr H / n) ‖D‖²."""
    generator = random()
    inputs = torch.randn(50, 4, generator=generator, dtype=DOUBLE)
    targets = torch.randn(50, 3, generator=generator, dtype=DOUBLE)

    def loss(weight):
        return (inputs @ weight.view(3, 4).T - targets).square().sum() / (2 * 50)

    weight = torch.randn(12, generator=generator, dtype=DOUBLE, requires_grad=True)

    def product(vector):
        (slope,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
        return torch.autograd.grad(slope, weight, grad_outputs=vector)[0]

    gram = inputs.T @ inputs / 50
    vector = torch.randn(12, generator=generator, dtype=DOUBLE)
    hessian = torch.kron(torch.eye(3, dtype=DOUBLE), gram)
    torch.testing.assert_close(product(vector), hessian @ vector)
    trace = 3 * float(gram.trace())
    exact = hutch_plus_plus(product, 12, sketch=12, generator=random(), dtype=DOUBLE)
    assert exact.value == pytest.approx(trace, rel=1e-10)
    errors = torch.randn(4000, 12, generator=generator, dtype=DOUBLE)
    errors *= 0.3 / errors.norm(dim=1, keepdim=True)
    measured = 0.5 * ((errors @ hessian) * errors).sum(1)
    score = mean_trace_scores(
        torch.tensor([exact.value]), torch.zeros(1), torch.tensor([12]), torch.tensor([0.3**2])
    )
    predicted = 0.5 * float(score.values)
    assert predicted == pytest.approx(0.5 * trace / 12 * 0.3**2, rel=1e-6)
    assert abs(float(measured.mean()) - predicted) < 3 * float(measured.std()) / 4000**0.5
    assert float(measured.mean()) == pytest.approx(predicted, rel=0.03)


def test_softmax_hessian_is_the_mean_of_squared_sampled_gradients():
    """For linear logits: E over labels of (p − onehot)(p − onehot)ᵀ = diag(p) − p pᵀ = Hessian."""
    logits = torch.randn(6, generator=random(), dtype=DOUBLE)
    probability = logits.softmax(0)
    residuals = probability - torch.eye(6, dtype=DOUBLE)
    expected = torch.einsum("y,yi,yj->ij", probability, residuals, residuals)
    torch.testing.assert_close(expected.diagonal(), probability - probability.square())
    hessian = torch.autograd.functional.hessian(lambda x: -x.log_softmax(0)[2], logits)
    torch.testing.assert_close(hessian, expected)
    trace = hutch_plus_plus(lambda v: hessian @ v, 6, sketch=6, generator=random(), dtype=DOUBLE)
    assert trace.value == pytest.approx(float((probability - probability.square()).sum()))


def test_restriction_is_the_diagonal_block():
    matrix = symmetric(6)
    block = restricted(lambda v: matrix @ v, 6, 2, 3)
    columns = torch.stack([block(unit) for unit in torch.eye(3, dtype=DOUBLE)])
    torch.testing.assert_close(columns, matrix[2:5, 2:5])


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="number of probes is 1"):
        hutchinson(lambda v: v, 3, generator=random(), max_probes=1)
    with pytest.raises(UsageError, match="sketch size is -1"):
        hutch_plus_plus(lambda v: v, 3, sketch=-1, generator=random())
    with pytest.raises(UsageError, match=r"made \(2,\) of a vector \(3,\)"):
        hutchinson(lambda v: v[:2], 3, generator=random())
    with pytest.raises(InputError, match="2 of 3 values are NaN or Inf"):
        hutchinson(lambda v: v / torch.tensor([1.0, 0.0, 0.0]), 3, generator=random())


def test_samples_are_what_the_numbers_come_from():
    samples = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=DOUBLE)
    traces = BlockTraces(samples=samples, products=2)
    assert traces.values.tolist() == [2.0, 4.0]
    assert traces.standard_errors.tolist() == pytest.approx([1.0, 2.0])
