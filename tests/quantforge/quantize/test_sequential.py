"""The driver: inputs from the quantized prefix, results put in place, errors as reported."""

import copy

import pytest
import torch

from quantforge.capture import BlockWalk, stage_grams
from quantforge.load.huggingface import from_module
from quantforge.methods.gptq import gptq
from quantforge.numerics import factorize
from quantforge.progress import Monitor
from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.sequential import quantize_sequentially
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import BitPlan, CalibrationSet, QuantSpec

CONFIG = QuantizeConfig(precision="float32")


@pytest.fixture(scope="module")
def trained():
    return train(tiny_llama(blocks=2))


def run(module, spec_of, config=CONFIG):
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
            channel_weights=[torch.ones(64)] * 2, generator=torch.Generator().manual_seed(0),
            monitor=Monitor(),
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
    grams = stage_grams(walk, walk.blocks[1], by_hand.architecture)
    for one in done:
        if one.layer.block == 1:
            float_weight = trained.get_submodule(one.layer.name).weight.detach()
            expected = gptq(float_weight, factorize(grams[one.layer.stage]), QuantSpec(3, 32))
            assert torch.equal(one.weight.codes, expected.codes)
            assert torch.equal(one.weight.scale, expected.scale)


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
