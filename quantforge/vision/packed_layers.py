"""Layers that keep their weight packed: on activation codes, or on float numbers.

A layer whose input has a grid multiplies integers: `CodedLayer`, on images or on rows, whose output
is numbers or codes. One whose input has none decodes its weight and takes its input as it is:
`WeightOnlyLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantforge_kernels.convolution import qconv2d
from quantforge_kernels.integer_convolution import IntegerConvolution, IntegerWeight
from quantforge_kernels.integer_layout import Places
from quantforge_kernels.integer_outputs import Codes, Dyadic, Floats, Output, dyadic
from quantforge_kernels.layout import pack
from quantforge_kernels.ops import qlinear
from quantforge_kernels.reference import dequantize
from torch import Tensor, nn
from torch.nn import functional

from quantforge.errors import UsageError
from quantforge.types import QuantizedWeight
from quantforge.vision.network import ActivationGrid, kernel_of

_LARGEST_SUM = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Zeros around images: down and across, before and after."""

    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)


NO_MARGINS = Margins()


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Down and across, from one number for both or from two (or a sequence of one)."""
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])


def places_of(layer: Any, margins: Margins = NO_MARGINS) -> Places:
    """Where a `Conv2d` or a `Linear` reads.

    Args:
        layer: float.
        margins: further zeros around its images.

    Raises:
        UsageError: the layer pads with something else than zeros on both sides alike.
    """
    if isinstance(layer, nn.Linear):
        return Places()
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UsageError(
            f"a convolution pads with {layer.padding_mode} {layer.padding}; make it a padding of "
            "zeros in numbers first"
        )
    down, across = pair(layer.padding)
    before, after = ((down + more[0], across + more[1]) for more in (margins.before, margins.after))
    return Places(
        kernel=pair(layer.kernel_size), stride=pair(layer.stride), padding=before, after=after,
        dilation=pair(layer.dilation), groups=layer.groups,
    )  # fmt: skip


def codes_output(grid: ActivationGrid, low: float, high: float) -> Codes:
    """Codes on `grid` of numbers clamped to [low, high], the clamp in codes.

    Rounding is monotone, so the code of the clamped number is the clamped code.
    """
    ends = [grid.zero + min(max(round(end / grid.scale), -256), 256) if abs(end) < 1e30 else None
            for end in (low, high)]  # fmt: skip
    least = 0 if ends[0] is None else min(max(ends[0], 0), grid.top)
    most = grid.top if ends[1] is None else min(max(ends[1], 0), grid.top)
    return Codes(scale=grid.scale, zero=grid.zero, least=least, most=most)


def dyadic_output(
    name: str, weight: QuantizedWeight, bias: Tensor, source: ActivationGrid, codes: Codes
) -> Dyadic:
    """The same through integers alone.

    Raises:
        UsageError: the layer's scales do not allow it.
    """
    if weight.scale.shape[1] != 1:
        raise UsageError(
            f"{name} has groups of scales, which integers alone do not rescale; quantize it per "
            "channel, or run without the dyadic option"
        )
    own = weight.scale[:, 0].double() * source.scale
    if not bool((own != 0).all()):
        raise UsageError(f"{name} has a scale of 0; run it without the dyadic option")
    offset = (bias.double() / own).round()
    most = 255 * 255 * weight.codes.shape[1] + int(offset.abs().max())
    if most > _LARGEST_SUM:
        raise UsageError(f"{name} has sums that do not fit 32 bits; run without the dyadic option")
    multiplier, shift = dyadic(own / codes.scale)
    return Dyadic(
        multiplier=multiplier, shift=shift, offset=offset.int(), zero=codes.zero,
        least=codes.least, most=codes.most,
    )  # fmt: skip


def integer_weight(
    layer: Any, weight: QuantizedWeight, margins: Margins = NO_MARGINS
) -> IntegerWeight:
    """The weight as the kernels take it."""
    linear = isinstance(layer, nn.Linear)
    return IntegerWeight(
        words=pack(weight.codes, weight.spec.bits), scale=weight.scale, zero=weight.zero,
        bits=weight.spec.bits, group_size=weight.spec.group_size,
        channels=layer.in_features if linear else layer.in_channels,
        places=places_of(layer, margins),
    )  # fmt: skip


class CodedLayer(nn.Module):
    """A convolution or a linear layer on codes.

    Args:
        layer: the float `Conv2d` or `Linear`; its weight is not read.
        weight: integers.
        bias: [out] float32.
        source: grid of the input.
        output: what is made of the sums.
        margins: zeros around images beside the layer's own padding.
        native_code: whether to use the C++ where it can be built.
    """

    def __init__(
        self,
        layer: Any,
        weight: QuantizedWeight,
        bias: Tensor,
        source: ActivationGrid,
        output: Output,
        *,
        margins: Margins = NO_MARGINS,
        native_code: bool = True,
    ) -> None:
        super().__init__()
        self.images = not isinstance(layer, nn.Linear)
        self.run = IntegerConvolution(
            integer_weight(layer, weight, margins), source.scale, source.zero, bias, output,
            native_code,
        )  # fmt: skip

    @property
    def stored_bytes(self) -> int:
        """Bytes it keeps in memory."""
        return self.run.stored_bytes

    def forward(self, codes: Tensor) -> Tensor:
        """[batch, in, height, width] or [..., in] uint8 → float32 or uint8 of that form."""
        if self.images:
            return self.run(codes)
        made = self.run(codes.reshape(-1, codes.shape[-1], 1, 1))
        return made.reshape(*codes.shape[:-1], made.shape[1])


class WeightOnlyLayer(nn.Module):
    """A convolution, transposed convolution or linear layer on numbers, its weight packed.

    Args:
        layer: the float layer; its weight is not read.
        weight: integers.
        bias: [out] float32.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor

    def __init__(self, layer: Any, weight: QuantizedWeight, bias: Tensor) -> None:
        super().__init__()
        self.spec, self.columns = weight.spec, weight.codes.shape[1]
        self.transposed = isinstance(layer, nn.ConvTranspose2d)
        self.linear = isinstance(layer, nn.Linear)
        # Its numbers, without its weight.
        self.shape = layer if self.linear else _without_weight(layer)
        self.register_buffer("words", pack(weight.codes, weight.spec.bits))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", bias.float())
        if self.linear:
            del self.shape

    @property
    def stored_bytes(self) -> int:
        """Bytes it keeps in memory."""
        return sum(one.numel() * one.element_size() for one in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """Float32 → float32."""
        packed = (self.words, self.scale, self.zero, self.spec.bits, self.spec.group_size)
        if self.linear:
            return qlinear(x, *packed, self.bias)
        if self.transposed:
            shape = (self.words.shape[0], self.columns)
            kernel = kernel_of(self.shape, dequantize(*packed, shape, x.dtype))
            layer: Any = self.shape
            return functional.conv_transpose2d(
                x, kernel, self.bias, layer.stride, layer.padding, layer.output_padding,
                layer.groups, layer.dilation,
            )  # fmt: skip
        places = places_of(self.shape)
        return qconv2d(
            x, *packed, places.kernel, self.bias, stride=places.stride, padding=places.padding,
            dilation=places.dilation, groups=places.groups,
        )  # fmt: skip


def _without_weight(layer: Any) -> Any:
    """A convolution of the same numbers whose tensors take no memory."""
    numbers = {
        "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation,
        "groups": layer.groups, "padding_mode": layer.padding_mode, "device": "meta",
    }  # fmt: skip
    if isinstance(layer, nn.ConvTranspose2d):
        numbers["output_padding"] = layer.output_padding
    return type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, **numbers)


def float_output(low: float, high: float) -> Floats:
    """Numbers clamped to [low, high]."""
    return Floats(low=low, high=high)
