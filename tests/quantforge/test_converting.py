"""A checkpoint in the GPTQ layout holds the same weights, by the layout's own arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantforge
from quantforge.cli.options import Layout
from quantforge.errors import CancelledError, InputError, UsageError
from quantforge.folders import LAYOUTS
from quantforge.format import gptq
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantizedWeight, QuantSpec


def written(folder: Path, spec: QuantSpec, **options):
    module = tiny_llama(hidden=64, intermediate=128, blocks=2)
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    weights = write_quantized(folder, module, dict.fromkeys(names, spec), **options)
    (folder / "tokenizer.json").write_text("{}")
    return weights


def decoded(tensors, name: str, config) -> torch.Tensor:
    """[out, in] by the layout's definition, a code at a time."""
    bits = config["bits"]
    words, zeros = tensors[f"{name}.qweight"].tolist(), tensors[f"{name}.qzeros"].tolist()
    scales, groups = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].tolist()
    a_word, mask = 32 // bits, (1 << bits) - 1
    shift = 1 if config["checkpoint_format"] == "gptq" else 0
    weight = torch.empty(scales.shape[1], len(groups))
    for o in range(weight.shape[0]):
        for i, group in enumerate(groups):
            code = words[i // a_word][o] >> (bits * (i % a_word)) & mask
            zero = (zeros[group][o // a_word] >> (bits * (o % a_word)) & mask) + shift
            weight[o, i] = (code - zero) * scales[group, o]
    return weight


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 32), QuantSpec(8, 16), QuantSpec(4), QuantSpec(4, 32, symmetric=False)]
)
def test_weights_are_those_of_the_source(spec, tmp_path):
    weights = written(tmp_path / "in", spec, stock_readable=spec.symmetric)
    report = quantforge.convert(tmp_path / "in", output=tmp_path / "out")
    assert (report.layers, report.spec) == (14, str(spec))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["quant_method"], config["bits"], config["sym"]) == (
        "gptq",
        spec.bits,
        spec.symmetric,
    )
    assert config["group_size"] == spec.group_size
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in list(weights.items())[::5]:
        assert torch.equal(decoded(tensors, name, config), weight.dequantize())
    source = load_file(tmp_path / "in" / "model.safetensors")
    kept = [name for name in source if name.endswith(".weight")]
    assert kept
    assert all(torch.equal(tensors[name], source[name]) for name in kept)
    assert not [name for name in tensors if "weight_packed" in name]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in files
    assert not files & {"quantforge.json", "plan.json"}


def test_shards_stay_and_the_index_names_what_is_there(tmp_path):
    written(tmp_path / "in", QuantSpec(4, 32), shard_bytes=30_000)
    quantforge.convert(tmp_path / "in", output=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= dict.fromkeys(load_file(file), file.name)
    assert index["weight_map"] == found
    assert len(set(found.values())) > 1


def test_a_zero_point_of_zero_asks_for_the_second_version():
    codes = torch.arange(64, dtype=torch.uint8).view(8, 8) % 16
    scale = torch.full((8, 1), 0.5, dtype=torch.bfloat16)
    zero = torch.tensor([[0], [3], [14], [1], [2], [8], [7], [9]], dtype=torch.uint8)
    spec = QuantSpec(4, symmetric=False)
    weight = QuantizedWeight(codes=codes, scale=scale, zero=zero, spec=spec)
    assert gptq.layout_for(spec, [weight]) == gptq.SECOND
    assert gptq.layout_for(spec, [replace(weight, zero=zero + 1)]) == gptq.FIRST
    with pytest.raises(UsageError, match="layer has a zero-point of 0, which only gptq_v2 holds"):
        gptq.to_tensors("layer", weight, gptq.FIRST)
    tensors = gptq.to_tensors("layer", weight, gptq.SECOND)
    assert torch.equal(gptq.from_tensors(tensors, spec, gptq.SECOND), weight.dequantize())


def test_what_the_layout_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    written(tmp_path / "three", QuantSpec(3, 32))
    with pytest.raises(InputError, match=r"one width of 4 or 8 bits .* the checkpoint has 3b-g32"):
        quantforge.convert(tmp_path / "three", output=tmp_path / "out")
    module = tiny_llama(hidden=64, intermediate=128, blocks=1)
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assignment = dict.fromkeys(names, QuantSpec(4, 32)) | {names[0]: None}
    write_quantized(tmp_path / "kept", module, assignment, ignore=["lm_head", names[0]])
    with pytest.raises(InputError, match=f"{names[0]} is kept in 16 bits"):
        quantforge.convert(tmp_path / "kept", output=tmp_path / "out")
    with pytest.raises(UsageError, match="unknown layout 'awq'; known: gptq"):
        quantforge.convert(tmp_path / "kept", output=tmp_path / "out", layout="awq")
    assert {one.value for one in Layout} == set(LAYOUTS)

    class Stop:
        def is_set(self) -> bool:
            return True

    written(tmp_path / "four", QuantSpec(4, 32))
    with pytest.raises(CancelledError):
        quantforge.convert(tmp_path / "four", output=tmp_path / "out", cancel=Stop())
    assert {path.name for path in tmp_path.iterdir()} == {"three", "kept", "four"}


def test_an_output_is_replaced_only_by_force_and_only_if_it_is_one(tmp_path):
    written(tmp_path / "in", QuantSpec(4, 32))
    quantforge.convert(tmp_path / "in", output=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        quantforge.convert(tmp_path / "in", output=tmp_path / "out")
    quantforge.convert(tmp_path / "in", output=tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(UsageError, match="was not written by quantforge"):
        quantforge.convert(tmp_path / "in", output=tmp_path / "in", force=True)
