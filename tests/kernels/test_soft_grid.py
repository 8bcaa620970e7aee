"""Soft grids: few levels equal all of them, C++ equals the definition, gradients are exact."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from quantforge_kernels import native
from quantforge_kernels import soft_grid as module
from quantforge_kernels.soft_grid import SoftGrid, soft_grid, soft_grid_reference

# bits' largest code, groups, width: vectors of 16 with and without a rest, and less than one.
SHAPES = [(2, 3, 37), (3, 2, 32), (7, 1, 50), (15, 5, 16), (255, 4, 7), (1, 3, 1)]
TARGETS = {"native": "native", "avx2": "x86-64-v3", "portable": "x86-64"}


def drawn(top, groups, width, *, shared=False, seed=0, rows=5, dtype=torch.float32):
    """Weights on and beyond the grid, scales of both signs, zeros and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, groups, generator=generator) + 0.2
    scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
    zero = torch.randint(0, top + 1, (rows, groups), generator=generator).float()
    if shared:
        zero = torch.tensor(top / 2)
    code = torch.rand(rows, groups, width, generator=generator) * (top + 3) - 1.5
    weight = (code - (zero if shared else zero.unsqueeze(-1))) * scale.unsqueeze(-1)
    gradient = torch.randn(rows, groups * width, generator=generator)
    return (weight.flatten(1).to(dtype), scale.to(dtype), zero.to(dtype)), gradient.to(dtype)


def both_ways(given, gradient, grid, dtype=None, native_code=True, function=soft_grid):
    """What is made, and the gradients of weight and scale."""
    weight, scale = (one.clone().requires_grad_() for one in given[:2])
    if function is soft_grid:
        made = soft_grid(weight, scale, given[2], grid, dtype, native_code=native_code)
    else:
        made = function(weight, scale, given[2], grid)
    made.backward(gradient.to(made.dtype))
    return made.detach(), weight.grad, scale.grad


def check_native(top, groups, width, temperature, pressure, weight_dtype, dtype):
    given, gradient = drawn(top, groups, width, shared=width % 2 == 1)
    given = (given[0].to(weight_dtype), *given[1:])
    grid = SoftGrid(top=top, temperature=temperature, pressure=pressure)
    expected = both_ways(given, gradient, grid, dtype, native_code=False)
    found = both_ways(given, gradient, grid, dtype)
    assert found[0].dtype == dtype
    assert found[1].dtype == weight_dtype
    # float32 rounding of exponentials, and of the result's own dtype
    sizes = (top, 1 + 1 / temperature if temperature else 1, (top + 1) * width)
    kinds = (dtype, weight_dtype, torch.float32)
    for one, other, size, kind in zip(found, expected, sizes, kinds, strict=True):
        rounding = torch.finfo(kind).eps if kind == torch.bfloat16 else 0.0
        allowed = 1e-6 * size + (rounding + 2e-6) * other.float().abs()
        assert ((one.float() - other.float()).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_the_definition(shape):
    dtypes = (torch.float32, torch.bfloat16)
    for temperature, pressure in [(0.35, 1.0), (0.05, 0.4), (1.7, 0.7), (0.0, 1.0), (0.0, 0.5)]:
        for weight_dtype, dtype in itertools.product(dtypes, dtypes):
            check_native(*shape, temperature, pressure, weight_dtype, dtype)


@pytest.fixture(params=["avx2", "portable"])
def older(request, monkeypatch):
    if not (sys.platform.startswith("linux") and native.instruction_set().startswith("x86_64")):
        pytest.skip("the other targets are those of x86-64")
    options = native.Options(target=TARGETS[request.param], math=native.IN_ORDER, extra=("-O1",))
    library = native.load(module.SOURCE, options)
    monkeypatch.setattr(module, "_library", lambda: library)


@pytest.mark.usefixtures("older")
def test_older_processors_get_the_same():
    for shape in SHAPES[:3]:
        check_native(*shape, 0.35, 0.6, torch.float32, torch.float32)
        check_native(*shape, 0.0, 1.0, torch.bfloat16, torch.bfloat16)


def test_the_number_of_threads_changes_no_bit():
    given, gradient = drawn(3, 4, 33)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(both_ways(given, gradient, SoftGrid(top=3, temperature=0.4)))
        finally:
            torch.set_num_threads(before)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 0.35089, 0.5, 1.0, 2.0, 5.0])
