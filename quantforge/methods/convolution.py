"""Convolutions as matrix products: unfolded inputs, their moments, and means of columns.

A convolution of one channel group is Y = K U, where K is the kernel flattened to
[out / groups, in / groups · height · width] and a column of U holds the inputs under the kernel at
one position of the output. So a layer has one gram for every channel group,

    H_g = mean over pictures and positions of u uᵀ,   u the column of group g,

and whatever is known of linear layers holds for each group by itself. A linear layer is the case of
one group and one place; a transposed convolution that of an input with zeros between its pixels and
a kernel turned by half a turn.

Positions of one picture are alike, so beyond a cap a share of them stands for all: one drawn from
every run of neighbours, with the weight of the run. Means of columns, which bias correction needs
exactly, are sums over shifted windows and take every position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS = 4096  # of a batch that a gram sees


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a kernel moves over its input; an ordinary convolution over a padded input.

    Attributes:
        groups: channel groups.
        kernel: height and width.
        stride: of the output's positions, in pixels of the padded input.
        dilation: between the kernel's places.
        padding: zeros left, right, above and below, as `torch.nn.functional.pad` takes them;
            negative ones cut.
        spread: pixels of the input are so far apart, rows and columns, with zeros between them;
            (1, 1) but for transposed convolutions.
        turned: the kernel's first place meets the last pixel.
    """

    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    spread: tuple[int, int] = (1, 1)
    turned: bool = False

    @property
    def places(self) -> int:
        """Numbers of a kernel of one channel."""
        return self.kernel[0] * self.kernel[1]

    @classmethod
    def of(cls, layer: Any) -> Geometry:
        """Of a `Conv2d`, `ConvTranspose2d` or `Linear`, padded with zeros.

        Raises:
            TypeError: the layer is of another kind.
            ValueError: it pads with something else.
        """
        if isinstance(layer, nn.Linear):
            return cls()
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            raise TypeError(f"no convolution and no linear layer: {type(layer).__name__}")
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError("a convolution must be padded with a number of zeros")
        rows, columns = layer.padding[0], layer.padding[1]
        kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        if isinstance(layer, nn.Conv2d):
            return cls(
                groups=layer.groups, kernel=kernel, stride=_pair(layer.stride), dilation=dilation,
                padding=(columns, columns, rows, rows),
            )  # fmt: skip
        high = dilation[0] * (kernel[0] - 1) - rows
        wide = dilation[1] * (kernel[1] - 1) - columns
        more = layer.output_padding
        return cls(
            groups=layer.groups, kernel=kernel, dilation=dilation, spread=_pair(layer.stride),
            padding=(wide, wide + more[1], high, high + more[0]), turned=True,
        )  # fmt: skip

    def laid_out(self, inputs: Tensor) -> Tensor:
        """[batch, channels, rows, columns] input as the kernel meets it: spread and padded."""
        if self.spread != (1, 1):
            batch, channels, rows, columns = inputs.shape
            high, wide = (rows - 1) * self.spread[0] + 1, (columns - 1) * self.spread[1] + 1
            apart = inputs.new_zeros(batch, channels, high, wide)
            apart[:, :, :: self.spread[0], :: self.spread[1]] = inputs
            inputs = apart
        return nn.functional.pad(inputs, self.padding) if any(self.padding) else inputs

    def offsets(self) -> list[tuple[int, int]]:
        """Row and column under every place of the kernel at position 0, in the kernel's order."""
        rows, columns = self.kernel
        found = [
            (row * self.dilation[0], column * self.dilation[1])
            for row in range(rows)
            for column in range(columns)
        ]
        return found[::-1] if self.turned else found

    def output(self, laid_out: Tensor) -> tuple[int, int]:
        """Rows and columns of the output for an input that is laid out."""
        high, wide = laid_out.shape[2:]
        rows, columns = (
            (size - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i, size in enumerate((high, wide))
        )
        return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    """Two numbers as a tuple that a dataclass can compare."""
    return int(value[0]), int(value[1])


def as_pictures(inputs: Tensor, geometry: Geometry) -> Tensor:
    """A linear layer's input [..., features] as [rows, features, 1, 1]; pictures as they are.

    Args:
        inputs: what a layer reads.
        geometry: of the layer; of a linear one where it has a single place and the input no four
            dimensions.
    """
    if inputs.ndim == 4:
        return inputs
    if geometry.places != 1:
        raise ValueError(f"a convolution reads 4 dimensions, not {inputs.ndim}")
    return inputs.reshape(-1, inputs.shape[-1], 1, 1)


def chosen_positions(total: int, cap: int, seed: int) -> Tensor:
    """[min(total, cap)] int64 ascending positions, one of every run of total / cap neighbours.

    Args:
        total: how many there are.
        cap: how many may be taken; 0 takes all.
        seed: of the draw inside the runs.
    """
    if not cap or total <= cap:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(cap, generator=generator, dtype=torch.float64)
    return ((torch.arange(cap) + draws) * (total / cap)).long().clamp_(max=total - 1)


def unfolded(inputs: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """[groups, positions, in / groups · places] the columns U, a row a position.

    Args:
        inputs: [batch, channels, rows, columns].
        geometry: of the layer.
        positions: of pictures and output pixels counted through; None takes all.
    """
    laid_out = geometry.laid_out(inputs)
    batch, channels, high, wide = laid_out.shape
    rows, columns = geometry.output(laid_out)
    if positions is None:
        positions = torch.arange(batch * rows * columns)
    picture, rest = positions // (rows * columns), positions % (rows * columns)
    row = (rest // columns) * geometry.stride[0]
    start = (picture * high + row) * wide + (rest % columns) * geometry.stride[1]
    pixels = laid_out.permute(0, 2, 3, 1).reshape(-1, channels)
    found = torch.stack([pixels[start + y * wide + x] for y, x in geometry.offsets()], 2)
    grouped = found.view(len(positions), geometry.groups, -1)
    return grouped.transpose(0, 1).contiguous()


def column_sums(inputs: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
    """[groups, in / groups · places] float64 sum of all columns of U, and how many those are.

    Args:
        inputs: [batch, channels, rows, columns].
        geometry: of the layer.
    """
    laid_out = geometry.laid_out(inputs)
    rows, columns = geometry.output(laid_out)
    sums = []
    for y, x in geometry.offsets():
        window = laid_out[
            :, :, y : y + geometry.stride[0] * (rows - 1) + 1 : geometry.stride[0],
            x : x + geometry.stride[1] * (columns - 1) + 1 : geometry.stride[1],
        ]  # fmt: skip
        sums.append(window.sum((2, 3)).sum(0, dtype=torch.float64))
    found = torch.stack(sums, 1).view(geometry.groups, -1)
    return found, len(laid_out) * rows * columns


def matrix_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """[positions, out] what a layer without a bias makes of unfolded inputs: the definition.

    Args:
        matrix: [out, in / groups · places], outputs of a group beside each other.
        columns: [groups, positions, in / groups · places].
    """
    groups, _, width = columns.shape
    made = columns @ matrix.view(groups, -1, width).transpose(1, 2)
    return made.transpose(0, 1).flatten(1)
