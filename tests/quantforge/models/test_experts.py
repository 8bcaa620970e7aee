"""Mixtures of experts: split into linears, measured, kept safe, written, refused and read."""

import json

import pytest
import torch

import quantforge
from quantforge import capture, delivery
from quantforge.calibrate.backward import backward_blocks
from quantforge.calibrate.fisher import weight_gradients
from quantforge.capture import BlockWalk, stage_grams
from quantforge.errors import InputError, UsageError
from quantforge.export.servers import SERVERS, network_problems
from quantforge.load.huggingface import from_module, load_model
from quantforge.load.source import resolve_source
from quantforge.methods.gptq import gptq
from quantforge.models.experts import SplitExperts, experts_split, split_experts
from quantforge.numerics import factorize
from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.sequential import quantize_sequentially
from quantforge.testing import markov_tokens, plan_of, train
from quantforge.types import CalibrationSet, QuantSpec

from .test_architectures import CONFIGS, LENGTH, MIXTURES, QUICK, network

NAME = "qwen3_moe"
EXPERTS = 4
EVERY = pytest.mark.parametrize("name", MIXTURES)


@torch.no_grad()
def logits(module):
    return module(input_ids=markov_tokens(3, LENGTH, seed=7)).logits


def routed(module, tokens):
    """Per block: what enters the experts [tokens, hidden], and [tokens, 2] which are chosen."""
    seen = []
    hooks = [
        block.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
        for block in module.model.layers
    ]
    with torch.no_grad():
        module(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


@EVERY
@pytest.mark.parametrize("whole", [True, False])
def test_split_experts_compute_the_same(name, whole):
    module = network(name)
    expected = logits(module)
    assert len(split_experts(module, whole=whole)) == 3
    assert torch.allclose(logits(module), expected, atol=1e-6)


@EVERY
def test_what_the_linears_hold_comes_back(name):
    module = network(name)
    inner = module.model.layers[1].mlp.experts.down_proj.shape[2]
    own = dict(module.named_parameters())
    values = {name: tensor.clone() for name, tensor in own.items()}
    with experts_split(module):
        assert isinstance(module.model.layers[1].mlp.experts, SplitExperts)
        up = module.get_submodule("model.layers.1.mlp.experts.2.up_proj")
        assert torch.equal(up.weight, values["model.layers.1.mlp.experts.gate_up_proj"][2, inner:])
        up.weight.data = up.weight.data * 2
    values["model.layers.1.mlp.experts.gate_up_proj"][2, inner:] *= 2
    found = dict(module.named_parameters())
    assert found.keys() == own.keys()
    for path, tensor in found.items():
        assert tensor is own[path]
        assert torch.equal(tensor, values[path])
    for one in module.model.layers[0].mlp.modules():
        assert not one._forward_pre_hooks
        assert not one._forward_hooks
        assert "lengths" not in vars(one)


def test_grams_are_of_an_experts_own_tokens_and_those_are_counted(monkeypatch):
    raw, tokens = network(NAME), markov_tokens(6, LENGTH)
    inputs = routed(raw, tokens)
    model = from_module(network(NAME))
    monkeypatch.setattr(capture, "LEAST_TOKENS", 72)
    walk = BlockWalk(model.module, model.architecture, tokens, batch_size=4, precision="float32")
    few = 0
    for block, (states, chosen) in zip(walk.blocks, inputs, strict=True):
        found = stage_grams(walk, block, model.architecture, advance=True)
        assert [one.starved for one in found[:2]] == [None, None]
        for number in range(EXPERTS):
            own = states[(chosen == number).any(1)]
            gate, down = found[2 + 2 * number], found[3 + 2 * number]
            gram = own.T @ own / tokens.numel()
            if len(own) < 72:
                few += 1
                assert gate.starved == down.starved == len(own)
                identity = torch.eye(64) * gram.diagonal().mean()
                assert torch.allclose(gate.mean(), identity, rtol=1e-4)
                continue
            assert gate.starved is down.starved is None
            assert torch.allclose(gate.mean(), gram, atol=1e-5 * float(gram.max()))
    assert 0 < few < 3 * EXPERTS


def test_an_expert_that_no_token_reached_is_rounded_by_its_weights():
    gram = capture.without_correlations(torch.zeros(8, 8))
    assert torch.equal(gram, torch.eye(8))


@EVERY
def test_weight_gradients_are_those_of_the_stacked_tensors(name):
    raw, tokens = network(name), markov_tokens(3, LENGTH)
    output = raw(input_ids=tokens).logits
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * target).sum().backward()
    model = from_module(network(name))
    model.module.requires_grad_(False)

    def head_gradient(rows, _states, head):
        return head.input_gradient(target[rows].flatten(0, 1), 1.0)

    total = {layer.name: 0.0 for layer in model.layers}
    for part in backward_blocks(
        model, tokens, batch_size=2, precision="float32", head_gradient=head_gradient
    ):
        for layer in model.layers:
            if layer.block == part.block:
                total[layer.name] += weight_gradients(part, layer).sum(0)
    for index, block in enumerate(raw.model.layers):
        prefix, experts = f"model.layers.{index}", block.mlp.experts
        pairs = [(total[f"{prefix}.self_attn.q_proj"], block.self_attn.q_proj.weight.grad)]
        if name == "qwen2_moe":
            for part in ("gate_proj", "up_proj", "down_proj"):
                shared = block.mlp.shared_expert.get_submodule(part)
                found = total[f"{prefix}.mlp.shared_expert.{part}"]
                pairs.append((found, shared.weight.grad))
        for number in range(EXPERTS):
            parts = [total[f"{prefix}.mlp.experts.{number}.{one}_proj"] for one in ("gate", "up")]
            pairs.append((torch.cat(parts), experts.gate_up_proj.grad[number]))
            pairs.append(
                (total[f"{prefix}.mlp.experts.{number}.down_proj"], experts.down_proj.grad[number])
            )
        for found, expected in pairs:
            assert float(expected.abs().max()) > 0
            torch.testing.assert_close(
                found, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_starved_experts_are_rounded_and_others_compensated(method, monkeypatch):
    tokens, spec = markov_tokens(6, LENGTH), QuantSpec(3, 16)
    inputs = routed(network(NAME), tokens)
    monkeypatch.setattr(capture, "LEAST_TOKENS", 72)
    model = from_module(network(NAME))
    weights = {
        one.name: model.module.get_submodule(one.name).weight.clone() for one in model.layers
    }
    config = QuantizeConfig(method=method, precision="float32", grid="mse", order="activation")
    done = list(
        quantize_sequentially(
            model,
            plan_of(dict.fromkeys(weights, spec)),
            CalibrationSet(fitting=tokens, held_out=tokens[:0], description="", fingerprint=""),
            dict.fromkeys(weights),
            config,
            channel_weights=[torch.ones(64)] * 3,
            generator=torch.Generator(),
            monitor=quantforge.progress.Monitor(),
        )
    )
    counts = torch.bincount(inputs[0][1].flatten(), minlength=EXPERTS).tolist()
    assert min(counts) < 72 <= max(counts)
    for one in done:
        if "experts" not in one.layer.name:
            assert "weights alone" not in one.report.note
            continue
        weight = weights[one.layer.name]
        identity = factorize(torch.eye(weight.shape[1]), damping=config.damping[0])
        plain = gptq(weight, identity, spec, grid=config.grid)
        starved = one.report.note.startswith("rounded by its weights alone: ")
        assert torch.equal(one.weight.codes, plain.codes) == starved
        if one.layer.block == 0:  # later ones are reached by other tokens than in the float network
            count = counts[int(one.layer.name.split(".")[5])]
            assert starved == (count < 72)
            assert not starved or f": {count} calibration tokens reached it" in one.report.note


@pytest.mark.parametrize(
    "name",
    [one if one == "qwen2_moe" else pytest.param(one, marks=pytest.mark.full) for one in MIXTURES],
)
def test_mixed_bits_are_searched_written_read_and_announced(name, tmp_path, monkeypatch):
    for place in (capture, delivery):
        monkeypatch.setattr(place, "LEAST_TOKENS", 10_000)
    module, folder = train(network(name), steps=30), tmp_path / "out"
    inner, kind = module.model.layers[0].mlp.experts.down_proj.shape[2], type(module).__name__
    report = quantforge.quantize(
        module,
        budget="4bit",
        calibration=markov_tokens(24, LENGTH),
        output=folder,
        settings=QUICK,
    )
    assert report.plan.stored_bits <= 4.0
    by_block = [set() for _ in range(3)]
    for layer, spec in report.plan.assignment.items():
        if ".experts." in layer:
            by_block[int(layer.split(".")[2])].add(spec)
    assert [len(specs) for specs in by_block] == [1, 1, 1]
    shared = 3 if name == "qwen2_moe" else 0
    assert len(report.plan.assignment) == 3 * (4 + shared + 3 * EXPERTS)
    assert len(set(report.plan.assignment.values())) > 1
    assert 0 < report.quality.kl < 1
    said = f"{kind}: its experts are stacked in one tensor; quantforge.load reads"
    assert any(line.startswith(said) for line in report.warnings)
    (starved,) = [line for line in report.warnings if "were rounded by their weights alone" in line]
    assert "fewer than 10000 calibration tokens reached" in starved
    assert "model.layers.0.mlp.experts.0, model.layers.0.mlp.experts.1" in starved
    assert json.loads((folder / "quantforge.json").read_text())["stock_readable"] is False
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"model.layers.{block}.mlp.gate" for block in range(3)} <= set(ignored)
    weighed = {f"model.layers.{block}.mlp.shared_expert_gate" for block in range(3)}
    assert weighed & set(ignored) == (weighed if shared else set())
    assert module.model.layers[0].mlp.experts.down_proj.shape == (EXPERTS, 64, inner)
    assert torch.allclose(logits(quantforge.load(folder)), logits(module), atol=1e-5)
    (problem,) = quantforge.check(folder, server="transformers").problems
    assert "its experts are stacked in one tensor" in problem
    found = quantforge.check(folder, server="vllm").problems
    assert not any("stacked" in line or "different specs" in line for line in found)
    other_names = [line for line in found if "by the names of the hub's checkpoints" in line]
    assert len(other_names) == (name == "mixtral")


