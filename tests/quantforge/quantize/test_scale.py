"""Channel scaling of a block: it changes the weights, never what the block computes."""

import copy

import pytest
import torch

from quantforge.errors import InputError
from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.load.huggingface import from_module
from quantforge.methods.awq import channel_scale
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.numerics import output_error
from quantforge.progress import Monitor
from quantforge.quantize.config import QuantizeConfig, RoundingConfig
from quantforge.quantize.scale import fold, rescale_outputs, scale_block
from quantforge.quantize.sequential import quantize_sequentially
from quantforge.quantize.streams import Streams
from quantforge.testing import markov_tokens, plan_of, tiny_llama, train
from quantforge.types import CalibrationSet, QuantSpec

GROUPED = {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
SOURCES = {False: GROUPED, True: GROUPED | {"self_attn.v_proj"}}
CALIBRATION = CalibrationSet(
    fitting=markov_tokens(16, 32, seed=4), held_out=markov_tokens(4, 32, seed=5),
    description="", fingerprint="",
)  # fmt: skip


@torch.no_grad()
def uneven(module, strength=30.0):
    """The same network with a few channels of large activations and small weights."""
    for block in module.model.layers:
        for norm, readers in (
            (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
            (block.post_attention_layernorm, ("gate_proj", "up_proj")),
        ):
            norm.weight[::16] *= strength
            for name in readers:
                part = block.self_attn if hasattr(block.self_attn, name) else block.mlp
                getattr(part, name).weight[:, ::16] /= strength
        block.mlp.up_proj.weight[::32] *= strength
        block.mlp.down_proj.weight[:, ::32] /= strength
    return module


@pytest.fixture(scope="module")
def trained():
    return uneven(train(tiny_llama(blocks=2)))


def everywhere(model, spec):
    return plan_of({layer.name: spec for layer in model.layers})


@torch.no_grad()
def logits(module, seed=9):
    return module(input_ids=markov_tokens(4, 24, seed=seed)).logits


def quantized(module, config, spec):
    model = from_module(copy.deepcopy(module))
    plan = everywhere(model, spec)
    done = list(
        quantize_sequentially(
            model, plan, CALIBRATION, dict.fromkeys(plan.assignment, 0.0), config,
            channel_weights=[torch.ones(64)] * 2, generator=torch.Generator().manual_seed(0),
            monitor=Monitor(),
        )
    )  # fmt: skip
    return model, done


@pytest.mark.parametrize("every_head", [False, True])
def test_a_scaled_block_computes_the_same_with_other_weights(every_head):
    module = uneven(tiny_llama(blocks=2, kv_heads=4 if every_head else 2))
    model = from_module(copy.deepcopy(module))
    config = QuantizeConfig(precision="float32", method="qep", grid="minmax", awq=True)
    streams = Streams(model, CALIBRATION, config)
    block = streams.quantized.blocks[0]
    found = scale_block(model, 0, everywhere(model, QuantSpec(3, 32)), streams, config)
    assert set(found) == SOURCES[every_head]
    for name in GROUPED:  # the channels made large in `uneven` are what scaling is for
        assert found[name].exponent > 0.2, name
        assert found[name].loss < 0.7 * found[name].unscaled_loss, name
    for name, parameter in block.named_parameters():
        changed = not torch.equal(parameter, module.model.layers[0].get_parameter(name))
        assert changed == (every_head or name != "self_attn.o_proj.weight"), name
        if name.endswith("layernorm.weight"):  # as the checkpoint will hold it
            assert torch.equal(parameter, parameter.bfloat16().float())
    assert (logits(model.module) - logits(module)).abs().max() <= 1e-5 * logits(module).abs().max()
    # What the next block is compared with is what the original network gives.
    streams.advance_native(block, {})
    inputs = streams.quantized.hidden[0]
    with torch.no_grad():
        expected = module.model.layers[0](
            inputs, **streams.quantized.arguments(model.module.model.layers[0])[0]
        )
    assert (streams.native.hidden[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_loss_of_a_scale_is_the_summed_output_error_of_what_reads_it(trained):
    model = from_module(copy.deepcopy(trained))
    config = QuantizeConfig(precision="float32", grid="minmax", awq=True)
    plan = everywhere(model, QuantSpec(3, 32, symmetric=False))
    first = "model.layers.0.self_attn."
    plan.assignment[f"{first}k_proj"] = None  # kept: scaled too, but no part of the loss
    seen = []
    norm = trained.model.layers[0].input_layernorm
    handle = norm.register_forward_hook(lambda *a: seen.append(a[2].detach().flatten(0, 1)))
    trained(input_ids=CALIBRATION.fitting)
    handle.remove()
    (inputs,) = seen
    found = scale_block(model, 0, plan, Streams(model, CALIBRATION, config), config)
    chosen = found["input_layernorm"]
    losses = []
    for step in range(20):
        scale = channel_scale(inputs.abs().mean(0), step / 20)
        total = 0.0
        for name in ("q_proj", "v_proj"):
            spec = plan.assignment[first + name]
            weight = trained.get_submodule(first + name).weight.detach()
            steps, zero = minmax_grid(weight * scale, spec)
            made = round_to_nearest(weight * scale, steps, spec, zero).dequantize()
            total += float(((inputs / scale) @ made.T - inputs @ weight.T).square().mean(0).sum())
        losses.append(total)
    assert chosen.unscaled_loss == pytest.approx(losses[0], rel=1e-3)
    assert chosen.loss == pytest.approx(min(losses), rel=1e-3)
    assert chosen.exponent == losses.index(min(losses)) / 20
    kept = model.module.get_submodule(f"{first}k_proj").weight
    assert not torch.equal(kept, trained.get_submodule(f"{first}k_proj").weight)


def test_a_stage_that_is_kept_is_left_alone(trained):
    model = from_module(copy.deepcopy(trained))
    assignment = {n.name: None if n.stage == 0 else QuantSpec(3, 32) for n in model.layers}
    config = QuantizeConfig(precision="float32", grid="minmax", awq=True)
    found = scale_block(model, 0, plan_of(assignment), Streams(model, CALIBRATION, config), config)
    assert set(found) == {"post_attention_layernorm", "mlp.up_proj"}
    before, after = trained.model.layers[0], model.module.model.layers[0]
    assert torch.equal(before.input_layernorm.weight, after.input_layernorm.weight)
    assert torch.equal(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)


def test_weights_that_are_on_the_grid_already_are_not_scaled(trained):
    """Eight bits that reach both ends of the codes: rounding is exact, so is the network."""
    module, spec = copy.deepcopy(trained), QuantSpec(8, symmetric=False)
    for layer in from_module(module).layers:
        weight = module.get_submodule(layer.name).weight.detach()
        exact = round_to_nearest(weight, *minmax_grid(weight, spec)[:1], spec, torch.full(
            (len(weight), 1), 128.0
        ))  # fmt: skip
        exact.codes[:, 0], exact.codes[:, 1] = 0, 255
        module.get_submodule(layer.name).weight.data.copy_(exact.dequantize())
    expected = logits(module)
    for method in ("rtn", "gptq"):
        config = QuantizeConfig(precision="float32", method=method, grid="minmax", awq=True)
        model, done = quantized(module, config, spec)
        assert (logits(model.module) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert max(one.report.weight_error for one in done) < 1e-10
        assert torch.equal(
            model.module.model.layers[0].input_layernorm.weight,
            module.model.layers[0].input_layernorm.weight,
        )


@pytest.mark.parametrize("method", ["rtn", "gptq", "qep"])
def test_scaling_lowers_the_kl_where_channels_are_uneven(trained, method):
    unseen = markov_tokens(16, 32, seed=7)
    reference = ReferenceOutputs.collect(trained, from_module(trained).architecture, unseen)
    kl, errors = {}, {}
    for awq in (False, True):
        config = QuantizeConfig(precision="float32", method=method, grid="minmax", awq=awq)
        model, done = quantized(trained, config, QuantSpec(3, 32))
        kl[awq] = measure(model.module, model.architecture, unseen, reference, text="").kl
        errors[awq] = sum(one.report.output_error for one in done)
        for one in done:
            held = model.module.get_submodule(one.layer.name).weight
            assert torch.equal(held, one.weight.dequantize())
    assert kl[True] < 0.7 * kl[False]
    assert errors[True] < 0.7 * errors[False]


def test_learned_rounding_aims_at_the_original_network(trained):
    rounding = RoundingConfig(steps=6, check_every=3)
    options = {"precision": "float32", "grid": "minmax", "awq": True, "true_sequential": True}
    tokens = CALIBRATION.held_out
    with torch.no_grad():
        goal = trained.model(tokens).last_hidden_state
    errors = []
    for steps in (rounding, RoundingConfig()):
        config = QuantizeConfig(**options, rounding=steps)
        model, _ = quantized(trained, config, QuantSpec(4, 32))
        with torch.no_grad():
            found = model.module.model(tokens).last_hidden_state
        errors.append(float((found - goal).square().mean() / goal.square().mean()))
    assert errors[0] < 1.05 * errors[1] < 0.1


def test_fold_divides_and_multiplies_by_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    norm, reader = torch.nn.LayerNorm(8), torch.nn.Linear(8, 5)
    norm.weight.data = torch.randn(8, generator=generator)
    norm.weight.data[3] = 0.0  # cannot be divided to any effect
    norm.bias.data.zero_()
    scale = torch.rand(8, generator=generator) * 4 + 0.1
    x = torch.randn(20, 8, generator=generator)
    with torch.no_grad():
        expected = reader(norm(x))
        before = norm.weight.clone()
        fold(norm, [reader], scale)
        assert torch.allclose(norm.weight * scale, before, rtol=2**-8)
        assert torch.allclose(reader(norm(x)), expected, atol=1e-6)
        source = torch.nn.Linear(6, 8)
        inputs = torch.randn(20, 6, generator=generator)
        expected = reader(source(inputs))
        bias = source.bias.clone()
        fold(source, [reader], scale)
        assert torch.allclose(source.bias * scale, bias)
        assert torch.allclose(reader(source(inputs)), expected, atol=1e-6)


def test_a_network_without_such_pairs_is_refused(trained):
    model = from_module(copy.deepcopy(trained))
    config = QuantizeConfig(precision="float32", awq=True)
    streams = Streams(model, CALIBRATION, config)
    bare = {name: getattr(model.architecture, name) for name in model.architecture.__slots__}
    model.architecture = type(model.architecture)(**{**bare, "folds": ()})
    with pytest.raises(InputError, match="nothing can be folded in the architecture llama"):
        scale_block(model, 0, everywhere(model, QuantSpec(3, 32)), streams, config)


def test_statistics_are_means_over_the_fitting_tokens(trained):
    config = QuantizeConfig(precision="float32", awq=True)
    streams = Streams(from_module(trained), CALIBRATION, config)
    seen = []
    down = trained.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach().flatten(0, 1)))
    trained(input_ids=CALIBRATION.fitting)
    handle.remove()
    gram, magnitude = streams.statistics(streams.quantized.blocks[0])[3]
    assert torch.allclose(magnitude, seen[0].abs().mean(0), rtol=1e-4, atol=1e-6)
    assert torch.allclose(gram, seen[0].T @ seen[0] / len(seen[0]), rtol=1e-3, atol=1e-5)
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(output_error(rows, gram), (seen[0] @ rows.T).square().mean(0), rtol=1e-3)


def test_output_grams_follow_the_scale_of_the_outputs():
    """y / s has gradients s g: by definition of the gram, in two blocks."""
    gradients = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])

    def blocks(rows):
        return [rows[:, :2].T @ rows[:, :2], rows[:, 2:].T @ rows[:, 2:]]

    found = rescale_outputs(blocks(gradients), scale)
    torch.testing.assert_close(found, blocks(gradients * scale))
