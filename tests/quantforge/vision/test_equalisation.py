"""Cross-layer equalisation: the same function, equal ranges, and only where it helps."""

import pytest
import torch

from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision.compensation import CompensationConfig, quantize_layers
from quantforge.vision.equalisation import Pair, equalised, equalised_if_better, pairs
from quantforge.vision.network import Simulation, weight_matrix
from quantforge.vision.ranges import activation_grids, observe
from quantforge.vision.sensitivity import divergence

X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def uneven():
    """A network whose channels differ by a factor of hundreds between layers."""
    network = tiny_convolutional()
    generator = torch.Generator().manual_seed(1)
    for pair in pairs(network):
        first = network.layer(pair.first)
        scale = torch.exp(2.0 * torch.randn(len(first.bias), generator=generator))
        first.weight.mul_(scale.view(-1, 1, 1, 1))
        first.bias.mul_(scale)
        second = network.layer(pair.second)
        second.weight.div_(
            scale.view(-1, 1, 1, 1) if second.groups > 1 else scale.view(1, -1, 1, 1)
        )
    return network


def test_pairs_are_joined_by_what_scales_and_read_by_nothing_else():
    found = pairs(tiny_convolutional())
    assert Pair(first="widen", second="spatial") in found
    assert Pair(first="spatial", second="narrow") in found
    assert Pair(first="stem", second="down") in found
    assert len(found) == 3  # the second block's input is read twice, the head is averaged
    assert pairs(tiny_convolutional(clipped=True)) == ()


def test_the_function_stays_and_ranges_become_equal():
    network = tiny_convolutional()
    before = network.graph(X)
    made = equalised(network)
    assert torch.allclose(made.graph(X), before, atol=1e-4)
    assert torch.equal(network.graph(X), before)
    for pair in pairs(network):
        written = weight_matrix(made.layer(pair.first)).abs().amax(1)
        second = made.layer(pair.second)
        matrix = weight_matrix(second).view(second.groups, -1, 1 if second.groups > 8 else
                                            second.in_channels // second.groups,
                                            second.kernel_size[0] ** 2)  # fmt: skip
        assert torch.allclose(written, matrix.abs().amax((1, 3)).flatten(), rtol=1e-2)


def lost(network):
    grids = activation_grids(observe(network, [X[:16]]), 6, "minmax")
    plan = {layer.name: QuantSpec(6) for layer in network.layers}
    made = quantize_layers(network, [X[:16]], plan, grids, CompensationConfig(feedback="gptq"))
    return float(divergence(made, X[16:], network.graph(X[16:])).mean())


def test_it_is_used_where_it_helps_and_only_there(uneven):
    made, before, after = equalised_if_better(uneven, lost)
    assert made is not uneven
    assert after < 0.3 * before
    worse, before, after = equalised_if_better(uneven, lambda one: -lost(one))
    assert worse is uneven and after > before
    clipped = tiny_convolutional(clipped=True)
    same, before, after = equalised_if_better(clipped, lost)
    assert same is clipped and before == after


def test_what_it_makes_is_simulated_like_any_network(uneven):
    made = equalised(uneven)
    quantized = quantize_layers(made, [X], {layer.name: QuantSpec(8) for layer in made.layers}, {})
    assert torch.allclose(Simulation(quantized).run(X), uneven.graph(X), atol=0.1)
