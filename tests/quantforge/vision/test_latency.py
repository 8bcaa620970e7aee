"""Budgets of time: what is measured is added up, and limits hold."""

import pytest
import torch

from quantforge.errors import BudgetError, UsageError
from quantforge.search.budget import Budget
from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision import compiler
from quantforge.vision.compiler import VisionJob
from quantforge.vision.latency import layer_seconds
from quantforge.vision.pictures import Pictures
from quantforge.vision.recipe import VisionRecipe
from quantforge.vision.search import Limits, search


def job():
    generator = torch.Generator().manual_seed(0)
    parts = [
        Pictures(inputs=torch.randn(n, 3, 16, 16, generator=generator), labels=None, description="")
        for n in (16, 8)
    ]
    recipe = VisionRecipe.model_validate(
        {"reconstruction": {"steps": 0}, "search": {"bits": [3, 4, 8]}}
    )
    return VisionJob(
        network=tiny_convolutional(), fitting=parts[0], held_out=parts[1], recipe=recipe
    )


def test_every_layer_has_a_time_for_what_fits_it():
    network, specs = tiny_convolutional(), (QuantSpec(4), QuantSpec(8), QuantSpec(4, 6))
    found = layer_seconds(network, specs, rounds=1)
    fits = torch.tensor([[one.divides(x.in_features) for one in specs] for x in network.layers])
    assert torch.equal(found[..., 0] > 0, fits)
    assert torch.equal(found[..., 1] > 0, fits)
    assert float(found.max()) < 1.0


def test_a_limit_of_time_is_kept_and_shares_are_of_eight_bits(monkeypatch):
    """Made-up times: the narrower, the slower, so that time and size pull apart."""
    made = []

    def times(network, specs, *, batch):
        made.append(batch)
        bits = torch.tensor([spec.bits for spec in specs], dtype=torch.float64)
        row = 1e-3 * (12.0 - bits)
        return torch.stack([row, 10 * row], dim=1).expand(len(network.layers), -1, 2).clone()

    monkeypatch.setattr(compiler, "layer_seconds", times)
    one = job()
    count = len(one.network.layers)
    plan = one.find(Budget.parse("6bit, latency:50ms@4")).plan
    expected = sum(1e-3 * (12 - spec.bits) for spec in plan.assignment.values())
    assert plan.seconds == pytest.approx(expected)
    assert plan.seconds <= 0.05 and plan.stored_bits <= 6.0 + 1e-9
    assert made == [4]
    with pytest.raises(BudgetError, match=f"{4.0 * count:.3g} ms in layers"):
        one.find(Budget.parse("latency:-10%"))  # 8 bits are the fastest there are
    with pytest.raises(UsageError, match="the times of one batch"):
        one.find(Budget.parse("latency:50ms@4, latency:50ms@2"))
    free = search(one.table, Limits(), budget="x")
    assert free.seconds is None
