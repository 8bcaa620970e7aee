"""Learned rounding: where it starts, and which codes it can commit to (identity 24, AdaRound)."""

import pytest
import torch

from quantforge.methods.rounding import CELL, TrainableWeight
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.types import QuantSpec

SPECS = [
    QuantSpec(2, 16), QuantSpec(4), QuantSpec(3, 16, symmetric=False),
    QuantSpec(2, 16, grid="ternary"), QuantSpec(2, -1, grid="balanced"),
]  # fmt: skip


def started(spec):
    """Weights, their rounding, their position on the grid in codes, and the latents."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = minmax_grid(weight, spec)
    quantized = round_to_nearest(weight, scale, spec, zero)
    steps = weight.view(*scale.shape, -1) / scale.unsqueeze(-1) + quantized.centre()
    return weight, quantized, steps.view_as(weight), TrainableWeight.start(weight, quantized)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_identity_24_the_start_reproduces_the_weight(spec):
    weight, quantized, steps, made = started(spec)
    scale = quantized.scale.float().unsqueeze(-1)
    latent = made.latents.latent.view(*quantized.scale.shape, -1)
    again = ((latent - quantized.centre()) * scale).view_as(weight)
    inside = (steps - quantized.codes).abs() <= CELL
    assert inside.float().mean() > 0.7
    assert torch.allclose(again[inside], weight[inside], atol=1e-5)
    assert torch.equal(made.finish().codes, quantized.codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("share", "up"), [(0.0, 0), (0.49, 0), (0.51, 1), (1.0, 1)])
def test_identity_24_latents_commit_to_floor_or_ceiling(spec, share, up):
    _, quantized, steps, made = started(spec)
    floor = steps.floor().clamp(0, spec.top - 1)  # the cell of a weight beyond the grid is its last
    made.latents.latent = floor + share
    committed = made.finish()
    assert torch.equal(committed.codes, (floor + up).to(torch.uint8))
    assert torch.equal(committed.scale, quantized.scale)
    assert torch.equal(made.weight(), committed.dequantize())
