"""Second moments: both versions against float64, at sizes around the tiles' edges."""

import pytest
import torch
from quantforge_kernels.moment import add_cross, add_gram

SHAPES = [(1, 1), (2, 7), (33, 48), (64, 49), (7, 97), (130, 145)]


def rows(tokens, features, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator).to(dtype)


@pytest.mark.parametrize("native_code", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "features"), SHAPES)
def test_gram_is_the_sum_of_outer_products(tokens, features, dtype, native_code):
    total = torch.zeros(features, features)
    exact = torch.zeros(features, features, dtype=torch.float64)
    for seed in range(2):
        part = rows(tokens, features, seed, dtype)
        add_gram(total, part, native_code=native_code)
        exact += part.double().T @ part.double()
    torch.testing.assert_close(
        torch.tril(total).double(), torch.tril(exact), rtol=1e-5, atol=1e-5 * tokens
    )


@pytest.mark.parametrize("native_code", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "features"), SHAPES)
def test_cross_keeps_left_and_right(tokens, features, dtype, native_code):
    left, right = rows(tokens, features, 0, dtype), rows(tokens, features + 5, 1, dtype)
    total = torch.ones(features, features + 5)
    add_cross(total, left, right, native_code=native_code)
    exact = 1.0 + left.double().T @ right.double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5 * tokens)


def test_small_eigenvalues_survive_large_ones():
    """Sums rounded to bfloat16 would lose everything below 1/256 of the largest entry."""
    generator = torch.Generator().manual_seed(0)
    common = 100.0 * torch.randn(512, 1, generator=generator)
    part = (common + torch.randn(512, 64, generator=generator)).bfloat16()
    total = torch.zeros(64, 64)
    add_gram(total, part)
    lower = torch.tril(total).double()
    found = torch.linalg.eigvalsh(lower + torch.tril(lower, -1).T)
    exact = torch.linalg.eigvalsh(part.double().T @ part.double())
    assert exact[-1] / exact[0] > 1e4
    torch.testing.assert_close(found[:-1], exact[:-1], rtol=0.05, atol=0.0)


def test_rows_need_not_be_contiguous():
    part = rows(40, 20, 3, torch.bfloat16)
    strided, straight = torch.zeros(10, 10), torch.zeros(10, 10)
    add_gram(strided, part[:, ::2])
    add_gram(straight, part[:, ::2].contiguous())
    assert torch.equal(strided, straight)
