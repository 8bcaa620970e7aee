"""Objectives with interactions: their values, their increments, their bounds."""

import numpy as np
import pytest

from quantforge.search.objective import GramObjective, PairwiseObjective, project_psd


def pairwise(seed, items, candidates, size=1.0):
    generator = np.random.default_rng(seed)
    loss = generator.random((items, candidates))
    pair = size * generator.normal(0, 0.2, (items, candidates, items, candidates))
    pair = pair + pair.transpose(2, 3, 0, 1)
    pair[np.arange(items), :, np.arange(items)] = 0
    return PairwiseObjective(loss=loss, pair=pair)


def gram(seed, items, candidates, samples=6, unary=0.1):
    generator = np.random.default_rng(seed)
    projections = generator.normal(0.2, 1, (samples, items, candidates))
    return GramObjective(
        loss=unary * generator.random((items, candidates)), projections=projections, weight=0.07
    )


OBJECTIVES = {"pairwise": pairwise, "gram": gram}


def test_a_quadratic_loss_is_its_pairs():
    # ½ Dᵀ H D over errors D of all layers = Σ ½ D_iᵀ H_ii D_i + Σ_{i<j} D_iᵀ H_ij D_j
    generator = np.random.default_rng(0)
    items, candidates, size = 4, 3, 5
    root = generator.normal(size=(items * size, items * size))
    hessian = root + root.T
    errors = generator.normal(size=(items, candidates, size))
    blocks = hessian.reshape(items, size, items, size)
    pair = np.einsum("iak,ikjl,jbl->iajb", errors, blocks, errors)
    rows = np.arange(items)
    own = np.einsum("iaia->ia", pair).copy()
    pair[rows, :, rows] = 0
    objective = PairwiseObjective(loss=own / 2, pair=pair)
    for picks in generator.integers(0, candidates, (20, items)):
        step = errors[rows, picks].ravel()
        assert objective.value(picks) == pytest.approx(0.5 * step @ hessian @ step)
    # and a finite difference of the loss of two layers is their entry
    loss = lambda step: 0.5 * step.ravel() @ hessian @ step.ravel()  # noqa: E731
    for i, j, a, b in ((0, 1, 2, 0), (3, 1, 1, 1)):
        first, second = np.zeros((2, items, size))
        first[i], second[j] = errors[i, a], errors[j, b]
        difference = loss(first + second) - loss(first) - loss(second)
        assert pair[i, a, j, b] == pytest.approx(difference)


def test_the_gram_form_is_the_sum_of_squares_it_says():
    objective = gram(0, 4, 3)
    weight, projections = objective.weight, objective.projections
    for picks in np.random.default_rng(1).integers(0, 3, (20, 4)):
        total = sum(
            sum(projections[s, i, picks[i]] for i in range(4)) ** 2 for s in range(len(projections))
        )
        loss = sum(objective.loss[i, picks[i]] for i in range(4))
        assert objective.value(picks) == pytest.approx(loss + weight * total)
        assert objective.pairwise().value(picks) == pytest.approx(objective.value(picks))
    assert objective.alone[1, 2] == pytest.approx(
        objective.loss[1, 2] + weight * (projections[:, 1, 2] ** 2).sum()
    )


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_increments_are_differences_of_values(kind):
    objective = OBJECTIVES[kind](2, 5, 4)
    generator = np.random.default_rng(3)
    state = objective.begin(generator.integers(0, 4, 5))
    for _ in range(6):
        for item in range(5):
            joint = state.joint(item)
            for pick in range(4):
                moved = state.picks.copy()
                moved[item] = pick
                change = objective.value(moved) - state.value
                assert state.changes[item, pick] == pytest.approx(change, abs=1e-12)
                for other in range(item + 1, 5):
                    both = moved.copy()
                    both[other] = (both[other] + 1) % 4
                    change = objective.value(both) - state.value
                    alone = state.changes[item, pick] + state.changes[other, both[other]]
                    assert joint[pick, other - item - 1, both[other]] == pytest.approx(
                        change - alone, abs=1e-12
                    )
        state.move(int(generator.integers(5)), int(generator.integers(4)))
        assert state.value == pytest.approx(objective.value(state.picks))


