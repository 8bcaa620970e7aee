"""Budgets in bytes: within every limit, and as good as any plan within it."""

import itertools
import math

import pytest
import torch

from quantforge.errors import BudgetError, InputError
from quantforge.format.footprint import Footprint
from quantforge.load.huggingface import from_module
from quantforge.planning import (
    excess,
    find_plan,
    frontier,
    priced,
    require_reachable,
    require_within,
    taken,
)
from quantforge.search.allocate import search
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.testing import tiny_llama
from quantforge.types import QuantSpec, Sensitivity

SPECS = (QuantSpec(2), QuantSpec(2, 32), QuantSpec(3), QuantSpec(4, 32))
CONFIG = SearchConfig()


@pytest.fixture(scope="module")
def model():
    return from_module(tiny_llama(blocks=1, hidden=64, intermediate=128, vocabulary=96))


@pytest.fixture(scope="module")
def footprint(model):
    return Footprint.of(model, shard_bytes=1 << 30)


def table(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(len(model.layers), len(SPECS), generator=generator).double()
    loss *= torch.tensor([1.0, 0.7, 0.3, 0.08])
    return Sensitivity(
        layers=model.layers, specs=SPECS, loss=loss, error=loss, estimator="", fingerprint=""
    )


def every_plan(model):
    groups = {}
    for layer in model.layers:
        groups.setdefault(layer.fused_group, []).append(layer.name)
    for picks in itertools.product([*SPECS, None], repeat=len(groups)):
        yield {
            name: spec for names, spec in zip(groups.values(), picks, strict=True) for name in names
        }


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("share", [0.3, 0.42, 0.6, 0.9])
@pytest.mark.parametrize("unit", ["bytes", "x", "vram"])
def test_equals_exhaustive_search_within_the_limit_less_the_headers(
    model, footprint, seed, share, unit
):
    sensitivity = table(model, seed)
    size = int(share * footprint.reference_bytes)
    text = {
        "bytes": f"{size / 1000}kB",
        "x": f"{share}x",
        "vram": f"vram:{(size + 50 * footprint.token_bytes) / 1000}kB@50",
    }[unit]
    budget = Budget.parse(text)
    (limit,) = budget.limits
    plan = find_plan(sensitivity, budget, footprint, CONFIG)
    assert excess(limit, footprint, plan.assignment) <= 0
    assert plan.budget == text
    loss = {
        (layer.name, spec): float(sensitivity.loss[row, column])
        for row, layer in enumerate(model.layers)
        for column, spec in enumerate(SPECS)
    }

    def best(room):
        """Least loss of all plans that leave `room` bytes of the limit free."""
        losses = (
            math.fsum(loss.get(pair, 0.0) for pair in assignment.items())
            for assignment in every_plan(model)
            if excess(limit, footprint, assignment) <= -room
        )
        return min(losses, default=math.inf)

    # a header entry has about 100 bytes, and a kept layer two entries fewer: 7 layers
    assert best(0) - 1e-12 <= plan.predicted_loss <= best(7 * 2 * 110) + 1e-12


def test_all_parts_hold_and_the_tighter_one_decides(model, footprint):
    sensitivity = table(model)
    alone = search(sensitivity, Budget.parse("3bit"), CONFIG)
    size = footprint.checkpoint_bytes(alone.assignment)
    loose = find_plan(sensitivity, Budget.parse(f"3bit,{size / 1000}kB"), footprint, CONFIG)
    assert loose.assignment == alone.assignment
    budget = Budget.parse(f"3bit,{(size - 600) / 1000}kB")
    tight = find_plan(sensitivity, budget, footprint, CONFIG)
    assert footprint.checkpoint_bytes(tight.assignment) <= size - 600
    assert tight.predicted_loss > alone.predicted_loss
    wide = find_plan(sensitivity, Budget.parse("3bit,1x"), footprint, CONFIG)
    assert wide.assignment == alone.assignment


def test_below_the_floor_the_line_names_a_budget_that_works(model, footprint):
    sensitivity = table(model)
    least = footprint.checkpoint_bytes(dict.fromkeys((x.name for x in model.layers), SPECS[0]))
    texts = (f"{(least - 1) / 1000}kB", "0.1x", "vram:3kB@64", "16bit,0.1x")
    for text in texts:
        with pytest.raises(BudgetError, match=r"cannot be met: .* takes") as caught:
            find_plan(sensitivity, Budget.parse(text), footprint, CONFIG)
        advice = str(caught.value).rpartition("at least ")[2].partition(",")[0]
        plan = find_plan(sensitivity, Budget.parse(advice), footprint, CONFIG)
        assert set(plan.assignment.values()) == {SPECS[0]}
    with pytest.raises(BudgetError, match=r"plans reach 2\.[0-9]+ to 16"):
        find_plan(sensitivity, Budget.parse("2bit,1x"), footprint, CONFIG)


def test_group_sizes_that_divide_no_row_are_named_before_anything_is_measured(model, footprint):
    budget, odd = Budget.parse("3bit"), SearchConfig(group_sizes=(48, 7))
    with pytest.raises(InputError, match=r"group_sizes=7, 48 divides no row .*\(rows of 64, 128\)"):
        require_reachable(model.layers, budget, footprint, odd, {})
    require_reachable(model.layers, budget, footprint, SearchConfig(group_sizes=(48, 32)), {})


def test_the_uniform_solver_takes_the_best_uniform_plan_that_fits(model, footprint):
    sensitivity = table(model)
    uniform = dict.fromkeys((x.name for x in model.layers), SPECS[2])
    size = footprint.checkpoint_bytes(uniform)
    config = SearchConfig(solver="uniform")
    plan = find_plan(sensitivity, Budget.parse(f"{size / 1000}kB"), footprint, config)
    assert plan.assignment == uniform
    with pytest.raises(BudgetError):
        find_plan(sensitivity, Budget.parse("0.1x"), footprint, config)


def test_the_only_plan_is_held_against_bytes(model, footprint):
    only = dict.fromkeys((x.name for x in model.layers), SPECS[3])
    size = taken(Budget.parse("1MB").limits[0], footprint, only)
    require_within(Budget.parse(f"{size / 1000}kB"), footprint, only)
    with pytest.raises(BudgetError, match="the checkpoint of the only plan takes"):
        require_within(Budget.parse(f"{(size - 1) / 1000}kB"), footprint, only)


def test_a_given_plan_is_priced(model):
    sensitivity = table(model)
    assignment = {layer.name: None for layer in model.layers} | {model.layers[0].name: SPECS[1]}
    plan = priced(model.layers, assignment, sensitivity)
    weights = sum(layer.numel for layer in model.layers)
    first = model.layers[0].numel
    stored = (16 * (weights - first) + 2.5 * first) / weights
    assert plan.stored_bits == pytest.approx(stored)
    assert plan.budget == f"{math.ceil(1000 * stored) / 1000:g}bit"
    assert plan.predicted_loss == pytest.approx(float(sensitivity.loss[0, 1]))
    assert (plan.solver, priced(model.layers, assignment, None).predicted_loss) == ("file", None)
    assignment[model.layers[1].name] = QuantSpec(7)
    assert priced(model.layers, assignment, sensitivity).predicted_loss is None


def test_the_frontier_goes_from_the_floor_to_six_bits_and_only_gets_better(model):
    sensitivity = table(model)
    plans = frontier(sensitivity, CONFIG, points=30)
    assert set(plans[0].assignment.values()) == {SPECS[0]}
    assert 5 < plans[-1].stored_bits <= 6
    for before, after in itertools.pairwise(plans):
        assert after.stored_bits > before.stored_bits
        assert after.predicted_loss < before.predicted_loss
    for plan in plans:  # each is what a call with its budget gives
        again = search(sensitivity, Budget.parse(plan.budget), CONFIG)
        assert again.assignment == plan.assignment
    assert len(plans) <= 30
