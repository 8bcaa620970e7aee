"""Never worse than uniform: the better network that fits is taken, and the report says so."""

import pytest
import torch

from quantforge.decision import Measurement, choose
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
def measured():
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
        sensitivity=sensitivity, store=None, channel_weights=(), final_hidden=loss, uniform=uniform
    )


@pytest.mark.parametrize(("kl", "taken"), [(0.1, False), (0.3, True)])
def test_a_better_uniform_plan_that_fits_is_taken(measured, kl, taken):
    budget = Budget.parse("3.6bit")
    plan = search(measured.sensitivity, budget, SearchConfig())
    chosen = choose(plan, quality(kl), measured, budget)
    if taken:
        assert set(chosen.plan.assignment.values()) == {QuantSpec(3)}
        assert chosen.plan.budget == "3.6bit"
        assert "uniform 3b-pc is better" in chosen.warnings[0]
    else:
        assert chosen.plan is plan
    assert chosen.cheapest_uniform == ("uniform 4b-pc", 0.04)  # over the budget, and compared
    assert 0.04 < chosen.hull_kl < 0.2
