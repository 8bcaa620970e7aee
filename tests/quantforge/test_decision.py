"""Never worse than uniform: the better network that fits is taken, and the report says so."""

from dataclasses import replace

import pytest
import torch

from quantforge.decision import Measurement, choose
from quantforge.format.store import CandidateStore
from quantforge.results import CurvePoint, Quality
from quantforge.search.allocate import search, uniform_plans
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

SPECS = (QuantSpec(2), QuantSpec(3), QuantSpec(4))


def quality(kl):
    return Quality(
        text="", windows=2, window_length=8, perplexity=2.0, reference_perplexity=2.0,
        kl=kl, kl_stderr=0.001, top1=1.0, window_kl=(kl, kl), window_nll=(0.7, 0.7),
    )  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    layers = tuple(
        LayerInfo(name=n, out_features=8, in_features=1024, block=0, stage=0, fused_group=n)
        for n in "ab"
    )
    loss = torch.tensor([[0.5, 0.1, 0.02], [0.6, 0.1, 0.02]], dtype=torch.float64)
    sensitivity = Sensitivity(
        layers=layers, specs=SPECS, loss=loss, error=loss, estimator="", fingerprint=""
    )
    kl = {"uniform 2b-pc": 1.0, "uniform 3b-pc": 0.2, "uniform 4b-pc": 0.04}
    uniform = tuple(
        CurvePoint(name=p.budget, stored_bits=p.stored_bits, quality=quality(kl[p.budget]))
        for p in uniform_plans(sensitivity)
    )
    return Measurement(
        sensitivity=sensitivity, store=CandidateStore(tmp_path, loss.device), channel_weights=(),
        final_hidden=loss, uniform=uniform, output_grams=None,
    )  # fmt: skip


@pytest.mark.parametrize(("kl", "taken"), [(0.1, False), (0.3, True)])
def test_a_better_uniform_plan_that_fits_is_taken(measured, kl, taken):
    budget = Budget.parse("3.6bit")
    plan = search(measured.sensitivity, budget, SearchConfig())
    chosen = choose(plan, quality(kl), measured, budget)
    if taken:
        assert set(chosen.plan.assignment.values()) == {QuantSpec(3)}
        assert chosen.plan.budget == "3.6bit"
        assert chosen.warnings[0].startswith("uniform 3b-pc has a held-out KL of 0.2000")
        assert "0.3000" in chosen.warnings[0]  # the rejected one is told, and nowhere else
    else:
        assert chosen.plan is plan
    assert chosen.cheapest_uniform == ("uniform 4b-pc", 0.04)  # over the budget, and compared
    assert 0.04 < chosen.hull_kl <= 0.2 + 1e-12
    assert chosen.curve[0].name == "plan"
    assert chosen.curve[0].stored_bits == chosen.plan.stored_bits
    assert chosen.curve[0].quality.kl == (0.2 if taken else 0.1)
    assert chosen.curve[1:] == measured.uniform


def test_hull_and_warning_are_about_the_plan_that_is_executed(measured):
    budget = Budget.parse("3.6bit")
    plan = search(measured.sensitivity, budget, SearchConfig())
    above = replace(measured, uniform=tuple(
        replace(point, quality=quality(kl))
        for point, kl in zip(measured.uniform, (0.1, 0.2, 0.04), strict=True)
    ))  # fmt: skip
    chosen = choose(plan, quality(0.3), above, budget)
    (used,) = chosen.warnings  # 2 bits is best of what fits and lies on the hull: no second line
    assert used.startswith("uniform 2b-pc")
    assert chosen.hull_kl == pytest.approx(0.1)
    alone = choose(plan, quality(0.3), replace(measured, uniform=measured.uniform[1:2]), budget)
    assert alone.hull_kl == pytest.approx(0.2)
    assert len(alone.warnings) == 1


def test_a_uniform_network_that_is_too_slow_is_not_taken(measured):
    budget = Budget.parse("3.6bit")
    plan = search(measured.sensitivity, budget, SearchConfig())
    assert choose(plan, quality(0.3), measured, budget).plan is not plan
    chosen = choose(plan, quality(0.3), measured, budget, barred={"uniform 3b-pc"})
    assert chosen.plan is plan
    assert chosen.curve[1:] == measured.uniform  # it is still compared with


def test_where_an_embedding_may_be_quantized_uniform_networks_count_it_in_16_bits(measured):
    """Both bits are averages over the same weights; a network over the budget is not let in."""
    spent = [point.stored_bits * 2 * 8 * 1024 for point in measured.uniform]
    table = LayerInfo(
        name="e", out_features=32, in_features=1024, block=-1, stage=-1, fused_group="e",
        kind="embedding",
    )  # fmt: skip
    row = torch.tensor([[0.9, 0.5, 0.3]], dtype=torch.float64)
    sensitivity = measured.sensitivity
    wide = replace(
        measured,
        sensitivity=replace(
            sensitivity,
            layers=(*sensitivity.layers, table),
            loss=torch.cat([sensitivity.loss, row]),
            error=torch.cat([sensitivity.error, row]),
        ),
    )
    weights = (2 * 8 + 32) * 1024
    expected = [(bits + 16 * 32 * 1024) / weights for bits in spent]
    points = wide.uniform_kept
    assert [point.stored_bits for point in points] == pytest.approx(expected)
    assert [point.quality for point in points] == [point.quality for point in measured.uniform]
    assert measured.uniform_kept == measured.uniform
    budget = Budget.parse("11.9bit")
    plan = search(wide.sensitivity, budget, SearchConfig())
    chosen = choose(plan, quality(0.3), replace(wide, uniform=points), budget)
    assert chosen.plan.stored_bits <= 11.9
