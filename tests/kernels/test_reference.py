"""The reference operators against a weight decoded by a loop over groups."""

from __future__ import annotations

import pytest
import torch
from quantforge_kernels import layout, reference


def make(
    out: int, cols: int, bits: int, groups: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (out, cols), generator=generator).to(torch.uint8)
    scale = torch.randn(out, groups, generator=generator).to(torch.bfloat16)
    zero = torch.randint(1 << bits, (out, groups), generator=generator).to(torch.uint8)
    return codes, layout.pack(codes, bits), scale, None if symmetric else zero


def decode_by_loop(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """float64 product of exact integers and 16-bit scales: exact."""
    weight = torch.empty(codes.shape, dtype=torch.float64)
    width = codes.shape[1] // scale.shape[1]
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = column // width
            offset = 1 << (bits - 1) if zero is None else int(zero[row, group])
            weight[row, column] = (int(codes[row, column]) - offset) * float(scale[row, group])
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", layout.WIDTHS)
def test_dequantize_is_exact_in_float32_and_rounded_once_in_bfloat16(
    bits: int, groups: int, symmetric: bool
) -> None:
    codes, words, scale, zero = make(5, 99, bits, groups, symmetric=symmetric)
    size = reference.PER_CHANNEL if groups == 1 else 33
    exact = decode_by_loop(codes, scale, zero, bits)
    for dtype in (torch.float32, torch.bfloat16):
        weight = reference.dequantize(words, scale, zero, bits, size, (5, 99), dtype)
        assert weight.dtype == dtype
        assert torch.equal(weight, exact.to(dtype))


@pytest.mark.parametrize("block", [1 << 22, 200])
def test_qlinear_equals_the_dense_product(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_WEIGHTS", block)  # 200: two rows at a time
    codes, words, scale, zero = make(7, 96, 3, 3, symmetric=False)
    weight = decode_by_loop(codes, scale, zero, 3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 96, generator=generator, dtype=torch.float64)
    bias = torch.randn(7, generator=generator, dtype=torch.float64)
    y = reference.qlinear(x, words, scale, zero, 3, 32, bias)
    # float64 sums of 96 terms of about 3: the order of summation changes at most 1e-13
    torch.testing.assert_close(y, x @ weight.t() + bias, rtol=0, atol=1e-12)
    gradient = reference.qlinear_input_gradient(y, words, scale, zero, 3, 32, 96)
    torch.testing.assert_close(gradient, y @ weight, rtol=0, atol=1e-11)


def test_qembedding_decodes_the_rows_asked_for() -> None:
    codes, words, scale, _ = make(9, 64, 4, 2, symmetric=True)
    weight = decode_by_loop(codes, scale, None, 4)
    ids = torch.tensor([[8, 0, 3], [3, 3, 1]])
    rows = reference.qembedding(ids, words, scale, None, 4, 32, 64, torch.float32)
    assert torch.equal(rows, weight.float()[ids])


def test_blocks_cover_every_row_once() -> None:
    blocks = reference.row_blocks(10_000, 1000)
    assert [block.start for block in blocks] == [0, 4194, 8388]
    assert blocks[-1].stop == 10_000
    assert len(reference.row_blocks(3, 1 << 30)) == 3
