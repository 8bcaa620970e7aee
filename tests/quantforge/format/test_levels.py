"""Ternary and balanced weights as bytes: there and back, damage, config.json, and uniform codes."""

import itertools
import math

import pytest
import torch

from quantforge.errors import InputError
from quantforge.format import compressed
from quantforge.format.levels import as_uniform, pack_levels, uniform_spec, unpack_levels
from quantforge.testing import random_weight
from quantforge.types import QuantizedWeight, QuantSpec

SPECS = [
    QuantSpec.parse(text)
    for text in ("ternary-g8", "ternary-pc", "ternary-pt", "balanced-g8", "balanced-pt")
]
each = pytest.mark.parametrize("spec", SPECS, ids=str)


def test_specs_have_names_that_are_read_back():
    for spec in SPECS:
        assert QuantSpec.parse(str(spec)) == spec
    assert (SPECS[0].top, SPECS[0].middle, SPECS[0].code_bits) == (2, 1.0, 1.6)
    assert (SPECS[3].top, SPECS[3].middle, SPECS[3].code_bits) == (3, 1.5, 2.0)
    assert (QuantSpec(3).top, QuantSpec(3).middle, QuantSpec(3).code_bits) == (7, 4.0, 3.0)
    for wrong in ("ternary-g64-asym", "ternary", "ternary-g0", "3b-pt", "trinary-g64"):
        with pytest.raises(ValueError, match=r"not a spec|no zero-points|group_size"):
            QuantSpec.parse(wrong)
    with pytest.raises(ValueError, match="codes of 2 bits"):
        QuantSpec(3, 64, grid="ternary")


def test_every_byte_of_five_ternary_codes_is_its_own():
    codes = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)
    packed = pack_levels(codes, SPECS[0])
    assert sorted(packed.flatten().tolist()) == list(range(243))
    assert torch.equal(unpack_levels(packed, SPECS[0], 5), codes)
    assert pack_levels(torch.tensor([[2, 0, 1]], dtype=torch.uint8), SPECS[0]).item() == 2 + 9
    assert pack_levels(torch.tensor([[3, 0, 2]], dtype=torch.uint8), SPECS[3]).item() == 3 + 32


@each
@pytest.mark.parametrize("columns", [8, 16, 56])
def test_there_and_back(spec, columns):
    if not spec.divides(columns):
        return
    weight = random_weight(7, columns, spec)
    tensors = compressed.to_tensors(weight)
    assert "weight_packed" not in tensors  # no stock reader may take them for its own
    found = compressed.from_tensors("layer", tensors, spec)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scale, weight.scale)
    shapes = compressed.stored_shapes(7, columns, spec)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == shapes
    stored = sum(8 * t.nbytes for name, t in tensors.items() if name != "weight_shape")
    assert stored == spec.stored_bits(7, columns)


def test_what_codes_and_scales_take():
    assert QuantSpec.parse("ternary-pt").stored_bits(576, 576) == 8 * 576 * 116 + 16
    assert QuantSpec.parse("ternary-g64").stored_bits(576, 576) / 576**2 == pytest.approx(
        1.6111 + 0.25, abs=1e-4
    )
    assert QuantSpec.parse("balanced-pc").stored_bits(10, 64) == 10 * (128 + 16)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_uniform_codes_are_the_same_numbers(spec, dtype):
    weight = random_weight(5, 64, spec)
    same = as_uniform(weight)
    assert same.spec == uniform_spec(spec)
    assert same.spec.grid == "uniform"
    assert torch.equal(same.dequantize(dtype), weight.dequantize(dtype))
    levels = weight.codes.float().view(*weight.scale.shape, -1) - spec.middle
    expected = (levels * weight.scale.float().unsqueeze(-1)).view(5, 64)
    assert torch.equal(weight.dequantize(), expected)
    plain = random_weight(5, 64, QuantSpec(3, 8))
    assert as_uniform(plain) is plain


@pytest.mark.parametrize(
    ("spec", "place", "byte"),
    [(SPECS[0], (0, 0), 243), (SPECS[0], (2, 3), 242), (SPECS[3], (1, 2), 255)],
)
def test_damaged_bytes_are_refused(spec, place, byte):
    columns = 16 if spec.grid == "ternary" else 9  # the last byte of a row is not full
    spec = QuantSpec(2, -1, grid=spec.grid)
    tensors = compressed.to_tensors(random_weight(3, columns, spec))
    tensors["weight_levels"][place] = byte
    with pytest.raises(InputError, match="the file is damaged"):
        compressed.from_tensors("layer", tensors, spec)


def test_one_scale_is_one():
    spec = QuantSpec.parse("ternary-pt")
    weight = random_weight(4, 10, spec)
    assert compressed.to_tensors(weight)["weight_scale"].shape == (1, 1)
    scale = weight.scale.clone()
    scale[2] *= 2
    several = QuantizedWeight(codes=weight.codes, scale=scale, zero=None, spec=spec)
    with pytest.raises(ValueError, match="has one scale, the weight has several"):
        compressed.to_tensors(several)


def test_the_configuration_says_whose_format_it_is():
    uniform = {"a": QuantSpec(3, 64), "b": QuantSpec(4)}
    stock = compressed.quantization_config(uniform, ["head"])
    assert (stock["quant_method"], stock["format"]) == ("compressed-tensors", "pack-quantized")
    assert "format_version" not in stock
    mixed = {**uniform, "c": QuantSpec.parse("ternary-pt"), "d": QuantSpec.parse("balanced-g64")}
    own = compressed.quantization_config(mixed, ["head"])
    assert (own["quant_method"], own["format"]) == ("compressed-tensors", "quantforge-levels")
    kinds = {label: group["weights"]["type"] for label, group in own["config_groups"].items()}
    assert kinds["group_3b-g64"] == "int"
    assert kinds["group_ternary-pt"] == "quantforge-ternary"
    assert compressed.specs_from_config({"quantization_config": own}) == mixed
    assert compressed.specs_from_config({"quantization_config": stock}) == uniform


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "pack-quantized"}, "strategy 'tensor'"),
        ({"format": "packed"}, "format 'packed' is not 'pack-quantized'"),
        ({"format_version": 2}, "version 2 of 'quantforge-levels'"),
        ({"quant_method": "other"}, "of method 'compressed-tensors'"),
    ],
)
def test_other_configurations_are_refused(changes, said):
    block = compressed.quantization_config({"c": QuantSpec.parse("ternary-pt")}, [])
    with pytest.raises(InputError, match=said):
        compressed.specs_from_config({"quantization_config": {**block, **changes}})


def test_groups_of_other_widths_are_refused():
    block = compressed.quantization_config({"c": QuantSpec.parse("ternary-pc")}, [])
    block["config_groups"]["group_ternary-pc"]["weights"]["num_bits"] = 3
    with pytest.raises(InputError, match="is ternary of 3 bits"):
        compressed.specs_from_config({"quantization_config": block})
    assert math.isclose(QuantSpec.parse("ternary-pc").code_bits, 8 / 5)
