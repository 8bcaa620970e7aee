"""Convolution of activation codes with a packed weight: its definition, and the C++ that runs it.

Activations are uint8 codes that mean `(q − z) · s`, a weight is `(c − z') · s'` of 2 to 8 bits with
a scale for a row or a group of it. So a convolution is the exact integer sums Σ (q − z)(c − z'),
which a scale for every group makes numbers, and the output's grid codes again. Padding is the code
that means 0.

The C++ keeps a weight in memory at the bits of its codes, in an order of its own, and decodes
sixty-four output channels at a time into bytes that stay in the cache while they are used. A linear
layer is the convolution of one place. Without a compiler the definition runs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantforge_kernels import native
from quantforge_kernels.integer_layout import (
    BLOCK,
    SLOT,
    UNIT,
    Places,
    block_channels,
    column_order,
    dense_slots,
    depthwise_slots,
    planes,
    runs_of,
    tiled,
)
from quantforge_kernels.integer_outputs import Codes, Dyadic, Floats, Output, finished
from quantforge_kernels.layout import unpack
from quantforge_kernels.ops import check_weight
from quantforge_kernels.reference import group_width

SOURCE = "convolution"
OPTIONS = native.Options(math=native.IN_ORDER)
PROCEDURES = ("qf_convolve", "qf_depthwise")
MOST_COLUMNS = 32768  # sums of products of two bytes stay within 32 bits

_KINDS = {Floats: 0, Codes: 1, Dyadic: 2}


def library() -> ctypes.CDLL | None:
    """The native library, or None (with one warning) where it cannot be built."""
    return native.optional(
        SOURCE, "convolutions on codes run in torch, many times slower", PROCEDURES, OPTIONS
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """The weight of a convolution in the order of a checkpoint.

    Attributes:
        words: [out, ceil(in / groups · height · width · bits / 32)] int32.
        scale: [out, groups of a row] floating point.
        zero: [out, groups of a row] uint8, or None for a symmetric weight.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        channels: of the input.
        places: where it reads.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    channels: int
    places: Places

    def __post_init__(self) -> None:
        if self.words.dim() != 2:
            raise ValueError(f"words must be int32 [out, n], got {tuple(self.words.shape)}")
        groups = self.places.groups
        if self.channels % groups or self.out_channels % groups:
            raise ValueError(
                f"{groups} groups do not divide {self.channels} channels in and "
                f"{self.out_channels} out"
            )
        if self.columns > MOST_COLUMNS:
            raise ValueError(f"rows of {self.columns} weights do not fit sums of 32 bits")
        check_weight(self.words, self.scale, self.zero, self.bits, self.group_size, self.columns)

    @property
    def out_channels(self) -> int:
        """Rows."""
        return int(self.words.shape[0])

    @property
    def columns(self) -> int:
        """Weights of a row."""
        height, width = self.places.kernel
        return self.channels // self.places.groups * height * width

    def differences(self) -> Tensor:
        """[out, groups of a row, width] int64 `code − zero`."""
        codes = unpack(self.words, self.bits, self.columns).long().view(*self.scale.shape, -1)
        if self.zero is None:
            return codes - (1 << (self.bits - 1))
        return codes - self.zero.long().unsqueeze(-1)


