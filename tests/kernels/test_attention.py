"""Fused causal attention against its definition in float64, and what it must refuse."""

import math
import subprocess
import sys

import pytest
import torch
from quantforge_kernels import attention, native
from quantforge_kernels.attention import (
    causal_attention,
    causal_attention_reference,
    supported,
)
from torch.utils.checkpoint import checkpoint

# batch, heads, key heads, length, size: around the edges of tiles (6), panels (64), blocks (192).
SHAPES = [
    (1, 1, 1, 1, 16),
    (1, 3, 1, 5, 32),
    (2, 4, 1, 64, 16),
    (1, 4, 4, 67, 48),
    (2, 6, 2, 192, 64),
    (1, 3, 1, 193, 80),
    (1, 2, 1, 391, 128),
    (1, 1, 1, 130, 256),
]
# Relative error of whole tensors: a rounding to bfloat16 is 2^-9 at most and 0.0017 in the mean
# square; outputs are rounded once after probabilities, gradients after probabilities and slopes.
OUTPUT, GRADIENT = 0.004, 0.008

with_kernel = pytest.mark.skipif(
    not attention.available(), reason="the fused kernel needs AVX-512 with bfloat16"
)


def operands(shape, dtypes=(torch.bfloat16,) * 3, seed=0):
    """Query, key, value as a decoder has them: transposed from [batch, length, heads, size]."""
    batch, heads, key_heads, length, size = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, count, size, generator=generator).to(dtype).transpose(1, 2)
        for count, dtype in zip((heads, key_heads, key_heads), dtypes, strict=True)
    ]


def slope_of(query, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(query.shape, generator=generator).bfloat16()


def with_gradients(function, tensors, slope, scale):
    tensors = [one.detach().requires_grad_() for one in tensors]
    out = function(*tensors, scale)
    return [out.detach(), *torch.autograd.grad(out, tensors, slope.to(out.dtype))]


def exactly(tensors, slope, scale):
    wide = [one.bfloat16().double() for one in tensors]
    return with_gradients(causal_attention_reference, wide, slope, scale)


def assert_near(found, exact):
    for one, right, limit in zip(found, exact, (OUTPUT, *[GRADIENT] * 3), strict=True):
        assert one.shape == right.shape
        # One key: its probability is 1, and the scores' exact gradient is 0.
        error, size = float((one.double() - right).norm()), float(right.norm())
        assert error <= limit * size + 1e-6, (error, size)


def check(shape, dtypes=(torch.bfloat16,) * 3, scale=None):
    """Values and gradients of one shape; also run under the sanitizer."""
    tensors = operands(shape, dtypes)
    slope, scale = slope_of(tensors[0]), scale or shape[-1] ** -0.5
    found = with_gradients(causal_attention, tensors, slope, scale)
    assert_near(found, exactly(tensors, slope, scale))
    assert found[0].dtype == torch.bfloat16
    assert [one.dtype for one in found[1:]] == list(dtypes)


def test_the_definition_is_softmax_over_earlier_keys():
    query = torch.tensor([[1.0], [2.0]]).double().view(1, 1, 2, 1)
    key = torch.tensor([[0.5], [1.0]]).double().view(1, 1, 2, 1)
    value = torch.tensor([[3.0], [5.0]]).double().view(1, 1, 2, 1)
    out = causal_attention_reference(query, key, value, 0.5).flatten()
    first, second = math.exp(0.5), math.exp(1.0)  # of 0.5 · 2 · key
    expected = torch.tensor([3, (3 * first + 5 * second) / (first + second)], dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


@with_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape):
    check(shape)


@with_kernel
@pytest.mark.parametrize("scale", [-0.3, 1e-3, 2.0])
def test_any_scale(scale):
    check((1, 2, 1, 70, 32), scale=scale)


@with_kernel
def test_float32_operands_are_rounded_and_get_float32_gradients():
    shape, wide, half = (2, 3, 1, 70, 64), torch.float32, torch.bfloat16
    check(shape, (wide, wide, half))
    check(shape, (half, wide, wide))
    mixed = operands(shape, (wide, wide, half))
    rounded = [one.bfloat16() for one in mixed]
    assert torch.equal(causal_attention(*mixed, 0.1), causal_attention(*rounded, 0.1))


@with_kernel
def test_no_further_from_the_definition_than_torch():
    tensors = operands((1, 9, 3, 256, 64))
    slope = slope_of(tensors[0])

    def stock(query, key, value, scale):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )

    exact = exactly(tensors, slope, 0.125)
    ours = with_gradients(causal_attention, tensors, slope, 0.125)
    theirs = with_gradients(stock, tensors, slope, 0.125)
    for own, other, right in zip(ours, theirs, exact, strict=True):
        distance = float((own.double() - right).norm())
        assert distance <= 1.1 * float((other.double() - right).norm())


