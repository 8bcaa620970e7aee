"""Packed modules equal the dense modules they stand for."""

from __future__ import annotations

import pytest
import torch
from quantforge_kernels import BackendError

from quantforge.runtime.linear import QuantEmbedding, QuantLinear
from quantforge.testing import random_weight
from quantforge.types import QuantSpec

SPECS = [QuantSpec(b, g, s) for b in (2, 3, 7, 8) for g in (-1, 32) for s in (True, False)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_dense(spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = random_weight(40, 96, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(40, generator=generator).to(dtype)
    x = torch.randn(3, 5, 96, generator=generator).to(dtype)
    layer = QuantLinear.from_weight(weight, bias, backend="reference")
    dense = torch.nn.functional.linear(x, weight.dequantize(dtype), bias)
    assert torch.equal(layer(x), dense)  # one block of rows: the same product
    fast = QuantLinear.from_weight(weight, bias)
    unit = torch.finfo(dtype).eps
    for order in ("", "cpu"):
        assert fast.order == order
        torch.testing.assert_close(fast(x), dense, rtol=unit, atol=16 * unit)
        fast.prepare(dtype)
    assert layer.weight_packed.nbytes == 40 * 96 * spec.bits // 8
    assert (layer.in_features, layer.out_features) == (96, 40)
    expected = {"weight_packed", "weight_scale", "bias"}
    assert set(layer.state_dict()) == expected | (
        set() if spec.symmetric else {"weight_zero_point"}
    )
    assert repr(layer) == f"QuantLinear(96, 40, {spec})"


def test_embedding_and_a_tied_head_share_one_weight() -> None:
    spec = QuantSpec(4, 32)
    weight = random_weight(50, 64, spec)
    head = QuantLinear.from_weight(weight)
    table = QuantEmbedding(50, 64, spec, dtype=torch.bfloat16)
    assert table.weight_packed.device.type == "meta"
    ids = torch.tensor([[49, 0], [7, 7]])
    for _ in range(2):  # in the order of the file, then of the kernels
        table.share(head)
        assert torch.equal(table(ids), weight.dequantize(torch.bfloat16)[ids])
        head.prepare(torch.bfloat16)
    assert table.weight_packed.data_ptr() == head.weight_packed.data_ptr()


def test_gradients_pass_through() -> None:
    weight = random_weight(8, 64, QuantSpec(3, 32))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer = QuantLinear.from_weight(weight)
    expected = weight.dequantize().sum(0).expand(2, 64)
    for _ in range(2):
        x.grad = None
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)
        layer.prepare(torch.float32)


def test_activations_of_eight_bits_are_close() -> None:
    weight = random_weight(40, 256, QuantSpec(4, 64), seed=1)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    layer = QuantLinear.from_weight(weight)
    layer.prepare(torch.float32, mode="a8")
    layer.mode = "a8"
    dense = x @ weight.dequantize().t()
    error = float((layer(x) - dense).norm() / dense.norm())
    # rounding to 1/127 of the group's largest, about 2.5 standard deviations of 64 values:
    # 2.5 / 127 / sqrt(12)
    assert 0.002 < error < 0.012


def test_a_backend_that_is_not_there_is_an_error() -> None:
    layer = QuantLinear.from_weight(random_weight(8, 64, QuantSpec(3, 32)), backend="abacus")
    with pytest.raises(BackendError, match="unknown backend 'abacus'"):
        layer(torch.zeros(1, 64))
