"""Whether a file of dequantized weights can be what it claims to be.

A peer that was run wrongly can hand back its original weights, or weights dequantized with a wrong
zero-point, and still print a plausible time. Three properties tell:

    distinct values   a row of w-bit codes in g groups has at most g · 2^w of them
    error > 0         of every layer: something was rounded
    error < limit     rounding on a grid of step s has the squared error s²/12 a weight, where s is
                      a group's range over 2^w − 1; codes that are all off by one have s² on top:
                      thirteen times as much. Compensation, which trades the weights' error for the
                      output's, stays well below the limit of eight times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantforge.types import PER_CHANNEL, SCALE_BITS, QuantSpec

SAMPLED_ROWS = 64
ERROR_LIMIT = 8.0


class BrokenRowError(SystemExit):
    """A row of the benchmark that means nothing; ends the program with its message."""


def groups_of(columns: int, spec: QuantSpec) -> int:
    """Groups of a row, the last of which may be shorter."""
    return 1 if spec.group_size == PER_CHANNEL else math.ceil(columns / spec.group_size)


def stored_bits(shapes: Sequence[tuple[int, ...]], spec: QuantSpec) -> float:
    """Average stored bits a weight: codes, 16-bit scales, and zero-points where there are any.

    Args:
        shapes: (out, in) of all linears.
        spec: the grid; its groups need not divide a row.
    """
    a_group = SCALE_BITS + (0 if spec.symmetric else spec.bits)
    total = sum(out * (cols * spec.bits + groups_of(cols, spec) * a_group) for out, cols in shapes)
    return total / sum(out * cols for out, cols in shapes)


@torch.no_grad()
def check_weights(
    name: str, weights: Mapping[str, Tensor], floats: Mapping[str, Tensor], spec: QuantSpec | None
) -> float:
    """Refuse weights that cannot be a quantization of `floats`; see the module's header.

    Args:
        name: of the row, for the message.
        weights: layer → dequantized [out, in].
        floats: layer → original [out, in].
        spec: the grid that was asked for; None for a format that has none, of which only the
            layers and a weight error below 1 are asked.

    Returns:
        ‖Ŵ − W‖² / ‖W‖² over all layers.

    Raises:
        BrokenRowError: they are not.
    """
    if weights.keys() != floats.keys():
        wrong = sorted(weights.keys() ^ floats.keys())
        raise BrokenRowError(f"{name}: layers missing or too many: {', '.join(wrong[:4])}")
    squared, reference, rounding = 0.0, 0.0, 0.0
    for layer, original in floats.items():
        weight = weights[layer]
        if weight.shape != original.shape or not bool(weight.isfinite().all()):
            raise BrokenRowError(f"{name}: {layer} has another shape or values that are not finite")
        error = float((weight - original).square().sum(dtype=torch.float64))
        if error == 0:
            raise BrokenRowError(f"{name}: {layer} holds the original weights")
        squared += error
        reference += float(original.square().sum(dtype=torch.float64))
        if spec is None:
            continue
        allowed = groups_of(weight.shape[1], spec) << spec.bits
        found = most_distinct(weight)
        if found > allowed:
            raise BrokenRowError(
                f"{name}: a row of {layer} has {found} distinct values, {spec} has {allowed}"
            )
        rounding += rounding_error(original, spec)
    if spec is None and squared >= reference:
        raise BrokenRowError(f"{name}: the weights are farther from the original ones than zeros")
    if spec is not None and squared > ERROR_LIMIT * rounding:
        raise BrokenRowError(
            f"{name}: the squared error of the weights is {squared / rounding:.1f} times that of "
            "plain rounding: were they dequantized as they were quantized?"
        )
    return squared / reference


def rounding_error(weight: Tensor, spec: QuantSpec) -> float:
    """Expected squared error of plain rounding of [out, in] between minimum and maximum."""
    width = weight.shape[1] if spec.group_size == PER_CHANNEL else spec.group_size
    total = 0.0
    for group in weight.split(width, dim=1):
        low, high = group.aminmax(dim=1)
        step = (high - low).double() / (2**spec.bits - 1)
        total += float(step.square().sum()) * group.shape[1] / 12
    return total


def most_distinct(weight: Tensor) -> int:
    """Largest number of distinct values in a row, of rows spread evenly over [out, in]."""
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)].sort(dim=1).values
    return int((rows.diff(dim=1) != 0).sum(dim=1).max()) + 1