def integer_sums(x: Tensor, zero: int, weight: IntegerWeight) -> Tensor:
    """The exact sums of every group of a scale.

    Args:
        x: [batch, in, height, width] uint8 codes.
        zero: the code that means 0.
        weight: packed.

    Returns:
        [batch, out, groups of a row, height, width] int64.
    """
    places, differences = weight.places, weight.differences()
    groups, width = differences.shape[1:]
    (top, left), (bottom, right) = places.padding, places.ends
    padded = functional.pad(x.double() - zero, (left, right, top, bottom))
    made = []
    for group in range(groups):
        rows = torch.zeros(weight.out_channels, groups, width, dtype=torch.float64)
        rows[:, group] = differences[:, group].double()
        kernel = rows.view(weight.out_channels, -1, *places.kernel)
        sums = functional.conv2d(
            padded, kernel, None, places.stride, 0, places.dilation, places.groups
        )
        made.append(sums.round().long())
    return torch.stack(made, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """A weight in the kernels' order; see `cpu/codes.h`."""

    depthwise: bool
    direct: bool
    codes: Tensor
    zeros: Tensor | None
    sums: Tensor
    shifts: Tensor | None
    scales: Tensor
    runs: Tensor
    numbers: tuple[int, int, int, int]
    row_bytes: int
    lanes: Tensor  # row of every lane, or -1


def _ordered(weight: IntegerWeight, scale: Tensor) -> _Order:
    """Repack a weight; `scale` is that of weight and input together."""
    one_scale = weight.scale.shape[1] == 1
    wide = weight.bits == 8 and weight.zero is not None  # differences do not fit a signed byte
    alone = weight.places.groups == weight.channels == weight.out_channels
    return _depthwise(weight, scale) if alone and one_scale and not wide else _dense(weight, scale)


def _rows(weight: IntegerWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """[out, columns] codes, [out, groups] centres, and what is to be added to every difference."""
    codes = unpack(weight.words, weight.bits, weight.columns)
    middle = torch.full(weight.scale.shape, 1 << (weight.bits - 1), dtype=torch.uint8)
    if weight.zero is None:
        return codes, middle, None
    if weight.bits == 8:
        return codes, middle, middle.int() - weight.zero.int()
    return codes, weight.zero, None


def _dense(weight: IntegerWeight, scale: Tensor) -> _Order:
    places = weight.places
    codes, centre, shift = _rows(weight)
    out, groups = weight.scale.shape
    width = group_width(weight.group_size, weight.columns)
    order = column_order(places, weight.channels // places.groups, width)
    # One column more for every group: the centre, with which its columns are filled up.
    columns = torch.cat([codes, centre], 1)
    fill = weight.columns + torch.arange(groups).unsqueeze(1)
    filled = torch.where(order < 0, fill, order)
    middle = torch.tensor(1 << (weight.bits - 1), dtype=torch.uint8)
    parts = places.groups
    slots = dense_slots(tiled(columns, parts, middle), filled)
    last = tiled(centre, parts, middle)[:, :, -1].view(-1, 1, 16, 1)
    difference = codes.view(out, groups, -1).int() - centre.int().unsqueeze(-1)
    nothing = torch.zeros(())

    def by_lane(values: Tensor, filler: Tensor = nothing) -> Tensor:
        return tiled(values, parts, filler).transpose(1, 2).contiguous()  # [tiles, groups, 16]

    own = weight.zero is not None and shift is None
    zeros = by_lane(centre, middle).unsqueeze(-1).expand(-1, -1, -1, SLOT).contiguous()
    plain = places.kernel == places.stride == (1, 1) and places.padding == places.ends == (0, 0)
    straight = bool((order.flatten() == torch.arange(order.numel())).all())
    return _Order(
        depthwise=False,
        direct=plain and places.groups == 1 and straight,
        codes=planes(slots, weight.bits, last),
        zeros=zeros if own else None,
        sums=by_lane(difference.sum(-1).int()),
        shifts=None if shift is None else by_lane(shift),
        scales=by_lane(scale),
        runs=runs_of(order, places, weight.channels),
        numbers=(-(-slots.shape[1] // UNIT), groups, order.shape[1] // SLOT, weight.bits),
        row_bytes=order.numel(),
        lanes=tiled(torch.arange(out), parts, torch.tensor(-1)).flatten(),
    )


def _depthwise(weight: IntegerWeight, scale: Tensor) -> _Order:
    codes, centre, _ = _rows(weight)
    out = weight.out_channels
    lanes = torch.full((-(-out // BLOCK) * BLOCK,), -1)
    lanes[:out] = torch.arange(out)
    inside = lanes >= 0
    middle = torch.full(lanes.shape, 1 << (weight.bits - 1), dtype=torch.uint8)
    filler = middle.clone()
    filler[inside] = centre[:, 0]
    rows = middle.unsqueeze(1).repeat(1, codes.shape[1])
    rows[inside] = codes
    slots = depthwise_slots(rows, weight.places.kernel, filler)
    count = slots.shape[1]
    channel = (torch.arange(len(slots)).view(-1, 1, 1) * BLOCK + block_channels()).flatten()
    by_vector = filler[channel].view(len(slots), 1, 4, 16, 1)
    by_slot = by_vector.expand(-1, count // 4, -1, -1, SLOT).reshape(len(slots), count, 16, SLOT)
    lanes = lanes[channel]
    taken, known = lanes.clamp(min=0), lanes >= 0
    difference = codes.int() - centre.int()
    units = -(-count // UNIT)
    missing = by_slot[:, :1].expand(-1, units * UNIT - count, -1, -1)
    return _Order(
        depthwise=True,
        direct=False,
        codes=planes(torch.cat([slots, missing], 1), weight.bits, torch.tensor(0)),
        zeros=None if weight.zero is None else torch.cat([by_slot, missing], 1).contiguous(),
        sums=torch.where(known, difference.sum(-1).int()[taken], 0).int(),
        shifts=None,
        scales=torch.where(known, scale[:, 0][taken], 0.0),
        runs=torch.zeros(1, 6, dtype=torch.int64),
        numbers=(units, units * UNIT, 1, weight.bits),
        row_bytes=0,
        lanes=lanes,
    )


@dataclass(slots=True)
class IntegerConvolution:
    """A convolution of codes, ready to run.

    Args:
        weight: packed; kept only where the definition runs.
        scale: of the input's grid.
        zero: its code that means 0.
        bias: [out] float32; not of a `Dyadic` output.
        output: what is made of the sums.
        native_code: whether to use the C++ where it can be built.
    """

    weight: IntegerWeight | None
    scale: float
    zero: int
    bias: Tensor
    output: Output
    native_code: bool = True
    out_channels: int = field(init=False)
    channels: int = field(init=False)
    places: Places = field(init=False)
    _library: ctypes.CDLL | None = field(init=False)
    _order: _Order | None = field(init=False, default=None)
    _arrays: tuple[Tensor | None, ...] = field(init=False, default=())
    _call: tuple[Any, ...] | None = field(init=False, default=None)
    _last: tuple[Any, ...] | None = field(init=False, default=None)  # of the last images' shape

    def __post_init__(self) -> None:
        weight = self.weight
        assert weight is not None
        if tuple(self.bias.shape) != (weight.out_channels,):
            raise ValueError(f"bias must be [{weight.out_channels}], got {tuple(self.bias.shape)}")
        if isinstance(self.output, Dyadic) and weight.scale.shape[1] != 1:
            raise ValueError("integers alone rescale a layer of one scale a row, not of groups")
        self.out_channels, self.channels = weight.out_channels, weight.channels
        self.places = weight.places
        self.bias = self.bias.float()
        on_cpu = self.native_code and weight.words.device.type == "cpu"
        self._library = library() if on_cpu else None
        if self._library is not None:
            scale = weight.scale.float() * torch.tensor(self.scale, dtype=torch.float32)
            self._order = _ordered(weight, scale)
            self._arrays = self._lane_arrays(self._order)
            self.weight = None

    def _lane_arrays(self, order: _Order) -> tuple[Tensor | None, ...]:
        """Bias, offsets, multipliers and shifts of every lane, those that the output needs."""
        taken, known = order.lanes.clamp(min=0), order.lanes >= 0
        if not isinstance(self.output, Dyadic):
            return torch.where(known, self.bias[taken], 0.0), None, None, None
        output = self.output
        offset, multiplier, shift = (
            torch.where(known, one[taken], filler).int()
            for one, filler in ((output.offset, 0), (output.multiplier, 0), (output.shift, 1))
        )
        return None, offset, multiplier, shift

    @property
    def stored_bytes(self) -> int:
        """Bytes of all it keeps in memory."""
        order = self._order
        if order is None or self.weight is not None:
            weight = self.weight
            assert weight is not None
            kept = [weight.words, weight.scale, weight.zero, self.bias]
        else:
            kept = [order.codes, order.zeros, order.sums, order.shifts, order.scales, order.runs]
            kept += self._arrays
        return sum(one.numel() * one.element_size() for one in kept if one is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] uint8 → [batch, out, height, width], channels last in memory.

        Raises:
            ValueError: `x` is nothing that the layer reads.
        """
        if x.dim() != 4 or x.dtype != torch.uint8 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be uint8 [batch, {self.channels}, height, width], got {x.dtype} "
                f"{tuple(x.shape)}"
            )
        if self._order is None or self._library is None:
            assert self.weight is not None
            sums = integer_sums(x, self.zero, self.weight)
            scale = self.weight.scale.float() * torch.tensor(self.scale, dtype=torch.float32)
            made = finished(sums, scale, self.bias, self.output)
            return made.contiguous(memory_format=torch.channels_last)
        return self._run(self._library, self._order, x)

    def _constant(self, order: _Order) -> tuple[Any, ...]:
        """What a call passes beside images and threads; made once, since making it takes time."""
        output, places = self.output, self.places
        grid = (0, 0, 0) if isinstance(output, Floats) else (output.zero, output.least, output.most)
        inverse = 1.0 / output.scale if isinstance(output, Codes) else 0.0
        limits = (output.low, output.high) if isinstance(output, Floats) else (0.0, 0.0)
        held = (order.codes, order.zeros, order.sums, order.shifts, order.scales)
        kernel: Any = native.pointer(order.runs)
        if order.depthwise:
            kernel = (ctypes.c_int64 * 4)(*places.kernel, *places.dilation)
        return (
            kernel, (ctypes.c_int64 * 4)(*order.numbers),
            (ctypes.c_void_p * 5)(*map(_address, held)),
            (ctypes.c_int64 * 5)(_KINDS[type(output)], *grid, self.out_channels),
            (ctypes.c_float * 3)(inverse, *limits),
            (ctypes.c_void_p * 4)(*map(_address, self._arrays)),
        )  # fmt: skip

    def _sizes(self, shape: tuple[int, ...], order: _Order) -> tuple[tuple[int, ...], Any]:
        """Shape of the result of images of a shape, and the numbers that a call passes."""
        places, parts = self.places, self.places.groups
        result = (shape[0], self.out_channels, *places.size(shape[2], shape[3]))
        numbers = (
            shape[0], shape[2], shape[3], self.channels, result[2], result[3],
            *places.stride, *places.padding, parts, self.channels // parts,
            self.out_channels // parts, order.row_bytes, len(order.runs), order.direct, self.zero,
        )  # fmt: skip
        return result, (ctypes.c_int64 * 17)(*numbers)

    def _run(self, library: ctypes.CDLL, order: _Order, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if self._last is None or self._last[0] != shape:
            self._last = (shape, *self._sizes(shape, order))
        if self._call is None:
            self._call = self._constant(order)
        _, result, sizes = self._last
        x = x.contiguous(memory_format=torch.channels_last)
        kind = torch.float32 if isinstance(self.output, Floats) else torch.uint8
        made = torch.empty(result, dtype=kind, memory_format=torch.channels_last)
        if made.numel():
            run = library.qf_depthwise if order.depthwise else library.qf_convolve
            run(
                ctypes.c_void_p(x.data_ptr()), sizes, *self._call,
                torch.get_num_threads(), ctypes.c_void_p(made.data_ptr()),
            )  # fmt: skip
        return made


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
