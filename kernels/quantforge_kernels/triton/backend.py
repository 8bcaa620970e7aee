"""The GPU kernels as a backend: what they can run, and the operators over prepared weights.

`prepare` repacks a weight on its device, once, at load; the three tensors it returns are those of
`DeviceWeight`. Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quantforge_kernels.geometry import Geometry
from quantforge_kernels.reference import PER_CHANNEL
from quantforge_kernels.triton import linear as operators
from quantforge_kernels.triton.repack import GROUP_STEP, DeviceWeight, padded_group, repack

DTYPES = (torch.bfloat16, torch.float16)
GROUP_SIZES = (PER_CHANNEL, *range(GROUP_STEP, 4096 + 1, GROUP_STEP))


@cache
def unavailable() -> str:
    """Why the kernels cannot run on this machine; empty if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton, Linux only)"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds no GPU" if built else "this torch is built for the CPU only"
    return ""


def prepare(
    words: Tensor, scale: Tensor, zero: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales and zero-points of a `DeviceWeight`."""
    weight = repack(words, scale, zero, geometry.bits, geometry.group_size, geometry.in_features)
    return weight.words, weight.scale, weight.zero


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: Geometry,
    bias: Tensor | None,
    mode: str,
) -> Tensor:
    """`x @ weight.T + bias`; in mode "a8" with the input rounded to int8 by token."""
    run = operators.linear_int8 if mode == "a8" else operators.linear
    return run(x, _weight(codes, scale, zero, geometry), bias)


def input_gradient(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, geometry: Geometry
) -> Tensor:
    """`gradient @ weight`."""
    return operators.input_gradient(gradient, _weight(codes, scale, zero, geometry))


def embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the weight.

    Raises:
        IndexError: an id on the CPU (the interpreter's) is no row. On a GPU, where looking at ids
            would wait for the device, the kernel asserts it: see `linear.embedding`.
    """
    if ids.device.type == "cpu":
        geometry.check_ids(ids)
    return operators.embedding(ids, _weight(codes, scale, zero, geometry), dtype)


def unprepared_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`qlinear` on the file's words, which are repacked in every call: prepare them instead."""
    return operators.linear(x, repack(words, scale, zero, bits, group_size, x.shape[-1]), bias)


def _weight(codes: Tensor, scale: Tensor, zero: Tensor | None, geometry: Geometry) -> DeviceWeight:
    return DeviceWeight(
        words=codes,
        scale=scale,
        zero=zero,
        bits=geometry.bits,
        group_size=padded_group(geometry.group_size, geometry.in_features),
        out_features=geometry.out_features,
        in_features=geometry.in_features,
    )
