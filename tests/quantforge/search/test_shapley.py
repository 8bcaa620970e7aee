"""Shapley values against their axioms and against all orders."""

import itertools
import math

import numpy as np
import pytest

from quantforge.search.shapley import shapley


def game(seed, players):
    table = np.random.default_rng(seed).normal(size=2**players)
    return lambda members: float(table[members @ (1 << np.arange(players))])


@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_values_sum_to_the_whole_in_every_sample(pairs):
    value = game(0, 6)
    result = shapley(value, 6, pairs=pairs, generator=np.random.default_rng(1))
    whole = value(np.ones(6, dtype=int)) - value(np.zeros(6, dtype=int))
    assert result.values.sum() == pytest.approx(whole, abs=1e-12)


def test_an_additive_game_gives_each_its_own_and_a_pair_is_split():
    own = np.array([3.0, -1.0, 0.5, 2.0])
    one = shapley(lambda s: own @ s, 4, pairs=1, generator=np.random.default_rng(0))
    assert one.values == pytest.approx(own)
    both = shapley(
        lambda s: own @ s + 4.0 * (s[0] and s[3]), 4, pairs=1, generator=np.random.default_rng(0)
    )
    assert both.values == pytest.approx([5.0, -1.0, 0.5, 4.0])


def test_one_pair_of_orders_is_exact_for_pairwise_interactions():
    generator = np.random.default_rng(2)
    own, pairs = generator.normal(size=8), generator.normal(size=(8, 8))
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    result = shapley(lambda s: own @ s + 0.5 * s @ pairs @ s, 8, pairs=1, generator=generator)
    assert result.values == pytest.approx(own + 0.5 * pairs.sum(axis=1))


def test_estimates_approach_the_mean_over_all_orders_within_their_errors():
    value, players = game(3, 5), 5
    exact = np.zeros(players)
    for order in itertools.permutations(range(players)):
        members = np.zeros(players, dtype=int)
        for player in order:
            before = value(members)
            members[player] = 1
            exact[player] += (value(members) - before) / math.factorial(players)
    result = shapley(value, players, pairs=400, generator=np.random.default_rng(4))
    assert (np.abs(result.values - exact) < 4 * result.stderr).all()
    assert (result.stderr < 0.1).all()


def test_counts_its_evaluations():
    calls = []
    result = shapley(
        lambda s: calls.append(1) or float(s.sum()), 5, pairs=3, generator=np.random.default_rng(0)
    )
    assert len(calls) == result.evaluations == 2 * 3 * 4 + 2
    single = shapley(lambda s: 2.0 * s[0], 1, pairs=1, generator=np.random.default_rng(0))
    assert single.values.tolist() == [2.0]
    assert np.isnan(single.stderr[0])


def test_no_players_or_orders_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        shapley(lambda _: 0.0, 0, pairs=1, generator=np.random.default_rng(0))
