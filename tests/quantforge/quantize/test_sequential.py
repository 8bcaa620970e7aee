"""The driver: inputs from the quantized prefix, results put in place, errors as reported."""

import copy

import pytest
import torch

from quantforge.capture import BlockWalk, stage_grams
from quantforge.errors import InputError
from quantforge.load.huggingface import from_module
from quantforge.methods.compensation import FEEDBACKS, compensate, cross_terms
from quantforge.methods.gptq import fit_grid, gptq
from quantforge.methods.magr import magr
from quantforge.methods.output_feedback import compensate_rows
from quantforge.methods.refit import refit_scales
from quantforge.numerics import factorize, output_error
from quantforge.progress import Monitor
from quantforge.quantize.config import QuantizeConfig, RoundingConfig
from quantforge.quantize.layer import Outputs, Stage, choices, quantize_layer
from quantforge.quantize.sequential import quantize_sequentially
from quantforge.quantize.streams import StageMoments
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import BitPlan, CalibrationSet, QuantSpec

CONFIG = QuantizeConfig(precision="float32", method="gptq")


@pytest.fixture(scope="module")
def trained():
    return train(tiny_llama(blocks=2))


def run(module, spec_of, config=CONFIG, channels=None, output_grams=None, squares=None):
    model = from_module(copy.deepcopy(module))
    assignment = {layer.name: spec_of(layer) for layer in model.layers}
    plan = BitPlan(
        assignment=assignment, budget="", stored_bits=0, code_bits=0, predicted_loss=0, solver=""
    )
    predicted = dict.fromkeys(assignment, 0.0)
    tokens = markov_tokens(16, 32, seed=4)
    calibration = CalibrationSet(
        fitting=tokens, held_out=markov_tokens(4, 32, seed=5), description="", fingerprint=""
    )
    done = list(
        quantize_sequentially(
            model, plan, calibration, predicted, config,
            channel_weights=[torch.ones(64) if channels is None else channels] * 2,
            generator=torch.Generator().manual_seed(0),
            monitor=Monitor(),
            output_grams=output_grams,
            token_squares=squares,
        )
    )  # fmt: skip
    return model, done


def test_every_block_reads_what_the_quantized_blocks_before_it_give(trained):
    model, done = run(trained, lambda layer: QuantSpec(3, 32))
    tokens = markov_tokens(16, 32, seed=4)
    for one in done:
        held = model.module.get_submodule(one.layer.name).weight
        assert torch.equal(held, one.weight.dequantize())
    # Redo the second block by hand: quantized first block, float second block.
    by_hand = from_module(copy.deepcopy(trained))
    for one in done:
        if one.layer.block == 0:
            weight = by_hand.module.get_submodule(one.layer.name).weight
            weight.data.copy_(one.weight.dequantize())
    walk = BlockWalk(by_hand.module, by_hand.architecture, tokens, precision="float32")
    walk.advance(walk.blocks[0])
    grams = [one.mean() for one in stage_grams(walk, walk.blocks[1], by_hand.architecture)]
    for one in done:
        if one.layer.block == 1:
            float_weight = trained.get_submodule(one.layer.name).weight.detach()
            expected = gptq(float_weight, factorize(grams[one.layer.stage]), QuantSpec(3, 32))
            assert torch.equal(one.weight.codes, expected.codes)
            assert torch.equal(one.weight.scale, expected.scale)


