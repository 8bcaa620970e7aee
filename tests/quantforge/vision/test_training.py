"""Training end to end: lowers the divergence, gives what it measured, starts where it says."""

import pytest
import torch

from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision.compensation import quantize_layers
from quantforge.vision.network import Simulation
from quantforge.vision.quality import compare, logits_of
from quantforge.vision.ranges import activation_grids, observe
from quantforge.vision.recipe import TrainingOptions
from quantforge.vision.training import Examples, TrainedNetwork, train


@pytest.fixture(scope="module")
def case():
    network = tiny_convolutional(clipped=True)
    network.layer("classifier").weight.mul_(12.0)  # predictions that are sure of something
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(512, 3, 16, 16, generator=generator)
    held_out = torch.randn(64, 3, 16, 16, generator=generator)
    batches = list(pictures.split(32))
    grids = activation_grids(observe(network, batches), 5)
    plan = {layer.name: QuantSpec(2) for layer in network.layers}
    quantized = quantize_layers(network, batches, plan, grids)
    logits, reference = (logits_of(network.graph, x) for x in (pictures, held_out))

    def measure(made):
        return compare(logits_of(Simulation(made).run, held_out), reference, pictures="").kl

    labels = logits.argmax(-1)
    return quantized, Examples(pictures=pictures, logits=logits, labels=labels), measure


def test_it_starts_as_what_is_stored(case):
    quantized, examples, _ = case
    network = TrainedNetwork(quantized, "hestia")
    network.prepare({})
    with torch.no_grad():
        made = network(examples.pictures[:8])
    assert torch.allclose(made, Simulation(quantized).run(examples.pictures[:8]), atol=1e-5)
    same = network.finish()
    for name, weight in quantized.weights.items():
        assert torch.equal(same.weights[name].codes, weight.codes)
        assert torch.equal(same.weights[name].scale, weight.scale)
    assert same.grids == dict(quantized.grids)


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantizer": "straight-through"}, {"quantizer": "lsq", "cross_entropy": 0.1}],
    ids=["hestia", "straight-through", "lsq"],
)
def test_it_lowers_the_divergence_and_gives_what_it_measured(case, settings):
    quantized, examples, measure = case
    options = TrainingOptions(
        steps=40, measure_every=20, weight_rate=0.03, scale_rate=0.003, **settings
    )
    made, outcome = train(quantized, examples, options, measure, seed=0)
    assert [point.step for point in outcome.points] == [0, 20, 40]
    assert outcome.kept
    assert outcome.points[outcome.best].kl == pytest.approx(measure(made), rel=1e-6)
    assert outcome.points[outcome.best].kl < outcome.points[0].kl
    assert any(
        not torch.equal(made.weights[n].codes, quantized.weights[n].codes) for n in made.weights
    )


def test_the_start_is_kept_where_nothing_better_comes(case):
    quantized, examples, measure = case
    options = TrainingOptions(steps=2, measure_every=1, weight_rate=50.0)
    made, outcome = train(quantized, examples, options, measure, seed=0)
    assert made is quantized
    assert not outcome.kept
    assert outcome.best == 0
