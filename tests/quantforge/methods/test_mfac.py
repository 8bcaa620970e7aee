"""M-FAC's recursion and Woodbury's form against a dense inverse, and the Gram of gradients."""

import pytest
import torch

from quantforge.methods.mfac import (
    interaction_matrix,
    invert_fisher,
    project_errors,
    saliency,
    woodbury_product,
)


def gradients(samples, weights, seed=0):
    return torch.randn(samples, weights, generator=torch.Generator().manual_seed(seed)).double()


def dense(rows, damping):
    return damping * torch.eye(rows.shape[1]).double() + rows.T @ rows / len(rows)


@pytest.mark.parametrize(("samples", "weights"), [(1, 6), (5, 20), (20, 5), (40, 40)])
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_recursion_equals_woodbury_equals_a_dense_solve(samples, weights, damping):
    rows = gradients(samples, weights)
    vectors = gradients(2 * 3, weights, seed=1).view(2, 3, weights)
    inverse = torch.linalg.inv(dense(rows, damping))
    expected, size = vectors @ inverse, 1 / damping
    fisher = invert_fisher(rows, damping)
    tolerance = 1e-10 * size
    torch.testing.assert_close(fisher.product(vectors), expected, rtol=0, atol=tolerance)
    direct = woodbury_product(rows, damping, vectors)
    torch.testing.assert_close(direct, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(fisher.diagonal(), inverse.diagonal(), rtol=0, atol=tolerance)
    one = vectors[0, 0]
    torch.testing.assert_close(fisher.product(one), expected[0, 0], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        woodbury_product(rows, damping, one), expected[0, 0], rtol=0, atol=tolerance
    )


def test_one_gradient_is_sherman_morrison():
    row, vector, damping = gradients(1, 8), gradients(1, 8, seed=2)[0], 0.3
    g = row[0]
    expected = vector / damping - g * (g @ vector) / (damping**2 + damping * (g @ g))
    torch.testing.assert_close(invert_fisher(row, damping).product(vector), expected)


def test_large_damping_divides_by_it():
    rows, vector = gradients(4, 8), gradients(1, 8, seed=2)[0]
    product = invert_fisher(rows, 1e9).product(vector) * 1e9
    torch.testing.assert_close(product, vector, rtol=1e-7, atol=1e-7)


def test_saliency_is_the_least_rise_with_all_other_weights_free():
    # minimize ½ xᵀ F x subject to x_j = change
    rows, damping = gradients(10, 5), 0.1
    fisher, change = dense(rows, damping), gradients(1, 5, seed=3)[0]
    found = saliency(change, invert_fisher(rows, damping).diagonal())
    for j in range(5):
        others = [k for k in range(5) if k != j]
        x = torch.zeros(5).double()
        x[j] = change[j]
        x[others] = torch.linalg.solve(
            fisher[others][:, others], -fisher[others][:, [j]].squeeze(1) * change[j]
        )
        assert float(found[j]) == pytest.approx(float(0.5 * x @ fisher @ x), rel=1e-9)


def test_the_gram_of_projections_is_the_dense_fishers_quadratic_form():
    generator = torch.Generator().manual_seed(4)
    shapes, samples, candidates = [(3, 4), (2, 5), (6,)], 7, 2
    per_layer = [torch.randn(samples, *s, generator=generator) for s in shapes]
    errors = [torch.randn(candidates, *s, generator=generator) for s in shapes]
    matrix = interaction_matrix(project_errors(per_layer, errors))
    flat = torch.cat([g.flatten(1) for g in per_layer], dim=1).double()
    fisher = flat.T @ flat / samples
    bounds = [0, 12, 22, 28]
    for i in range(3):
        for j in range(3):
            block = fisher[bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]]
            expected = errors[i].flatten(1).double() @ block @ errors[j].flatten(1).double().T
            torch.testing.assert_close(matrix[i, :, j], expected, rtol=1e-10, atol=1e-10)
    values = torch.linalg.eigvalsh(matrix.reshape(6, 6))
    assert float(values.min()) > -1e-10 * float(values.max())


def test_wrong_inputs_are_refused():
    rows = gradients(3, 4)
    with pytest.raises(ValueError, match="damping must be positive"):
        invert_fisher(rows, 0.0)
    with pytest.raises(ValueError, match=r"gradients must be \[m, d\]"):
        woodbury_product(rows[:0], 1.0, rows[0])
    with pytest.raises(ValueError, match="2 layers of gradients but 1 of errors"):
        project_errors([rows, rows], [rows])
    with pytest.raises(ValueError, match=r"layer 0: gradients of \(4,\) weights, errors of \(3,\)"):
        project_errors([rows], [rows[:, :3]])
    with pytest.raises(ValueError, match="same number of samples"):
        project_errors([rows, rows[:2]], [rows, rows])
