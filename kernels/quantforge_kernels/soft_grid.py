"""Weights drawn softly to a uniform grid: definition in torch, and the C++ that runs.

A weight w of a group with scale s and zero z lies at x = w / s, in steps of the grid. Level k, for
k = 0 .. top, is at k − z and draws it with the probability

    p_k = softmax_k( −(x − (k − z))² / T ),    soft = s Σ_k p_k (k − z),
    out = (1 − pressure) w + pressure soft

T is the temperature, in squared steps. With Var the variance of k under p and g the gradient of a
loss with respect to `out`, exactly,

    slope D = ∂ soft / ∂w = 2 Var / T          (T = 0: 1 within reach of the grid, else 0)
    for w       g · ((1 − pressure) + pressure · D)
    for scale   Σ g · pressure · (soft / s − x D) over the group

At T = 0 the nearest level is taken and its gradient passed straight through; with reach 0 that is
LSQ's (Esser et al., arXiv 1902.08153), `round(x) − x` inside the grid and the end level outside.

Few levels matter. Relative to the nearest one, at distance f ∈ [−½, ½], the level j steps away has
the weight exp((2jf − j²)/T), so all beyond the radius r together have at most

    Σ_{j>r} exp(−(j² − j)/T) + exp(−(j² + j)/T)

(the sum is even and convex in f: its maximum is at ½; beyond the ends of the grid it is smaller
still). The radius is the smallest with that below NEGLECTED. Nothing but weight and scale is kept
for the backward pass, and no tensor a level is ever made.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantforge_kernels import native

# Weight of the levels that are left out, relative to the nearest one's; float64 is for checking.
NEGLECTED = 1e-7
NEGLECTED_IN_DOUBLE = 1e-17
LARGEST_RADIUS = 16  # of the C++; temperatures that need more have no use in training
UNDERFLOW = 746.0  # exp(-746) is 0 in float64
SHARPEST = 1e12  # 1 / T is cut here: float32 positions are coarser than such steps
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# The C++ source beside this file, and how it is compiled.
SOURCE = "soft_grid"
OPTIONS = native.Options(math=native.IN_ORDER)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftGrid:
    """What all groups of a weight share.

    Attributes:
        top: the largest code, 1 .. 255.
        temperature: in squared steps of the grid; 0 takes the nearest level.
        pressure: share of the softly quantized weight in what is made, 0 .. 1.
        reach: steps beyond the last levels from where a gradient still passes at temperature 0.
    """

    top: int
    temperature: float = 0.0
    pressure: float = 1.0
    reach: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.top <= 255:
            raise ValueError(f"the largest code must be 1..255, got {self.top}")
        if not self.temperature >= 0.0:
            raise ValueError(f"a temperature is not negative, got {self.temperature}")
        if not 0.0 <= self.pressure <= 1.0:
            raise ValueError(f"pressure must be 0..1, got {self.pressure}")

    def radius(self, dtype: torch.dtype = torch.float32) -> int:
        """Levels on each side of the nearest one that count; 0 for hard rounding."""
        if self.temperature == 0.0:
            return 0
        allowed = NEGLECTED_IN_DOUBLE if dtype == torch.float64 else NEGLECTED
        enough = (one for one in range(1, self.top) if self.neglected(one) <= allowed)
        return next(enough, self.top)

    def neglected(self, radius: int) -> float:
        """The most weight that levels beyond `radius` have, relative to the nearest one's."""
        if self.temperature == 0.0:
            return 0.0
        total = 0.0
        for j in range(radius + 1, self.top + 1):
            if j * j - j > UNDERFLOW * self.temperature:
                break
            total += math.exp((j - j * j) / self.temperature)
            total += math.exp(-(j * j + j) / self.temperature)
        return total


