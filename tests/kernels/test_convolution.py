"""Convolution with a packed weight equals torch's with the decoded one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantforge_kernels import dequantize, pack, qconv2d
from torch.nn import functional

# channels in and out, kernel, stride, padding, dilation, groups of channels
CASES = [
    (4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 6, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (6, 4, (3, 5), (2, 1), (0, 2), (1, 2), 2),
    (8, 8, (3, 3), (1, 2), (1, 0), (2, 1), 8),
]


def made(case: tuple[Any, ...], bits: int, dtype: torch.dtype, *, symmetric: bool = False) -> Any:
    """Arguments of `qconv2d`, and the weight that they pack."""
    inside, outside, kernel, stride, padding, dilation, groups = case
    columns = inside // groups * kernel[0] * kernel[1]
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (outside, columns), generator=generator).to(torch.uint8)
    scale = torch.randn(outside, 1, generator=generator).bfloat16()
    zero = torch.randint(1 << bits, (outside, 1), generator=generator).to(torch.uint8)
    zeros = None if symmetric else zero
    words = pack(codes, bits)
    arguments = {
        "x": torch.randn(2, inside, 9, 11, generator=generator).to(dtype), "words": words,
        "scale": scale, "zero": zeros, "bits": bits, "group_size": -1, "kernel": kernel,
        "bias": torch.randn(outside, generator=generator).to(dtype),
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
    }  # fmt: skip
    weight = dequantize(words, scale, zeros, bits, -1, (outside, columns), dtype)
    return arguments, weight.view(outside, inside // groups, *kernel)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equals_the_dense_convolution_and_its_gradients(
    case: tuple[Any, ...], bits: int, dtype: torch.dtype
) -> None:
    arguments, weight = made(case, bits, dtype, symmetric=bits == 3)
    found = {name: arguments[name].clone().requires_grad_() for name in ("x", "bias")}
    dense = {name: arguments[name].clone().requires_grad_() for name in ("x", "bias")}
    places = {name: arguments[name] for name in ("stride", "padding", "dilation", "groups")}
    y = qconv2d(**(arguments | found))
    expected = functional.conv2d(dense["x"], weight, dense["bias"], **places)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, leaf in found.items():
        torch.testing.assert_close(leaf.grad, dense[name].grad)


def test_groups_of_a_row_run_over_places_and_then_channels() -> None:
    codes = torch.arange(16).view(1, 16).to(torch.uint8)
    scale = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    zero = torch.zeros(1, 4, dtype=torch.uint8)
    x = torch.eye(16).view(16, 4, 2, 2)
    y = qconv2d(x, pack(codes, 4), scale, zero, 4, 4, (2, 2))
    assert y.flatten().tolist() == [c * 10 ** (c // 4) for c in range(16)]


def test_torch_checks_the_registration_and_compiles() -> None:
    arguments, _ = made(CASES[2], 3, torch.float32)
    for name in ("x", "bias"):
        arguments[name].requires_grad_()
    grid = [arguments["bits"], arguments["group_size"], *arguments["kernel"]]
    places = [*arguments["stride"], *arguments["padding"], *arguments["dilation"]]
    plain = [arguments[name] for name in ("x", "words", "scale", "zero", "bias")]
    torch.library.opcheck(
        torch.ops.quantforge.qconv2d.default, (*plain, grid, [*places, arguments["groups"]])
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x": torch.zeros(4, 9, 11)}, r"x must be a floating point \[batch, in, height, width\]"),
        ({"x": torch.zeros(1, 4, 0, 11)}, "reaches over 3 places is larger"),
        ({"x": torch.zeros(1, 5, 9, 11)}, "rows of 45 codes of 3 bits"),
        ({"groups": 4}, "4 groups do not divide 4 channels in and 6 out"),
        ({"stride": (0, 1)}, r"stride must be two whole numbers from 1 up, got \(0, 1\)"),
        ({"stride": 2}, "stride must be two whole numbers from 1 up, got 2"),
        ({"stride": (1.0, 1.0)}, "stride must be two whole numbers"),
        ({"padding": (1,)}, r"padding must be two whole numbers from 0 up, got \(1,\)"),
        ({"words": torch.tensor(1)}, r"words must be int32 \[out, n\]"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta"),
        ({"bias": torch.zeros(5)}, "bias must be torch.float32 of shape"),
        ({"scale": torch.ones(6, 1, requires_grad=True)}, "no gradient to the scales"),
    ],
)
def test_refusals(changed: dict[str, Any], said: str) -> None:
    arguments, _ = made(CASES[0], 3, torch.float32)
    with pytest.raises(ValueError, match=said):
        qconv2d(**(arguments | changed))
