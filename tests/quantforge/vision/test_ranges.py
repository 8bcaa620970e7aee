"""Activation grids: streaming histograms and the four ways to choose a range."""

import pytest
import torch

from quantforge.errors import InputError
from quantforge.testing import tiny_convolutional
from quantforge.vision.network import ActivationGrid
from quantforge.vision.ranges import (
    Histogram,
    activation_grids,
    fit_range,
    grid_error,
    observe,
)


def counted(*parts):
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def samples(count=40_000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_a_histogram_does_not_depend_on_order_and_batches():
    x = samples()
    x[7], x[39_999] = 300.0, -70.0
    whole = counted(x)
    parts = counted(x[20_000:] * 1.0, x[:100], x[100:20_000])
    assert parts.radius == whole.radius == 512.0
    assert torch.equal(parts.counts, whole.counts)
    assert (parts.low, parts.high, parts.seen) == (-70.0, 300.0, 40_000)
    assert float(whole.counts.sum()) == 40_000


def test_zeros_alone_and_a_power_of_two_at_the_end():
    nothing = counted(torch.zeros(5))
    assert fit_range(nothing, 8).zero == 0
    clipped = counted(torch.tensor([0.0, 4.0]))
    assert clipped.radius == 8.0
    assert fit_range(clipped, 8, "minmax").scale == pytest.approx(4.0 / 255)


def test_what_cannot_be_used_is_refused():
    with pytest.raises(InputError, match="NaN or Inf"):
        counted(torch.tensor([1.0, torch.nan]))
    with pytest.raises(InputError, match="no calibration pictures"):
        fit_range(Histogram(), 8)
    with pytest.raises(ValueError, match="one of"):
        fit_range(counted(samples(10)), 8, "other")
    with pytest.raises(ValueError, match="percentile"):
        fit_range(counted(samples(10)), 8, "percentile", percentile=40.0)


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentiles_are_those_of_the_sorted_values(percentile):
    x = samples()
    grid = fit_range(counted(x[:1000], x[1000:]), 8, "percentile", percentile=percentile)
    share = percentile / 100.0
    low, high = float(x.quantile(1 - share)), float(x.quantile(share))
    assert grid.scale * 255 == pytest.approx(high - low, rel=2e-3)
    assert grid.zero == round(-low / grid.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_least_error_is_that_of_a_brute_force_search(bits):
    x = torch.cat([samples(20_000), 3.0 * samples(200, seed=1)])
    grid = fit_range(counted(x), bits)
    found = float((grid.rounded(x) - x).square().mean())
    assert grid_error(grid, counted(x)) == pytest.approx(found, rel=0.02)
    low, high = float(x.min()), float(x.max())
    least = min(
        float((one.rounded(x) - x).square().mean())
        for i in range(1, 33)
        for j in range(1, 33)
        if (one := ActivationGrid.covering(low * i / 32, high * j / 32, bits))
    )
    assert found <= 1.03 * least
    covering = ActivationGrid.covering(low, high, bits)
    gain = float((covering.rounded(x) - x).square().mean()) / found
    assert gain > {2: 3.0, 3: 3.0, 4: 2.0, 8: 1.0}[bits]


def test_one_sided_values_get_all_codes_above_zero():
    grid = fit_range(counted(samples().clamp(0.0, 6.0)), 4)
    assert grid.zero == 0
    assert grid.scale * 15 < 4.0


def test_gaussian_grids_have_the_published_distortion():
    # best uniform grid of 16 levels: 0.011543; ours holds 0, which costs the middle of the range
    grid = fit_range(counted(samples(200_000)), 4)
    assert 0.0115 < grid_error(grid, counted(samples(200_000))) < 0.0125


def test_sites_of_one_grid_share_it():
    network = tiny_convolutional()
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = observe(network, [x[:3], x[3:]])
    assert set(found) == {site.grid for site in network.sites}
    values = dict.fromkeys(("narrow", "add_tensor"))
    whole = observe(network, [x])
    assert torch.equal(found["pictures"].counts, whole["pictures"].counts)
    assert found["pictures"].low == float(x.min())
    # relu of "down", "narrow" and their sum: 8 channels of 4 x 4 each
    assert found["sum"].seen == 3 * 8 * 8 * 16
    assert values.keys() <= {node.name for node in network.graph.graph.nodes}
    grids = activation_grids(found, {"pictures": 8, "sum": 4})
    assert {name: grid.bits for name, grid in grids.items()} == {"pictures": 8, "sum": 4}
    assert set(activation_grids(found, 6, "minmax")) == set(found)
