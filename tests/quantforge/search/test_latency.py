"""Limits in time: closed forms, and exhaustive search under several limits at one time."""

import itertools
import math

import pytest
import torch

from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.search.allocate import search, stored_cost
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.search.latency import (
    MeasuredTable,
    Roofline,
    in_time,
    layer_seconds,
    plan_seconds,
    require_in_time,
)
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SPECS = (QuantSpec(2), QuantSpec(3), QuantSpec(4), QuantSpec(8))
# 1 byte a microsecond, and 3 microseconds to start a layer
SLOW = Roofline(name="slow", description="", bandwidth=1e6, operations=1e9, overhead=3e-6)
CONFIG = SearchConfig()


def layer(name, rows=8, columns=64, **fields):
    return LayerInfo(
        name=name, out_features=rows, in_features=columns, stage=0, fused_group=name,
        **({"block": 0} | fields),
    )  # fmt: skip


LAYERS = tuple(layer(str(i), rows) for i, rows in enumerate((8, 16, 24, 8, 40)))


def table(seed=0, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(len(layers), len(SPECS), generator=generator).double()
    loss *= torch.tensor([1.0, 0.3, 0.08, 0.001])
    return Sensitivity(
        layers=layers, specs=SPECS, loss=loss, error=loss, estimator="", fingerprint=""
    )


def odd_times(seed=0):
    """Times that do not follow the bits: some wide candidates are faster than narrow ones."""
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = {(one.out_features, one.in_features) for one in LAYERS}
    keys = [(*shape, spec, 1) for shape in sorted(shapes) for spec in (*SPECS, None)]
    seconds = (1e-5 + 1e-4 * torch.rand(len(keys), generator=generator).double()).tolist()
    return MeasuredTable(name="odd.json", times=dict(zip(keys, seconds, strict=True)))


def test_a_roofline_in_closed_form():
    one = layer("a")
    # 512 weights: 1024 bytes in 16 bits; 3 bits and 8 scales of 16 bits: 208 bytes
    assert SLOW.seconds(one, None, 1) == pytest.approx(3e-6 + 1024e-6)
    assert SLOW.seconds(one, QuantSpec(3), 1) == pytest.approx(3e-6 + 208e-6)
    # 2 x 512 operations a row: from 208 rows on they take longer than the bytes
    assert SLOW.seconds(one, QuantSpec(3), 200) == pytest.approx(3e-6 + 208e-6)
    assert SLOW.seconds(one, QuantSpec(3), 1000) == pytest.approx(3e-6 + 1024e-6)
    assert layer_seconds(SLOW, layer("e", kind="embedding", block=-1), None, 1) == 0
    tied = layer("e", kind="tied", block=-1)
    assert layer_seconds(SLOW, tied, None, 1) == SLOW.seconds(one, None, 1)
    plan = dict.fromkeys((x.name for x in LAYERS), QuantSpec(4))
    weights = 96 * 64
    expected = 5 * 3e-6 + (weights * 4 + 96 * 16) / 8 * 1e-6
    assert plan_seconds(SLOW, LAYERS, plan, 1) == pytest.approx(expected)


def every_plan(latency, batch=1):
    """Stored bits, seconds and loss of all plans."""
    sensitivity = table()
    for picks in itertools.product(range(len(SPECS) + 1), repeat=len(LAYERS)):
        specs = [SPECS[p] if p < len(SPECS) else None for p in picks]
        plan = {x.name: s for x, s in zip(LAYERS, specs, strict=True)}
        loss = sum(
            float(sensitivity.loss[i, p]) if p < len(SPECS) else 0.0 for i, p in enumerate(picks)
        )
        bits = sum(stored_cost(x, s) for x, s in zip(LAYERS, specs, strict=True))
        yield bits, plan_seconds(latency, LAYERS, plan, batch), loss


@pytest.mark.parametrize(
    ("latency", "budget", "solver"),
    [
        (SLOW, "latency:-70%", "dynamic-program"),
        (SLOW, "latency:-70%,16bit", "dynamic-program"),  # bits that do not bind
        (SLOW, "latency:-50%,3.6bit", "integer-program"),
        (odd_times(), "latency:-30%", "dynamic-program"),
        (odd_times(), "latency:-30%,4.2bit", "integer-program"),
        (odd_times(1), "latency:0.2ms@1,4.2bit", "integer-program"),
    ],
)
def test_equals_exhaustive_search_under_all_limits(latency, budget, solver):
    parsed = Budget.parse(budget)
    weights = sum(x.numel for x in LAYERS)
    kept = plan_seconds(latency, LAYERS, dict.fromkeys(x.name for x in LAYERS), 1)
    (limit,) = parsed.latency
    most = float(limit.amount) * (kept if limit.kind == "latency-share" else 1)
    best = min(
        loss
        for bits, seconds, loss in every_plan(latency)
        if bits <= parsed.total_bits(weights) and seconds <= most
    )
    plan = search(table(), parsed, CONFIG, latency)
    assert plan.predicted_loss == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert plan.solver == solver
    assert plan.stored_bits <= parsed.bits
    assert plan_seconds(latency, LAYERS, plan.assignment, 1) <= most
    assert in_time(parsed, LAYERS, plan.assignment, latency)
    assert not in_time(parsed, LAYERS, dict.fromkeys(x.name for x in LAYERS), latency)


def test_what_no_plan_meets_names_what_the_fastest_takes():
    least = min(seconds for _, seconds, _ in every_plan(SLOW))
    with pytest.raises(BudgetError, match=r"the fastest plan takes .* \(slow, roofline\)") as error:
        search(table(), Budget.parse("latency:-99%"), CONFIG, SLOW)
    advice = str(error.value).rpartition("at least ")[2]
    found = search(table(), Budget.parse(advice), CONFIG, SLOW)
    assert plan_seconds(SLOW, LAYERS, found.assignment, 1) == pytest.approx(least)
    with pytest.raises(BudgetError, match=r"at least latency:1\.\d+ms") as error:
        search(table(), Budget.parse("latency:10us"), CONFIG, SLOW)
    search(table(), Budget.parse(str(error.value).rpartition("at least ")[2]), CONFIG, SLOW)
    plan = dict.fromkeys((x.name for x in LAYERS), QuantSpec(8))
    with pytest.raises(BudgetError, match=r"the only plan takes .* raise --budget to at least"):
        require_in_time(Budget.parse("latency:1ms"), LAYERS, plan, SLOW)
    with pytest.raises(UsageError, match="--latency-device"):
        search(table(), Budget.parse("latency:-5%"), CONFIG)


def test_limits_that_exclude_each_other():
    times = {
        (x.out_features, x.in_features, spec, 1): 1e-3 if spec == SPECS[0] else 1e-6
        for x in LAYERS
        for spec in (*SPECS, None)
    }
    slow_when_narrow = MeasuredTable(name="t.json", times=times)
    with pytest.raises(BudgetError, match="no plan is within all parts; loosen one"):
        search(table(), Budget.parse("2.3bit,latency:0.1ms"), CONFIG, slow_when_narrow)


def test_a_shape_that_was_not_measured_is_one_clear_line():
    odd = odd_times()
    times = {key: t for key, t in odd.times.items() if key[:3] != (24, 64, SPECS[2])}
    partial = MeasuredTable(name="here.json", times=times)
    with pytest.raises(InputError) as error:
        search(table(), Budget.parse("latency:-10%"), CONFIG, partial)
    assert str(error.value) == (
        "here.json has no time of 24 x 64 in 4b-pc at batch 1 (2); "
        "measure it with quantforge profile"
    )
    with pytest.raises(InputError, match="in 2b-pc at batch 4"):
        search(table(), Budget.parse("latency:-10%@4"), CONFIG, odd)


def test_fused_and_fixed_layers_count_their_time():
    pair = (
        layer("a", fixed=False), layer("b", 16), layer("e", 32, kind="tied", block=-1, fixed=True),
    )  # fmt: skip
    sensitivity = table(layers=pair)
    sensitivity.loss[2, [0, 1, 3]] = math.inf
    head = SLOW.seconds(pair[2], SPECS[2], 1)
    rest = sum(SLOW.seconds(one, SPECS[1], 1) for one in pair[:2])
    budget = Budget.parse(f"latency:{1e6 * (head + rest) + 0.01}us")
    plan = search(sensitivity, budget, CONFIG, SLOW)
    assert plan.assignment["e"] == SPECS[2]
    assert plan.fixed == ("e",)
    assert plan_seconds(SLOW, pair, plan.assignment, 1) <= float(budget.latency[0].amount)
    assert plan.stored_bits < 4  # of a and b alone


@pytest.mark.parametrize(
    ("text", "kind", "amount", "batch"),
    [
        ("latency:-25%", "latency-share", 0.75, 1),
        ("latency: -12.5% @ 8", "latency-share", 0.875, 8),
        ("latency:12ms@1", "latency", 0.012, 1),
        ("latency:900us", "latency", 0.0009, 1),
        ("latency:1.5s@4", "latency", 1.5, 4),
    ],
)
def test_forms(text, kind, amount, batch):
    (limit,) = Budget.parse(text).latency
    assert (limit.kind, limit.context) == (kind, batch)
    assert float(limit.amount) == pytest.approx(amount)
    assert Budget.parse(text).bits == 16
    assert Budget.parse(f"3bit+{text}").in_bits(3).latency == (limit,)


@pytest.mark.parametrize(
    "text", ["latency:25%", "latency:-100%", "latency:0ms", "latency:12", "latency:5ms@0"]
)
def test_what_is_no_time(text):
    with pytest.raises(UsageError, match=r"budget"):
        Budget.parse(text)