def stage_input(module, name, tokens):
    """[tokens, in] what the named layer reads when the network as it stands runs on `tokens`."""
    seen = []
    layer = module.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        module(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_tokens_count_as_the_loss_feels_them(trained, power):
    """Stage by stage by hand: grams and cross moments of weighted tokens."""
    generator = torch.Generator().manual_seed(9)
    names = [layer.name for layer in from_module(trained).layers]
    squares = {n: torch.rand(16, 32, generator=generator).pow(4) for n in names}
    squares = {n: one / one.mean() for n, one in squares.items()}
    config = QuantizeConfig(
        precision="float32", method="gptaq", true_sequential=True, token_weighting=power
    )
    spec, tokens = QuantSpec(3, 32), markov_tokens(16, 32, seed=4)
    _, done = run(trained, lambda _: spec, config, squares=squares.__getitem__)
    by_hand = from_module(copy.deepcopy(trained))
    for block, stage in sorted({(one.layer.block, one.layer.stage) for one in done}):
        members = [o for o in done if (o.layer.block, o.layer.stage) == (block, stage)]
        mean = sum(squares[one.layer.name] for one in members) / len(members)
        weights = mean.clamp_min(1e-4).pow(power).flatten()
        root = (weights / weights.mean()).sqrt()[:, None]
        behind = stage_input(by_hand.module, members[0].layer.name, tokens)
        missed = (stage_input(trained, members[0].layer.name, tokens) - behind) * root
        rows = behind * root
        factor, cross = factorize(rows.T @ rows / len(rows)), missed.T @ rows / len(rows)
        for one in members:
            weight = trained.get_submodule(one.layer.name).weight.detach()
            scale, _ = fit_grid(weight, factor, spec, "diagonal")
            expected = compensate(
                weight, factor, spec, scale, cross=cross, feedback=FEEDBACKS["gptaq"]
            )
            same = (one.weight.codes == expected.codes).float().mean()
            assert same > 0.995, (one.layer.name, float(same))
        for one in members:
            target = by_hand.module.get_submodule(one.layer.name).weight
            target.data.copy_(one.weight.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "gptaq", "qep", "qronos", "foem-gptaq"])
def test_a_stage_sees_all_that_was_quantized_before_it_beside_the_float_network(
    trained, method, symmetric
):
    config = QuantizeConfig(precision="float32", method=method, true_sequential=True)
    _, done = run(trained, lambda layer: QuantSpec(3, 32, symmetric), config)
    tokens = markov_tokens(16, 32, seed=4)
    # Redo every layer by hand, on whole networks: one float, one quantized as far as the stage.
    by_hand = from_module(copy.deepcopy(trained))
    stages = sorted({(one.layer.block, one.layer.stage) for one in done})
    for block, stage in stages:
        members = [o for o in done if (o.layer.block, o.layer.stage) == (block, stage)]
        behind = stage_input(by_hand.module, members[0].layer.name, tokens)
        native = stage_input(trained, members[0].layer.name, tokens)
        gram = behind.T @ behind / len(behind)
        cross = (native - behind).T @ behind / len(behind)
        factor = factorize(gram)
        for one in members:
            weight = trained.get_submodule(one.layer.name).weight.detach()
            feedback = FEEDBACKS[method]
            target = cross_terms(cross, factor, feedback).target(weight)
            spec = one.weight.spec
            scale, zero = fit_grid(target, factor, spec, "diagonal")
            expected = compensate(
                weight, factor, spec, scale, zero=zero, cross=cross, feedback=feedback
            )
            # float32 sums in another order move a code that sits between two
            same = (one.weight.codes == expected.codes).float().mean()
            assert same > 0.995, (one.layer.name, float(same))
        for one in members:
            weight = by_hand.module.get_submodule(one.layer.name).weight
            weight.data.copy_(one.weight.dequantize())


def output_gram(name, rows):
    """A well coupled output gram that depends on the layer's name."""
    seed = sum(map(ord, name))
    gradients = torch.randn(40, rows, generator=torch.Generator().manual_seed(seed))
    gradients += 2.0 * gradients[:, :1]
    return gradients.T @ gradients / 40


def test_rows_answer_for_each_other_by_the_output_gram(trained):
    features = {layer.name: layer.out_features for layer in from_module(trained).layers}

    def grams(name):
        whole, cut = output_gram(name, features[name]), 3 * features[name] // 4
        return [whole[:cut, :cut], whole[cut:, cut:]]

    config = CONFIG.model_copy(update={"output_damping": 0.2})
    _, done = run(trained, lambda layer: QuantSpec(3, 32), config, output_grams=grams)
    _, alone = run(trained, lambda layer: QuantSpec(3, 32))
    walk = BlockWalk(
        trained, from_module(trained).architecture, markov_tokens(16, 32, seed=4),
        precision="float32",
    )  # fmt: skip
    stages = stage_grams(walk, walk.blocks[0], from_module(trained).architecture)
    inputs = [one.mean() for one in stages]
    for one, other in zip(done, alone, strict=True):
        if one.layer.block > 0:
            continue
        factor = factorize(inputs[one.layer.stage])
        rows = [factorize(gram, damping=0.2) for gram in grams(one.layer.name)]
        weight = trained.get_submodule(one.layer.name).weight.detach()
        expected = compensate_rows(
            weight,
            rows,
            lambda taken, carried, w=weight, f=factor: gptq(
                w[taken] + carried, f, QuantSpec(3, 32)
            ),
        )
        assert torch.equal(one.weight.codes, expected.codes)
        assert torch.equal(one.weight.scale, expected.scale)
        changed = (one.weight.codes != other.weight.codes).float().mean()
        assert changed > 0.01 or len(weight) <= 32  # a single panel of rows is quantized as one
    off = CONFIG.model_copy(update={"output_feedback": False})
    _, without = run(trained, lambda layer: QuantSpec(3, 32), off, output_grams=grams)
    assert all(
        torch.equal(a.weight.codes, b.weight.codes) for a, b in zip(without, alone, strict=True)
    )


