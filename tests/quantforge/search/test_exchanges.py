"""Exchanges around given picks, against every plan there is."""

import itertools

import numpy as np
import pytest

from quantforge.search.exchanges import Exchange, joined, nearest_exchanges, solved_again

COST = np.array([[2, 3, 4, 16]] * 4) * np.array([[1], [2], [1], [3]])


def made_up(seed, picks):
    """Changes of every move, some of them gains; one candidate is missing."""
    changes = np.random.default_rng(seed).normal(size=COST.shape)
    changes[np.arange(4), picks] = 0.0
    changes[3, 0] = np.inf
    return changes


def value(table, picks):
    return table[np.arange(len(picks)), picks].sum()


@pytest.mark.parametrize("seed", range(6))
def test_exchanges_are_the_best_moves_and_each_has_its_best_payer(seed):
    picks = np.array([1, 1, 2, 1])
    limit = value(COST, picks) + 1
    changes = made_up(seed, picks)
    found = nearest_exchanges(changes, COST, picks, limit, 100)
    expected = {}
    for item, candidate in itertools.product(range(4), range(4)):
        moved = picks.copy()
        moved[item] = candidate
        if candidate == picks[item] or not np.isfinite(changes[item, candidate]):
            continue
        if value(COST, moved) <= limit:
            expected[frozenset({(item, candidate)})] = changes[item, candidate]
            continue
        pairs = []
        for other, theirs in itertools.product(range(4), range(4)):
            both = moved.copy()
            both[other] = theirs
            payer = other != item and theirs != picks[other]
            if payer and np.isfinite(changes[other, theirs]) and value(COST, both) <= limit:
                pairs.append((changes[other, theirs], (other, theirs)))
        if pairs:
            change, payer = min(pairs)
            expected[frozenset({(item, candidate), payer})] = changes[item, candidate] + change
    made = {frozenset(one.moves.items()): one.change for one in found}
    assert made == pytest.approx(expected)
    assert [one.change for one in found] == sorted(expected.values())
    assert nearest_exchanges(changes, COST, picks, limit, 3) == found[:3]


@pytest.mark.parametrize("seed", range(6))
def test_solving_again_gives_the_best_picks_and_fewer_moves_when_they_are_charged(seed):
    picks = np.array([1, 1, 2, 1])
    limit = int(value(COST, picks)) + 1
    changes = made_up(seed, picks)
    found = solved_again(changes, COST, picks, limit)
    best = min(
        value(changes, np.array(other))
        for other in itertools.product(range(4), repeat=4)
        if value(COST, np.array(other)) <= limit
    )
    if best >= 0:
        assert found == []
        return
    assert value(changes, found[0]) == pytest.approx(best)
    moves = [int((one != picks).sum()) for one in found]
    assert moves == sorted(moves, reverse=True)
    assert all(value(COST, one) <= limit for one in found)
    assert len({tuple(one) for one in found}) == len(found)
    assert tuple(picks) not in {tuple(one) for one in found}


def test_nothing_to_gain_proposes_nothing():
    picks = np.array([1, 1, 1, 1])
    changes = np.ones(COST.shape)
    changes[np.arange(4), picks] = 0.0
    assert solved_again(changes, COST, picks, 1000) == []
    assert solved_again(changes, COST, picks, 1) == []


def test_exchanges_are_joined_in_order_where_they_fit():
    picks = np.array([1, 1, 1, 1])  # costs 3, 6, 3, 9
    first, second = Exchange({0: 2}, -3.0), Exchange({0: 3, 1: 0}, -2.0)  # both move item 0
    third, fourth = Exchange({2: 3}, -1.0), Exchange({3: 0, 2: 2}, -0.5)  # the third costs 13
    found = joined([first, second, third, fourth], COST, picks, 22)
    assert found.tolist() == [2, 1, 2, 0]
    assert picks.tolist() == [1, 1, 1, 1]
