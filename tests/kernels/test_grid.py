"""Asymmetric grids against dense scans, the Gaussian table, and their definition in torch."""

import math
from dataclasses import replace

import pytest
import torch
from quantforge_kernels.compensate import search_scales
from quantforge_kernels.grid import search_grid, search_grid_reference

from quantforge.methods.rtn import minmax_grid, minmax_scale
from quantforge.types import QuantSpec

# Relative squared error of the best uniform grid on a Gaussian, by bits.
GAUSSIAN = {2: 0.118846, 3: 0.037440, 4: 0.011543, 5: 0.003495, 6: 0.001040, 8: 0.000088}
# The same of the best grid of any spacing (Lloyd 1957, Max 1960).
LLOYD_MAX = {2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505, 6: 0.000644, 8: 0.000041}


def errors(weight, scale, zero, bits, importance=None):
    """[out, groups] weighted squared error of the nearest codes."""
    groups = weight.view(*scale.shape, -1)
    s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
    codes = (groups / s + z).round().clamp(0, (1 << bits) - 1)
    square = (groups - (codes - z) * s).square()
    if importance is not None:
        square = square * importance.view(scale.shape[1], -1)
    return square.sum(-1)


def relative(weight, scale, zero, bits):
    return float(errors(weight, scale, zero, bits).sum() / weight.square().sum())


def dense_scan(weight, importance, bits, width, zeros):
    """[out, groups] least error over many scales and all `zeros`."""
    groups = weight.view(len(weight), -1, width)
    range_ = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
    least = torch.full_like(range_, torch.inf)
    for factor in torch.linspace(0.2, 1.08, 50):
        scale = factor * range_ / ((1 << bits) - 1)
        for zero in zeros:
            trial = errors(weight, scale, torch.full_like(scale, float(zero)), bits, importance)
            least = torch.minimum(least, trial)
    return least


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("width", [16, 48])
def test_native_equals_reference(bits, width, zero):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 96, generator=generator) + 0.5
    importance = torch.rand(96, generator=generator) + 0.1
    options = {"bits": bits, "width": width, "zero": zero}
    found = search_grid(weight, importance, **options)
    expected = search_grid_reference(weight, importance, **options)
    # Sums in another order break a few ties differently; the error is the same to rounding.
    same = (found[0] == expected[0]) & (found[1] == expected[1])
    assert same.float().mean() > 0.98
    sums = [errors(weight, *grid, bits, importance).sum() for grid in (found, expected)]
    assert torch.allclose(*sums, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", ["integer", "float"])
def test_no_worse_than_a_dense_scan(bits, zero):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(60, 96, generator=generator).pow(3)  # outliers, often on one side
    importance = torch.rand(96, generator=generator) + 0.1
    scale, zeros = search_grid(weight, importance, bits=bits, width=32, zero=zero)
    trials = torch.arange(0, 1 << bits) if zero == "integer" else torch.arange(-1, 1 << bits, 0.2)
    dense = dense_scan(weight, importance, bits, 32, trials)
    # Both are scans of an error that jumps: one may be luckier by a little.
    assert errors(weight, scale, zeros, bits, importance).sum() <= 1.005 * dense.sum()


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_can_be_stored(bits, zero):
    weight = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)) - 0.3
    scale, zeros = search_grid(weight, torch.ones(64), bits=bits, width=32, zero=zero)
    assert torch.equal(scale, scale.bfloat16().float())
    assert (scale > 0).all()
    if zero == "integer":
        assert torch.equal(zeros, zeros.round())
        assert zeros.min() >= 0 and zeros.max() < 1 << bits
    else:
        assert torch.equal(zeros, zeros.half().float())


# Relative squared error of Gaussian groups of 64, by bits and grid.
GROUPS_OF_64 = {
    2: {"minmax": 0.261, "minmax asymmetric": 0.209, "one sign": 0.142, "either sign": 0.1230,
        "integer": 0.1230, "float": 0.1017},
    3: {"minmax": 0.0485, "minmax asymmetric": 0.0380, "one sign": 0.0357, "either sign": 0.0309,
        "integer": 0.0307, "float": 0.0268},
    4: {"minmax": 0.01058, "minmax asymmetric": 0.00829, "one sign": 0.00899,
        "either sign": 0.00809, "integer": 0.00756, "float": 0.00652},
}  # fmt: skip


