"""Sizes counted from hand-made folders, against numbers worked out here."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantforge.errors import InputError
from quantforge.evaluate.sizes import read_header, size_report
from quantforge.types import QuantSpec

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
SHAPES = {Q: (8, 24), UP: (40, 24), DOWN: (24, 40)}
EMBEDDING, NORM, BIAS = 50 * 24, 24, 8


def packed_layer(name: str, rows: int, columns: int, spec: QuantSpec) -> dict[str, torch.Tensor]:
    groups = spec.groups(columns)
    tensors = {
        f"{name}.weight_packed": torch.ones(rows, -(-columns * spec.bits // 32), dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(rows, groups, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    if not spec.symmetric:
        words = -(-rows * spec.bits // 32)
        tensors[f"{name}.weight_zero_point"] = torch.ones(words, groups, dtype=torch.int32)
    return tensors


def group(name: str, spec: QuantSpec) -> dict[str, Any]:
    return {
        "targets": [name],
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "channel" if spec.group_size == -1 else "group",
            "group_size": None if spec.group_size == -1 else spec.group_size,
        },
    }


@pytest.fixture
def checkpoint(tmp_path):
    """q_proj at 3 bits (padded rows), up_proj asymmetric at 5, down_proj kept; two shards."""
    q, up = QuantSpec(3, 12), QuantSpec(5, -1, False)
    first = packed_layer(Q, *SHAPES[Q], q) | {
        f"{Q}.bias": torch.zeros(BIAS, dtype=torch.bfloat16),
        f"{DOWN}.weight": torch.zeros(24, 40, dtype=torch.bfloat16),
    }
    second = packed_layer(UP, *SHAPES[UP], up) | {
        "model.embed_tokens.weight": torch.zeros(50, 24, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(NORM, dtype=torch.bfloat16),
    }
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    config = {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", DOWN],
            "config_groups": {"group_0": group(Q, q), "group_1": group(UP, up)},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def rewrite(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_counts_symmetric_asymmetric_and_kept(checkpoint):
    report = size_report(checkpoint)
    codes = 8 * 24 * 3 + 40 * 24 * 5 + 24 * 40 * 16
    overhead = 8 * 2 * 16 + 40 * (16 + 5)  # q_proj: two groups a row; up_proj: scale and zero
    planned = 8 * 24 + 40 * 24 + 24 * 40
    assert report.planned_weights == planned
    assert report.code_bits == pytest.approx(codes / planned, rel=1e-15)
    assert report.stored_bits == pytest.approx((codes + overhead) / planned, rel=1e-15)
    assert report.kept_weights == EMBEDDING + NORM + BIAS
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert report.checkpoint_bytes == size
    assert report.checkpoint_bits == pytest.approx(8 * size / (planned + report.kept_weights))
    assert report.reference_bytes == 2 * (planned + report.kept_weights)


@pytest.mark.parametrize("spec", [QuantSpec(3, 12), QuantSpec(2, -1), QuantSpec(4, 8, False)])
def test_agrees_with_the_definition_of_stored_bits(tmp_path, spec):
    save_file(packed_layer(Q, 8, 24, spec), tmp_path / "model.safetensors")
    block = {"config_groups": {"g": group(Q, spec)}, "ignore": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    report = size_report(tmp_path)
    assert report.stored_bits == spec.stored_bits(8, 24) / (8 * 24)
    assert report.code_bits == spec.bits
    assert report.kept_weights == 0


def test_planned_names_can_be_given(checkpoint):
    report = size_report(checkpoint, planned=[Q, UP])
    assert report.planned_weights == 8 * 24 + 40 * 24
    assert report.kept_weights == EMBEDDING + NORM + BIAS + 24 * 40


def test_float_checkpoint_has_no_plan(tmp_path):
    save_file({"a.weight": torch.zeros(4, 6)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    report = size_report(tmp_path)
    assert (report.planned_weights, report.stored_bits, report.kept_weights) == (0, 0.0, 24)
    assert report.reference_bytes == 48


def test_header_gives_offsets_of_the_data(checkpoint):
    tensor = read_header(checkpoint / "model-00001-of-00002.safetensors")[f"{Q}.weight_shape"]
    raw = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert torch.frombuffer(bytearray(raw), dtype=torch.int64).tolist() == [8, 24]


def test_broken_folders(checkpoint, tmp_path):
    file = checkpoint / "model-00001-of-00002.safetensors"
    whole = file.read_bytes()
    for cut in (4, 60, len(whole) - 3):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"cut off|header describes"):
            size_report(checkpoint)
    file.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(InputError, match="broken safetensors header"):
        size_report(checkpoint)
    file.write_bytes(whole)
    shutil.copy(file, checkpoint / "extra.safetensors")
    with pytest.raises(InputError, match="stored twice"):
        size_report(checkpoint)
    (checkpoint / "extra.safetensors").unlink()
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        size_report(checkpoint)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"no \.safetensors"):
        size_report(empty)


def test_configuration_that_does_not_fit(checkpoint):
    def wrong_bits(block):
        block["config_groups"]["group_0"]["weights"]["num_bits"] = 6

    def wrong_symmetry(block):
        block["config_groups"]["group_0"]["weights"]["num_bits"] = 3
        block["config_groups"]["group_1"]["weights"]["symmetric"] = True

    def no_target(block):
        del block["config_groups"]["group_1"]

    for change, message in (
        (wrong_bits, "6-bit codes of a 8x24 weight"),
        (wrong_symmetry, "symmetric but stores zero-points"),
        (no_target, "no group of quantization_config"),
    ):
        rewrite(checkpoint, change)
        with pytest.raises(InputError, match=message):
            size_report(checkpoint)
