"""Weights as named tensors and specs as a config block: exact both ways, strict when reading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quantforge.errors import InputError
from quantforge.format import compressed
from quantforge.testing import random_weight
from quantforge.types import QuantSpec

SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits in range(2, 9)
    for group in (-1, 32, 64)
    for symmetric in (True, False)
]
MIXED = {"a.q": QuantSpec(3, 64), "a.o": QuantSpec(2), "b.q": QuantSpec(3, 64)}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tensors_and_back(spec: QuantSpec) -> None:
    weight = random_weight(21, 192, spec, seed=spec.bits)
    tensors = compressed.to_tensors(weight)
    groups = spec.groups(192)
    assert tensors["weight_packed"].shape == (21, 6 * spec.bits)
    assert tensors["weight_scale"].shape == (21, groups)
    assert tensors["weight_shape"].tolist() == [21, 192]
    again = compressed.from_tensors("layer", tensors, spec)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert torch.equal(again.dequantize(), weight.dequantize())
    if spec.symmetric:
        assert len(tensors) == 3
    else:
        assert tensors["weight_zero_point"].shape == (-(-21 * spec.bits // 32), groups)
        assert again.zero is not None
        assert torch.equal(again.zero, weight.zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_compressed_tensors_decodes_the_same_weight(bits: int, symmetric: bool) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    spec = QuantSpec(bits, 32, symmetric)
    weight = random_weight(10, 96, spec, seed=bits)
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group", group_size=32
    )
    scheme = QuantizationScheme(targets=["x"], weights=arguments)
    tensors = compressed.to_tensors(weight)
    for dtype in (torch.float32, torch.bfloat16):
        state = {**tensors, "weight_scale": tensors["weight_scale"].to(dtype)}
        decoded = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(decoded, weight.dequantize(dtype))


def damaged(change: str) -> dict[str, torch.Tensor]:
    tensors = compressed.to_tensors(random_weight(8, 96, QuantSpec(3, 32)))
    if change == "float scale":
        tensors["weight_scale"] = tensors["weight_scale"].float()
    elif change == "short words":
        tensors["weight_packed"] = tensors["weight_packed"][:, :-1]
    elif change == "no scale":
        del tensors["weight_scale"]
    elif change == "zero-point":
        tensors["weight_zero_point"] = tensors["weight_packed"]
    elif change == "wrong shape":
        tensors["weight_shape"] = torch.tensor([8, 100])
    elif change == "negative shape":
        tensors["weight_shape"] = torch.tensor([8, -96])
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("float scale", "layer.weight_scale must be torch.bfloat16 or torch.float16"),
        ("short words", r"layer.weight_packed must be torch.int32 of shape \(8, 9\), got"),
        ("no scale", "needs the tensors weight_packed, weight_scale, weight_shape, the checkpoint"),
        ("zero-point", "needs the tensors"),
        ("wrong shape", "groups of 32 do not divide 100 columns"),
        ("negative shape", "must be two positive int64 numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compressed.from_tensors("layer", damaged(change), QuantSpec(3, 32))


def test_a_set_padding_bit_is_refused() -> None:
    tensors = compressed.to_tensors(random_weight(2, 5, QuantSpec(3)))
    tensors["weight_packed"][1, 0] |= 1 << 15
    with pytest.raises(InputError, match="set bits beyond the end of a row"):
        compressed.from_tensors("layer", tensors, QuantSpec(3))


def test_the_config_block() -> None:
    block = compressed.quantization_config(MIXED, ["lm_head", "a.v", "lm_head"])
    assert block["quant_method"] == "compressed-tensors"
    assert block["format"] == "pack-quantized"
    assert block["version"] == "0.17.0"
    assert block["ignore"] == ["a.v", "lm_head"]
    assert list(block["config_groups"]) == ["group_2b-pc", "group_3b-g64"]
    channel, group = block["config_groups"].values()
    assert group["targets"] == ["a.q", "b.q"]
    assert (channel["weights"]["strategy"], channel["weights"]["group_size"]) == ("channel", None)
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 64)
    assert compressed.specs_from_config({"quantization_config": block}) == MIXED
    shuffled = dict(reversed(MIXED.items()))
    assert compressed.quantization_config(shuffled, ["a.v", "lm_head"]) == block


def set_path(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        config = config[parent]
    config[leaf] = value


GROUP = "config_groups/group_3b-g64"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "gptq", "no quantization_config of method"),
        ("format", "int-quantized", "format 'int-quantized' is not 'pack-quantized'"),
        ("config_groups", None, "no config_groups"),
        ("version", "0.16.2", "3 bits in the layout of compressed-tensors 0.16.2"),
        ("version", None, "3 bits in the layout"),
        (f"{GROUP}/targets", ["re:.*q"], "targets 're:.*q', not an exact name"),
        (f"{GROUP}/targets", ["Linear"], "targets 'Linear'"),
        (f"{GROUP}/targets", ["a.o"], "a.o is in two groups"),
        (f"{GROUP}/targets", None, "no list of targets"),
        (f"{GROUP}/weights", None, "has no weights"),
        (f"{GROUP}/weights/num_bits", 9, "has 9 bits"),
        (f"{GROUP}/weights/num_bits", "3", "has '3' bits"),
        (f"{GROUP}/weights/type", "float", "of 'float'"),
        (f"{GROUP}/weights/strategy", "tensor", "strategy 'tensor'"),
        (f"{GROUP}/weights/group_size", 0, "group_size 0"),
        (f"{GROUP}/weights/actorder", "group", "reordered"),
        (f"{GROUP}/weights/symmetric", None, "unknown symmetry"),
        (f"{GROUP}/input_activations", {"num_bits": 8}, "quantizes input_activations"),
    ],
)
def test_a_config_that_is_not_decoded_is_refused(path: str, value: Any, message: str) -> None:
    block = copy.deepcopy(compressed.quantization_config(MIXED, []))
    set_path(block, path, value)
    with pytest.raises(InputError, match=message):
        compressed.specs_from_config({"quantization_config": block})
