"""The numerics on networks as the tracer writes them: batch sizes, constants, odd padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantforge.types import QuantSpec
from quantforge.vision.block_run import BlockRun
from quantforge.vision.building import build
from quantforge.vision.compensation import quantize_layers
from quantforge.vision.network import Preprocessing, Simulation
from quantforge.vision.ranges import activation_grids, observe
from quantforge.vision.reconstruction import ReconstructionConfig, reconstruct
from quantforge.vision.sensitivity import candidates, importances, sensitivities
from quantforge.vision.streams import Stream
from quantforge.vision.traces import network_traces


class Bit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8))
        self.even = nn.Conv2d(8, 8, 2, padding="same", groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.mixed = nn.Conv2d(6, 6, 3, padding=1, dilation=1)
        self.head = nn.Linear(6 * 16, 5)
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = functional.relu6(self.stem(functional.pad(x, (0, 1, 0, 1))))
        x = self.up(functional.hardswish(self.even(x)))
        x = functional.relu(x + self.mixed(x))
        x = functional.adaptive_avg_pool2d(x, 4)
        return self.head(x.view(x.size(0), -1)) + self.shift


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    preprocessing = Preprocessing(size=(16, 16), mean=(0.0,) * 3, deviation=(1.0,) * 3)
    return build(Bit().eval(), preprocessing, name="bit", fingerprint="0")


X = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_streams_and_blocks_compute_the_network(network):
    result = network.blocks[-1].result
    stream = Stream(network, [X[:7], X[7:]])
    expected = network.graph(X)
    assert torch.allclose(torch.cat(stream.value(result)), expected, atol=1e-5)
    value = X[:5]
    for block in network.blocks:
        value = BlockRun(network, block)(value, {}, {})
    assert torch.allclose(value, expected[:5], atol=1e-5)


def test_every_step_runs_on_it(network):
    batches = [X[:7], X[7:]]
    histograms = observe(network, batches)
    plan = {layer.name: QuantSpec(4) for layer in network.layers}
    made = quantize_layers(network, batches, plan, activation_grids(histograms, 8))
    assert set(made.weights) == set(plan)
    config = ReconstructionConfig(steps=4, batch=6)
    weighted = importances(network, X, labels=1)
    learned, reports = reconstruct(made, batches, config, importance=weighted)
    assert len(reports) == len(network.blocks)
    expected = network.graph(X)
    for one in (made, learned):
        error = (Simulation(one).run(X) - expected).square().mean() / expected.var()
        assert float(error) < 0.1
    tried = candidates(network, batches, (QuantSpec(4), QuantSpec(3)))
    weights, sites = sensitivities(network, X[:6], tried, histograms, (8, 4))
    assert bool((weights.loss[:, 0] < weights.loss[:, 1]).all())
    assert bool((sites.loss[:, 0] < sites.loss[:, 1]).all())
    assert len(network_traces(network, X[:2], probes=2).sizes) == len(network.layers) + len(
        network.sites
    )