def soft_grid(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: SoftGrid,
    dtype: torch.dtype | None = None,
    *,
    native_code: bool = True,
) -> Tensor:
    """The weight as the grid draws it; can be differentiated once, by weight and scale.

    Args:
        weight: [out, in], any float dtype; arithmetic is float32, of float64 weights float64.
        scale: [out, groups], not 0, of either sign.
        zero: the code that means 0, [out, groups] or [] for all; whole or not; no gradient.
        grid: levels, temperature and pressure.
        dtype: of what is made; the weight's if None.
        native_code: use the C++ version where there is one.

    Returns:
        [out, in]. With pressure 0 it is the weight itself; with pressure 1 and temperature 0 it is
        (code − zero) · scale with the codes of rounding to nearest.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    fits = scale.ndim == 2 and weight.ndim == 2 and len(weight) == len(scale)
    if not fits or scale.shape[1] == 0 or weight.shape[1] % scale.shape[1]:
        raise ValueError(f"weights {tuple(weight.shape)} have no scales {tuple(scale.shape)}")
    if zero.ndim and zero.shape != scale.shape:
        raise ValueError(f"zeros {tuple(zero.shape)} are not one a scale {tuple(scale.shape)}")
    made: Tensor = _SoftGrid.apply(  # type: ignore[no-untyped-call]
        weight, scale, zero, grid, dtype or weight.dtype, native_code
    )
    return made


def soft_grid_reference(weight: Tensor, scale: Tensor, zero: Tensor, grid: SoftGrid) -> Tensor:
    """`soft_grid` at a temperature above 0 by its definition, all levels at once, for autograd."""
    groups = weight.view(*scale.shape, -1, 1)
    levels = torch.arange(grid.top + 1, dtype=weight.dtype, device=weight.device)
    levels = levels - (zero.view(*scale.shape, 1, 1) if zero.ndim else zero)
    position = groups / scale.view(*scale.shape, 1, 1)
    chance = torch.softmax(-(position - levels).square() / grid.temperature, -1)
    soft = ((chance * levels).sum(-1) * scale.unsqueeze(-1)).view_as(weight)
    return (1.0 - grid.pressure) * weight + grid.pressure * soft


class _SoftGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        grid: SoftGrid,
        dtype: torch.dtype,
        native_code: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.grid, ctx.native_code = grid, native_code
        if grid.pressure == 0.0:  # also where a scale is useless
            return weight.detach().clone() if weight.dtype == dtype else weight.detach().to(dtype)
        return _forward(weight.detach(), scale.detach(), zero, grid, dtype, native_code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero = ctx.saved_tensors
        rest = (None, None, None, None)
        if ctx.grid.pressure == 0.0:
            return gradient.to(weight.dtype), torch.zeros_like(scale), *rest
        for_weight, for_scale = _backward(gradient, weight, scale, zero, ctx.grid, ctx.native_code)
        return for_weight, for_scale.to(scale.dtype), *rest


def _forward(
    weight: Tensor, scale: Tensor, zero: Tensor, grid: SoftGrid, dtype: torch.dtype, wanted: bool
) -> Tensor:
    """[out, in] in `dtype`."""
    library = _native(weight, grid, dtype, wanted)
    if library is None:
        wide = _wide(weight)
        level, _, _ = _soften(weight.to(wide), scale.to(wide), zero.to(wide), grid, slope=False)
        soft = (level * scale.to(wide).unsqueeze(-1)).view_as(weight)
        if grid.pressure < 1.0:
            soft = (1.0 - grid.pressure) * weight.to(wide) + grid.pressure * soft
        return soft.to(dtype)
    weight, scale, zero = weight.contiguous(), *_narrow(scale, zero)
    made = torch.empty_like(weight, dtype=dtype)
    library.qf_soft_weight(
        *_described(weight, scale, zero, grid), *_typed(weight),
        native.pointer(scale), native.pointer(zero), *_typed(made),
    )  # fmt: skip
    return made


def _backward(
    gradient: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, grid: SoftGrid, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, in its dtype, and of the scale."""
    library = _native(weight, grid, gradient.dtype, wanted)
    if library is None:
        wide = _wide(weight)
        level, position, slope = _soften(
            weight.to(wide), scale.to(wide), zero.to(wide), grid, slope=True
        )
        grouped = gradient.to(wide).reshape(level.shape)
        moved = torch.where(slope == 0.0, 0.0, position * slope)  # a position may be infinite
        for_scale = grid.pressure * (grouped * (level - moved)).sum(-1)
        for_weight = grouped * (1.0 - grid.pressure + grid.pressure * slope)
        return for_weight.view_as(weight).to(weight.dtype), for_scale
    gradient, weight = gradient.contiguous(), weight.contiguous()
    scale, zero = _narrow(scale, zero)
    for_weight, for_scale = torch.empty_like(weight), torch.empty_like(scale)
    library.qf_soft_gradients(
        *_described(weight, scale, zero, grid), *_typed(gradient), *_typed(weight),
        native.pointer(scale), native.pointer(zero),
        native.pointer(for_weight), native.pointer(for_scale),
    )  # fmt: skip
    return for_weight, for_scale


