"""The augmented ordering and the bisection over it."""

import itertools
import math

import numpy as np
import pytest

from quantforge.search.ordering import augmented_order, bisect_prefix, most_evaluations


def interactions(seed, layers):
    matrix = np.random.default_rng(seed).normal(0, 0.3, (layers, layers))
    return matrix + matrix.T


def test_prefixes_are_nested_and_their_losses_are_sums_of_pairs():
    generator = np.random.default_rng(0)
    loss, pairs, saving = generator.random(7), interactions(1, 7), generator.integers(1, 5, 7)
    order = augmented_order(loss, pairs, saving.astype(float))
    assert sorted(order.layers) == list(range(7))
    for length in range(8):
        members = order.layers[:length]
        expected = loss[members].sum()
        expected += sum(pairs[i, j] for i, j in itertools.combinations(members, 2))
        assert order.loss[length] == pytest.approx(expected, abs=1e-12)
        assert order.saving[length] == saving[members].sum()


def test_without_interactions_it_is_loss_a_cost():
    loss, saving = np.array([3.0, 1.0, 2.0, 1.0]), np.array([6.0, 1.0, 1.0, 1.0])
    order = augmented_order(loss, np.zeros((4, 4)), saving)
    assert order.layers.tolist() == [0, 1, 3, 2]  # rates ½, 1, 1, 2


def test_each_step_back_restores_what_saves_most_for_its_cost():
    generator = np.random.default_rng(2)
    loss, pairs, saving = generator.random(6), interactions(3, 6), generator.random(6) + 0.5
    order = augmented_order(loss, pairs, saving)

    def predicted(members):
        pairwise = sum(pairs[i, j] for i, j in itertools.combinations(members, 2))
        return loss[list(members)].sum() + pairwise

    quantized = set(range(6))
    for layer in order.layers[::-1]:
        rate = {
            i: (predicted(quantized) - predicted(quantized - {i})) / saving[i] for i in quantized
        }
        assert layer == max(rate, key=rate.get)
        quantized.remove(layer)


def test_interactions_change_the_order():
    # 0 and 1 are harmless alone and ruinous together; 2 is worse than each alone
    loss, pairs = np.array([1.0, 1.1, 1.5]), np.zeros((3, 3))
    assert augmented_order(loss, pairs, np.ones(3)).layers.tolist() == [0, 1, 2]
    pairs[0, 1] = pairs[1, 0] = 5.0
    order = augmented_order(loss, pairs, np.ones(3))
    assert order.layers.tolist() == [0, 2, 1]
    assert order.loss == pytest.approx([0, 1.0, 2.5, 8.6])


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="must be"):
        augmented_order(np.ones(2), np.zeros((3, 3)), np.ones(2))
    with pytest.raises(ValueError, match="symmetric"):
        augmented_order(np.ones(2), np.array([[0.0, 1.0], [2.0, 0.0]]), np.ones(2))
    with pytest.raises(ValueError, match="save something"):
        augmented_order(np.ones(2), np.zeros((2, 2)), np.array([1.0, 0.0]))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 20, 210])
def test_bisection_finds_every_boundary_with_the_logarithm_of_evaluations(length):
    for boundary in range(length + 1):
        calls = []

        def within(prefix, calls=calls, boundary=boundary):
            calls.append(prefix)
            return prefix <= boundary

        result = bisect_prefix(length, within)
        assert result.prefix == boundary
        assert result.searched <= math.ceil(math.log2(length + 1)) == most_evaluations(length)
        assert len(calls) == len(set(calls)) == len(result.tried) <= result.searched + 2
        assert result.monotone
        neighbours = {boundary - 1, boundary, boundary + 1} & set(range(length + 1))
        assert neighbours <= set(result.tried)


def test_nothing_within_the_target_is_said_and_never_inferred():
    result = bisect_prefix(10, lambda _: False)
    assert result.prefix is None
    assert result.tried[0] is False


def test_noise_is_noticed_and_the_longest_evaluated_prefix_is_kept():
    # 5 passes, 4 does not: the boundary is not where a monotone predicate would have it
    result = bisect_prefix(7, lambda prefix: prefix in {0, 1, 2, 3, 5})
    assert result.prefix is not None
    assert result.tried[result.prefix]
    noisy = bisect_prefix(7, lambda prefix: prefix in {4, 5})
    assert noisy.prefix == 5
    dip = bisect_prefix(4, lambda prefix: prefix in {0, 1, 3})
    assert (dip.prefix, dip.monotone) == (1, True) or dip.tried.get(2) is False
    holes = bisect_prefix(7, lambda prefix: prefix in {4, 6})
    assert holes.prefix == 6
    assert not holes.monotone  # 5 was verified as a neighbour, and is not within the target


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="negative"):
        bisect_prefix(-1, lambda _: True)
