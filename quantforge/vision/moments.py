"""Moments of what the layers of a convolutional network read.

Two streams of pictures run through the network: the float one, x, and the one behind the layers
that are quantized already, x̃. A layer needs of them its grams E[ũ ũᵀ], and C = E[(u − ũ) ũᵀ] where
compensation answers for the difference (`methods.compensation`), both from a share of the
positions; and E[u] and E[ũ], from all of them, for its bias. u is a column of the unfolded input of
one channel group (`methods.convolution`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.methods.convolution import (
    POSITIONS,
    Geometry,
    as_pictures,
    chosen_positions,
    column_sums,
    unfolded,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of one layer's inputs; n is the length of a flattened kernel of one group.

    Attributes:
        gram: [groups, n, n] float32 mean of ũ ũᵀ.
        cross: [groups, n, n] float32 mean of (u − ũ) ũᵀ; None where only one stream was given.
        native: [groups, n, n] float32 mean of u uᵀ; None likewise.
        mean: [groups, n] float64 mean of ũ.
        native_mean: [groups, n] float64 mean of u; that of ũ where only one stream was given.
    """

    gram: Tensor
    cross: Tensor | None
    native: Tensor | None
    mean: Tensor
    native_mean: Tensor


class MomentAccumulator:
    """Adds up moments over batches of pictures; the same batches give the same bits."""

    def __init__(self, geometry: Geometry, *, cap: int = POSITIONS, products: bool = True) -> None:
        """Start with nothing.

        Args:
            geometry: of the layer.
            cap: positions of a batch that the products see; 0 takes all.
            products: whether grams are wanted, or only means.
        """
        self._geometry, self._cap, self._products = geometry, cap, products
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._native: Tensor | None = None
        self._sums: list[Tensor] = []
        self._count, self._batches = 0, 0

    def add(self, inputs: Tensor, native: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: x̃, as the layer reads it.
            native: x, of the same shape; None where there is only one stream.
        """
        geometry = self._geometry
        both = [as_pictures(one, geometry) for one in (inputs, native) if one is not None]
        summed = [column_sums(one, geometry) for one in both]
        count = summed[0][1]
        if self._products:
            taken = chosen_positions(count, self._cap, self._batches)
            quantized = unfolded(both[0], geometry, taken)
            share = count / len(taken)
            gram = share * (quantized.transpose(1, 2) @ quantized)
            self._gram = gram if self._gram is None else self._gram.add_(gram)
            if len(both) > 1:
                original = unfolded(both[1], geometry, taken)
                cross = share * ((original - quantized).transpose(1, 2) @ quantized)
                self._cross = cross if self._cross is None else self._cross.add_(cross)
                square = share * (original.transpose(1, 2) @ original)
                self._native = square if self._native is None else self._native.add_(square)
        sums = [one for one, _ in summed]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._count, self._batches = self._count + count, self._batches + 1

    def means(self) -> tuple[Tensor, Tensor]:
        """[groups, n] float64 means of ũ and of u.

        Raises:
            InputError: nothing was added.
        """
        if not self._sums:
            raise InputError("no calibration pictures reached this layer")
        return self._sums[0] / self._count, self._sums[-1] / self._count

    def mean(self) -> Moments:
        """All of them.

        Raises:
            InputError: nothing was added.
        """
        mean, native = self.means()
        if self._gram is None:
            raise ValueError("products were not asked for")
        gram = self._gram / self._count
        cross = None if self._cross is None else self._cross / self._count
        square = None if self._native is None else self._native / self._count
        return Moments(
            gram=0.5 * (gram + gram.transpose(1, 2)), cross=cross, native=square, mean=mean,
            native_mean=native,
        )  # fmt: skip


def output_variance(matrix: Tensor, gram: Tensor, mean: Tensor) -> Tensor:
    """[out] float64 variance of what a layer makes of inputs with these moments; 0 at least.

    Args:
        matrix: [out, n].
        gram: [groups, n, n] mean of u uᵀ.
        mean: [groups, n] float64 mean of u.
    """
    apart = matrix.double().view(len(gram), -1, matrix.shape[1])
    squares = ((apart @ gram.double()) * apart).sum(2).flatten()
    means = torch.einsum("gon,gn->go", apart, mean).flatten()
    return (squares - means.square()).clamp_min(0.0)


def output_mean(matrix: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """[out] float64 mean of what a layer makes of inputs with these means of columns.

    Args:
        matrix: [out, n].
        bias: [out].
        mean: [groups, n] float64.
    """
    groups, width = mean.shape
    made = torch.einsum("gon,gn->go", matrix.double().view(groups, -1, width), mean)
    return made.flatten() + bias.double()
