"""Predicted losses against measured ones, and against closed forms where those exist."""

import pytest
import torch

from quantforge.testing import tiny_convolutional
from quantforge.types import QuantSpec
from quantforge.vision.network import kernel_of, weight_matrix
from quantforge.vision.ranges import fit_range, observe
from quantforge.vision.sensitivity import (
    candidates,
    gradient_products,
    importances,
    measured_losses,
    sensitivities,
)
from quantforge.vision.traces import activation_losses, network_traces, weight_losses

SPECS = (QuantSpec(8), QuantSpec(5), QuantSpec(4, 6))


@pytest.fixture(scope="module")
def known():
    network = tiny_convolutional()
    x = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return network, x, candidates(network, [x[:16], x[16:]], SPECS), observe(network, [x])


def test_candidates_are_those_that_fit(known):
    network, _, tried, _ = known
    fits = torch.tensor([[one.divides(layer.in_features) for one in SPECS]
                         for layer in network.layers])  # fmt: skip
    assert torch.equal(tried.error.isfinite(), fits)
    assert len(tried.weights) == int(fits.sum())
    assert bool((tried.error[:, 0] < 0.05 * tried.error[:, 1]).all())


def test_predictions_are_what_is_measured_where_errors_are_small(known):
    network, x, tried, histograms = known
    weights, sites = sensitivities(network, x, tried, histograms, (8, 6), labels=40)
    measured, rounded = measured_losses(network, x, tried, sites.candidates)
    ratio = (weights.loss / measured)[:, 0]
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=0.25)
    assert ratio.log().mean().abs() < 0.08
    ratio = (sites.loss / rounded)[:, 0]
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=0.3)
    assert ratio.log().mean().abs() < 0.1
    assert torch.equal(weights.loss.isfinite(), tried.error.isfinite())
    assert bool((weights.stderr[:, 0] < 0.6 * weights.loss[:, 0]).all())
    assert sites.grids == tuple(histograms) and sites.loss.shape == (len(histograms), 2)


def test_products_are_directional_derivatives(known):
    network, x, tried, histograms = known
    grids = {name: (fit_range(one, 4),) for name, one in histograms.items()}
    products, rounding = gradient_products(network, x[:3], tried, grids, labels=1, seed=0)
    assert products.shape == (3, 1, 7, 3) and rounding.shape == (3, 1, len(grids), 1)
    # the last layer's gradient is known: (onehot - p) times its input, or times 1 for its bias
    head = network.layer("classifier")
    logits = network.graph(x[:1])
    read = {}
    hook = head.register_forward_pre_hook(lambda module, given: read.update(x=given[0]))
    network.graph(x[:1])
    hook.remove()
    spec = SPECS[1]
    error = tried.weights["classifier", spec].dequantize() - weight_matrix(head)
    moved = tried.biases["classifier", spec] - head.bias
    felt = (error @ read["x"][0] + moved).double()
    possible = felt - (logits[0].double().softmax(0) @ felt)
    assert float((possible - products[0, 0, 6, 1]).abs().min()) < 1e-5
    assert float(products[:, :, [1, 4], 2].abs().min()) >= 0.0
    assert not products[:, :, 3, 2].any()  # 9 weights are no groups of 6


def test_fisher_weights_of_blocks_have_mean_one_and_match_the_last_block(known):
    network, x, _, _ = known
    found = importances(network, x[:4], labels=400)
    assert {name: one.shape[0] for name, one in found.items()} == {"first": 4, "second": 4,
                                                                  "last": 4}  # fmt: skip
    assert all(float(one.mean()) == pytest.approx(1.0, rel=1e-4) for one in found.values())
    chance = network.graph(x[:4]).softmax(1)
    expected = chance * (1 - chance)
    assert torch.allclose(found["last"], expected / expected.mean(), atol=0.5)
    both = torch.stack([found["last"].flatten(), expected.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95


def test_traces_are_those_of_dense_curvature(known):
    network, x, tried, histograms = known
    x = x[:2]
    found = network_traces(network, x, probes=100, tolerance=0.01)
    # at the logits the divergence's curvature is diag(p) - p pT, so that of the last weight is that
    # times the input's square
    chance = network.graph(x).softmax(1)
    read = {}
    hook = network.layer("classifier").register_forward_pre_hook(
        lambda module, given: read.update(x=given[0])
    )
    network.graph(x)
    hook.remove()
    exact = (1 - chance.square().sum(1)) * read["x"].square().sum(1)
    assert float(found.traces.values[6]) == pytest.approx(float(exact.mean()), rel=0.2)
    assert found.sizes[6] == 240 and found.sizes[7] == 3 * 16 * 16
    weight = network.layer("classifier").weight
    pooled = ((chance @ weight.square()) - (chance @ weight).square()).sum(1)
    assert float(found.traces.values[-1]) == pytest.approx(float(pooled.mean()), rel=0.2)
    losses = weight_losses(network, found, tried)
    assert torch.equal(losses.isfinite(), tried.error.isfinite())
    assert bool((losses[:, 0] < losses[:, 1]).all())
    grids = {name: (fit_range(one, 8), fit_range(one, 4)) for name, one in histograms.items()}
    sites = activation_losses(network, found, x, grids)
    assert bool((sites[:, 0] < 0.1 * sites[:, 1]).all())


def test_the_kernel_of_a_matrix_carries_gradients():
    layer = torch.nn.ConvTranspose2d(4, 6, 3, groups=2)
    matrix = weight_matrix(layer).requires_grad_()
    (kernel_of(layer, matrix) * 2.0).sum().backward()
    assert torch.equal(matrix.grad, torch.full_like(matrix, 2.0))
