"""Who gets candidates under which budget, and tables that hold layers of both kinds."""

import itertools
import math

import pytest
import torch

from quantforge.errors import InputError, UsageError
from quantforge.search.allocate import reachable_bits, search, stored_cost, uniform_plans
from quantforge.search.budget import Budget
from quantforge.search.config import EmbeddingsConfig, SearchConfig
from quantforge.search.vocabulary import (
    given_candidates,
    inside_blocks,
    joined,
    vocabulary_candidates,
)
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SEARCH = SearchConfig()
ONE_GRID = SearchConfig(bits=(4,), group_sizes=(32,), solver="uniform")
WIDE, NARROW = QuantSpec(8, 64), QuantSpec(8)


def layer(name, rows=16, columns=128, **fields):
    return LayerInfo(
        name=name, out_features=rows, in_features=columns, stage=0, fused_group=name,
        **({"block": 0} | fields),
    )  # fmt: skip


TIED = layer("embed", 96, kind="tied", block=-1)


def candidates(include, budget, search=SEARCH, layers=(TIED,)):
    parsed = None if budget is None else Budget.parse(budget)
    return vocabulary_candidates(layers, EmbeddingsConfig(include=include), search, parsed)


@pytest.mark.parametrize(
    ("include", "budget", "planned"),
    [
        (None, "3bit", False), (None, "120MB", True), (None, "0.4x", True),
        (None, "vram:1GB@8", True), (None, "3bit,120MB", False), (None, "kl:0.05", False),
        (None, "kl:0.05,120MB", True), (None, "latency:-25%", False), (None, None, False),
        ("keep", "120MB", False), ("plan", "3bit", True), ("plan", None, True),
    ],
)  # fmt: skip
def test_when_embeddings_are_planned(include, budget, planned):
    found = candidates(include, budget)
    specs = tuple(sorted(QuantSpec(b, g) for b in (4, 5, 6, 8) for g in (64, -1)))
    assert found == ({TIED: specs} if planned else {})


def test_without_a_search_they_are_kept_or_fixed():
    assert candidates(None, "120MB", ONE_GRID) == {}
    with pytest.raises(UsageError, match="give embeddings a spec"):
        candidates("plan", "120MB", ONE_GRID)
    ((key, specs),) = candidates("8bit", None, ONE_GRID).items()
    assert (key.name, key.fixed, specs) == ("embed", True, (WIDE,))
    narrow = layer("embed", 96, 48, kind="tied", block=-1)
    assert next(iter(candidates("8bit", "3bit", layers=(narrow,)).values())) == (NARROW,)
    with pytest.raises(InputError, match="8b-g64 does not divide rows of 48"):
        candidates("8b-g64", "3bit", layers=(narrow,))


def test_a_given_plan_says_it_or_leaves_it_to_the_option():
    asked, silent = EmbeddingsConfig(include="8bit"), EmbeddingsConfig()
    fixed = LayerInfo(**{f: getattr(TIED, f) for f in TIED.__slots__} | {"fixed": True})
    assert given_candidates((TIED,), {"embed": NARROW}, (), silent) == {TIED: (NARROW,)}
    assert given_candidates((TIED,), {"embed": NARROW}, ("embed",), silent) == {fixed: (NARROW,)}
    assert given_candidates((TIED,), {"embed": None}, (), silent) == {TIED: ()}
    assert given_candidates((TIED,), {}, (), silent) == {}
    assert given_candidates((TIED,), {}, (), asked) == {fixed: (WIDE,)}
    with pytest.raises(UsageError, match="the plan says what embed gets"):
        given_candidates((TIED,), {"embed": NARROW}, (), asked)


INSIDE = (layer("a"), layer("b", 32), layer("c", 8))
SPECS = (QuantSpec(2), QuantSpec(3, 64), QuantSpec(4))
OUTSIDE = (QuantSpec(4), QuantSpec(8))


