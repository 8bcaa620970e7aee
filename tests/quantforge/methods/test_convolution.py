"""Unfolded inputs against explicit patch loops and torch's own convolutions (identity 36)."""

import pytest
import torch
from torch import nn

from quantforge.methods.convolution import (
    Geometry,
    as_pictures,
    chosen_positions,
    column_sums,
    matrix_product,
    unfolded,
)
from quantforge.vision.network import kernel_of, weight_matrix

LAYERS = {
    "plain": nn.Conv2d(4, 6, 3),
    "point": nn.Conv2d(4, 6, 1),
    "stride": nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2)),
    "dilation": nn.Conv2d(4, 6, 3, padding=2, dilation=(2, 1)),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 5, stride=2, padding=2, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed-groups": nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), groups=2, dilation=(1, 2)),
}


def pictures(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_identity_36_a_convolution_is_a_product_with_unfolded_inputs(name):
    layer = LAYERS[name].double()
    x = pictures(3, 4, 9, 11)
    columns = unfolded(x, Geometry.of(layer))
    made = matrix_product(weight_matrix(layer), columns)
    wanted = layer(x)
    assert columns.shape[1] == wanted[:, 0].numel()
    again = made.view(3, *wanted.shape[2:], -1).permute(0, 3, 1, 2) + layer.bias.view(1, -1, 1, 1)
    assert torch.allclose(again, wanted, atol=1e-12)
    assert torch.equal(kernel_of(layer, weight_matrix(layer)), layer.weight)


def test_identity_36_the_gram_of_a_strided_grouped_convolution_is_that_of_a_patch_loop():
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    x = pictures(2, 4, 7, 6)
    columns = unfolded(x, Geometry.of(layer))
    gram = columns.transpose(1, 2) @ columns
    padded = nn.functional.pad(x, (0, 0, 1, 1))
    expected = torch.zeros(2, 12, 12, dtype=torch.float64)
    positions = 0
    for picture in padded:
        for row in range(0, 9 - 2, 2):
            for column in range(0, 6 - 2):
                patch = picture[:, row : row + 3, column : column + 3 : 2]
                for group in range(2):
                    u = patch[2 * group : 2 * group + 2].reshape(-1)
                    expected[group] += torch.outer(u, u)
                positions += 1
    assert columns.shape == (2, positions, 12)
    assert torch.allclose(gram, expected, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_sums_of_columns_are_those_of_the_unfolded_input(name):
    geometry = Geometry.of(LAYERS[name])
    x = pictures(2, 4, 8, 7)
    columns = unfolded(x, geometry)
    sums, count = column_sums(x, geometry)
    assert count == columns.shape[1]
    assert torch.allclose(sums, columns.sum(1), atol=1e-12)


def test_a_linear_layer_is_one_group_of_one_place():
    x = pictures(2, 5, 7)
    columns = unfolded(as_pictures(x, Geometry.of(nn.Linear(7, 3))), Geometry())
    assert torch.equal(columns[0], x.reshape(-1, 7))


def test_positions_are_one_of_every_run_of_neighbours():
    chosen = chosen_positions(1000, 64, seed=3)
    edges = torch.arange(65) * (1000 / 64)
    assert bool(((chosen >= edges[:-1].floor()) & (chosen <= edges[1:])).all())
    assert torch.equal(chosen, chosen_positions(1000, 64, seed=3))
    assert not torch.equal(chosen, chosen_positions(1000, 64, seed=4))
    assert torch.equal(chosen_positions(50, 64, seed=0), torch.arange(50))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
              nn.Conv2d(2, 2, 3, padding="same")],
)  # fmt: skip
def test_other_layers_are_refused(layer):
    with pytest.raises((TypeError, ValueError), match="convolution"):
        Geometry.of(layer)
