"""Learned activation steps: values of the grid, LSQ's gradients (identity 24), and dropping."""

import pytest
import torch

from quantforge.methods.activation import dropped, rounded_to_step
from quantforge.vision.network import ActivationGrid


def test_values_are_those_of_the_grid_that_is_stored():
    x = 4.0 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    grid = ActivationGrid.covering(-2.0, 5.0, 4)
    step = torch.tensor(grid.scale)
    assert torch.equal(rounded_to_step(x, step, grid.zero, grid.top), grid.rounded(x))


@pytest.mark.parametrize(
    ("x", "level", "inside"), [(0.7, 1, True), (1.2, 2, True), (-3.0, -2, False), (9.0, 5, False)]
)
def test_identity_24_the_gradients_are_lsqs(x, level, inside):
    value = torch.tensor([x], requires_grad=True)
    step = torch.tensor(0.6, requires_grad=True)
    (3.0 * rounded_to_step(value, step, 2, 7)).sum().backward()
    assert float(value.grad) == (3.0 if inside else 0.0)
    expected = level - x / 0.6 if inside else level
    assert float(step.grad) == pytest.approx(3.0 * expected, rel=1e-5)


def test_about_the_asked_share_of_the_rows_stays():
    generator = torch.Generator().manual_seed(0)
    x, other = torch.zeros(8, 32, 16, 5), torch.ones(8, 32, 16, 5)
    made = dropped(x, other, 0.25, generator)
    assert float(made.mean()) == pytest.approx(0.75, abs=0.02)
    assert torch.equal(made.amin(-1), made.amax(-1))
    assert dropped(x, other, 0.0, generator) is other
    flat = dropped(torch.zeros(4, 1000), torch.ones(4, 1000), 0.5, generator)
    assert 0.4 < float(flat[0].mean()) < 0.6