def test_neglected_levels_weigh_less_than_the_bound(temperature):
    grid = SoftGrid(top=255, temperature=temperature)
    f = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    for radius in {1, grid.radius(), grid.radius() + 1}:
        j = torch.arange(radius + 1, 256, dtype=torch.float64).unsqueeze(1)
        left_out = sum(torch.exp((2 * sign * j * f - j * j) / temperature) for sign in (1, -1))
        worst = float(left_out.sum(0).max())
        assert worst == pytest.approx(grid.neglected(radius), rel=1e-12)  # reached at one half
    assert grid.neglected(grid.radius()) <= 1e-7
    assert grid.radius() == 1 or grid.neglected(grid.radius() - 1) > 1e-7


def test_how_many_levels_count():
    radii = {0.1: 1, 0.2: 2, 0.35089: 2, 0.5: 3, 1.0: 4, 2.0: 6}
    for temperature, radius in radii.items():
        assert SoftGrid(top=255, temperature=temperature).radius() == radius
    assert SoftGrid(top=3, temperature=1e9).radius() == 3  # all there are
    assert SoftGrid(top=3).radius() == 0


@pytest.mark.parametrize("temperature", [0.1, 0.35, 0.6, 1.5])
@pytest.mark.parametrize("top", [3, 15, 255])
def test_few_levels_equal_the_sum_over_all(top, temperature, monkeypatch):
    given, gradient = drawn(top, 3, 40, dtype=torch.float64)
    grid = SoftGrid(top=top, temperature=temperature, pressure=0.8)
    every = both_ways(given, gradient, grid, function=soft_grid_reference)
    exact = both_ways(given, gradient, grid)
    monkeypatch.setattr(module, "NEGLECTED_IN_DOUBLE", module.NEGLECTED)
    few = both_ways(given, gradient, grid)
    narrow = tuple(one.float() for one in given)
    fused = both_ways(narrow, gradient.float(), grid)
    # a neglected level moves the mean by its weight times its distance, the variance by its square
    distance = grid.radius() + 3
    sizes = (distance, 2 * distance**2 / temperature, 3 * (top + 1) * distance**2 / temperature)
    for one, two, three, four, size in zip(every, exact, few, fused, sizes, strict=True):
        largest = float(gradient.abs().max()) + 1
        assert float((one - two).abs().max()) < 1e-12 * size * largest * (top + 1)
        assert float((one - three).abs().max()) < 1e-7 * size * largest * 40
        # positions are rounded to float32, which the slope of the soft steps enlarges
        rounding = 4e-7 * (top + 1) * (1 + 1 / temperature**2)
        assert float((one - four).abs().max()) < rounding * largest * (
            40 if size is sizes[2] else 2
        )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("top", "temperature", "pressure"),
    [(2, 0.35, 1.0), (3, 0.2, 0.5), (7, 1.0, 0.3), (15, 4.0, 1.0)],
)
def test_gradients_are_those_of_the_function(top, temperature, pressure, shared):
    (weight, scale, zero), _ = drawn(top, 2, 5, shared=shared, rows=3, dtype=torch.float64)
    grid = SoftGrid(top=top, temperature=temperature, pressure=pressure)
    inputs = (weight.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, s: soft_grid(w, s, zero, grid), inputs)


def test_weights_far_outside_take_the_end_levels_and_stay_finite():
    weight = torch.tensor([[-3e38, -1e6, -30.0, 30.0, 1e6, 3e38]])
    for temperature in (1e-35, 1e-3, 0.35, 2.0, 0.0):
        grid = SoftGrid(top=3, temperature=temperature)
        for native_code in (True, False):
            made, at_weight, at_scale = both_ways(
                (weight, torch.ones(1, 1), torch.tensor(2.0)),
                torch.ones(1, 6),
                grid,
                None,
                native_code,
            )
            expected = torch.tensor([[-2.0, -2, -2, 1, 1, 1]])
            assert torch.allclose(made, expected, atol=1e-6)
            assert torch.allclose(at_weight, torch.zeros(1, 6), atol=1e-6)
            assert torch.allclose(at_scale, torch.tensor([[-3.0]]), atol=1e-5)


def test_without_pressure_the_weight_is_untouched_whatever_the_scale():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    grid = SoftGrid(top=3, temperature=0.3, pressure=0.0)
    made, at_weight, at_scale = both_ways(
        (weight, torch.zeros(3, 2), torch.tensor(2.0)), torch.ones(3, 8), grid
    )
    assert torch.equal(made, weight)
    assert torch.equal(at_weight, torch.ones(3, 8))
    assert torch.equal(at_scale, torch.zeros(3, 2))


