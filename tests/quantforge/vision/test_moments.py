"""Moments of layer inputs: exact without a cap, unbiased with one, and means of outputs."""

import pytest
import torch
from torch import nn

from quantforge.errors import InputError
from quantforge.methods.convolution import Geometry, unfolded
from quantforge.vision.moments import MomentAccumulator, output_mean
from quantforge.vision.network import weight_matrix


def streams(seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, size, size, generator=generator)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator)


def test_batches_add_up_to_the_means_over_all_positions():
    geometry = Geometry.of(nn.Conv2d(4, 4, 3, padding=1, groups=2))
    x, y = streams()
    made = MomentAccumulator(geometry, cap=0)
    made.add(y[:1], x[:1])
    made.add(y[1:], x[1:])
    found = made.mean()
    u, v = unfolded(x, geometry).double(), unfolded(y, geometry).double()
    count = u.shape[1]
    assert torch.allclose(found.gram.double(), v.transpose(1, 2) @ v / count, atol=1e-5)
    assert torch.allclose(found.cross.double(), (u - v).transpose(1, 2) @ v / count, atol=1e-5)
    assert torch.allclose(found.mean, v.mean(1), atol=1e-6)
    assert torch.allclose(found.native_mean, u.mean(1), atol=1e-6)


def test_a_share_of_the_positions_stands_for_all_of_them():
    geometry = Geometry.of(nn.Conv2d(4, 4, 1))
    x, _ = streams(size=40)
    x = x * torch.linspace(0.1, 2.0, 40)  # positions differ
    exact, sampled = MomentAccumulator(geometry, cap=0), MomentAccumulator(geometry, cap=1500)
    for batch in (x[:1], x[1:]):  # 1600 positions, and five times as many
        exact.add(batch)
        sampled.add(batch)
    whole, part = exact.mean(), sampled.mean()
    assert torch.allclose(part.gram, whole.gram, atol=0.08 * float(whole.gram.amax()))
    assert torch.equal(part.mean, whole.mean)
    assert part.cross is None


def test_mean_outputs_need_no_outputs():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x, _ = streams()
    made = MomentAccumulator(Geometry.of(layer), products=False)
    made.add(x)
    expected = layer(x).double().mean((0, 2, 3))
    found = output_mean(weight_matrix(layer), layer.bias.detach(), made.means()[0])
    assert torch.allclose(found, expected, atol=1e-6)


def test_nothing_is_refused():
    with pytest.raises(InputError, match="no calibration pictures"):
        MomentAccumulator(Geometry()).mean()
