"""Interactions from samples: shrinking against a made-up truth, the objective by brute force."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from quantforge.errors import UsageError
from quantforge.search import interactions as module
from quantforge.search.allocate import search, stored_cost
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.search.correction import corrected, correction_factors
from quantforge.search.interactions import (
    pair_loss,
    pairwise_objective,
    shrunk_interactions,
    uniform_loss,
)
from quantforge.types import Interactions, LayerInfo, QuantSpec, Sensitivity

SPECS = (QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(4, 64))
LENGTH = 8


def layers(blocks, fused=False):
    return tuple(
        LayerInfo(
            name=f"{block}.{name}", out_features=4, in_features=192, block=block, stage=0,
            fused_group=f"{block}" if fused else f"{block}.{name}",
        )
        for block in range(blocks)
        for name in "ab"
    )  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def table(blocks=2, samples=6, seed=0, fused=False):
    """Losses and strong interactions of all pairs."""
    known = layers(blocks, fused)
    projections = normal(samples, len(known), 3, seed=seed) * torch.tensor([0.6, 0.3, 0.1])
    loss = projections.square().mean(0)
    weights = 1.0 - torch.eye(len(known)).double()
    return Sensitivity(
        layers=known, specs=SPECS, loss=loss, error=loss, estimator="", fingerprint="",
        interactions=Interactions(projections=projections, weights=weights),
    )  # fmt: skip


def quadratic(sensitivity, columns):
    """Loss of an assignment, every pair added by hand."""
    kept = [(row, column) for row, column in enumerate(columns) if column is not None]
    total = sum(float(sensitivity.loss[row, column]) for row, column in kept)
    found = sensitivity.interactions
    for (i, a), (j, b) in itertools.combinations(kept, 2):
        pair = 2 * (found.projections[:, i, a] * found.projections[:, j, b]).mean()
        total += float(found.weights[i, j] * pair)
    return total


def test_pairs_add_up_to_the_square_of_the_sum():
    sensitivity = table()
    found = sensitivity.interactions
    for columns in ([0, 0, 0, 0], [2, None, 1, 0], [None, None, 1, None]):
        alone = sum(float(sensitivity.loss[i, c]) for i, c in enumerate(columns) if c is not None)
        taken = [found.projections[:, i, c] for i, c in enumerate(columns) if c is not None]
        expected = float(sum(taken).square().mean())
        assert alone + pair_loss(found, columns) == pytest.approx(expected)
    assert uniform_loss(sensitivity, 1) == pytest.approx(quadratic(sensitivity, [1] * 4))
    assert pair_loss(None, [0, 0]) == 0.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", ["2.4bit", "3bit", "4bit"])
def test_the_plan_is_the_best_of_all_with_interactions(bits, fused):
    sensitivity, budget = table(seed=3, fused=fused), Budget.parse(bits)
    config = SearchConfig(interactions="full")
    plan = search(sensitivity, budget, config)
    assert plan.solver == "pairwise"
    weights, best = sum(layer.numel for layer in sensitivity.layers), np.inf
    for picks in itertools.product([0, 1, 2, None], repeat=4):
        if fused and (picks[0] != picks[1] or picks[2] != picks[3]):
            continue
        cost = sum(
            stored_cost(layer, None if c is None else SPECS[c])
            for layer, c in zip(sensitivity.layers, picks, strict=True)
        )
        if Fraction(cost, weights) <= budget.bits:
            best = min(best, quadratic(sensitivity, picks))
    assert plan.predicted_loss == pytest.approx(best)
    assert plan.gap == pytest.approx(0.0, abs=1e-12)  # few layers: branched over, with proof
    assert plan.stored_bits <= float(budget.bits)


def test_ordering_takes_interactions_in_and_names_itself():
    sensitivity, budget = table(blocks=3, seed=3), Budget.parse("2.7bit")
    best = search(sensitivity, budget, SearchConfig(interactions="full"))
    plan = search(sensitivity, budget, SearchConfig(interactions="full", solver="ordering"))
    assert plan.solver == "ordering"
    column = {spec: index for index, spec in enumerate(SPECS)} | {None: None}
    columns = [column[spec] for spec in plan.assignment.values()]
    assert plan.predicted_loss == pytest.approx(quadratic(sensitivity, columns))
    assert best.predicted_loss <= plan.predicted_loss + 1e-12
    assert plan.gap >= plan.predicted_loss - best.predicted_loss - 1e-12
    with pytest.raises(ValueError, match="or solver ordering, not pareto"):
        SearchConfig(interactions="sparse", solver="pareto")


def test_the_additive_plan_misses_what_pairs_lose():
    sensitivity, budget = table(blocks=3, seed=3), Budget.parse("2.7bit")
    plan = search(sensitivity, budget, SearchConfig(interactions="full"))
    additive = search(replace(sensitivity, interactions=None), budget, SearchConfig())
    assert (additive.solver, additive.gap) == ("dynamic-program", 0.0)
    column = {spec: index for index, spec in enumerate(SPECS)} | {None: None}
    missed = quadratic(sensitivity, [column[spec] for spec in additive.assignment.values()])
    assert plan.predicted_loss < 0.8 * missed


def made_up(samples, *, correlation, seed):
    """Products of 12 blocks of two layers; layers of one block move together."""
    common = normal(samples, 12, 1, 1, seed=seed).expand(samples, 12, 2, 3)
    own = normal(samples, 12, 2, 3, seed=seed + 100)
    mixed = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
    return (2 * LENGTH) ** 0.5 * mixed.flatten(1, 2)


def test_noise_is_shrunk_away_and_signal_is_kept():
    known = layers(12)
    same = torch.tensor([[a.block == b.block for a in known] for b in known])
    same.fill_diagonal_(False)
    apart = ~same & ~torch.eye(24).bool()
    for seed in range(3):
        pure = shrunk_interactions(
            made_up(32, correlation=0.0, seed=seed), LENGTH, known, sparse=False
        )
        assert float(pure.weights.mean()) < 0.2
        mixed = shrunk_interactions(
            made_up(32, correlation=0.5, seed=seed), LENGTH, known, sparse=False
        )
        # 0.25 of signal beside a noise of about 1.25 / 32
        assert float(mixed.weights[same].min()) == pytest.approx(0.87, abs=0.08)
        assert float(mixed.weights[apart].mean()) < 0.2
        # a shrunk table is nearer to the truth than the Gram itself
        found = mixed.projections.flatten(1)
        gram = (found.T @ found / 32).view(24, 3, 24, 3)
        truth = 0.5 * same[:, None, :, None].expand_as(gram)
        other = ~torch.eye(24).bool()[:, None, :, None].expand_as(gram)
        shrunk = gram * mixed.weights[:, None, :, None]
        before, after = ((one - truth)[other].square().mean() for one in (gram, shrunk))
        assert float(after) < 0.2 * float(before)
    torch.testing.assert_close(pure.projections, made_up(32, correlation=0.0, seed=2) / 4.0)


def test_sparse_keeps_pairs_of_near_blocks_and_one_sample_tells_nothing():
    known, products = layers(12), made_up(32, correlation=0.5, seed=0)
    products = products + 4.0 * normal(32, 1, 1, seed=9)  # all layers move together
    full = shrunk_interactions(products, LENGTH, known, sparse=False)
    sparse = shrunk_interactions(products, LENGTH, known, sparse=True)
    near = torch.tensor([[abs(a.block - b.block) <= 1 for a in known] for b in known])
    assert torch.equal(sparse.weights, full.weights * near)
    assert float(full.weights[~near].min()) > 0.5
    assert not full.weights.diagonal().any()
    assert torch.equal(full.weights, full.weights.T)
    assert not shrunk_interactions(products[:1], LENGTH, known, sparse=False).weights.any()
    outside = tuple(replace(one, block=-1) for one in known[:2]) + known[2:]
    assert not shrunk_interactions(products, LENGTH, outside, sparse=True).weights[:2].any()


def test_correction_makes_uniform_networks_exact_with_their_pairs():
    raw = table(blocks=3, seed=1)
    measured = {SPECS[0]: 2.5, SPECS[2]: 0.04}
    factors = correction_factors(raw, measured)
    fixed = corrected(raw, factors)
    assert uniform_loss(fixed, 0) == pytest.approx(2.5)
    assert uniform_loss(fixed, 2) == pytest.approx(0.04)
    assert factors[SPECS[0]] == pytest.approx(2.5 / uniform_loss(raw, 0))
    columns = [0, 2, None, 0, 2, 2]
    rows = [i for i, c in enumerate(columns) if c is not None]
    root = torch.tensor([factors[SPECS[columns[i]]] for i in rows]).sqrt()
    taken = torch.stack([raw.interactions.projections[:, i, columns[i]] for i in rows], 1) * root
    pairs = taken.sum(1).square().mean() - taken.square().mean(0).sum()
    assert pair_loss(fixed.interactions, columns) == pytest.approx(float(pairs))


def test_a_table_of_pairs_that_is_too_large_is_refused(monkeypatch):
    sensitivity = table()
    loss = np.zeros((4, 4))
    monkeypatch.setattr(module, "MOST_BYTES", 8 * 16**2 - 1)
    with pytest.raises(UsageError, match="4 groups of layers with 4 candidates"):
        pairwise_objective(loss, sensitivity.interactions, [[0], [1], [2], [3]])
    with pytest.raises(ValueError, match="a search of their own"):
        SearchConfig(interactions="sparse", solver="uniform")