def test_nothing_but_weight_scale_and_zero_is_kept():
    (weight, scale, zero), gradient = drawn(3, 2, 20)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    leaf = weight.bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = soft_grid(leaf, scale.requires_grad_(), zero, SoftGrid(top=3, temperature=0.4))
    made.backward(gradient.bfloat16())
    assert [one.data_ptr() for one in kept] == [one.data_ptr() for one in (leaf, scale, zero)]


def test_any_strides_will_do():
    (weight, scale, zero), gradient = drawn(3, 2, 20, rows=4)
    grid = SoftGrid(top=3, temperature=0.4, pressure=0.5)
    turned = tuple(one.T.contiguous().T for one in (weight, scale, zero))
    assert not turned[0].is_contiguous()
    for native_code in (True, False):
        plain = both_ways((weight, scale, zero), gradient, grid, None, native_code)
        strided = both_ways(turned, gradient.T.contiguous().T, grid, None, native_code)
        for left, right in zip(plain, strided, strict=True):
            assert torch.allclose(left, right, rtol=1e-6, atol=1e-6)


def test_temperatures_beyond_the_native_code_run_in_torch(monkeypatch):
    (weight, scale, zero), _ = drawn(255, 1, 16)
    grid = SoftGrid(top=255, temperature=40.0)
    assert grid.radius() > module.LARGEST_RADIUS
    expected = soft_grid_reference(*(one.double() for one in (weight, scale, zero)), grid)
    assert torch.allclose(soft_grid(weight, scale, zero, grid).double(), expected, atol=1e-4)
    monkeypatch.setattr(module, "_library", pytest.fail)
    soft_grid(weight, scale, zero, grid)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"weights \(4, 6\) have no scales \(4, 4\)"):
        soft_grid(torch.zeros(4, 6), torch.ones(4, 4), torch.tensor(2.0), SoftGrid(top=3))
    with pytest.raises(ValueError, match=r"zeros \(4, 1\) are not one a scale \(4, 3\)"):
        soft_grid(torch.zeros(4, 6), torch.ones(4, 3), torch.ones(4, 1), SoftGrid(top=3))
    for wrong in ({"top": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"pressure": 1.1}):
        with pytest.raises(ValueError, match=r"must be|not negative"):
            SoftGrid(**{"top": 3, **wrong})


@pytest.mark.parametrize("native_code", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.35])
def test_scales_that_are_far_too_small_take_the_end_levels(temperature, native_code):
    """A position is infinite there, times a slope of 0."""
    weight = torch.tensor([[30.0, -0.5, 20.0, 7.0] * 5, [1.0, 1.0, -1.0, -1.0] * 5])
    scale = torch.tensor([[1e-38], [1.0]])
    grid = SoftGrid(top=3, temperature=temperature)
    given = (weight, scale, torch.tensor(2.0))
    made, by_weight, by_scale = both_ways(
        given, torch.ones_like(weight), grid, native_code=native_code
    )
    levels = torch.tensor([1.0, -2.0, 1.0, 1.0] * 5)
    assert torch.equal(made[0], levels * scale[0])
    assert (by_weight[0] == 0.0).all()
    assert float(by_scale[0, 0]) == float(levels.sum())
    assert bool(by_scale[1].isfinite())


def test_weights_of_no_rows_or_no_columns_are_weights():
    for shape in ((0, 8), (3, 0)):
        for temperature, native_code in itertools.product((0.0, 0.35), (True, False)):
            weight = torch.zeros(shape, requires_grad=True)
            scale = torch.ones(shape[0], 1, requires_grad=True)
            grid = SoftGrid(top=3, temperature=temperature)
            made = soft_grid(weight, scale, torch.tensor(2.0), grid, native_code=native_code)
            assert made.shape == shape
            made.sum().backward()
            assert torch.equal(scale.grad, torch.zeros(shape[0], 1))


_UNDER_SANITIZER = """
import ctypes, torch
from quantforge_kernels import soft_grid
kernel = ctypes.CDLL(library)
kernel.qf_soft_weight.restype = kernel.qf_soft_gradients.restype = None
soft_grid._library = lambda: kernel
import test_soft_grid
for shape in test_soft_grid.SHAPES:
    for dtype in (torch.float32, torch.bfloat16):
        test_soft_grid.check_native(*shape, 0.35, 0.6, dtype, dtype)
        test_soft_grid.check_native(*shape, 0.0, 1.0, dtype, dtype)
"""


@pytest.mark.full
def test_runs_under_the_sanitizers(sanitized) -> None:
    sanitized("soft_grid.cpp", module.OPTIONS, _UNDER_SANITIZER)
