"""Bytes predicted from shapes against the bytes of files, equal to the last."""

from dataclasses import replace

import pytest
import torch

from quantforge.errors import InputError
from quantforge.export.writer import CheckpointWriter
from quantforge.format.footprint import Footprint
from quantforge.format.sizes import size_report
from quantforge.load.huggingface import from_module, model_config
from quantforge.testing import plan_of, random_weight, tiny_llama
from quantforge.types import QuantSpec

SPECS = {
    "one": [QuantSpec(3, 32)],
    "mixed": [QuantSpec(2), QuantSpec(5, 16), None, QuantSpec(8, 32), QuantSpec(7, 8)],
    "asymmetric": [QuantSpec(3, 32, symmetric=False), QuantSpec(4, 32)],
    "kept": [None],
}


def biased(module):
    """Give one layer a bias, as some decoders have."""
    layer = module.model.layers[0].self_attn.q_proj
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    return module


def write(folder, model, assignment, shard_bytes):
    """A checkpoint in the order in which compilations write: layers as they come, then the rest."""
    quantized = [layer for layer in model.layers if assignment[layer.name] is not None]
    with CheckpointWriter(
        folder, model_config=model_config(model.module), plan=plan_of(assignment),
        ignore=["lm_head"], shard_bytes=shard_bytes, stock_readable=False,
    ) as writer:  # fmt: skip
        for layer in quantized:
            spec = assignment[layer.name]
            weight = random_weight(layer.out_features, layer.in_features, spec)
            writer.add_layer(layer.name, weight, model.module.get_submodule(layer.name).bias)
        names = {layer.name for layer in quantized}
        for name, tensor in model.module.state_dict().items():
            if name.rpartition(".")[0] not in names:
                writer.add_tensor(name, tensor)
        writer.finish()


@pytest.mark.parametrize("specs", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("shard_bytes", [10_000, 1 << 30])
@pytest.mark.parametrize(("hidden", "tied"), [(64, True), (80, False)])
def test_sizes_are_those_of_the_files(tmp_path, specs, shard_bytes, hidden, tied):
    """80 columns of 3, 5 or 7 bits fill no whole number of words: rows are padded."""
    if hidden == 80:
        specs = [None if s is None else QuantSpec(s.bits, 16, s.symmetric) for s in specs]
    module = biased(tiny_llama(blocks=2, hidden=hidden, intermediate=128, tied=tied))
    model = from_module(module)
    assignment = {layer.name: specs[index % len(specs)] for index, layer in enumerate(model.layers)}
    if not any(assignment.values()):  # a checkpoint with nothing quantized is not ours to read
        assignment[model.layers[3].name] = QuantSpec(4, 16)
    write(tmp_path, model, assignment, shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 10_000)
    footprint = Footprint.of(model, shard_bytes=shard_bytes)
    assert footprint.sizes(assignment) == size_report(tmp_path)
    on_disk = sum(path.stat().st_size for path in files)
    assert footprint.checkpoint_bytes(assignment) == on_disk


def test_memory_is_the_data_and_the_keys_and_values():
    model = from_module(tiny_llama(blocks=3))  # 4 heads of 16 features, 2 of keys and values
    footprint = Footprint.of(model, shard_bytes=1 << 30)
    assert footprint.token_bytes == 2 * 3 * 2 * 16 * 2
    kept = dict.fromkeys(layer.name for layer in model.layers)
    weights = 2 * sum(p.numel() for p in model.module.parameters())
    assert footprint.reference_bytes == weights  # the tied head once
    assert footprint.memory_bytes(kept, 0) == weights
    assert footprint.memory_bytes(kept, 100) - weights == 100 * footprint.token_bytes
    header = footprint.checkpoint_bytes(kept) - weights
    assert 0 < header < 0.2 * weights


def test_a_network_without_known_heads_has_no_memory_budget():
    model = from_module(tiny_llama(blocks=1))
    footprint = Footprint(layers=model.layers, tensors=(), shard_bytes=1, token_bytes=None)
    with pytest.raises(InputError, match="keys and values"):
        footprint.memory_bytes({}, 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_sizes_with_a_quantized_embedding_and_head(tmp_path, tied, fixed):
    """Padded rows: 80 columns of 5 bits. What is fixed is no part of the plan, planned or not."""
    module = tiny_llama(blocks=1, hidden=80, intermediate=128, tied=tied)
    model = from_module(module)
    outside = model.architecture.vocabulary(module)
    assert [x.kind for x in outside] == (["tied"] if tied else ["embedding", "linear"])
    specs = {x.name: QuantSpec(5, 16) for x in outside}
    inside = {x.name: QuantSpec(3, 16) for x in model.layers}
    plan = plan_of(inside | specs)
    if fixed:
        plan = replace(plan, fixed=tuple(specs))
    footprint = Footprint.of(model, shard_bytes=1 << 30, fixed=specs if fixed else None)
    with CheckpointWriter(
        tmp_path, model_config=model_config(module), plan=plan, ignore=["lm_head"] if tied else [],
        stock_readable=False,
    ) as writer:  # fmt: skip
        for layer in (*model.layers, *outside):
            spec = plan.assignment[layer.name]
            weight = random_weight(layer.out_features, layer.in_features, spec)
            kind = "linear" if layer.kind == "linear" else "embedding"
            writer.add_layer(layer.name, weight, kind=kind)
        for name, tensor in module.state_dict().items():
            if name.rpartition(".")[0] not in plan.assignment:
                writer.add_tensor(name, tensor)
        found = writer.finish()
    assert footprint.sizes(plan.assignment) == found == size_report(tmp_path)
    weights = sum(x.numel for x in model.layers)
    assert found.planned_weights == weights + (0 if fixed else sum(x.numel for x in outside))
    assert footprint.checkpoint_bytes(inside) == (
        footprint.checkpoint_bytes(plan.assignment) if fixed else footprint.checkpoint_bytes(
            inside | dict.fromkeys(specs)
        )
    )  # fmt: skip