def test_vllm_knows_mixtrals_experts_by_other_names():
    names = {one: {"architectures": [type(network(one)).__name__]} for one in MIXTURES}
    found = {one: network_problems(SERVERS["vllm"], config, 1) for one, config in names.items()}
    assert [len(found[one]) for one in MIXTURES] == [one == "mixtral" for one in MIXTURES]
    assert "by the names of the hub's checkpoints" in found["mixtral"][0]


@EVERY
def test_a_folder_gives_the_original_s_logits(name, tmp_path):
    module = network(name)
    module.save_pretrained(tmp_path)
    loaded = load_model(resolve_source(str(tmp_path))).module
    assert isinstance(loaded.model.layers[0].mlp.experts, SplitExperts)
    assert torch.allclose(logits(loaded), logits(module), atol=1e-6)


def test_what_is_refused_before_anything_is_measured(tmp_path):
    asked = {"budget": "4bit", "calibration": markov_tokens(4, 8), "output": tmp_path / "out"}
    with pytest.raises(UsageError, match="its experts are stacked in one tensor"):
        quantforge.quantize(network(NAME), settings={"search.server": "transformers"}, **asked)
    config = CONFIGS[NAME]()
    config.mlp_only_layers = [1]
    dense = type(network(NAME))(config)
    with pytest.raises(InputError, match="do not all have the same number of experts"):
        quantforge.quantize(dense, **asked)
    assert dense.model.layers[0].mlp.experts.down_proj.shape == (EXPERTS, 64, 32)
    assert not (tmp_path / "out").exists()