def test_layers_choose_on_held_out_tokens_and_say_what(trained):
    def held_out_error(done):
        """Σ|Ŵx̃ − Wx|² over stage inputs of a network quantized as in `done`, last block."""
        model = from_module(copy.deepcopy(trained))
        for one in done:
            weight = model.module.get_submodule(one.layer.name).weight
            weight.data.copy_(one.weight.dequantize())
        tokens = markov_tokens(4, 32, seed=5)
        with torch.no_grad():
            return float((model.module.model(tokens)[0] - trained.model(tokens)[0]).square().mean())

    grid = {"mismatch": (0.0, 0.5, 1.0), "pull": (0.0, 0.2), "damping": (0.01, 0.1)}
    config = QuantizeConfig(precision="float32", method="qep", **grid)
    _, chosen = run(trained, lambda layer: QuantSpec(3, 32), config)
    _, plain = run(trained, lambda layer: QuantSpec(3, 32))
    assert all(one.report.note.startswith("chosen: damping 0.") for one in chosen)
    assert len({one.report.note for one in chosen}) > 1
    assert held_out_error(chosen) < held_out_error(plain)
    # one candidate asked for is the same as having no choice
    single = QuantizeConfig(precision="float32", method="qep", mismatch=(0.0,))
    _, zero = run(trained, lambda layer: QuantSpec(3, 32), single)
    assert all(
        torch.equal(a.weight.codes, b.weight.codes) for a, b in zip(zero, plain, strict=True)
    )


def test_unweighted_learned_rounding_does_not_look_at_the_channels(trained):
    def codes(weighted, channels):
        rounding = RoundingConfig(steps=8, latent_step=0.05, check_every=8, weighted=weighted)
        config = QuantizeConfig(precision="float32", method="gptq", rounding=rounding)
        _, done = run(trained, lambda layer: QuantSpec(2, 32), config, channels)
        return torch.cat([one.weight.codes.flatten() for one in done])

    even = torch.ones(64)
    uneven = torch.linspace(0.01, 10.0, 64).flip(0)
    assert torch.equal(codes(False, even), codes(False, uneven))
    assert not torch.equal(codes(True, even), codes(True, uneven))


@pytest.mark.parametrize("coupled", [False, True])
def test_choice_is_the_candidate_with_the_least_error_on_the_held_out_inputs(coupled):
    gram = output_gram("six", 6) if coupled else torch.eye(6)
    outputs = Outputs.of([gram], 0.5) if coupled else Outputs()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)

    def moments(tokens):
        quantized = torch.randn(tokens, 32, generator=generator)
        native = quantized + 0.3 * torch.randn(tokens, 32, generator=generator)
        gram = quantized.T @ quantized / tokens
        cross = (native - quantized).T @ quantized / tokens
        return native, quantized, StageMoments(gram=gram, cross=cross)

    _, _, fitting = moments(48)
    native, quantized, held_out = moments(64)
    grid = {"mismatch": (0.0, 0.5, 1.0), "pull": (0.0, 0.2), "damping": (0.01, 0.3)}
    config = QuantizeConfig(method="qep", **grid)
    made = quantize_layer(weight, Stage(fitting, held_out), QuantSpec(3, 16), config, outputs)
    errors = {}
    for choice in choices(config, 16):
        alone = config.model_copy(
            update={
                "mismatch": (choice.feedback.target,),
                "pull": (choice.feedback.pull,),
                "damping": (choice.damping,),
            }
        )
        other = quantize_layer(weight, Stage(fitting, None), QuantSpec(3, 16), alone, outputs)
        output = quantized @ other.quantized.dequantize().T - native @ weight.T
        errors[str(choice)] = float(((output @ gram) * output).sum())
    assert len(errors) == 12
    assert str(made.choice) == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("symmetric", [True, False])