def table(layers, specs, seed):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(len(layers), len(specs), generator=generator).double()
    loss *= torch.tensor([0.5 ** (2 * s.bits) for s in specs])
    return Sensitivity(
        layers=tuple(layers), specs=specs, loss=loss, error=2 * loss, estimator="e",
        fingerprint="f", stderr=3 * loss,
    )  # fmt: skip


def both(seed=0, *, fixed=False):
    outside = layer("embed", 96, kind="tied", block=-1, fixed=fixed)
    specs = OUTSIDE[1:] if fixed else OUTSIDE
    return joined(table(INSIDE, SPECS, seed), table([outside], specs, seed + 50))


def test_a_joined_table_holds_both():
    first, second, whole = table(INSIDE, SPECS, 0), table([TIED], OUTSIDE, 50), both()
    assert whole.specs == (*SPECS, QuantSpec(8))
    for name, scale in (("loss", 1), ("error", 2), ("stderr", 3)):
        found = getattr(whole, name)
        assert torch.equal(found[:3, :3], scale * first.loss)
        assert torch.equal(found[3, 2:], scale * second.loss[0])
        assert found[:3, 3].isinf().all()
        assert found[3, :2].isinf().all()
    assert torch.equal(inside_blocks(whole).loss[:, :3], first.loss)
    assert [x.name for x in inside_blocks(whole).layers] == ["a", "b", "c"]


def every_plan(sensitivity, *, uniform=False):
    """Bits that a budget counts, loss and assignment of all plans."""
    options = [
        [s for s, lost in zip(sensitivity.specs, row.tolist(), strict=True) if math.isfinite(lost)]
        + ([] if one.fixed else [None])
        for one, row in zip(sensitivity.layers, sensitivity.loss, strict=True)
    ]
    for specs in itertools.product(*options):
        if uniform and len(set(specs[:3])) > 1:
            continue
        pairs = list(zip(sensitivity.layers, specs, strict=True))
        bits = sum(stored_cost(x, s) for x, s in pairs if not x.fixed)
        loss = sum(
            0.0 if s is None else float(sensitivity.loss[i, sensitivity.specs.index(s)])
            for i, (_, s) in enumerate(pairs)
        )
        yield bits, loss, {x.name: s for x, s in pairs}


@pytest.mark.parametrize("solver", ["dynamic-program", "uniform"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("budget", ["4bit", "5.5bit", "9bit"])
def test_equals_exhaustive_search(solver, fixed, budget):
    sensitivity = both(3, fixed=fixed)
    config = SearchConfig(solver=solver)
    limit = Budget.parse(budget)
    weights = sum(x.numel for x in sensitivity.layers if not x.fixed)
    plans = list(every_plan(sensitivity, uniform=solver == "uniform"))
    best = min(loss for bits, loss, _ in plans if bits <= limit.total_bits(weights))
    plan = search(sensitivity, limit, config)
    assert plan.predicted_loss == pytest.approx(best)
    assert plan.stored_bits <= limit.bits
    assert plan.fixed == (("embed",) if fixed else ())
    counted = [bits for bits, _, _ in plans]
    low, high = reachable_bits(sensitivity, config)
    assert low == pytest.approx(min(counted) / weights)
    assert high == pytest.approx(max(counted) / weights)


def test_uniform_plans_have_the_embedding_they_are_given():
    plans = uniform_plans(both(), {"embed": OUTSIDE[0]})
    assert [p.budget for p in plans] == [f"uniform {s}" for s in SPECS]
    assert all(p.assignment["embed"] == OUTSIDE[0] for p in plans)
    assert all(p.assignment["embed"] is None for p in uniform_plans(both()))
    fixed = uniform_plans(both(fixed=True))
    assert all(p.assignment["embed"] == OUTSIDE[1] for p in fixed)
    inside = uniform_plans(table(INSIDE, SPECS, 0))
    assert [p.stored_bits for p in fixed] == [p.stored_bits for p in inside]
