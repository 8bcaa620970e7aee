"""Training end to end: lowers the divergence, gives what it measured, starts where it says."""

import pytest
import torch
from torch.nn import functional

from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision.compensation import CompensationConfig, quantize_layers
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

    def drawn(count):
        coarse = torch.randn(count, 3, 4, 4, generator=generator)
        smooth = functional.interpolate(coarse, size=(16, 16), mode="bicubic")
        return smooth + 0.1 * torch.randn(count, 3, 16, 16, generator=generator)

    pictures, held_out = drawn(512), drawn(128)
    batches = list(pictures.split(32))
    grids = activation_grids(observe(network, batches), 6)
    plan = {layer.name: QuantSpec(2) for layer in network.layers}
    # plain rounding leaves training something to do
    config = CompensationConfig(feedback="nearest")
    quantized = quantize_layers(network, batches, plan, grids, config)
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
    options = TrainingOptions(steps=120, measure_every=40, batch=32, weight_rate=0.03, **settings)
    made, outcome = train(quantized, examples, options, measure, seed=0)
    assert [point.step for point in outcome.points] == [0, 40, 80, 120]
    assert outcome.kept
    assert outcome.points[outcome.best].kl == pytest.approx(measure(made), rel=1e-6)
    assert outcome.points[outcome.best].kl < 0.9 * outcome.points[0].kl
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
