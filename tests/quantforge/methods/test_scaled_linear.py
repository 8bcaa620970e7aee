"""Scale gradients against autograd through the dequantized weight, and the end-to-end tuning."""

import copy

import pytest
import torch

from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.load.huggingface import from_module
from quantforge.methods.gptq import gptq
from quantforge.methods.head_loss import distillation_gradient
from quantforge.methods.rounding import TrainableWeight
from quantforge.methods.rtn import minmax_grid, minmax_scale, round_to_nearest
from quantforge.methods.scaled_linear import ScaledLinear
from quantforge.models import Head
from quantforge.numerics import factorize
from quantforge.progress import Monitor
from quantforge.quantize.config import RoundingConfig, TuningConfig
from quantforge.quantize.refine import BlockTask, refine_block
from quantforge.quantize.tune import tune_scales
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import QuantSpec

SPEC = QuantSpec(3, 32)
ASYMMETRIC = QuantSpec(3, 32, symmetric=False)
either = pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)


def quantized(spec=SPEC, out=24, columns=64, seed=0):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    weight += 0.0 if spec.symmetric else 0.7  # so that zero-points are not the middle
    scale, zero = minmax_grid(weight, spec)
    return weight, round_to_nearest(weight, scale, spec, zero)


def integers(weight):
    """[out, groups, width] float codes less the zero-point, by the format's definition."""
    groups = weight.codes.float().view(*weight.scale.shape, -1)
    return groups - (4.0 if weight.zero is None else weight.zero.float().unsqueeze(-1))


@either
def test_forward_and_gradients_equal_autograd_through_the_dequantized_weight(spec):
    _, weight = quantized(spec)
    layer = ScaledLinear(weight, None)
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    toward = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(2))
    (layer(x).float() * toward).sum().backward()

    scale = weight.scale.float().requires_grad_()
    other = x.detach().clone().requires_grad_()
    dense = (integers(weight) * scale.unsqueeze(-1)).view(24, 64)
    expected = other @ dense.T
    (expected * toward).sum().backward()
    assert torch.allclose(layer(x).float(), expected, rtol=0.02, atol=0.05)
    # the parameter is a relative change: its gradient is the scale's times the scale
    found = layer.change.grad / weight.scale.float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), scale.grad.flatten(), 0) > 0.999
    assert torch.nn.functional.cosine_similarity(x.grad.flatten(), other.grad.flatten(), 0) > 0.999


@either
def test_no_change_gives_back_the_same_weight(spec):
    _, weight = quantized(spec)
    finished = ScaledLinear(weight, None).finish()
    assert torch.equal(finished.codes, weight.codes)
    assert torch.equal(finished.scale, weight.scale)
    assert torch.equal(finished.dequantize(), weight.dequantize())


def test_distillation_gradient_is_the_gradient_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 8, generator=generator, requires_grad=True)
    teacher = torch.randn(6, 8, generator=generator)
    head = torch.randn(20, 8, generator=generator)
    p, q = (teacher @ head.T).log_softmax(-1), (student @ head.T).log_softmax(-1)
    (p.exp() * (p - q)).sum().backward()
    found = distillation_gradient(student.detach(), teacher, Head(weight=head))
    assert torch.allclose(found, student.grad, atol=1e-5)


