"""Convolution on codes equals its definition, exactly: every shape, width and target."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from quantforge_kernels import integer_convolution, native, pack
from quantforge_kernels.integer_convolution import (
    IntegerConvolution,
    IntegerWeight,
    integer_sums,
)
from quantforge_kernels.integer_layout import Places
from quantforge_kernels.integer_outputs import (
    Codes,
    Dyadic,
    Floats,
    dyadic,
    finished,
    rescaled,
)

# channels in, out, height, width, places: pointwise, strided, dilated, odd sizes, parts, depthwise
SHAPES = [
    (8, 24, 5, 3, Places()),
    (6, 5, 4, 4, Places(stride=(2, 1))),
    (3, 33, 9, 8, Places(kernel=(3, 3), stride=(2, 2), padding=(1, 1))),
    (5, 70, 6, 7, Places(kernel=(3, 3), padding=(2, 2), dilation=(2, 2))),
    (16, 17, 7, 7, Places(kernel=(5, 5), padding=(2, 2))),
    (4, 6, 9, 9, Places(kernel=(7, 7), stride=(3, 2), padding=(3, 3))),
    (8, 6, 5, 5, Places(kernel=(1, 3), padding=(0, 1), groups=2)),
    (12, 24, 4, 5, Places(kernel=(3, 3), padding=(1, 1), groups=12)),
    (20, 20, 6, 5, Places(kernel=(3, 3), padding=(1, 1), groups=20)),
    (70, 70, 7, 6, Places(kernel=(5, 5), stride=(2, 2), padding=(2, 2), groups=70)),
    (65, 65, 8, 9, Places(kernel=(3, 2), padding=(2, 1), dilation=(2, 2), groups=65)),
    (3, 3, 8, 8, Places(kernel=(7, 7), padding=(3, 3), groups=3)),
    # rows of outputs that share what is interleaved: four, three and two
    (70, 70, 7, 6, Places(kernel=(5, 5), padding=(2, 2), groups=70)),
    (20, 20, 8, 5, Places(kernel=(2, 3), groups=20)),
    (20, 20, 9, 9, Places(kernel=(6, 3), stride=(2, 1), padding=(2, 1), groups=20)),
    # padded on some sides more than on others
    (3, 32, 8, 10, Places(kernel=(3, 3), stride=(2, 2), after=(1, 1))),
    (5, 9, 6, 7, Places(kernel=(3, 2), padding=(0, 2), after=(3, 0))),
    (4, 8, 5, 5, Places(padding=(1, 0), after=(0, 1))),
    (70, 70, 8, 6, Places(kernel=(5, 5), stride=(2, 2), padding=(1, 1), after=(2, 2), groups=70)),
    (20, 20, 6, 5, Places(kernel=(3, 3), padding=(2, 0), after=(0, 3), groups=20)),
]
TARGETS = {"native": "native", "AVX2": "x86-64-v3", "portable": "x86-64"}


def made(
    channels: int, out: int, places: Places, bits: int, *, group: int = -1, symmetric: bool = True,
    seed: int = 0,
) -> IntegerWeight:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    columns = channels // places.groups * places.kernel[0] * places.kernel[1]
    codes = torch.randint(1 << bits, (out, columns), generator=generator).to(torch.uint8)
    groups = 1 if group == -1 else columns // group
    # Powers of two of both signs: every scaled sum is exact.
    scale = torch.tensor([1.0, 0.5, -2.0, 0.25])[torch.arange(out * groups) % 4].view(out, groups)
    zero = torch.randint(1 << bits, (out, groups), generator=generator).to(torch.uint8)
    return IntegerWeight(
        words=pack(codes, bits), scale=scale.bfloat16(), zero=None if symmetric else zero,
        bits=bits, group_size=group, channels=channels, places=places,
    )  # fmt: skip


def pictures(
    channels: int, height: int, width: int, *, batch: int = 2, seed: int = 1
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, channels, height, width), generator=generator).to(torch.uint8)


def dyadic_output(out: int) -> Dyadic:
    ratios = torch.linspace(-0.004, 0.02, out).double()
    multiplier, shift = dyadic(ratios)
    offset = torch.arange(out, dtype=torch.int32) * 100 - 500
    return Dyadic(multiplier=multiplier, shift=shift, offset=offset, zero=7, least=3, most=250)


def check(weight: IntegerWeight, x: torch.Tensor, zero: int) -> None:
    """All three outputs against the definition."""
    bias = torch.arange(weight.out_channels) * 0.5 - 3
    sums = integer_sums(x, zero, weight)
    scale = weight.scale.float() * 0.5
    outputs = [
        Floats(),
        Floats(low=-20.0, high=300.0),
        Codes(scale=64.0, zero=9, least=2, most=240),
    ]
    if scale.shape[1] == 1:
        outputs.append(dyadic_output(weight.out_channels))
    for output in outputs:
        layer = IntegerConvolution(weight, 0.5, zero, bias, output)
        assert layer.weight is None  # the C++ runs
        result, expected = layer(x), finished(sums, scale, bias, output)
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected), (weight, output)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_equals_the_definition(bits):
    for channels, out, height, width, places in SHAPES[:1] + SHAPES[2:3] + SHAPES[8:9]:
        for symmetric in (True, False):
            weight = made(channels, out, places, bits, symmetric=symmetric)
            check(weight, pictures(channels, height, width), 0 if bits % 2 else 131)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_shape_equals_the_definition(shape, bits):
    channels, out, height, width, places = shape
    for symmetric in (True, False):
        weight = made(channels, out, places, bits, symmetric=symmetric)
        check(weight, pictures(channels, height, width), 37)


@pytest.mark.parametrize("group", [2, 4, 6, 9, 12, 18])
def test_groups_of_scales_equal_the_definition(group):
    for places in (Places(kernel=(3, 3), padding=(1, 1)), Places(kernel=(3, 3), groups=2)):
        for bits, symmetric in itertools.product((2, 5, 8), (True, False)):
            weight = made(8, 20, places, bits, group=group, symmetric=symmetric)
            check(weight, pictures(8, 6, 5), 90)


def test_sums_are_those_of_a_loop_over_places():
    places = Places(
        kernel=(2, 3), stride=(2, 1), padding=(1, 2), after=(2, 1), dilation=(1, 2), groups=2
    )
    weight = made(4, 6, places, 4, group=3, symmetric=False)
    x, zero = pictures(4, 4, 5, batch=1), 50
    sums, rows = integer_sums(x, zero, weight), weight.differences().view(6, 2, 2, 3)
    for out, down, across in itertools.product(range(6), range(3), range(4)):
        expected = [0] * 4
        for channel, i, j in itertools.product(range(2), range(2), range(3)):
            y, z = 2 * down - 1 + i, across - 2 + 2 * j
            if 0 <= y < 4 and 0 <= z < 5:
                value = int(x[0, out // 3 * 2 + channel, y, z]) - zero
                place = channel * 6 + i * 3 + j
                expected[place // 3] += value * int(rows[out, channel, i, j])
        assert sums[0, out, :, down, across].tolist() == expected


def test_the_largest_sums_fit():
    weight = replace(made(32768, 1, Places(), 8, symmetric=False), zero=torch.zeros(1, 1).byte())
    weight = replace(weight, words=pack(torch.full((1, 32768), 255, dtype=torch.uint8), 8))
    x = torch.full((1, 32768, 1, 1), 255, dtype=torch.uint8)
    for zero, expected in ((0, 255 * 255 * 32768), (255, 0)):
        layer = IntegerConvolution(weight, 1.0, zero, torch.zeros(1), Floats())
        assert float(layer(x)) == float(torch.tensor(float(expected)))
    with pytest.raises(ValueError, match="do not fit sums of 32 bits"):
        made(32769, 1, Places(), 8)


def test_a_dyadic_number_is_the_nearest_and_its_rescaling_exact():
    generator = torch.Generator().manual_seed(0)
    ratios = torch.cat([
        torch.randn(50, generator=generator).double() * 10.0 ** -torch.arange(50).double().div(6),
        torch.tensor([1.0, 0.5, 2.0**29, 1 - 2.0**-40, 2.0**-70, 0.0]).double(),
    ])  # fmt: skip
    multiplier, shift = dyadic(ratios)
    assert int(shift.min()) >= 1
    assert int(shift.max()) <= 62
    sums = torch.tensor([0, 1, -1, 12345, -98765, 2**31 - 1, -(2**31)])
    for ratio, b, c in zip(ratios.tolist(), multiplier.tolist(), shift.tolist(), strict=True):
        exact = Fraction(ratio)
        assert abs(Fraction(b, 2**c) - exact) <= max(abs(exact) / 2**30, Fraction(1, 2**63))
        moved = rescaled(sums, torch.tensor(b), torch.tensor(c)).tolist()
        for value, found in zip(sums.tolist(), moved, strict=True):
            assert found == math.floor(Fraction(value * b, 2**c) + Fraction(1, 2))
    with pytest.raises(ValueError, match="no multiplier of 31 bits"):
        dyadic(torch.tensor([2.0**31]).double())


def test_a_layer_in_integers_equals_rational_arithmetic():
    weight = made(8, 20, Places(kernel=(3, 3)), 4)
    x, output = pictures(8, 5, 4), dyadic_output(20)
    codes = IntegerConvolution(weight, 1.0, 12, torch.zeros(20), output)(x)
    sums = integer_sums(x, 12, weight)[:, :, 0]
    for (batch, out, down, across), total in zip(
        itertools.product(*map(range, sums.shape)), sums.flatten().tolist(), strict=True
    ):
        ratio = Fraction(int(output.multiplier[out]), 2 ** int(output.shift[out]))
        exact = math.floor((total + int(output.offset[out])) * ratio + Fraction(1, 2)) + output.zero
        assert int(codes[batch, out, down, across]) == min(max(exact, 3), 250)


def test_one_step_at_most_where_scales_are_any_numbers():
    weight = made(24, 40, Places(kernel=(3, 3), padding=(1, 1)), 4)
    scale = torch.rand(40, 1, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight = replace(weight, scale=scale)
    x, bias = pictures(24, 14, 14), torch.randn(40, generator=torch.Generator().manual_seed(4))
    output = Codes(scale=1.3, zero=120, least=0, most=255)
    expected = finished(integer_sums(x, 100, weight), scale.float() * 0.013, bias, output)
    result = IntegerConvolution(weight, 0.013, 100, bias, output)(x)
    apart = (result.int() - expected.int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).double().mean()) < 1e-3  # ties
    assert len(result.unique()) > 100


def test_the_definition_runs_without_a_compiler():
    weight, x = made(6, 5, Places(kernel=(3, 3)), 3), pictures(6, 5, 5)
    output = Codes(scale=64.0, zero=9, least=2, most=240)
    slow = IntegerConvolution(weight, 0.5, 3, torch.zeros(5), output, native_code=False)
    assert slow.weight is weight
    assert torch.equal(slow(x), IntegerConvolution(weight, 0.5, 3, torch.zeros(5), output)(x))


@pytest.mark.parametrize("batch", [1, 8])  # threads share output channels, or have own positions
def test_the_number_of_threads_changes_no_bit(batch):
    before = torch.get_num_threads()
    for places in (Places(kernel=(3, 3)), Places(kernel=(3, 3), groups=72), Places()):
        output = Codes(scale=7.0, zero=9, least=0, most=255)
        layer = IntegerConvolution(made(72, 72, places, 4), 0.5, 3, torch.zeros(72), output)
        x, results = pictures(72, 9, 9, batch=batch), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                results.append(layer(x))
            finally:
                torch.set_num_threads(before)
        expected = finished(
            integer_sums(x, 3, made(72, 72, places, 4)),
            made(72, 72, places, 4).scale.float() * 0.5, torch.zeros(72), output,
        )  # fmt: skip
        for result in results:
            apart = (result.int() - expected.int()).abs()
            assert torch.equal(result, results[0])
            assert int(apart.max()) <= 1  # the last bit of 1 / 7 decides ties


def test_a_weight_takes_the_bits_of_its_codes():
    for bits in (2, 3, 4, 8):
        weight = made(64, 128, Places(kernel=(3, 3)), bits)
        layer = IntegerConvolution(weight, 1.0, 0, torch.zeros(128), Floats())
        codes = 64 * 128 * 9 * bits // 8
        assert codes <= layer.stored_bytes <= codes + 128 * 16 + 9 * 48


@pytest.mark.skipif("linux" not in sys.platform, reason="targets of x86")
@pytest.mark.parametrize("target", ["AVX2", "portable"])
def test_other_instruction_sets_give_the_same(target, tmp_path, monkeypatch):
    import ctypes

    options = native.Options(target=TARGETS[target], math=native.IN_ORDER, extra=("-O1",))
    path = native.build(native.SOURCES / "convolution.cpp", tmp_path, options)
    other = ctypes.CDLL(str(path))
    for name in integer_convolution.PROCEDURES:
        getattr(other, name).restype = None
    assert other.qf_convolution_instructions() == {"AVX2": 2, "portable": 1}[target]
    monkeypatch.setattr(integer_convolution, "library", lambda: other)
    for channels, out, height, width, places in SHAPES:
        for bits, symmetric in ((3, True), (8, False)):
            weight = made(channels, out, places, bits, symmetric=symmetric)
            check(weight, pictures(channels, height, width), 200)
    check(made(8, 20, Places(kernel=(3, 3)), 5, group=6, symmetric=False), pictures(8, 6, 5), 90)


def test_nothing_is_read_or_written_outside(sanitized):
    sanitized(
        "convolution.cpp",
        integer_convolution.OPTIONS,
        """
