"""The stages put together on a small network: plans, limits, policies, targets."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from quantforge.errors import BudgetError, UsageError
from quantforge.search.budget import Budget
from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision import compiler
from quantforge.vision.checkpoint import write_vision
from quantforge.vision.compiler import VisionJob
from quantforge.vision.network import QuantizedNetwork, Simulation
from quantforge.vision.pictures import Pictures
from quantforge.vision.quality import compare
from quantforge.vision.recipe import VisionRecipe
from quantforge.vision.reconstruction import BlockReport
from quantforge.vision.search import uniform_plans
from quantforge.vision.sensitivity import candidates


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


def test_the_last_layers_losses_are_measured_and_exact():
    one = job()
    last, row = one.network.layers[-1], one.table.loss[-1]
    reference = one.reference
    tried = candidates(one.network, one.batches, one.table.specs, one.compensation)
    for column, spec in enumerate(one.table.specs):
        weights = {last.name: tried.weights[last.name, spec]}
        biases = {last.name: tried.biases[last.name, spec]}
        made = QuantizedNetwork(network=one.network, weights=weights, biases=biases, grids={})
        logits = Simulation(made).run(one.held_out.inputs)
        expected = compare(logits, reference, pictures="").kl
        assert float(row[column]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_nearer_uniform_network_within_the_budget_is_taken(monkeypatch):
    one = job()
    budget = Budget.parse("4.6bit")
    plan = one.find(budget).plan
    fitting = max(
        (p for p in uniform_plans(one.table, {}) if p.stored_bits <= 4.6),
        key=lambda p: p.stored_bits,
    )
    real = one.quality_of

    def quality_of(asked):
        found = real(asked)
        return replace(found, kl=0.0) if asked.identity == fitting.identity else found

    monkeypatch.setattr(one, "quality_of", quality_of)
    taken = one.find(budget).plan
    assert plan.identity != fitting.identity
    assert taken.identity == fitting.identity
    assert (taken.budget, taken.solver) == ("4.6bit", "uniform")


def test_equalisation_is_kept_where_uniform_networks_gain():
    """Channels of very different ranges, which one scale a tensor of activations cannot hold."""
    one = job(weights={"equalise": True}, activations={"bits": [4]})
    first, second = (one.network.layer(name) for name in ("stem", "down"))
    stretch = torch.logspace(-2, 2, len(first.weight))
    first.weight.mul_(stretch.view(-1, 1, 1, 1))
    first.bias.mul_(stretch)
    second.weight.div_(stretch.view(2, 1, -1, 1, 1).expand(2, 4, 4, 1, 1).reshape(8, 4, 1, 1))
    made = one.equalised()
    assert made.network is not one.network
    x = one.held_out.inputs
    assert torch.allclose(made.network.graph(x), one.network.graph(x), rtol=1e-3, atol=1e-4)
    plan = uniform_plans(made.table, {})[-1]
    assert made.quality_of(plan).kl < 0.5 * one.quality_of(plan).kl
    plain = job()
    assert plain.equalised() is plain


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


def test_bit_operations_and_bytes_are_limits(tmp_path):
    one = job(activations={"bits": [4, 8], "edges": None})
    half = one.find(Budget.parse("bops:-50%")).plan
    assert half.operations <= 0.5 * one.costs.whole_operations
    assert len(set(half.widths.values()) | {s.bits for s in half.assignment.values()}) > 1
    small = one.find(Budget.parse("4kB")).plan
    assert 3000 < write_vision(one.one_pass(small), tmp_path) <= 4000  # header and all
    with pytest.raises(BudgetError, match=r"at least 3\.\d+ stored bits"):
        one.find(Budget.parse("2kB"))


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
    assert made.reconstructed


def test_reconstruction_is_undone_where_they_lose(monkeypatch):
    one = job(reconstruction={"steps": 1})
    plan = one.find(Budget.parse("4.5bit")).plan
    worse = one.one_pass(one.find(Budget.parse("3.2bit")).plan)
    said = (BlockReport(block="first", before=1.0, after=0.5),)
    monkeypatch.setattr(compiler, "reconstruct", lambda *_, **__: (worse, said))
    made = one.finish(plan)
    assert not made.reconstructed
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