@pytest.fixture(scope="module")
def trained():
    return train(tiny_llama(blocks=2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_tuning_lowers_the_kl_on_unseen_tokens_and_changes_no_integer(trained, symmetric):
    tokens, unseen = markov_tokens(32, 48, seed=1), markov_tokens(16, 48, seed=2)
    reference = ReferenceOutputs.collect(trained, from_module(trained).architecture, unseen)
    model = from_module(copy.deepcopy(trained))
    with torch.no_grad():
        teacher = trained.model(tokens).last_hidden_state.bfloat16()
    weights = {}
    for layer in model.layers:
        module = model.module.get_submodule(layer.name).requires_grad_(False)
        spec = QuantSpec(2, 32, symmetric)
        scale, zero = minmax_grid(module.weight, spec)
        weights[layer.name] = round_to_nearest(module.weight, scale, spec, zero)
        module.weight.data.copy_(weights[layer.name].dequantize())

    def kl():
        return measure(model.module, model.architecture, unseen, reference, text="").kl

    before = kl()
    types = {name: type(m) for name, m in model.module.named_modules()}
    config = TuningConfig(steps=30, batch=4, scale_step=0.01, norm_step=0.005)
    parameters = {name: model.module.get_submodule(name).weight for name in weights}
    held: list[int] = []

    def watch(_):
        held.append(sum(p.nbytes for p in parameters.values()))

    tuned = tune_scales(
        model, weights, tokens, teacher, config,
        generator=torch.Generator().manual_seed(0), monitor=Monitor(progress=watch),
    )  # fmt: skip
    assert set(held) == {0}  # the float weights take no memory meanwhile, and are back after
    assert all(torch.equal(p, weights[name].dequantize()) for name, p in parameters.items())
    for name, weight in tuned.items():
        assert torch.equal(weight.codes, weights[name].codes)
        assert (weight.zero is None) == symmetric
        assert symmetric or torch.equal(weight.zero, weights[name].zero)
        model.module.get_submodule(name).weight.data.copy_(weight.dequantize())
    assert kl() < 0.8 * before
    assert {name: type(m) for name, m in model.module.named_modules()} == types
    assert all(p.grad is None for p in model.module.parameters())


def test_recomputing_blocks_changes_no_bit_and_leaves_the_network_as_it_was(trained):
    tokens = markov_tokens(8, 48, seed=1)
    with torch.no_grad():
        teacher = trained.model(tokens).last_hidden_state.bfloat16()
    spec, scales = QuantSpec(3, 32), {}
    for every in (0, 1):
        model = from_module(copy.deepcopy(trained))
        weights = {}
        for layer in model.layers:
            module = model.module.get_submodule(layer.name)
            weights[layer.name] = round_to_nearest(
                module.weight.detach(), minmax_scale(module.weight.detach(), spec), spec
            )
        tuned = tune_scales(
            model, weights, tokens, teacher, TuningConfig(steps=4, batch=2, recompute=every),
            generator=torch.Generator().manual_seed(0), monitor=Monitor(),
        )  # fmt: skip
        scales[every] = [weight.scale for weight in tuned.values()]
        assert not any("forward" in vars(block) for block in model.module.model.layers)
    assert all(torch.equal(a, b) for a, b in zip(scales[0], scales[1], strict=True))


@either
def test_a_rounding_step_follows_the_gradient_that_passes_straight_through(spec):
    weight, start = quantized(spec)
    one = TrainableWeight.start(weight, start)
    assert torch.equal(one.finish().codes, start.codes)
    assert torch.equal(one.weight(), start.dequantize())
    one.latents.latent[0, 0] = 50.0
    before, integer = one.latents.latent.clone(), integers(one.finish())
    toward = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    (one.weight() * toward).sum().backward()
    one.step(0.01, 0.001)
    # d weight / d latent is the scale inside the grid
    expected = toward * start.scale.float().repeat_interleave(32, 1)
    expected[0, 0] = 0.0
    assert torch.allclose(one.latents.latent_mean, expected)
    assert torch.allclose(one.latents.latent, before - 0.01 * expected.sign())
    assert one.finish().codes[0, 0] == 7
    # d weight / d scale is the integer
    for_scale = (toward.view(24, 2, 32) * integer).sum(-1)
    assert torch.allclose(one.latents.scale_mean, for_scale, atol=1e-4)
    scale = start.scale.float()
    moved = scale - 0.001 * for_scale.sign() * scale.abs()
    assert torch.allclose(one.latents.scale, moved, rtol=1e-6)
    assert spec.symmetric or torch.equal(one.finish().zero, start.zero)
    assert torch.equal(start.scale.float(), scale)  # what it started from is as it was


@either
def test_latents_start_on_the_float_weights_side_of_their_codes(spec):
    weight, start = quantized(spec)
    one = TrainableWeight.start(weight, start)
    error = (weight - start.dequantize()).view(24, 2, 32) / start.scale.float().unsqueeze(-1)
    found = one.latents.latent - start.codes.float()
    assert torch.allclose(found, error.view(24, 64).clamp(-0.45, 0.45), atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_refining_a_block_lowers_its_held_out_error_and_never_raises_it(trained, symmetric):
    block = trained.model.layers[0]
    hidden = torch.randn(64, 16, 64, generator=torch.Generator().manual_seed(0))
    kwargs = {"position_embeddings": trained.model.rotary_emb(hidden, torch.arange(16)[None])}
    batches = list(hidden.split(8))
    with torch.no_grad():
        targets = [block(batch, **kwargs) for batch in batches]
    floats = {n: m.weight.detach() for n, m in block.named_modules() if hasattr(m, "in_features")}
    start = {}
    for name, weight in floats.items():
        gram = factorize(torch.eye(weight.shape[1]))
        start[name] = gptq(weight, gram, QuantSpec(2, 32, symmetric))
    task = BlockTask(
        block, batches, targets, [kwargs] * 8,
        channel_weight=torch.ones(64), held_out=2, precision="float32",
    )  # fmt: skip

    def error(weights):
        return task.held_out_error({f"{n}.weight": w.dequantize() for n, w in weights.items()})

    config = RoundingConfig(steps=60, latent_step=0.005, scale_step=0.002, check_every=10)
    block.zero_grad()  # of the network's own training
    refined = refine_block(task, floats, start, config, torch.Generator().manual_seed(0))
    assert error(refined) < 0.9 * error(start)
    # only the weights that are learned get gradients: no product is spent on the others
    assert all(one.grad is None and one.requires_grad for one in block.parameters())
    wild = RoundingConfig(steps=10, latent_step=5.0, scale_step=0.5, check_every=10)
    assert error(refine_block(task, floats, start, wild, torch.Generator())) <= error(start)