import ctypes
import test_integer_convolution as tests
from quantforge_kernels import integer_convolution
own = ctypes.CDLL(library)
for name in integer_convolution.PROCEDURES:
    getattr(own, name).restype = None
integer_convolution.library = lambda: own
for channels, out, height, width, places in tests.SHAPES:
    for bits, symmetric in ((4, True), (8, False)):
        weight = tests.made(channels, out, places, bits, symmetric=symmetric)
        tests.check(weight, tests.pictures(channels, height, width), 17)
tests.check(tests.made(8, 20, tests.Places(kernel=(3, 3)), 3, group=6), tests.pictures(8, 6, 5), 9)
""",
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 groups do not divide 8 channels in"):
        made(8, 6, Places(groups=3), 4)
    layer = IntegerConvolution(
        made(8, 6, Places(kernel=(3, 3)), 4), 1.0, 0, torch.zeros(6), Floats()
    )
    with pytest.raises(ValueError, match="x must be uint8"):
        layer(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match="reaches over 3 places is larger than 2"):
        layer(pictures(8, 2, 4))
    with pytest.raises(ValueError, match="no pair of whole numbers"):
        Places(after=(0, -1))
    with pytest.raises(ValueError, match="bias must be"):
        IntegerConvolution(made(8, 6, Places(), 4), 1.0, 0, torch.zeros(5), Floats())
    with pytest.raises(ValueError, match="one scale a row"):
        IntegerConvolution(
            made(8, 20, Places(), 4, group=4), 1.0, 0, torch.zeros(20), dyadic_output(20)
        )