def test_refit_keeps_the_integers_and_lowers_the_error_to_the_float_network(symmetric):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 32, generator=generator)
    quantized = torch.randn(80, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    native = quantized + 0.3 * torch.randn(80, 32, generator=generator)
    moments = StageMoments(
        gram=quantized.T @ quantized / 80, cross=(native - quantized).T @ quantized / 80
    )
    found = {}
    for refit in (False, True):
        config = QuantizeConfig(method="qronos", refit=refit)
        spec = QuantSpec(2, 16, symmetric)
        found[refit] = quantize_layer(weight, Stage(moments, None), spec, config)
    before, after = found[False].quantized, found[True].quantized
    assert torch.equal(before.codes, after.codes)
    assert symmetric or torch.equal(before.zero, after.zero)

    def error(one):
        output = quantized @ one.dequantize().T - native @ weight.T
        return float(output.square().sum())

    assert error(after) < 0.97 * error(before)


def test_a_layer_whose_inputs_overflow_is_named(trained):
    module = copy.deepcopy(trained)
    with torch.no_grad():
        module.model.layers[1].post_attention_layernorm.weight.mul_(torch.inf)
        module.model.layers[1].post_attention_layernorm.weight.nan_to_num_(posinf=3e38)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj: .*NaN or Inf"):
        run(module, lambda layer: QuantSpec(3, 32))


def test_block_walk_equals_the_whole_network(trained):
    tokens = markov_tokens(6, 20, seed=8)
    model = from_module(trained)
    walk = BlockWalk(model.module, model.architecture, tokens, batch_size=4, precision="float32")
    for block in walk.blocks:
        walk.advance(block)
    found = torch.cat(walk.hidden)
    with torch.no_grad():
        expected = trained.lm_head(trained.model.norm(found))
        assert torch.allclose(expected, trained(input_ids=tokens).logits, atol=1e-5)


def test_feedback_lowers_output_error_below_rounding_on_the_same_grid(trained):
    _, done = run(trained, lambda layer: QuantSpec(2, 32))
    better = [one.report.output_error < one.report.rtn_output_error for one in done]
    assert sum(better) >= 0.9 * len(better)
    total = sum(one.report.output_error for one in done)
    assert total < 0.8 * sum(one.report.rtn_output_error for one in done)


def test_kept_layers_and_identity_width(trained):
    model, done = run(trained, lambda layer: None if layer.stage == 0 else QuantSpec(8))
    for one in done:
        after = model.module.get_submodule(one.layer.name).weight
        before = trained.get_submodule(one.layer.name).weight
        if one.layer.stage == 0:
            assert one.weight is None
            assert one.report.spec == "kept"
            assert torch.equal(after, before)
        else:
            assert one.report.weight_error < 2e-4
    tokens = markov_tokens(4, 20, seed=9)
    with torch.no_grad():
        logits, expected = model.module(tokens).logits, trained(tokens).logits
        p, q = expected.log_softmax(-1), logits.log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "foem", "foem-gptaq", "qep", "qronos"])
def test_zero_points_pay_where_weights_have_a_mean(method):
    """Weights around 2 with a spread of 1: a symmetric grid spends half its codes on nothing."""
    generator = torch.Generator().manual_seed(6)
    weight = 2.0 + torch.randn(24, 32, generator=generator)
    quantized = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    native = quantized + 0.02 * torch.randn(200, 32, generator=generator)
    moments = StageMoments(
        gram=quantized.T @ quantized / 200, cross=(native - quantized).T @ quantized / 200
    )
    errors = {}
    for symmetric in (True, False):
        spec, config = QuantSpec(3, 16, symmetric), QuantizeConfig(method=method)
        made = quantize_layer(weight, Stage(moments, None), spec, config)
        difference = made.quantized.dequantize() - weight
        errors[symmetric] = float(output_error(difference, moments.gram).sum())
        assert (made.quantized.zero is None) == symmetric
        assert made.quantized.spec == spec
    assert errors[False] < 0.6 * errors[True]


