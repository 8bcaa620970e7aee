"""Isotonic repair against the optimality conditions of the projection and against pooling."""

import numpy as np
import pytest

from quantforge.search.monotone import falling


def pooled(values, weights):
    """Pool-adjacent-violators, non-increasing."""
    blocks = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            v, w, n = blocks.pop()
            u, x, m = blocks.pop()
            blocks.append([(u * x + v * w) / (x + w), x + w, m + n])
    return np.concatenate([[v] * n for v, _, n in blocks])


@pytest.mark.parametrize("seed", range(20))
def test_equals_pooling_of_adjacent_violators(seed):
    generator = np.random.default_rng(seed)
    loss, weight = generator.normal(size=(6, 9)), generator.random((6, 9)) + 0.1
    cost = np.array([generator.permutation(9) for _ in range(6)])
    repaired = falling(loss, cost, weight)
    for row in range(6):
        order = np.argsort(cost[row])
        assert repaired[row][order] == pytest.approx(pooled(loss[row][order], weight[row][order]))
        assert (np.diff(repaired[row][order]) <= 1e-12).all()
    # weighted means are kept, and what already falls is kept as it is
    assert (weight * repaired).sum(axis=1) == pytest.approx((weight * loss).sum(axis=1))
    assert falling(repaired, cost, weight) == pytest.approx(repaired)


def test_missing_candidates_stay_missing_and_do_not_count():
    loss = np.array([[3.0, np.inf, 4.0, 1.0], [np.inf, 2.0, np.inf, np.inf]])
    cost = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    repaired = falling(loss, cost)
    assert repaired[0] == pytest.approx([3.5, np.inf, 3.5, 1.0])
    assert repaired[1] == pytest.approx(loss[1])


def test_weights_pull_towards_what_is_sure():
    repaired = falling(np.array([[1.0, 4.0]]), np.array([[1, 2]]), np.array([[3.0, 1.0]]))
    assert repaired[0] == pytest.approx([1.75, 1.75])


def test_equal_costs_never_contradict_each_other():
    loss = np.array([[1.0, 5.0, 0.5]])
    assert falling(loss, np.array([[2, 2, 3]])) == pytest.approx(loss)


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="must be"):
        falling(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="positive"):
        falling(np.ones((1, 2)), np.ones((1, 2)), np.array([[1.0, 0.0]]))
