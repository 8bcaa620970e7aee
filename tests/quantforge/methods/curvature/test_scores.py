"""Scores and head budgets against numbers by hand and invariants."""

import math

import pytest
import torch

from quantforge.errors import UsageError
from quantforge.methods.curvature.heads import head_budgets, head_scores, head_traces
from quantforge.methods.curvature.scores import (
    Scores,
    cautious,
    eigenvalue_density,
    fine_tuning_scores,
    mean_trace_scores,
)
from quantforge.methods.curvature.trace import BlockTraces

DOUBLE = torch.float64


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_hawq_order_and_fine_tuning_order_differ_as_they_should():
    eigenvalues, residuals = torch.tensor([10.0, 8.0, 1.0]), torch.tensor([1.0, 0.5, 0.1])
    density = eigenvalue_density(eigenvalues, residuals, torch.tensor([100, 10, 10]))
    assert density.values.tolist() == pytest.approx([0.1, 0.8, 0.1])
    assert density.standard_errors.tolist() == pytest.approx([0.01, 0.05, 0.01])
    assert density.order() == [1, 0, 2]  # ties in forward order
    tuning = fine_tuning_scores(eigenvalues, residuals, torch.tensor([2.0, 1.0, 30.0]))
    assert tuning.values.tolist() == pytest.approx([20.0, 8.0, 30.0])
    assert tuning.standard_errors.tolist() == pytest.approx([2.0, 0.5, 3.0])
    assert tuning.order() == [2, 0, 1]


def test_mean_trace_table_with_specs_that_do_not_fit():
    table = mean_trace_scores(
        torch.tensor([12.0, -4.0]),
        torch.tensor([1.2, 1.0]),
        torch.tensor([6, 2]),
        torch.tensor([[3.0, 0.5], [1.0, math.inf]]),
    )
    assert table.values.tolist() == [[6.0, 1.0], [-2.0, math.inf]]
    assert table.standard_errors.flatten().tolist() == pytest.approx([0.6, 0.1, 0.5, 0.0])
    with pytest.raises(UsageError, match="choose a spec"):
        table.order()


def test_an_estimate_below_its_error_counts_as_its_error():
    found = cautious(torch.tensor([5.0, -3.0, 0.1]), torch.tensor([1.0, 0.5, 0.4]))
    assert found.tolist() == pytest.approx([5.0, 0.5, 0.4])


def test_heads_are_the_rows_of_a_projection():
    """4 heads of 2 rows of 3: a diagonal Hessian gives every head's sum exactly."""
    diagonal = torch.randn(24, generator=random(), dtype=DOUBLE)
    traces = head_traces(lambda v: diagonal * v, 4, 8, 3, generator=random(), dtype=DOUBLE)
    weights = diagonal.view(8, 3)
    expected = torch.stack([weights[2 * head : 2 * head + 2].sum() for head in range(4)])
    torch.testing.assert_close(traces.values, expected)
    with pytest.raises(UsageError, match="8 rows do not split into 3 heads"):
        head_traces(lambda v: v, 3, 8, 3, generator=random())


def test_head_scores_sum_to_one_and_their_error_is_that_of_a_ratio():
    means = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    runs = []
    for seed in range(300):
        common = 1 + 0.2 * torch.randn(40, 1, generator=random(seed), dtype=DOUBLE)
        noise = 0.3 * torch.randn(40, 3, generator=random(1000 + seed), dtype=DOUBLE)
        scores = head_scores(BlockTraces(samples=means * common + noise, products=40))
        assert float(scores.values.sum()) == pytest.approx(1.0)
        runs.append(scores)
    values = torch.stack([one.values for one in runs])
    claimed = torch.stack([one.standard_errors for one in runs]).mean(0)
    assert values.mean(0).tolist() == pytest.approx([0.125, 0.25, 0.625], abs=1e-3)
    torch.testing.assert_close(claimed, values.std(0), rtol=0.12, atol=0)


def test_head_scores_of_negative_traces():
    samples = torch.tensor([[3.0, -1.0, 1.0], [3.0, -3.0, 1.0]], dtype=DOUBLE)
    scores = head_scores(BlockTraces(samples=samples, products=2))
    assert scores.values.tolist() == [0.75, 0.0, 0.25]
    assert scores.standard_errors.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(UsageError, match="no head has a positive trace"):
        head_scores(BlockTraces(samples=-samples.abs(), products=2))


@pytest.mark.parametrize("seed", range(20))
def test_head_budgets_keep_the_total_and_the_cap(seed):
    generator = random(seed)
    shares = torch.rand(9, generator=generator, dtype=DOUBLE).pow(4)
    total = 9 * 8.0 * float(torch.rand((), generator=generator))
    budgets = head_budgets(shares / shares.sum(), total, 8.0)
    assert float(budgets.sum()) == pytest.approx(total, abs=1e-9)
    assert (budgets >= 0).all()
    assert (budgets <= 8.0).all()
    free = budgets < 8.0 - 1e-9
    ratios = (budgets / shares)[free]  # those below the cap share in proportion, by one factor
    assert float(ratios.max() - ratios.min()) <= 1e-9 * float(ratios.max())
    if free.any() and not free.all():
        assert (8.0 / shares[~free] <= ratios.max() * (1 + 1e-9)).all()


def test_head_budgets_by_hand():
    shares = torch.tensor([0.7, 0.2, 0.1])
    assert head_budgets(shares, 9.0, 4.0).tolist() == pytest.approx([4.0, 10 / 3, 5 / 3], abs=1e-6)
    assert head_budgets(shares, 12.0, 4.0).tolist() == pytest.approx([4.0, 4.0, 4.0])
    assert head_budgets(shares, 0.0, 4.0).tolist() == [0.0, 0.0, 0.0]
    assert head_budgets(torch.tensor([1.0, 0.0, 0.0]), 6.0, 4.0).tolist() == [4.0, 1.0, 1.0]
    with pytest.raises(UsageError, match="3 heads of at most 4 cannot take 13"):
        head_budgets(shares, 13.0, 4.0)


def test_scores_are_put_in_order_with_infinite_ones_first():
    scores = Scores(values=torch.tensor([1.0, math.inf, 2.0]), standard_errors=torch.zeros(3))
    assert scores.order() == [1, 2, 0]
