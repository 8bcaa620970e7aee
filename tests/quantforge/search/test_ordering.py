"""The augmented ordering and the bisection over it."""

import itertools
import math

import numpy as np
import pytest

from quantforge.search.objective import GramObjective, PairwiseObjective
from quantforge.search.ordering import (
    additive_steps,
    augmented_choice,
    augmented_order,
    bisect_prefix,
    most_evaluations,
)


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


def two_precisions(seed, layers):
    """Losses and pairs of layers that are quantized (candidate 0) or kept (1), and their costs."""
    generator = np.random.default_rng(seed)
    loss = generator.random(layers) + 0.5
    pairs = 0.05 * np.abs(interactions(seed, layers))
    np.fill_diagonal(pairs, 0)
    saving = generator.integers(1, 9, layers)
    table = np.zeros((layers, 2, layers, 2))
    table[:, 0, :, 0] = pairs
    objective = PairwiseObjective(loss=np.stack([loss, 0 * loss], 1), pair=table)
    return loss, pairs, saving, objective, np.stack([np.ones_like(saving), 1 + saving], 1)


@pytest.mark.parametrize("seed", range(5))
def test_with_two_precisions_plans_are_the_prefixes_of_the_list(seed):
    loss, pairs, saving, objective, cost = two_precisions(seed, 7)
    order = augmented_order(loss, pairs, saving.astype(float))
    full = int(cost[:, 1].sum())
    for length in range(8):
        choice = augmented_choice(objective, cost, full - int(order.saving[length]))
        quantized = {layer for layer, pick in enumerate(choice.picks) if pick == 0}
        assert quantized == set(order.layers[:length].tolist())
        assert choice.loss == pytest.approx(order.loss[length])


def test_steps_between_many_candidates_take_the_steepest_first():
    # losses a bit: 1 to 2 saves 4 for 1 and 2 to 3 saves 1 for 1; the other item 3 for 1, 2 for 1
    loss = np.array([[5.0, 1.0, 0.0], [5.0, 2.0, 0.0]])
    alone = GramObjective(loss=loss, projections=np.zeros((0, 2, 3)), weight=0.0)
    cost = np.array([[1, 2, 3], [1, 2, 3]])
    picks = [augmented_choice(alone, cost, limit).picks for limit in range(2, 7)]
    assert picks == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)]
    assert augmented_choice(alone, cost, 1) is None


def test_a_step_that_does_not_fit_is_passed_over():
    loss = np.array([[9.0, 0.0], [1.0, 0.0]])
    alone = GramObjective(loss=loss, projections=np.zeros((0, 2, 2)), weight=0.0)
    assert augmented_choice(alone, np.array([[1, 9], [1, 2]]), 4).picks == (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_steps_of_losses_that_add_up_are_the_same(seed, tables):
    loss, costs = tables(seed, 8, 5)
    alone = GramObjective(loss=loss, projections=np.zeros((0, 8, 5)), weight=0.0)
    low, high = costs[0].min(axis=1).sum(), costs[0].max(axis=1).sum()
    for limit in np.linspace(low, high, 7):
        choice, picks = (
            augmented_choice(alone, costs[0], limit),
            additive_steps(loss, costs[0], limit),
        )
        if choice is None:
            assert picks is None
        else:
            assert choice.picks == tuple(picks)


@pytest.mark.parametrize("seed", range(5))
def test_interacting_steps_save_what_the_whole_objective_says(seed, brute_force_objective):
    generator = np.random.default_rng(seed)
    projections = generator.normal(0.2, 1, (6, 4, 3)) * np.array([4.0, 2.0, 1.0])
    objective = GramObjective(loss=np.zeros((4, 3)), projections=projections, weight=0.1)
    cost = np.tile([2, 3, 4], (4, 1))
    for limit in (8, 10, 13, 16):
        choice = augmented_choice(objective, cost, limit)
        assert choice.loss == pytest.approx(objective.value(np.array(choice.picks)))
        assert choice.cost <= limit
        best = brute_force_objective(objective, cost[None], [limit])
        assert choice.bound <= best + 1e-9 and best <= choice.loss + 1e-9


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
