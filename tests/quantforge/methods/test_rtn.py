"""Min-max grids and rounding: bounds, idempotence, and what a group of zeros gets."""

import pytest
import torch

from quantforge.methods.rtn import minmax_grid, minmax_scale, nearest_codes, round_to_nearest
from quantforge.types import QuantSpec


def rounded(weight, spec):
    """The weight on its min-max grid, and the [out, in] scales."""
    if spec.symmetric:
        scale, zero = minmax_scale(weight, spec), None
    else:
        scale, zero = minmax_grid(weight, spec)
    width = spec.width(weight.shape[1])
    return round_to_nearest(weight, scale, spec, zero), scale.repeat_interleave(width, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, -1])
def test_covering_grids_move_no_weight_by_more_than_half_a_step(bits, group_size, symmetric):
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(bits)) + 0.2
    found, scale = rounded(weight, QuantSpec(bits, group_size, symmetric))
    distance = (found.dequantize() - weight).abs() / scale
    # a scale rounded down to bfloat16, and a zero to an integer, leave a little out of range
    slack = 2**-8 * (1 << bits) + (0.0 if symmetric else 0.5)
    assert distance.max() <= 0.5 + slack
    assert distance.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_idempotent_monotone_and_keeps_zero(bits, symmetric):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    weight[:, 3] = 0.0
    spec = QuantSpec(bits, 16, symmetric)
    found, _ = rounded(weight, spec)
    zero = None if found.zero is None else found.zero.float()
    again = round_to_nearest(found.dequantize(), found.scale.float(), spec, zero)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(found.dequantize()[:, 3], torch.zeros(6))
    for row, made in zip(weight[:, :16], found.dequantize()[:, :16], strict=True):
        assert (made[row.argsort()].diff() >= 0).all()


def test_asymmetric_grid_by_hand():
    scale, zero = minmax_grid(torch.tensor([[-1.0, 0.25, 2.0, 0.5]]), QuantSpec(2, -1, False))
    assert (float(scale), float(zero)) == (1.0, 1.0)
    codes = nearest_codes(torch.tensor([[-1.0, 0.25, 2.0, 0.6]]), scale, zero, 2)
    assert codes.tolist() == [[0, 1, 3, 2]]


def test_range_of_positive_weights_reaches_down_to_zero():
    scale, zero = minmax_grid(torch.tensor([[1.0, 3.0]]), QuantSpec(2, -1, False))
    assert (float(scale), float(zero)) == (1.0, 0.0)


def test_group_of_zeros_gets_a_usable_grid():
    spec = QuantSpec(3, -1, False)
    found, _ = rounded(torch.zeros(2, 8), spec)
    assert torch.equal(found.dequantize(), torch.zeros(2, 8))
    assert torch.equal(found.scale, torch.ones(2, 1, dtype=torch.bfloat16))