def test_both_forms_move_alike():
    low_rank = gram(4, 6, 3)
    states = [form.begin(np.zeros(6, dtype=int)) for form in (low_rank, low_rank.pairwise())]
    for item, pick in ((0, 2), (3, 1), (0, 1), (5, 2)):
        for state in states:
            state.move(item, pick)
        assert states[0].changes == pytest.approx(states[1].changes)
        assert states[0].joint(2) == pytest.approx(states[1].joint(2))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_bound_is_below_every_plan_within_the_limits(kind, brute_force_objective):
    for seed in range(8):
        objective = OBJECTIVES[kind](seed, 5, 3)
        generator = np.random.default_rng(100 + seed)
        costs = generator.integers(1, 20, (2, 5, 3))
        objective.loss[0, 1] = objective.loss[3, 0] = np.inf
        for share in (0.8, 1.0, 3.0):
            limits = (costs.mean(axis=2).sum(axis=1) * share).astype(int)
            best = brute_force_objective(objective, costs, limits)
            bound = objective.bound(costs, limits)
            assert bound <= (np.inf if best is None else best) + 1e-9
        assert objective.bound(costs, [4, 4]) == np.inf


def test_bounds_are_tight_where_nothing_interacts(brute_force_objective):
    generator = np.random.default_rng(5)
    loss, costs = generator.random((5, 3)), generator.integers(1, 20, (1, 5, 3))
    # at an unlimited budget both relaxations of an additive objective are the optimum
    none = PairwiseObjective(loss=loss, pair=np.zeros((5, 3, 5, 3)))
    assert none.bound(costs, [1000]) == pytest.approx(loss.min(axis=1).sum())
    flat = GramObjective(loss=loss, projections=np.zeros((2, 5, 3)), weight=1.0)
    assert flat.bound(costs, [1000]) == pytest.approx(loss.min(axis=1).sum())
    # and two layers of one candidate each have nothing to relax
    pair = np.zeros((2, 1, 2, 1))
    pair[0, 0, 1, 0] = pair[1, 0, 0, 0] = -0.3
    single = PairwiseObjective(loss=np.array([[1.0], [2.0]]), pair=pair)
    assert single.bound(costs[:, :2, :1], [1000]) == pytest.approx(2.7)


def test_the_convex_bound_is_the_relaxations_optimum():
    # one sample, two candidates ±: shares cancel the sum, so only the loss is left
    projections = np.array([[[1.0, -1.0], [1.0, -1.0]]])
    objective = GramObjective(loss=np.ones((2, 2)), projections=projections, weight=1.0)
    assert objective.bound(np.ones((1, 2, 2), dtype=int), [2]) == pytest.approx(2.0, rel=1e-3)


def test_wrong_tables_are_refused():
    loss, pair = np.zeros((2, 2)), np.zeros((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"pair must be \(2, 2, 2, 2\)"):
        PairwiseObjective(loss=loss, pair=pair[0])
    own = pair.copy()
    own[1, 0, 1, 1] = own[1, 1, 1, 0] = 1
    with pytest.raises(ValueError, match="zero within an item"):
        PairwiseObjective(loss=loss, pair=own)
    skew = pair.copy()
    skew[0, 1, 1, 0] = 1
    with pytest.raises(ValueError, match="symmetric"):
        PairwiseObjective(loss=loss, pair=skew)
    with pytest.raises(ValueError, match="finite"):
        PairwiseObjective(loss=loss, pair=pair + np.nan)
    with pytest.raises(ValueError, match=r"\[samples, 2, 2\]"):
        GramObjective(loss=loss, projections=np.zeros((3, 2, 1)), weight=1.0)
    with pytest.raises(ValueError, match="finite"):
        GramObjective(loss=loss, projections=np.full((1, 2, 2), np.inf), weight=1.0)
    with pytest.raises(ValueError, match="weight"):
        GramObjective(loss=loss, projections=np.zeros((1, 2, 2)), weight=-1.0)


def test_projection_is_the_nearest_and_idempotent():
    generator = np.random.default_rng(6)
    matrix = generator.normal(size=(7, 7))
    matrix = matrix + matrix.T
    projected = project_psd(matrix)
    assert np.linalg.eigvalsh(projected).min() >= -1e-12
    assert project_psd(projected) == pytest.approx(projected, abs=1e-12)
    # what was taken away is negative semi-definite and orthogonal to what is left
    assert np.linalg.eigvalsh(matrix - projected).max() <= 1e-12
    assert np.trace((matrix - projected) @ projected) == pytest.approx(0, abs=1e-10)
