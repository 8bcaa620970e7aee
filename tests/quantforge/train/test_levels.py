"""Training on ternary and balanced grids: BitNet's, ParetoQ's and Hestia's, from one start."""

import pytest
import torch

from quantforge.methods.hestia import TERNARY, mean_magnitude, soft_codebook
from quantforge.methods.level_scales import level_scales, mean_scales
from quantforge.methods.rtn import round_to_nearest
from quantforge.methods.straight_through import absmean_ternary, learned_step, stretched_elastic
from quantforge.progress import Monitor
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear, first_weight
from quantforge.train.loop import train
from quantforge.train.quantizers import HARD, QUANTIZERS, Hardness
from quantforge.types import QuantSpec

NAMES = ("ternary-g16", "ternary-pt", "balanced-g16", "balanced-pt")
SPECS = [QuantSpec.parse(name) for name in NAMES]
each = pytest.mark.parametrize("spec", SPECS, ids=str)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(spec, quantizer, scale=None):
    weight = drawn(24, 64)
    scale = level_scales(weight, torch.ones(64), spec) if scale is None else scale
    quantized = round_to_nearest(weight, scale, spec)
    first = first_weight(weight, quantized, "float")
    return TrainedLinear(quantized, first, QUANTIZERS[quantizer], None), quantized, weight


@each
@pytest.mark.parametrize("quantizer", ["hestia", "straight-through", "lsq"])
def test_it_starts_at_the_rounded_weights_and_ends_at_what_runs(spec, quantizer):
    made, quantized, _ = layer(spec, quantizer)
    x = drawn(3, 64, seed=1)
    assert torch.equal(made(x), x @ quantized.dequantize().T)
    made.prepare(HARD, torch.float32)
    (made(x) * drawn(3, 24, seed=2)).sum().backward()
    made.collect()
    assert made.weight.grad.abs().sum() > 0 < made.change.grad.abs().sum()
    with torch.no_grad():
        made.weight.sub_(made.weight.grad, alpha=0.01)
        made.change.sub_(made.change.grad.sign(), alpha=0.03)
    finished = made.finish()
    assert torch.equal(made(torch.eye(64)).T, finished.dequantize())
    assert int(finished.codes.max()) == spec.top
    assert not torch.equal(finished.scale, quantized.scale)
    if spec.group_size == 0:
        assert made.change.numel() == 1
        assert len(finished.scale.unique()) == 1


@pytest.mark.parametrize("size", [16, -1, 0])
def test_absmean_is_bitnets_ternary_weight_at_a_16_bit_mean(size):
    spec = QuantSpec(2, size, grid="ternary")
    made, quantized, weight = layer(spec, "absmean", mean_scales(drawn(24, 64), spec))
    x, toward = drawn(5, 64, seed=1), drawn(5, 24, seed=2)
    made.prepare(Hardness(temperature=0.3, pressure=0.2), torch.float32)  # looks at neither
    out = made(x)
    assert torch.equal(out.detach(), x @ quantized.dequantize().T)
    (out * toward).sum().backward()
    made.collect()
    # the gradient is passed on whole, to weights outside the grid too
    assert torch.allclose(made.weight.grad, toward.T @ x, atol=1e-5)
    assert made.change.grad is None
    groups = 1 if size == -1 else 64 // size if size else 0
    flat = weight if groups else weight.view(1, -1)
    published = absmean_ternary(flat, max(groups, 1)).view_as(weight)
    near = torch.isclose(published, quantized.dequantize(), rtol=2**-8)
    assert near.float().mean() > 0.99  # the rounded mean has other thresholds
    # a moved weight has another mean, and that is what is stored
    with torch.no_grad():
        made.weight.mul_(2.0)
    assert torch.equal(made.finish().scale.float(), mean_scales(2.0 * weight, spec))
    assert torch.equal(made.finish().codes, quantized.codes)


@pytest.mark.parametrize(("grid", "levels"), [("ternary", 3), ("balanced", 4)])
def test_lsq_on_these_grids_is_paretoqs(grid, levels):
    spec = QuantSpec(2, 16, grid=grid)
    weight, toward = drawn(6, 32, seed=3), drawn(6, 32, seed=4)
    step = drawn(6, 2, seed=5).abs() + 0.3
    results = []
    for function in (
        lambda w, s: learned_step(w, s, spec),
        lambda w, s: stretched_elastic(w, s * (levels / 2), levels),
    ):
        leaf, scale = weight.clone().requires_grad_(), step.clone().requires_grad_()
        made = function(leaf, scale)
        made.backward(toward)
        results.append((made.detach(), leaf.grad, scale.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert bool((results[0][1] == 0).any())  # some weights are beyond the ends


def test_hestia_is_the_published_softmax_over_three_levels():
    spec, weight = QuantSpec(2, 16, grid="ternary"), drawn(24, 64)
    scale = mean_magnitude(weight, 4).bfloat16().float()
    made, _, _ = layer(spec, "hestia", scale)
    assert made.first_temperature() == pytest.approx(0.35, abs=0.03)
    made.prepare(Hardness(temperature=0.35, pressure=0.6), torch.float32)
    found = made(torch.eye(64)).T
    expected = soft_codebook(weight, scale, TERNARY, temperature=0.35, pressure=0.6)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["hestia", "absmean"])
def test_a_network_is_trained_on_one_scale_a_matrix(case, quantizer):
    spec = QuantSpec(2, 0, grid="ternary")
    case.weights = {
        name: round_to_nearest(case.original(name), mean_scales(case.original(name), spec), spec)
        for name in case.weights
    }
    case.put(case.weights)
    before = case.kl()
    config = TrainingConfig(
        tokens=16 * 4 * 32, batch=4, evaluate_every=8 * 4 * 32, precision="float32", start="float",
        weight_rate=0.03, quantizer=quantizer,
    )  # fmt: skip
    made = train(case.task(), config, seed=0, monitor=Monitor())
    points, best = made.outcome.points, made.outcome.best
    assert points[0].kl == pytest.approx(before, rel=1e-5)  # one start for both
    assert points[best].kl < 0.5 * before
    case.put(made.weights)
    assert case.kl() == pytest.approx(points[best].kl, rel=1e-6)
    for weight in made.weights.values():
        assert weight.spec == spec
        assert len(weight.scale.unique()) == 1
        assert set(weight.codes.unique().tolist()) <= {0, 1, 2}
