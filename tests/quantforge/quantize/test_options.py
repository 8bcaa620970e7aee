"""Options of the quantize stage: orders of columns, clip, which rounding is learned how long."""

import copy

import pytest
import torch
from torch import nn

from quantforge.errors import UsageError
from quantforge.load.huggingface import from_module
from quantforge.methods.awq import clip_groups, search_clip
from quantforge.methods.gptq import gptq
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.numerics import factorize, output_error
from quantforge.progress import Monitor
from quantforge.quantize.config import QuantizeConfig, RoundingConfig
from quantforge.quantize.layer import Stage, quantize_layer
from quantforge.quantize.refine import BlockTask, refine_block
from quantforge.quantize.sequential import quantize_sequentially
from quantforge.quantize.streams import StageMoments
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import BitPlan, CalibrationSet, QuantSpec


@pytest.fixture(scope="module")
def trained():
    return train(tiny_llama(blocks=2))


def problem(seed=0):
    """A weight with a few outliers, and the moments of uneven, correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 64, generator=generator)
    weight[:, ::9] *= 3.0
    inputs = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    inputs *= 0.2 + torch.rand(64, generator=generator)
    return weight, StageMoments(gram=inputs.T @ inputs / 300, cross=None)


@pytest.mark.parametrize(
    ("order", "options"),
    [("activation", {}), ("groups", {"group_width": 16}), ("natural", {"act_order": False})],
)
def test_columns_go_in_the_order_that_is_asked_for(order, options):
    weight, moments = problem()
    spec = QuantSpec(3, 16)
    config = QuantizeConfig(method="gptq", order=order)
    made = quantize_layer(weight, Stage(moments, None), spec, config).quantized
    expected = gptq(weight, factorize(moments.gram, **options), spec)
    assert torch.equal(made.codes, expected.codes)
    other = gptq(weight, factorize(moments.gram, act_order=order == "natural"), spec)
    assert not torch.equal(made.codes, other.codes)


def test_layers_of_one_stage_keep_their_own_groups_together():
    """One stage serves layers of several group sizes, whose orders differ."""
    weight, moments = problem()
    stage, config = Stage(moments, None), QuantizeConfig(method="gptq", order="groups")
    for width in (16, 32):
        spec = QuantSpec(3, width)
        made = quantize_layer(weight, stage, spec, config).quantized
        expected = gptq(weight, factorize(moments.gram, group_width=width), spec)
        assert torch.equal(made.codes, expected.codes)


def test_clip_rounds_what_awq_leaves_of_the_range_and_errors_stay_those_to_the_weight():
    weight, moments = problem()
    spec = QuantSpec(3, 16)
    errors = {}
    for clip in (False, True):
        config = QuantizeConfig(method="rtn", grid="minmax", clip=clip)
        made = quantize_layer(weight, Stage(moments, None), spec, config).quantized
        errors[clip] = float(output_error(made.dequantize() - weight, moments.gram).sum())
    clipped = clip_groups(weight, search_clip(weight, moments.gram, spec))
    expected = round_to_nearest(clipped, minmax_grid(clipped, spec)[0], spec)
    assert torch.equal(made.codes, expected.codes)
    assert errors[True] < 0.8 * errors[False]


class CountedTask(BlockTask):
    """A linear block whose held-out error falls as often as asked for, and counts questions."""

    def __init__(self, falls):
        hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(3))
        super().__init__(
            nn.Sequential(nn.Linear(16, 16, bias=False)), [hidden, hidden], [hidden, hidden],
            [{}, {}], channel_weight=torch.ones(16), held_out=1, precision="float32",
        )  # fmt: skip
        self.asked, self.falls = 0, falls

    def held_out_error(self, weights):
        self.asked += 1
        return 100.0 - self.asked if self.asked <= self.falls + 1 else 200.0


@pytest.mark.parametrize(
    ("patience", "falls", "asked"), [(0, 0, 9), (2, 0, 3), (2, 3, 6), (1, 8, 9)]
)
def test_training_ends_when_the_error_stops_falling(patience, falls, asked):
    """Asked once at the start and once a step of eight, as long as patience lasts."""
    task = CountedTask(falls)
    weight = task.block[0].weight.detach()
    spec = QuantSpec(3)
    start = {"0": round_to_nearest(weight, minmax_grid(weight, spec)[0], spec)}
    config = RoundingConfig(steps=8, check_every=1, patience=patience)
    made = refine_block(task, {"0": weight}, start, config, torch.Generator().manual_seed(0))
    assert task.asked == asked
    assert (made["0"] is start["0"]) == (falls == 0)


def quantize(module, losses, rounding):
    """Layer name → weight of two blocks, whose layers are predicted to lose `losses`."""
    model = from_module(copy.deepcopy(module))
    specs = {layer.name: QuantSpec(2, 32) for layer in model.layers}
    plan = BitPlan(
        assignment=specs, budget="", stored_bits=0, code_bits=0, predicted_loss=0, solver=""
    )
    calibration = CalibrationSet(
        fitting=markov_tokens(16, 32, seed=4), held_out=markov_tokens(4, 32, seed=5),
        description="", fingerprint="",
    )  # fmt: skip
    made = quantize_sequentially(
        model, plan, calibration, {layer.name: losses[layer.block] for layer in model.layers},
        QuantizeConfig(precision="float32", method="gptq", rounding=rounding),
        channel_weights=[torch.ones(64)] * 2, generator=torch.Generator().manual_seed(0),
        monitor=Monitor(),
    )  # fmt: skip
    return {one.layer: one.weight for one in made}


@pytest.mark.parametrize("most", [0, 1])
def test_a_share_of_the_blocks_is_learned_those_that_lose_most(trained, most):
    losses = [0.01, 0.01]
    losses[most] = 0.02
    plain = quantize(trained, losses, RoundingConfig())
    learned = quantize(trained, losses, RoundingConfig(steps=20, share=0.5))
    changed = {
        layer.block
        for layer, weight in plain.items()
        if not torch.equal(weight.scale, learned[layer].scale) and layer.block <= most
    }
    assert changed == {most}
    if most == 0:  # what follows reads other inputs, but its rounding is compensation's own
        return
    everything = quantize(trained, losses, RoundingConfig(steps=20))
    first = [layer for layer in plain if layer.block == 0]
    assert any(not torch.equal(everything[x].scale, plain[x].scale) for x in first)


def test_a_share_of_blocks_without_predictions_is_refused(trained):
    with pytest.raises(UsageError, match=r"rounding\.share goes by .* none for model\.layers\.0\."):
        quantize(trained, [None, None], RoundingConfig(steps=20, share=0.5))
    assert quantize(trained, [None, None], RoundingConfig(steps=20))