@pytest.mark.parametrize("method", ["rtn", "gptq", "qep"])
def test_magr_is_what_is_compensated_and_errors_are_those_to_the_weight_itself(trained, method):
    options = {"precision": "float32", "method": method}
    spec = QuantSpec(2)
    _, done = run(trained, lambda layer: spec, QuantizeConfig(**options, magr=3e-3))
    tokens = markov_tokens(16, 32, seed=4)
    for one in done[:3]:  # the first stage reads the same whatever the method did
        weight = trained.get_submodule(one.layer.name).weight.detach()
        inputs = stage_input(trained, one.layer.name, tokens)
        gram = inputs.T @ inputs / len(inputs)
        moved = magr(weight, gram, spec, strength=3e-3)
        moments = StageMoments(gram=gram, cross=torch.zeros_like(gram))
        expected = quantize_layer(moved, Stage(moments, None), spec, QuantizeConfig(**options))
        same = (one.weight.codes == expected.quantized.codes).float().mean()
        assert same > 0.995, float(same)
        difference = one.weight.dequantize() - weight
        error = float(difference.square().sum() / weight.square().sum())
        assert one.report.weight_error == pytest.approx(error)
        seen = output_error(difference, gram).sum() / output_error(weight, gram).sum()
        assert one.report.output_error == pytest.approx(float(seen), rel=1e-3)
        assert not torch.equal(one.weight.codes, quantize_layer(
            weight, Stage(moments, None), spec, QuantizeConfig(**options)
        ).quantized.codes)  # fmt: skip


def test_magr_takes_outliers_that_correlated_inputs_can_do_without():
    """Inputs come in equal pairs, so a large weight can be shared with the other of its pair."""
    generator = torch.Generator().manual_seed(9)
    gram = torch.eye(32).repeat(2, 2)
    weight = 0.1 * torch.randn(16, 64, generator=generator)
    weight[:, 5] = 1.0
    moments = StageMoments(gram=gram, cross=None)
    errors = {}
    for strength in (0.0, 0.2):
        config = QuantizeConfig(method="rtn", grid="minmax", magr=strength)
        made = quantize_layer(weight, Stage(moments, None), QuantSpec(3), config)
        errors[strength] = float(output_error(made.quantized.dequantize() - weight, gram).sum())
    assert errors[0.2] < 0.5 * errors[0.0]


def test_refit_after_magr_fits_the_weight_itself():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    moments = StageMoments(gram=inputs.T @ inputs / 200, cross=None)
    weight = torch.randn(6, 32, generator=generator)
    found = {}
    for refit in (False, True):
        config = QuantizeConfig(method="gptq", magr=0.1, refit=refit)
        made = quantize_layer(weight, Stage(moments, None), QuantSpec(3, 16), config).quantized
        found[refit] = made
    start = found[False]
    expected = refit_scales(start.codes, weight, moments.gram, start.scale, start.spec)
    assert torch.equal(found[True].scale, expected.bfloat16())
    assert not torch.equal(found[True].scale, start.scale)


def test_an_asymmetric_rounding_is_learned_and_keeps_its_zero_points(trained):
    spec = QuantSpec(2, 32, symmetric=False)
    rounding = RoundingConfig(steps=40, latent_step=0.02, check_every=10)
    _, plain = run(trained, lambda layer: spec)
    learned, done = run(
        trained,
        lambda layer: spec,
        QuantizeConfig(precision="float32", method="gptq", rounding=rounding),
    )
    first, moved = plain[0].weight, done[0].weight
    assert torch.equal(first.zero, moved.zero)  # the first block starts from the same weights
    assert not torch.equal(first.codes, moved.codes)
    for one in done:
        held = learned.module.get_submodule(one.layer.name).weight
        assert torch.equal(held, one.weight.dequantize())


def test_rtn_method_is_rounding(trained):
    _, done = run(trained, lambda layer: QuantSpec(4, 32), QuantizeConfig(method="rtn"))
    assert all(one.report.output_error == one.report.rtn_output_error for one in done)


def test_dead_inputs_are_reported_and_cost_nothing(trained):
    module = copy.deepcopy(trained)
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[5] = 0.0  # so that down_proj never sees input 5
    model, done = run(module, lambda layer: QuantSpec(3, 32))
    (down,) = [o for o in done if o.layer.name == "model.layers.0.mlp.down_proj"]
    assert down.report.dead_columns == 1
    assert torch.isfinite(model.module.get_submodule(down.layer.name).weight).all()