@with_kernel
def test_scores_far_apart_do_not_overflow():
    query, key, value = operands((1, 1, 1, 200, 16))
    query, key = 60 * query, 60 * key
    slope = slope_of(query)
    found = with_gradients(causal_attention, (query, key, value), slope, 1.0)
    exact = exactly((query, key, value), slope, 1.0)[0]
    assert float((found[0].double() - exact).norm()) <= OUTPUT * float(exact.norm())
    assert all(bool(torch.isfinite(one).all()) for one in found)


@with_kernel
def test_a_value_that_is_no_number_is_passed_on():
    query, key, value = operands((1, 1, 1, 40, 16))
    value[0, 0, 20, 3] = torch.nan
    out = causal_attention(query, key, value, 0.25)[0, 0, :, 3]
    assert bool(out[:18].isfinite().all())  # the tiles of six before the one it is in
    assert bool(out[20:].isnan().all())


@with_kernel
def test_layout_in_memory_changes_nothing():
    tensors = operands((2, 4, 2, 75, 32))
    slope = slope_of(tensors[0])
    found = with_gradients(causal_attention, tensors, slope, 0.2)
    straight = [one.contiguous() for one in tensors]
    padded = [torch.cat((one, one), -1)[..., :32] for one in tensors]
    across = [one.transpose(-1, -2).contiguous().transpose(-1, -2) for one in tensors]
    for other in (straight, padded, across):
        again = with_gradients(causal_attention, other, slope, 0.2)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # What the output projection reads is a view, not a copy.
    assert found[0].transpose(1, 2).is_contiguous()


@with_kernel
@pytest.mark.parametrize("shape", [(1, 9, 3, 200, 32), (3, 4, 4, 390, 16), (1, 8, 1, 100, 16)])
def test_threads_change_nothing(shape):
    tensors = operands(shape)
    slope, before, found = slope_of(tensors[0]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(causal_attention, tensors, slope, 0.2))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@with_kernel
def test_checkpointed_under_autocast():
    tensors = operands((1, 3, 1, 70, 32), (torch.float32,) * 3)
    slope = slope_of(tensors[0])

    def again(*given):
        return checkpoint(causal_attention, *given, use_reentrant=False)

    plain = with_gradients(causal_attention, tensors, slope, 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = with_gradients(again, tensors, slope, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@with_kernel
def test_only_what_is_asked_for_gets_a_gradient():
    query, key, value = operands((1, 2, 1, 30, 16))
    query.requires_grad_()
    causal_attention(query, key, value, 0.2).float().sum().backward()
    assert query.grad is not None
    assert key.grad is None


@with_kernel
def test_a_second_derivative_is_refused():
    query, key, value = (one.requires_grad_() for one in operands((1, 1, 1, 8, 16)))
    out = causal_attention(query, key, value, 0.2)
    (first,) = torch.autograd.grad(out.float().square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.float().sum().backward()


def test_what_does_not_fit_is_not_supported():
    good = operands((1, 4, 2, 10, 16))
    assert supported(*good) == attention.available()
    query, key, value = good
    for bad in (
        operands((1, 4, 2, 10, 24)),
        operands((1, 4, 3, 10, 16)),
        operands((1, 2, 1, 10, 272)),
        operands((1, 2, 1, 0, 16)),
        (query[:, :, -1:], key, value),
        (query, key, value[..., :8]),
        [one.double() for one in good],
        [one.half() for one in good],
        [one.to("meta") for one in good],
        [one[0] for one in good],
    ):
        assert not supported(*bad)
        with pytest.raises(RuntimeError, match="supported"):
            causal_attention(*bad, 1.0)


def test_a_processor_without_the_instructions_is_told_apart(tmp_path):
    """The same source for an older processor has the question, and answers no."""
    if not native.instruction_set().startswith("x86_64"):
        pytest.skip("the older target is an x86 one")
    options = native.Options(target="x86-64-v3", math=native.IN_ORDER)
    library = native.build(native.SOURCES / "attention.cpp", tmp_path, options)
    code = (
        "import ctypes, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "print(library.qf_attention_available(), hasattr(library, 'qf_attention_forward'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["0", "False"]


_UNDER_SANITIZER = """
import ctypes, torch
from quantforge_kernels import attention
kernel = ctypes.CDLL(library)
attention._library = lambda: kernel
import test_attention
for shape in test_attention.SHAPES:
    test_attention.check(shape)
    test_attention.check(shape, (torch.float32, torch.float32, torch.bfloat16))
"""


@with_kernel
@pytest.mark.full
def test_runs_under_the_sanitizers(sanitized) -> None:
    sanitized("attention.cpp", attention.OPTIONS, _UNDER_SANITIZER)
