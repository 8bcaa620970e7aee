"""How the weight of a convolution on codes is ordered for the kernels.

A packed row has the order of a flattened kernel, [channel, height, width]. The kernels want the
order in which an image [height, width, channel] holds what a position reads, and every group of a
scale for itself, filled up to four columns. So a group's columns are sorted by (height, width,
channel), and what then lies together in the image is a run. See `cpu/codes.h` for slots and
`cpu/packed.h` for planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16
SLOT = 4  # columns
UNIT = 8  # slots
BLOCK = 64  # channels of a depthwise block
VECTORS = BLOCK // LANES


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a convolution reads.

    Attributes:
        kernel: height and width.
        stride: of the output over the input, down and across.
        padding: zeros above and left of the input.
        after: zeros below and right of it; None for as many.
        dilation: distance of the kernel's places, likewise.
        groups: parts of the channels that are convolved apart.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    after: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        padding = ((self.padding, 0), (self.ends, 0))
        pairs = ((self.kernel, 1), (self.stride, 1), (self.dilation, 1), *padding)
        for pair, least in pairs:
            if len(pair) != 2 or any(type(one) is not int or one < least for one in pair):
                raise ValueError(f"{pair} is no pair of whole numbers from {least} up")
        if self.groups < 1:
            raise ValueError(f"groups must be positive, got {self.groups}")

    @property
    def ends(self) -> tuple[int, int]:
        """Zeros below and right."""
        return self.padding if self.after is None else self.after

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output of an input of that size.

        Raises:
            ValueError: the kernel reaches over more than the input.
        """
        sides = []
        for axis, side in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            room = side + self.padding[axis] + self.ends[axis] - reach
            if room < 0:
                raise ValueError(f"a kernel that reaches over {reach} places is larger than {side}")
            sides.append(room // self.stride[axis] + 1)
        return sides[0], sides[1]


def column_order(places: Places, channels: int, width: int) -> Tensor:
    """[scale groups, columns filled up to a slot] int64 indices of columns; -1 where filled up.

    Args:
        places: of the convolution.
        channels: that a row reads.
        width: columns of a scale group.
    """
    taps = places.kernel[0] * places.kernel[1]
    column = torch.arange(channels * taps)
    key = column % taps * channels + column // taps
    groups = key.view(-1, width)
    order = groups.argsort(1) + torch.arange(len(groups)).unsqueeze(1) * width
    filled = torch.full((len(groups), -(-width // SLOT) * SLOT), -1)
    filled[:, :width] = order
    return filled


def runs_of(order: Tensor, places: Places, channels: int) -> Tensor:
    """[runs, 6] int64: down, across, first channel, bytes, taps, place in the gathered row."""
    height, width = places.kernel
    found: list[list[int]] = []
    previous = (-1, -1)
    for target, index in enumerate(order.flatten().tolist()):
        if index < 0:
            previous = (-1, -1)
            continue
        channel, tap = divmod(index, height * width)
        if (tap, channel - 1) == previous:
            found[-1][3] += 1
        else:
            down, across = divmod(tap, width)
            found.append(
                [down * places.dilation[0], across * places.dilation[1], channel, 1, 1, target]
            )
        previous = (tap, channel)
    if places.groups == 1 and places.dilation[1] == 1:
        found = _joined(found, channels)
    return torch.tensor(found, dtype=torch.int64)


def _joined(runs: list[list[int]], channels: int) -> list[list[int]]:
    """Runs of all channels of neighbouring columns as one."""
    made: list[list[int]] = []
    for run in runs:
        last = made[-1] if made else None
        if (
            last is not None
            and last[3] == run[3] == channels
            and last[0] == run[0]
            and last[1] + last[4] == run[1]
            and last[5] + last[4] * channels == run[5]
        ):
            last[4] += 1
        else:
            made.append(list(run))
    return made


def tiled(rows: Tensor, parts: int, filler: Tensor) -> Tensor:
    """[out, ...] rows as [tiles, 16, ...]: those of every part filled up to whole tiles."""
    apart = rows.reshape(parts, -1, *rows.shape[1:])
    missing = -apart.shape[1] % LANES
    if missing:
        fill = filler.expand(parts, missing, *rows.shape[1:]).to(rows.dtype)
        apart = torch.cat([apart, fill], 1)
    return apart.reshape(-1, LANES, *rows.shape[1:])


def dense_slots(rows: Tensor, order: Tensor) -> Tensor:
    """[tiles, 16, columns] codes, one column more for what fills up → [tiles, slots, 16, 4]."""
    ordered = rows[..., order.flatten()]
    return ordered.view(*ordered.shape[:2], -1, SLOT).permute(0, 2, 1, 3)


def block_channels() -> Tensor:
    """[4, 16] channel of a depthwise block by vector and lane."""
    lane, vector = torch.arange(LANES), torch.arange(VECTORS).unsqueeze(1)
    return 16 * (lane // 4) + 4 * vector + lane % 4


def depthwise_slots(rows: Tensor, kernel: tuple[int, int], filler: Tensor) -> Tensor:
    """[blocks · 64, height · width] → [blocks, width · row groups · 4, 16, 4].

    Args:
        rows: a whole number of blocks of channels.
        kernel: height and width.
        filler: [blocks · 64] what rows of the kernel are filled up with.
    """
    height, width = kernel
    groups = -(-height // SLOT)
    square = filler.view(-1, 1, 1).expand(-1, groups * SLOT, width).clone()
    square[:, :height] = rows.view(-1, height, width)
    blocks = square.view(-1, BLOCK, groups, SLOT, width)[:, block_channels()]
    return blocks.permute(0, 5, 3, 1, 2, 4).flatten(1, 3)  # width, row group, vector


def planes(slots: Tensor, bits: int, filler: Tensor) -> Tensor:
    """[tiles, slots, 16, 4] uint8 codes → [tiles, units, bits, 16] int32.

    Args:
        slots: of all tiles.
        bits: width of a code.
        filler: [] or [tiles, 1, 16, 1] the codes with which the last unit is filled up.
    """
    tiles, count = slots.shape[:2]
    missing = -count % UNIT
    if missing:
        fill = filler.expand(tiles, missing, LANES, SLOT).to(slots.dtype)
        slots = torch.cat([slots, fill], 1)
    units = slots.reshape(tiles, -1, UNIT, LANES * SLOT)
    made = torch.zeros(tiles, units.shape[1], bits, LANES * SLOT, dtype=torch.uint8)
    below = first = 0
    for plane in (8, 4, 2, 1):
        if not bits & plane:
            continue
        field = (units >> below) & ((1 << plane) - 1)
        a_vector = 8 // plane
        for slot in range(UNIT):
            made[:, :, first + slot // a_vector] |= field[:, :, slot] << plane * (slot % a_vector)
        below += plane
        first += plane
    return made.view(torch.int32)
