"""Layers quantized in order: bias correction is exact (identity 37), feedback beats rounding."""

import pytest
import torch
from torch.nn import functional

from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.testing import tiny_convolutional
from quantforge.types import QuantizedWeight, QuantSpec
from quantforge.vision.compensation import CompensationConfig, quantize_layers
from quantforge.vision.correction import correct_biases, corrected_bias, matched_deviations
from quantforge.vision.moments import Moments
from quantforge.vision.network import Simulation, weight_matrix
from quantforge.vision.ranges import activation_grids, observe


def pictures(count=24, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return tiny_convolutional()


@pytest.fixture(scope="module")
def grids(network):
    return activation_grids(observe(network, [pictures()]), 6)


def quantized(network, grids, bits=3, batches=None, **config):
    plan = {layer.name: QuantSpec(bits) for layer in network.layers}
    return quantize_layers(
        network, batches or [pictures()], plan, grids, CompensationConfig(positions=0, **config)
    )


def output_means(run, network, x):
    """Layer name → mean of every channel of its output, before it is rounded."""
    found, hooks = {}, []
    for layer in network.layers:

        def keep(module, inputs, made, name=layer.name):
            found[name] = made.double().mean((0,) if made.ndim == 2 else (0, 2, 3))

        hooks.append(network.layer(layer.name).register_forward_hook(keep))
    run(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("later", [False, True], ids=["at once", "afterwards"])
def test_identity_37_every_channel_keeps_its_mean(network, grids, later):
    x = pictures()
    made = quantized(network, grids, correct_bias=not later, batches=[x[:10], x[10:]])
    if later:
        made = correct_biases(made, [x[:10], x[10:]])
    wanted = output_means(network.graph, network, x)
    found = output_means(Simulation(made).run, network, x)
    assert set(found) == {layer.name for layer in network.layers}
    for name, mean in wanted.items():
        assert torch.allclose(found[name], mean, atol=2e-5), name
    plain = output_means(Simulation(quantized(network, grids, correct_bias=False)).run, network, x)
    assert max(float((plain[name] - wanted[name]).abs().max()) for name in wanted) > 0.02


def test_every_channel_keeps_its_deviation(network, grids):
    x = pictures()
    native, found = {}, {}
    for kept, made in ((native, network.graph), (found, Simulation(quantized(network, grids)).run)):
        hooks = [
            network.layer(layer.name).register_forward_hook(
                lambda module, inputs, out, kept=kept, name=layer.name: kept.update(
                    {name: out.double().std((0,) if out.ndim == 2 else (0, 2, 3))}
                )
            )
            for layer in network.layers
        ]
        made(x)
        for hook in hooks:
            hook.remove()
    for name, deviation in native.items():
        live = deviation > 1e-4
        ratio = found[name][live] / deviation[live]
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=0.01), name


def test_a_matched_scale_is_written_down():
    moments = Moments(
        gram=torch.tensor([[[5.0]]]), cross=None, native=torch.tensor([[[10.0]]]),
        mean=torch.tensor([[1.0]]).double(), native_mean=torch.tensor([[1.0]]).double(),
    )  # fmt: skip
    codes, scale = torch.tensor([[9]], dtype=torch.uint8), torch.tensor([[2.0]]).bfloat16()
    made = QuantizedWeight(codes=codes, scale=scale, zero=None, spec=QuantSpec(4))
    # float outputs deviate by sqrt(10 - 1) * 2, quantized ones by sqrt(5 - 1) * 2: 3/2, the most
    weight = torch.tensor([[2.0]])
    assert matched_deviations(weight, made, moments).scale.item() == 3.0
    assert matched_deviations(-9.0 * weight, made, moments).scale.item() == 3.0
    assert matched_deviations(0.0 * weight, made, moments).scale.item() == 2.0
    alone = Moments(
        gram=moments.gram, cross=None, native=None, mean=moments.mean, native_mean=moments.mean
    )
    # then floats and quantized inputs deviate alike, by sqrt(5 - 1)
    assert matched_deviations(weight, made, alone).scale.item() == 2.0


def test_deviations_can_be_matched_afterwards(network, grids):
    x = pictures()
    plain = quantized(network, grids, correct_bias=False, match_deviation=False)
    made = correct_biases(plain, [x], deviations=True)
    again = quantized(network, grids)
    assert torch.equal(made.weights["stem"].codes, again.weights["stem"].codes)
    ratio = made.weights["stem"].scale.float() / again.weights["stem"].scale.float()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=0.02)
    other = pictures(200, seed=5)
    assert divergence(network, made, other) < divergence(network, plain, other)


def test_a_corrected_bias_is_written_down():
    weight, rounded = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.5]])
    mean, native = torch.tensor([[1.0, 4.0]]).double(), torch.tensor([[2.0, 3.0]]).double()
    made = corrected_bias(weight, rounded, torch.tensor([0.25]), native, mean)
    assert made.tolist() == [0.25 + 8.0 - 7.5]


def test_nearest_is_plain_rounding(network, grids):
    made = quantized(network, grids, feedback="nearest", grid="minmax")
    for layer in network.layers:
        weight = weight_matrix(network.layer(layer.name))
        scale, zero = minmax_grid(weight, QuantSpec(3))
        expected = round_to_nearest(weight, scale, QuantSpec(3), zero)
        assert torch.equal(made.weights[layer.name].codes, expected.codes)


def divergence(network, made, x):
    native, other = network.graph(x), Simulation(made).run(x)
    return float(
        functional.kl_div(
            other.log_softmax(1), native.log_softmax(1), log_target=True, reduction="batchmean"
        )
    )


def test_each_step_lowers_the_divergence_on_other_pictures(network, grids):
    x = pictures(200, seed=5)
    nearest = quantized(network, grids, feedback="nearest", grid="minmax", correct_bias=False)
    plain = quantized(network, grids, correct_bias=False)
    corrected = quantized(network, grids)
    figures = [divergence(network, made, x) for made in (nearest, plain, corrected)]
    assert figures[1] < 0.8 * figures[0]
    assert figures[2] < figures[1]


def test_layers_without_a_spec_and_sites_without_a_grid_stay_float(network):
    x = pictures()
    made = quantize_layers(network, [x], {"stem": None, "down": QuantSpec(8)}, {})
    assert set(made.weights) == set(made.biases) == {"down"}
    assert torch.allclose(Simulation(made).run(x), network.graph(x), atol=0.02)
    assert made.weights["down"].codes.shape == (8, 36)


def test_feedback_for_the_float_streams_inputs_runs_and_differs(network, grids):
    plain, asymmetric = (quantized(network, grids, feedback=name) for name in ("gptq", "qep"))
    assert torch.equal(plain.weights["stem"].scale, asymmetric.weights["stem"].scale)
    assert not torch.equal(plain.weights["narrow"].codes, asymmetric.weights["narrow"].codes)
    with pytest.raises(ValueError, match="feedback is one of"):
        CompensationConfig(feedback="other")
