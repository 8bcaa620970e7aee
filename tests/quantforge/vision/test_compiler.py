"""The stages put together on a small network: plans, limits, policies, targets."""

import pytest
import torch
from torch.nn import functional

from quantforge.errors import BudgetError, UsageError
from quantforge.search.budget import Budget
from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision import compiler
from quantforge.vision.compiler import VisionJob
from quantforge.vision.pictures import Pictures
from quantforge.vision.recipe import VisionRecipe
from quantforge.vision.reconstruction import BlockReport


def pictures(count, seed, network=None):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    made = functional.interpolate(coarse, size=(16, 16), mode="bicubic")
    made += 0.1 * torch.randn(made.shape, generator=generator)
    labels = None if network is None else network.graph(made).argmax(-1)
    return Pictures(inputs=made, labels=labels, description="noise")


def job(count=24, **settings):
    network = tiny_convolutional()
    network.layer("classifier").weight.mul_(12.0)  # predictions that are sure of something
    recipe = VisionRecipe.model_validate({"reconstruction": {"steps": 0}} | settings)
    return VisionJob(
        network=network,
        fitting=pictures(count, 1),
        held_out=pictures(48, 2, network),
        recipe=recipe,
    )


def test_a_budget_of_bits_is_kept_and_no_worse_than_uniform():
    one = job()
    found = one.find(Budget.parse("4.5bit"))
    plan = found.plan
    assert plan.stored_bits <= 4.5
    assert set(plan.widths.values()) == {8}
    assert set(plan.assignment) == {layer.name for layer in one.network.layers}
    by_name = {point.name: point for point in found.curve}
    fitting = [p for n, p in by_name.items() if n != "plan" and p.stored_bits <= 4.5]
    assert by_name["plan"].quality.kl <= min(p.quality.kl for p in fitting)
    # Wider networks are nearer: the measurements are of what the names say.
    assert by_name["uniform 8b-pc-a8"].quality.kl < 0.2 * by_name["uniform 3b-pc-a8"].quality.kl


def test_edges_have_their_own_spec_and_are_not_counted():
    one = job(search={"edges": "8b-pc"}, activations={"bits": [4, 6], "edges": 8})
    plan = one.find(Budget.parse("4.6bit")).plan
    ends = one.network.layers[0], one.network.layers[-1]
    assert all(plan.assignment[layer.name] == QuantSpec(8) for layer in ends)
    assert {plan.widths[one.reads[layer.name]] for layer in ends} == {8}
    inner = [layer for layer in one.network.layers if layer not in ends]
    counted = sum(plan.assignment[x.name].stored_bits(x.out_features, x.in_features) for x in inner)
    assert plan.stored_bits == pytest.approx(counted / sum(x.numel for x in inner))
    others = {bits for grid, bits in plan.widths.items()} - {8}
    assert others <= {4, 6}


def test_bit_operations_and_bytes_are_limits():
    one = job(activations={"bits": [4, 8], "edges": None})
    half = one.find(Budget.parse("bops:-50%")).plan
    assert half.operations <= 0.5 * one.whole_operations
    assert len(set(half.widths.values()) | {s.bits for s in half.assignment.values()}) > 1
    small = one.find(Budget.parse("3kB")).plan
    file = sum(
        small.assignment[x.name].stored_bits(x.out_features, x.in_features) + 32 * x.out_features
        for x in one.network.layers
    )
    assert file <= 8 * 3000
    with pytest.raises(BudgetError, match=r"at least 3\.\d+ stored bits"):
        one.find(Budget.parse("0.7kB"))


def test_a_target_of_accuracy_is_met_with_fewer_bits_than_uniform():
    one = job()
    found = one.find(Budget.parse("acc:-15%"))
    (outcome,) = found.targets
    assert outcome.upper <= 0.15
    made = one.measure(one.one_pass(found.plan))
    assert made.reference_accuracy == 1.0
    assert made.drop == pytest.approx(outcome.measured)
    with pytest.raises(UsageError, match="is a classifier"):
        one.find(Budget.parse("ppl:+1%"))


def test_reconstruction_is_kept_where_held_out_pictures_gain():
    one = job(
        search={"bits": [2], "solver": "uniform"}, reconstruction={"steps": 100, "batch": 16},
        weights={"feedback": "nearest"}, count=256,
    )  # fmt: skip
    plan = one.find(Budget.parse("4bit")).plan
    made = one.finish(plan)
    assert len(made.blocks) == len(one.network.blocks)
    assert made.before == one.measure(one.one_pass(plan))
    assert made.quality == one.measure(made.quantized)
    assert made.quality.kl < made.before.kl
    assert not made.undone


def test_reconstruction_is_undone_where_they_lose(monkeypatch):
    one = job(reconstruction={"steps": 1})
    plan = one.find(Budget.parse("4.5bit")).plan
    worse = one.one_pass(one.find(Budget.parse("3.2bit")).plan)
    said = (BlockReport(block="first", before=1.0, after=0.5),)
    monkeypatch.setattr(compiler, "reconstruct", lambda *_, **__: (worse, said))
    made = one.finish(plan)
    assert made.undone
    assert made.quantized is one.one_pass(plan)


def test_training_comes_last_and_is_kept_where_it_helps():
    one = job(
        count=256, search={"bits": [2], "solver": "uniform"}, activations={"bits": [5]},
        training={"steps": 40, "measure_every": 20, "weight_rate": 0.03, "quantizer": "lsq"},
    )  # fmt: skip
    plan = one.find(Budget.parse("4bit")).plan
    made = one.finish(plan)
    assert made.training is not None
    assert made.training.points[0].kl == pytest.approx(made.before.kl)
    assert made.quality.kl == pytest.approx(min(p.kl for p in made.training.points))
