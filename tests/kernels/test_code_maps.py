"""Rounding, decoding, adding and pooling codes: the C++ equals the definition in torch."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from quantforge_kernels import code_maps
from quantforge_kernels.code_maps import (
    CodeGrid,
    add_codes,
    dyadic_pair,
    from_codes,
    largest_codes,
    to_codes,
)
from quantforge_kernels.integer_layout import Places

GRIDS = [CodeGrid(scale=0.25, zero=0, top=255), CodeGrid(scale=0.5, zero=9, top=15)]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def check_all() -> None:
    for grid in GRIDS:
        for shape in ((3,), (2, 37), (2, 3, 5, 7), (1, 8, 4, 4), (2, 3, 131, 131)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 20
            x.view(-1)[:3] = torch.tensor([grid.scale / 2, grid.scale * 1.5, -grid.scale / 2])
            expected = to_codes(x, grid, native_code=False)
            assert torch.equal(to_codes(x, grid), expected)
            if len(shape) == 4:
                last = x.contiguous(memory_format=torch.channels_last)
                assert torch.equal(to_codes(last, grid), expected)
            values = from_codes(expected, grid, native_code=False)
            assert torch.equal(from_codes(expected, grid), values)
            assert torch.equal(to_codes(values, grid), expected)
    out = CodeGrid(scale=0.75, zero=20, top=255)
    for shape in ((5,), (3, 41), (2, 3, 5, 7), (1, 64, 70, 70)):
        a, b = codes(*shape), codes(*shape, seed=1) % 16
        for dyadic in (False, True):
            for limits in ({}, {"least": 20, "most": 90}):
                asked = {"dyadic": dyadic, **limits}
                expected = add_codes(a, GRIDS[0], b, GRIDS[1], out, native_code=False, **asked)
                result = add_codes(a, GRIDS[0], b, GRIDS[1], out, **asked)
                apart = (result.int() - expected.int()).abs()
                assert int(apart.max()) <= (0 if dyadic else 1)
                assert float((apart > 0).double().mean()) < 0.2  # thirds: a sixth are ties
    for places in (
        Places(kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        Places(kernel=(2, 3), dilation=(2, 1), padding=(1, 0)),
    ):
        x = codes(2, 19, 9, 8)
        assert torch.equal(largest_codes(x, places), largest_codes(x, places, native_code=False))


def test_native_equals_the_definition():
    check_all()


def test_nothing_is_read_or_written_outside(sanitized):
    sanitized(
        "code_maps.cpp",
        code_maps.OPTIONS,
        """
import ctypes
import test_code_maps as tests
from quantforge_kernels import code_maps
own = ctypes.CDLL(library)
for name in code_maps.PROCEDURES:
    getattr(own, name).restype = None
code_maps.library = lambda: own
tests.check_all()
""",
    )


def test_a_dyadic_sum_is_that_of_rational_numbers():
    left, right = CodeGrid(scale=0.013, zero=3, top=255), CodeGrid(scale=0.2, zero=100, top=255)
    out = CodeGrid(scale=0.11, zero=60, top=255)
    first, second, shift = dyadic_pair(left.scale / out.scale, right.scale / out.scale)
    assert 2**29 <= max(first, second) < 2**30
    assert abs(Fraction(first, 2**shift) - Fraction(left.scale / out.scale)) < Fraction(1, 2**shift)
    a, b = codes(200), codes(200, seed=2)
    for x, y, made in zip(
        a.tolist(), b.tolist(), add_codes(a, left, b, right, out, dyadic=True).tolist(), strict=True
    ):
        exact = Fraction((x - 3) * first + (y - 100) * second, 2**shift)
        assert made == min(max(math.floor(exact + Fraction(1, 2)) + 60, 0), 255)
    with pytest.raises(ValueError, match="no multipliers"):
        dyadic_pair(2.0**29, 1.0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not of one shape"):
        add_codes(codes(4), GRIDS[0], codes(5), GRIDS[0], GRIDS[0])
    with pytest.raises(ValueError, match="more than half"):
        largest_codes(codes(1, 4, 5, 5), Places(kernel=(2, 2), padding=(2, 2)))
    with pytest.raises(ValueError, match=r"before and .* after differ"):
        largest_codes(codes(1, 4, 5, 5), Places(kernel=(2, 2), after=(1, 1)))
