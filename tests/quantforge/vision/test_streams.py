"""Streams: the values of the simulation, node by node, and blocks as parts of the graph."""

import pytest
import torch

from quantforge.errors import InputError
from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision.compensation import quantize_layers
from quantforge.vision.network import Block, Simulation
from quantforge.vision.ranges import activation_grids, observe
from quantforge.vision.streams import Stream, compute, in_batches, node_named, segment


def pictures(count=12, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return tiny_convolutional()


def test_a_stream_ends_where_the_graph_and_the_simulation_do(network):
    x = pictures()
    native = Stream(network, in_batches(x, 5))
    assert torch.allclose(torch.cat(native.value("classifier")), network.graph(x), atol=1e-5)
    grids = activation_grids(observe(network, [x]), 5)
    plan = {layer.name: QuantSpec(3) for layer in network.layers}
    quantized = quantize_layers(network, [x], plan, grids)
    parameters = {
        name: (one.dequantize(), quantized.biases[name]) for name, one in quantized.weights.items()
    }
    stream = Stream(network, [x], grids, parameters)
    expected = Simulation(quantized).run(x)
    assert torch.allclose(stream.value("classifier")[0], expected, atol=1e-4)
    assert not torch.allclose(expected, network.graph(x), atol=1e-2)


def test_what_was_read_by_all_is_let_go_of(network):
    stream = Stream(network, [pictures(2)])
    stream.value(network.reads["down"])
    stream.value(network.reads["widen"])
    with pytest.raises(ValueError, match="used up"):
        stream.value(network.reads["down"])
    with pytest.raises(InputError, match="no node"):
        stream.value("nothing")


def test_blocks_one_after_the_other_are_the_network(network):
    value = x = pictures(3)
    for block in network.blocks:
        known = {node_named(network, block.source): value}
        for node in segment(network, block):
            known[node] = compute(network.graph, node, known)
        value = known[node]
        assert node.name == block.result
    assert torch.equal(value, network.graph(x))


def test_a_block_that_reads_past_its_source_is_refused(network):
    block = network.blocks[1]
    wrong = Block(name="wrong", source="widen", result=block.result, layers=())
    with pytest.raises(InputError, match="wrong reads pictures"):
        segment(network, wrong)