def _soften(
    weight: Tensor, scale: Tensor, zero: Tensor, grid: SoftGrid, *, slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Expected code − zero, position x and slope D, [out, groups, width] each.

    Without `slope` the last is of no use.
    """
    shift = zero.unsqueeze(-1) if zero.ndim else zero
    width = weight.shape[1] // scale.shape[1]
    position = weight.reshape(*scale.shape, width) / scale.unsqueeze(-1)
    code = position + shift
    nearest = code.round().clamp(0, grid.top)
    level = nearest - shift
    if grid.temperature == 0.0:
        inside = (code >= -grid.reach) & (code <= grid.top + grid.reach)
        return level, position, inside.to(weight.dtype)
    sharpness = min(1.0 / grid.temperature, SHARPEST)
    twice = 2.0 * (position - level)
    total, first, second = torch.ones_like(level), torch.zeros_like(level), torch.zeros_like(level)
    for step in range(1, grid.radius(weight.dtype) + 1):
        for signed in (step, -step):
            share = torch.exp(((signed * twice - step * step) * sharpness).clamp_max(0.0))
            share.mul_((nearest <= grid.top - step) if signed > 0 else (nearest >= step))
            total += share
            first.add_(share, alpha=signed)
            if slope:
                second.add_(share, alpha=step * step)
    mean = first / total
    return level + mean, position, (second / total - mean * mean) * (2.0 * sharpness)


def _wide(weight: Tensor) -> torch.dtype:
    """What arithmetic is done in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _library() -> ctypes.CDLL | None:
    """The native library, or None (with one warning) where it cannot be built."""
    return native.optional(
        SOURCE,
        "soft grids run in torch, many times slower",
        ("qf_soft_weight", "qf_soft_gradients"),
        OPTIONS,
    )


def _native(weight: Tensor, grid: SoftGrid, other: torch.dtype, wanted: bool) -> ctypes.CDLL | None:
    """The library where it is wanted and has these dtypes and this temperature."""
    supported = weight.dtype in NATIVE_DTYPES and other in NATIVE_DTYPES
    if not (wanted and supported and weight.device.type == "cpu"):
        return None
    return _library() if grid.radius() <= LARGEST_RADIUS else None


class _Layer(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("zero_stride", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


class _Grid(ctypes.Structure):
    """The C++ names of the same; see soft_grid.cpp."""

    _fields_ = (
        ("top", ctypes.c_float),
        ("keep", ctypes.c_float),
        ("pressure", ctypes.c_float),
        ("reach", ctypes.c_float),
        ("sharpness", ctypes.c_float),
        ("variance_slope", ctypes.c_float),
        ("radius", ctypes.c_int32),
        ("zeroth", ctypes.c_float * (LARGEST_RADIUS + 1)),
        ("first", ctypes.c_float * (LARGEST_RADIUS + 1)),
        ("second", ctypes.c_float * (LARGEST_RADIUS + 1)),
    )

    @classmethod
    def of(cls, grid: SoftGrid) -> _Grid:
        radius = grid.radius()
        inverse = min(1.0 / grid.temperature, SHARPEST) if radius else 0.0
        ratios = [math.exp((j - j * j) * inverse) for j in range(radius + 1)]
        return cls(
            top=grid.top, keep=1.0 - grid.pressure, pressure=grid.pressure, reach=grid.reach,
            sharpness=math.log2(math.e) * inverse, variance_slope=2.0 * inverse, radius=radius,
            zeroth=tuple(ratios), first=tuple(j * one for j, one in enumerate(ratios)),
            second=tuple(j * j * one for j, one in enumerate(ratios)),
        )  # fmt: skip


def _described(weight: Tensor, scale: Tensor, zero: Tensor, grid: SoftGrid) -> tuple[Any, Any]:
    """Layer and grid as the library takes them."""
    out, groups = scale.shape
    width, threads = weight.shape[1] // groups, torch.get_num_threads()
    layer = _Layer(out, groups, width, int(zero.ndim > 0), threads)
    return ctypes.byref(layer), ctypes.byref(_Grid.of(grid))


def _narrow(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero as the library reads them: float32 and contiguous."""
    return scale.float().contiguous(), zero.float().contiguous()


def _typed(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int]:
    """Address of a tensor, and whether it is float32."""
    return native.pointer(tensor), ctypes.c_int(tensor.dtype == torch.float32)
