"""The registered operators: gradients, fake tensors, torch.compile, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantforge_kernels import BackendError, dequantize, pack, qembedding, qlinear

OUT, COLS, BITS, GROUP = 6, 64, 3, 32


@pytest.fixture
def parts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << BITS, (OUT, COLS), generator=generator).to(torch.uint8)
    return {
        "x": torch.randn(2, 5, COLS, generator=generator),
        "words": pack(codes, BITS),
        "scale": torch.randn(OUT, COLS // GROUP, generator=generator).to(torch.bfloat16),
        "zero": torch.randint(8, (OUT, COLS // GROUP), generator=generator).to(torch.uint8),
        "bits": BITS,
        "group_size": GROUP,
        "bias": torch.randn(OUT, generator=generator),
    }


def weight_of(parts: dict[str, Any]) -> torch.Tensor:
    return dequantize(
        parts["words"], parts["scale"], parts["zero"], BITS, GROUP, (OUT, COLS), parts["x"].dtype
    )


def test_forward_and_gradients_equal_the_dense_layer(parts: dict[str, Any]) -> None:
    x = parts["x"].clone().requires_grad_()
    bias = parts["bias"].clone().requires_grad_()
    y = qlinear(**{**parts, "x": x, "bias": bias})
    dense_x = parts["x"].clone().requires_grad_()
    dense_bias = parts["bias"].clone().requires_grad_()
    dense = torch.nn.functional.linear(dense_x, weight_of(parts), dense_bias)
    torch.testing.assert_close(y, dense, rtol=1e-6, atol=1e-5)
    y.square().sum().backward()
    dense.square().sum().backward()
    # sums over outputs in another order, which depends on the processor
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, dense_bias.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_use_the_rounded_weight(
    parts: dict[str, Any], dtype: torch.dtype
) -> None:
    parts["x"], parts["bias"] = parts["x"].to(dtype), None
    y = qlinear(**parts)
    assert y.dtype == dtype
    expected = parts["x"].double() @ weight_of(parts).double().t()
    # one rounding of the result to 8 or 11 significant bits
    unit = torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= unit * expected.abs() + unit).all()


def test_torch_checks_the_registration(parts: dict[str, Any]) -> None:
    x = parts["x"].clone().requires_grad_()
    arguments = [x, *(parts[k] for k in ("words", "scale", "zero", "bits", "group_size", "bias"))]
    torch.library.opcheck(torch.ops.quantforge.qlinear.default, (*arguments, "auto"))
    ids = torch.tensor([[0, 5], [2, 2]])
    table = (ids, *arguments[1:6], COLS, torch.bfloat16)
    torch.library.opcheck(torch.ops.quantforge.qembedding.default, table)


def test_compiles_into_one_graph_with_gradients(parts: dict[str, Any]) -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(qlinear(**{**parts, "x": x})).sum(-1)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x = torch.randn(2, tokens, COLS, generator=torch.Generator().manual_seed(tokens))
        eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, result = network(eager_x), compiled(compiled_x)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        expected.sum().backward()
        result.sum().backward()
        torch.testing.assert_close(compiled_x.grad, eager_x.grad, rtol=0, atol=1e-6)


def test_embedding_is_a_row_of_the_weight(parts: dict[str, Any]) -> None:
    ids = torch.tensor([[0, 5], [2, 2]], dtype=torch.int32)
    rows = qembedding(
        ids, parts["words"], parts["scale"], parts["zero"], BITS, GROUP, COLS, torch.float32
    )
    assert torch.equal(rows, weight_of(parts)[ids.long()])


@pytest.mark.parametrize("wrong", [6, -1])
def test_ids_that_are_no_rows_are_errors_as_in_torch_s_embedding(
    wrong: int, parts: dict[str, Any]
) -> None:
    ids = torch.tensor([0, wrong])
    with pytest.raises(IndexError, match="out of range"):
        torch.nn.functional.embedding(ids, weight_of(parts))
    with pytest.raises(IndexError, match="out of range"):
        qembedding(
            ids, parts["words"], parts["scale"], parts["zero"], BITS, GROUP, COLS, torch.float32
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, "x must be a floating point"),
        ({"x": torch.zeros(2, 65)}, "rows of 65 codes of 3 bits are 7 words, got 6"),
        ({"bits": 9}, "bits must be one of"),
        ({"group_size": 24}, "groups of 24 do not divide a row of 64"),
        ({"group_size": 16}, r"scale must be floating point of shape \(6, 4\)"),
        ({"words": torch.zeros(6, 6)}, "words must be int32"),
        ({"words": torch.zeros(6, 6, dtype=torch.int32).t()}, "words must be contiguous"),
        ({"zero": torch.zeros(6, 2)}, "zero must be uint8"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(6,\)"),
        ({"bias": torch.zeros(6, dtype=torch.bfloat16)}, "bias must be torch.float32"),
        ({"scale": torch.zeros(6, 2, device="meta")}, "scale is on meta"),
        ({"scale": torch.zeros(6, 2, requires_grad=True)}, "no gradient to the scales"),
    ],
)
def test_refuses(parts: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qlinear(**{**parts, **change})


def test_an_unknown_backend_is_an_error(parts: dict[str, Any]) -> None:
    torch.testing.assert_close(qlinear(**parts, backend="reference"), qlinear(**parts))
    with pytest.raises(BackendError, match="unknown backend 'abacus'; known: auto, triton, cpu"):
        qlinear(**parts, backend="abacus")