@pytest.mark.parametrize("bits", list(GROUPS_OF_64))
def test_error_of_gaussian_groups_falls_with_every_freedom_of_the_grid(bits):
    weight = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    ones, spec = torch.ones(64), QuantSpec(bits)
    centre = torch.full((2000, 1), float(1 << (bits - 1)))
    largest = weight.abs().amax(1, keepdim=True) / centre
    positive = [errors(weight, f * largest, centre, bits) for f in torch.linspace(0.2, 1.1, 100)]
    grids = {
        "minmax": (minmax_scale(weight, spec), centre),
        "minmax asymmetric": minmax_grid(weight, replace(spec, symmetric=False)),
        "either sign": (search_scales(weight, ones, bits=bits, width=64), centre),
        "integer": search_grid(weight, ones, bits=bits, width=64, zero="integer"),
        "float": search_grid(weight, ones, bits=bits, width=64, zero="float"),
    }
    found = {name: relative(weight, *grid, bits) for name, grid in grids.items()}
    found["one sign"] = float(torch.stack(positive).amin(0).sum() / weight.square().sum())
    assert found == pytest.approx(GROUPS_OF_64[bits], rel=0.02)


@pytest.mark.parametrize("bits", list(GAUSSIAN))
def test_one_large_gaussian_group_meets_the_table_of_best_uniform_grids(bits):
    weight = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1_000_000)
    scale, zero = search_grid(weight, ones, bits=bits, width=1_000_000, zero="float")
    found = relative(weight, scale, zero, bits)
    assert found == pytest.approx(GAUSSIAN[bits], rel=0.02)
    assert found > LLOYD_MAX[bits]  # which no grid of so many levels can be below
    # the minimum is flat: a percent of the codes to one side costs next to nothing
    levels = 1 << bits
    assert float(zero) == pytest.approx((levels - 1) / 2, abs=0.1 + 0.01 * levels)


def lloyd_max(bits):
    """Relative squared error after Lloyd's steps on the density itself: levels are cells' means."""
    levels = torch.special.ndtri((torch.arange(1 << bits).double() + 0.5) / (1 << bits))
    for _ in range(40 * 4**bits):
        inner = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([torch.tensor([-torch.inf]), inner, torch.tensor([torch.inf])])
        mass = torch.special.ndtr(edges).diff()
        levels = -torch.exp(-0.5 * edges.square()).diff() / math.sqrt(2 * math.pi) / mass
    return float(1 - (mass * levels.square()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_table_of_the_best_levels_of_any_spacing(bits):
    """(identity 4) So that what bounds our grids above is no copied number."""
    assert lloyd_max(bits) == pytest.approx(LLOYD_MAX[bits], rel=1e-3)


def test_importance_decides_which_weights_are_met():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, 10.0, -7.3]])
    importance = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    scale, zero = search_grid(weight, importance, bits=2, width=6, zero="integer")
    assert (float(scale), float(zero)) == (1.0, 0.0)


def test_a_group_far_from_zero_needs_a_float_zero():
    weight = 5.0 + 0.1 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    spread = float((weight - 5.0).square().sum())
    found = {}
    for zero in ("integer", "float"):
        grid = search_grid(weight, torch.ones(64), bits=3, width=64, zero=zero)
        found[zero] = float(errors(weight, *grid, 3).sum()) / spread
    assert found["float"] < 0.05 < found["integer"]


@pytest.mark.parametrize("zero", ["integer", "float"])
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-30])
def test_constant_groups_are_met(value, zero):
    weight = torch.full((2, 8), value)
    scale, zeros = search_grid(weight, torch.ones(8), bits=2, width=8, zero=zero)
    made = ((weight / scale + zeros).round().clamp(0, 3) - zeros) * scale
    assert torch.allclose(made, weight, rtol=2**-8, atol=0)
    if value == 0.0:
        assert torch.equal(scale, torch.ones(2, 1))
