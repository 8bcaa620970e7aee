"""What models and texts in practice are like, through whole runs: a result that says so, or a line.

Each ends in a network with finite weights, a finite KL and a report that names the trouble, or in
one line that names what is wrong.
"""

import math

import pytest
import torch

import quantforge
from quantforge.errors import InputError
from quantforge.testing import markov_tokens, tiny_llama, train

SETTINGS = {
    "search.group_sizes": [32, -1],
    "search.bits": [2, 3],
    "evaluate.curve_windows": 2,
    "search.refine": 0,
    "quantize.tuning.steps": 2,
}
ONE_CANDIDATE = {"search.solver": "uniform", "search.bits": [2], "search.group_sizes": [32]}
UP = "model.layers.1.mlp.up_proj"
# Blocks one after the other, or the calibration's integers as they are (`--effort fast`).
BOTH_WAYS = pytest.mark.parametrize("sequential", [True, False])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def module():
    return train(tiny_llama(blocks=2), steps=20)


def batches():
    return [markov_tokens(2, 24, seed=seed) for seed in range(8)]


def compiled(module, calibration=None, *, changes=(), budget="3bit", **options):
    """The report of a run whose network is finite and in the dtype it came in."""
    dtype = module.lm_head.weight.dtype
    report = quantforge.quantize(
        module, budget=budget, calibration=calibration or batches(),
        settings={**SETTINGS, **dict(changes)}, **options,
    )  # fmt: skip
    assert report.plan.stored_bits <= 3.0
    assert 0 < report.quality.kl < 0.1
    assert all(math.isfinite(layer.output_error) for layer in report.layers)
    assert len(report.layers) == 14
    for tensor in module.state_dict().values():
        assert tensor.dtype == dtype
        assert torch.isfinite(tensor).all()
    return report


def test_a_text_of_one_token_makes_every_gram_singular(module):
    """Of rank one where a layer reads the same at every position, as the first block's do."""
    report = compiled(module, [torch.full((2, 24), 7)] * 8, budget="2.5bit")
    assert all(layer.damping > 0 for layer in report.layers)
    first = [layer for layer in report.layers if layer.name.startswith("model.layers.0.self")]
    assert all(layer.output_error < 0.1 * layer.rtn_output_error for layer in first)


@BOTH_WAYS
def test_a_gram_that_needs_more_damping_is_reported(module, sequential):
    """Without any, inputs of rank one cannot be factored."""
    changes = {"quantize.damping": [0.0]} if sequential else {"quantize.sequential": False}
    changes |= {"calibrate.damping": 0.0}
    report = compiled(module, [torch.full((2, 24), 7)] * 8, changes=changes, budget="2.5bit")
    assert any("layers needed more damping, first model.layers.0" in w for w in report.warnings)
    damped = [layer for layer in report.layers if "gram needed damping" in layer.note]
    assert damped
    assert all(layer.damping > 0 for layer in damped)


@BOTH_WAYS
def test_dead_and_duplicate_inputs_are_reported(module, sequential):
    with torch.no_grad():
        for block in module.model.layers:
            block.mlp.up_proj.weight[5] = 0.0  # down_proj never sees input 5
            for part in (block.mlp.up_proj, block.mlp.gate_proj):
                part.weight[64:128] = part.weight[:64]  # and the rest twice
    # Learned rounding may give a row of zeros a use, and then these inputs are dead no more.
    changes = {"quantize.sequential": sequential, "quantize.rounding.steps": 0}
    report = compiled(module, changes=changes)
    warning = "2 layers have inputs that were always zero, first model.layers.0.mlp.down_proj"
    assert warning in report.warnings
    dead = {layer.name: layer.dead_columns for layer in report.layers if layer.dead_columns}
    assert dead == {f"model.layers.{index}.mlp.down_proj": 2 for index in range(2)}
    for block in module.model.layers:
        assert not block.mlp.down_proj.weight[:, [5, 69]].any()


@BOTH_WAYS
def test_a_layer_that_sees_nothing_is_rounded_and_reported(module, sequential):
    with torch.no_grad():
        module.model.layers[0].self_attn.v_proj.weight.zero_()
    report = compiled(module, changes={"quantize.sequential": sequential})
    name = "model.layers.0.self_attn.o_proj"
    assert f"1 layers could only be rounded to nearest, first {name}" in report.warnings
    (layer,) = [one for one in report.layers if one.name == name]
    assert layer.note.startswith("rounded to nearest")
    assert module.model.layers[0].self_attn.o_proj.weight.any()


def test_one_calibration_sequence_is_too_few_and_two_are_enough(module):
    with pytest.raises(InputError, match=r"^1 calibration sequence cannot be split .* at least 2$"):
        compiled(module, [markov_tokens(1, 48)])
    report = compiled(module, [markov_tokens(1, 48, seed=seed) for seed in range(2)])
    assert report.quality.windows == 1
    assert any(line.startswith("one sequence is held out") for line in report.warnings)


def test_activations_that_overflow_float16_are_run_in_float32(module):
    with torch.no_grad():
        module.model.layers[1].post_attention_layernorm.weight.fill_(1e3)
        module.get_submodule(UP).weight.mul_(30)
        module.model.layers[1].mlp.gate_proj.weight.mul_(30)
    module.half()
    assert not torch.isfinite(module(input_ids=batches()[0]).logits).all()
    compiled(module)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, r"model\.layers\.1\.mlp\.gate_proj: the gram of the layer's inputs"),
        # nothing is searched, so that no layer is looked at before the network as a whole
        (ONE_CANDIDATE, "the logits"),
    ],
)
def test_activations_that_overflow_float32_say_so(module, changes, where):
    with torch.no_grad():
        module.model.layers[1].post_attention_layernorm.weight.fill_(3e38)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    message = rf"^{where}.*: \d+ of \d+ values are NaN or Inf; the model overflows float32"
    with pytest.raises(InputError, match=message) as caught:
        compiled(module, changes=changes)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens", "model.norm"])
def test_weights_that_are_not_finite_are_named(module, name, value):
    with torch.no_grad():
        module.get_submodule(name).weight.view(-1)[3] = value
    with pytest.raises(InputError, match=rf"{name}\.weight holds 1 NaN or infinite"):
        compiled(module)


def test_groups_that_do_not_divide_a_row(module):
    """Refused where they are asked for; one candidate less where there are others."""
    with pytest.raises(InputError, match=r"search\.group_sizes=.*48.* divides no row"):
        compiled(module, changes={"search.group_sizes": [48]})
    plan = {f"model.layers.{i}.mlp.{n}_proj": "3b-g48" for i in (0, 1) for n in ("gate", "up")}
    with pytest.raises(InputError, match=r"gate_proj: 3b-g48 does not divide rows of 64"):
        compiled(module, budget=None, plan=plan)
    report = compiled(module, changes={"search.group_sizes": [48, -1]})
    assert {spec.group_size for spec in report.plan.assignment.values() if spec} == {-1}
