"""Block types hold weights as they are, by gguf's own decoders, and the smallest is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from quantforge.format import gguf_blocks
from quantforge.format.gguf_blocks import (
    BLOCK_TYPES,
    bits_a_weight,
    encode,
    encode_rounded,
    held_exactly,
    is_dominated,
)
from quantforge.testing import random_weight
from quantforge.types import SUPPORTED_BITS, QuantizedWeight, QuantSpec


def decoded(kind, rows):
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType[kind]).copy())


def test_sizes_are_those_of_gguf():
    for kind in BLOCK_TYPES:
        known = GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]]
        assert known == (kind.size, kind.block_bytes)
    bits = [8 * kind.block_bytes / kind.size for kind in BLOCK_TYPES]
    assert bits == sorted(bits)


# Type by width, for groups of 32 to 192 and for 256 weights or rows of so many that share a scale.
SYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
SHARED = {**SYMMETRIC, 2: "Q2_K", 3: "Q3_K", 6: "Q6_K"}
ASYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q5_0", 5: "Q8_0", 6: "Q8_0", 7: "Q8_0", 8: None}
ASYMMETRIC_SHARED = {**ASYMMETRIC, 2: "Q2_K", 5: "Q6_K"}


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (64, 128), (192, 576), (-1, 96), (-1, 72),
                                                (256, 512), (-1, 768), (16, 64)])  # fmt: skip
def test_the_smallest_type_that_holds_a_weight_gives_it_back(bits, symmetric, group, columns):
    spec = QuantSpec(bits, group, symmetric)
    weight = random_weight(200, columns, spec, seed=bits)
    found = encode(weight)
    shared = spec.width(columns) % 256 == 0
    table = (SHARED if shared else SYMMETRIC) if symmetric else (
        ASYMMETRIC_SHARED if shared else ASYMMETRIC
    )  # fmt: skip
    expected = None if spec.width(columns) % 32 else table[bits]
    assert (found[0] if found else None) == expected
    assert held_exactly(spec, columns) == (expected is not None)
    if found is not None:
        assert torch.equal(decoded(*found), weight.dequantize())


def crafted(codes, scale, zero=None, *, bits=4):
    spec = QuantSpec(bits, symmetric=zero is None)
    scale = torch.tensor(scale, dtype=torch.bfloat16).view(-1, 1)
    zeros = None if zero is None else torch.tensor(zero, dtype=torch.uint8).view(-1, 1)
    return QuantizedWeight(codes=codes.to(torch.uint8), scale=scale, zero=zeros, spec=spec)


def test_zero_points_whose_products_float16_holds_take_the_type_with_a_minimum():
    codes = torch.arange(32).view(1, 32) % 16
    scale = 255 / 128  # eight significant bits: times 9 they are twelve, float16 has eleven
    for zero, kind in ((4, "Q4_1"), (12, "Q4_1"), (9, "Q5_0")):
        weight = crafted(codes, [scale], [zero])
        found = encode(weight)
        assert found[0] == kind, zero
        assert torch.equal(decoded(*found), weight.dequantize())
    five = crafted(torch.arange(32).view(1, 32), [scale], [12], bits=5)
    assert encode(five)[0] == "Q5_1"
    assert torch.equal(decoded(*encode(five)), five.dequantize())


def test_a_block_that_reaches_eight_changes_its_sign():
    codes = torch.stack([torch.arange(32) % 9, 8 + torch.arange(32) % 8])
    weight = crafted(codes, [0.5, 0.25], [0, 8])  # integers 0..8 and 0..7
    kind, rows = encode(weight)
    assert kind == "Q4_0"
    assert torch.equal(decoded(kind, rows), weight.dequantize())


def test_scales_beyond_float16_take_a_float_type_unless_nothing_depends_on_them():
    codes = torch.arange(64).view(2, 32) % 16
    assert encode(crafted(codes, [1e-3, 2.0**-30])) is None
    assert encode(crafted(codes, [1e-3, 1e6])) is None
    unused = torch.stack([codes[0], torch.full((32,), 8)])
    weight = crafted(unused, [1e-3, 2.0**-30])
    assert encode(weight)[0] == "Q4_0"
    assert torch.equal(decoded(*encode(weight)), weight.dequantize())
    large = crafted(codes, [1e-3, 1e6])
    kind, rows, change = encode_rounded(large)
    assert kind == "BF16"
    meant = large.dequantize()
    assert ((decoded(kind, rows) - meant).abs() <= 2**-8 * meant.abs()).all()
    assert torch.equal((decoded(kind, rows) - meant).abs().amax(1), torch.from_numpy(change))


@pytest.mark.parametrize(
    ("bits", "small", "kind"),
    [
        (4, 129 * 2.0**-25, "Q4_0"),  # between two subnormal numbers of float16
        (6, 129 * 2.0**-25, "Q8_0"),
        (8, 129 * 2.0**-25, "Q8_0"),
        (4, 2.0**-30, "Q4_0"),  # becomes 0
    ],
)
def test_a_row_of_small_scales_leaves_the_others_in_blocks(bits, small, kind):
    codes = torch.arange(64).view(2, 32) % (1 << bits)
    weight = crafted(codes, [1e-2, small], bits=bits)
    assert encode(weight) is None
    found, rows, change = encode_rounded(weight)
    assert found == kind
    meant, back = weight.dequantize(), decoded(found, rows)
    assert torch.equal(back[0], meant[0])
    assert torch.equal((back - meant).abs().amax(1), torch.from_numpy(change))
    # the scale moves by half a step of 2**-24, or to 0, times the largest integer of the row
    largest = float((codes[1] - (1 << bits - 1)).abs().max())
    assert change.tolist() == [0.0, largest * min(2.0**-25, small)]
    assert change[1] <= 2.0**-12 * float(meant.abs().max())
    alone = crafted(codes[1:], [small], bits=bits)  # where it is all there is, float16 is finer
    assert encode_rounded(alone)[0] == "F16"


def test_specs_that_save_nothing_in_blocks_are_dominated():
    known = {"2b-g32": 4.5, "3b-pc": 3.4375, "2b-pc": 2.625, "4b-g32": 4.5, "5b-g32": 5.5,
             "4b-g32-asym": 5.5, "8b-g32-asym": None, "6b-g32": 8.5, "6b-pc": 6.5625}  # fmt: skip
    specs = {text: QuantSpec.parse(text) for text in known}
    assert {text: bits_a_weight(spec, 256) for text, spec in specs.items()} == known
    lost = {text for text, spec in specs.items() if is_dominated(spec, specs.values(), 256)}
    # 5b-g32 has all integers of 4b-g32-asym, at the same 5.5 bits; nothing covers 6b at 8.5
    assert lost == {"2b-g32", "4b-g32-asym"}
    both = [QuantSpec(3, 32), QuantSpec(3, 32, symmetric=False)]
    assert [is_dominated(spec, both, 64) for spec in both] == [True, False]
    coarse = [QuantSpec(4, 64), QuantSpec(4, 96)]  # neither's groups are some of the other's
    assert not any(is_dominated(spec, coarse, 192) for spec in coarse)
    assert is_dominated(QuantSpec(4, 64), [QuantSpec(4, 32)], 192)


def test_kept_tensors_stay_as_they_are_stored():
    values = torch.linspace(-3, 3, 64).view(2, 32)
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        name, array = gguf_blocks.encode_float(values.to(dtype))
        assert name == kind
        assert torch.equal(decoded(name, array), values.to(dtype).float())
    name, array = gguf_blocks.encode_float(values[0].bfloat16())
    assert (name, array.dtype.name) == ("F32", "float32")
    assert torch.equal(decoded(name, array), values[0].bfloat16().float())


def test_eight_bits_with_zero_points_fit_where_the_integers_do():
    spec = QuantSpec(8, 32, symmetric=False)
    weight = random_weight(4, 64, spec)
    assert encode(weight) is None
    near = replace(weight, zero=torch.full_like(weight.zero, 128))
    assert encode(near)[0] == "Q8_0"
    assert torch.equal(decoded(*encode(near)), near.dequantize())
    assert not held_exactly(spec, 64)
