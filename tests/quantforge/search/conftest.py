"""Random tables and the exhaustive search that solvers are checked against."""

import itertools

import numpy as np
import pytest


def make_tables(seed, items, candidates, *, resources=1, missing=0.15, largest=15):
    """Losses with holes, whole-numbered costs; every item keeps at least one candidate."""
    generator = np.random.default_rng(seed)
    loss = generator.random((items, candidates))
    holes = generator.random((items, candidates)) < missing
    holes[np.arange(items), generator.integers(0, candidates, items)] = False
    loss[holes] = np.inf
    return loss, generator.integers(0, largest, (resources, items, candidates))


def exhaustive(value, costs, limits):
    """Least `value(picks)` over all picks within the limits; None if there are none."""
    items, candidates = costs.shape[1:]
    best = None
    for picks in itertools.product(range(candidates), repeat=items):
        spent = costs[:, np.arange(items), picks].sum(axis=1)
        reached = value(np.array(picks))
        if (spent <= limits).all() and np.isfinite(reached) and (best is None or reached < best):
            best = reached
    return best


@pytest.fixture
def tables():
    return make_tables


@pytest.fixture
def brute_force():
    """Least additive loss within the limits."""

    def additive(loss, costs, limits):
        return exhaustive(lambda picks: loss[np.arange(len(loss)), picks].sum(), costs, limits)

    return additive


@pytest.fixture
def brute_force_objective():
    return lambda objective, costs, limits: exhaustive(objective.value, costs, limits)
