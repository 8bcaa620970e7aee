"""Embedding and head as integers: which way serves which use."""

import pytest
import torch

from quantforge.calibrate.vocabulary import MatrixQuantizer, head_gram, relative_error
from quantforge.types import LayerInfo, QuantSpec

SPEC = QuantSpec(3, 16)


def matrix(kind):
    return LayerInfo(
        name="e", kind=kind, out_features=96, in_features=64, block=-1, stage=0, fused_group="e"
    )


@pytest.fixture(scope="module")
def case():
    """A weight, strongly correlated head inputs, and their gram."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    mix = torch.randn(64, 64, generator=generator) / 8 + 0.5
    hidden = torch.randn(4, 128, 64, generator=generator) @ mix
    return weight, hidden, head_gram(hidden, torch.float32, weight.device)


def test_the_gram_is_that_of_the_heads_inputs(case):
    _, hidden, gram = case
    rows = hidden.flatten(0, 1)
    assert torch.allclose(gram, rows.T @ rows / 512, rtol=1e-4, atol=1e-4)


def test_every_use_has_its_ways_and_each_is_best_at_its_own(case):
    weight, _, gram = case
    found = {}
    for kind in ("embedding", "linear", "tied"):
        quantizer = MatrixQuantizer(matrix(kind), weight, gram, 0.01)
        found[kind] = {way: quantizer.make(way, SPEC) for way in quantizer.ways}
    assert [len(ways) for ways in found.values()] == [1, 2, 3]
    counts = torch.ones(96)

    def error(kind, way, use):
        difference = found[kind][way].dequantize() - weight
        return relative_error(matrix(use), difference, weight, gram, counts)

    # outputs: feedback wins, by much where inputs are correlated; lookups: rounding does
    assert error("linear", "gptq", "linear") < 0.5 * error("linear", "rounded", "linear")
    assert error("tied", "rounded", "embedding") < error("tied", "gptq", "embedding")
    lookups = [error("tied", w, "embedding") for w in ("rounded", "gptq, lookups as much", "gptq")]
    outputs = [error("tied", w, "linear") for w in ("gptq", "gptq, lookups as much", "rounded")]
    assert lookups == sorted(lookups)
    assert outputs == sorted(outputs)
    assert error("tied", "gptq", "tied") == pytest.approx(
        (error("tied", "gptq", "embedding") + error("tied", "gptq", "linear")) / 2
    )
    assert all(way.spec == SPEC for ways in found.values() for way in ways.values())


def test_rows_count_as_often_as_their_token_occurs():
    weight = torch.full((3, 4), 2.0)
    difference = torch.tensor([[1.0] * 4, [2.0] * 4, [0.0] * 4])
    counts = torch.tensor([3.0, 0.0, 1.0])
    found = relative_error(matrix("embedding"), difference, weight, torch.eye(4), counts)
    assert found == pytest.approx(3 * 4 / (4 * 16))  # the second token never occurs
