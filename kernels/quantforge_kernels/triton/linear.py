"""The operators over a weight in GPU layout: check nothing twice, allocate, launch.

Results are sums of exact products `(code - zero) * x` in float32, scaled by group in float32. Where
the reference rounds the weight to the dtype of `x` before it multiplies, nothing is rounded here
before the result: outputs agree with the reference to its own rounding, and with the float32
reference more closely.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from quantforge_kernels.triton.launch import Device, Launch, choose_launch, read_table
from quantforge_kernels.triton.repack import DeviceWeight, repack

ARRANGE_COLUMNS = 1024
LOOKUP_ROWS = 8
REDUCE_BLOCK = 1024
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # as tables of launches have them


def linear(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None = None, *, launch: Launch | None = None
) -> Tensor:
    """`x @ weight.T + bias` with float32 sums.

    Args:
        x: [..., in] bfloat16 or float16.
        weight: the matrix.
        bias: [out] in the dtype of `x`, or None.
        launch: how to run it; None chooses.

    Returns:
        [..., out] in the dtype of `x`.
    """
    return _linear(x, weight, bias, launch, integer=False)


def linear_int8(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None = None, *, launch: Launch | None = None
) -> Tensor:
    """`linear` with the input rounded to int8 by token: the products are integers.

    Args:
        x: [..., in] bfloat16 or float16.
        weight: the matrix.
        bias: [out] in the dtype of `x`, or None.
        launch: how to run it, with the kernel "gemm"; None chooses.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: a launch of the kernel "gemv", which takes 16-bit inputs only.
    """
    if launch is not None and launch.kernel != "gemm":
        raise ValueError("int8 inputs are multiplied by the kernel 'gemm'")
    return _linear(x, weight, bias, launch, integer=True)


def input_gradient(gradient: Tensor, weight: DeviceWeight) -> Tensor:
    """Gradient of `linear` to its input: [..., out] → [..., in] in the dtype of `gradient`."""
    return gradient @ dequantize(weight, gradient.dtype)


def embedding(ids: Tensor, weight: DeviceWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, formed as the reference forms them.

    Args:
        ids: integers of any shape in [0, out). Another one on a GPU is a device-side assertion, an
            error of the next synchronization as in torch's embedding; nothing is read out of
            bounds.
        weight: the matrix.
        dtype: of the result.

    Returns:
        [*ids.shape, in] in `dtype`.
    """
    flat = ids.reshape(-1).contiguous()
    return _lookup(flat, flat.numel(), weight, dtype).view(*ids.shape, weight.in_features)


def dequantize(weight: DeviceWeight, dtype: torch.dtype) -> Tensor:
    """The whole matrix, [out, in] in `dtype`, formed as the reference forms it."""
    return _lookup(None, weight.out_features, weight, dtype)


def concatenate(
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    bits: int,
    group_size: int,
    in_features: int,
) -> tuple[DeviceWeight, tuple[int, ...]]:
    """Several matrices that read the same input (q, k, v; gate, up) as one.

    Args:
        parts: words, scale and zero of each, as `qlinear` takes them; one spec for all.
        bits: width of a code.
        group_size: columns that share a scale; -1 for the whole row.
        in_features: columns.

    Returns:
        The matrix of all rows, and the rows of each part: `linear(x, weight).split(rows, -1)` are
        the parts' outputs, views of one tensor.

    Raises:
        ValueError: parts with and without zero-points.
    """
    words, scales, zeros = zip(*parts, strict=True)
    given = [zero for zero in zeros if zero is not None]
    if given and len(given) != len(parts):
        raise ValueError("matrices with and without zero-points do not make one")
    zero = torch.cat(given) if given else None
    weight = repack(torch.cat(words), torch.cat(scales), zero, bits, group_size, in_features)
    return weight, tuple(part.shape[0] for part in words)


def _linear(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, launch: Launch | None, *, integer: bool
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    rows, size = flat.shape[0], weight.out_features
    out = x.new_empty(rows, size)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    if rows and launch is None:
        device = describe(x.device)
        launch = choose_launch(
            rows, size, weight.in_features, weight.bits, weight.group_size, device,
            dtype=DTYPE_NAMES[x.dtype], asymmetric=weight.zero is not None, integer=integer,
            table=read_table(device.name),
        )  # fmt: skip
    if rows and launch is not None:
        run = _gemv if launch.kernel == "gemv" else _gemm
        split, share = _shares(weight.words.shape[1], launch.split)
        target = out if split == 1 else out.new_empty(split, rows, size, dtype=torch.float32)
        with launching_on(x.device):
            run(flat, weight, bias if split == 1 else None, target, launch, share, integer)
            if split > 1:
                _reduce(target, bias, out)
    return out.view(*x.shape[:-1], size)


def _gemv(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, target: Tensor,
    launch: Launch, share: int, integer: bool,
) -> None:  # fmt: skip
    from quantforge_kernels.triton.device.gemv import gemv

    rows, row_tiles, units = x.shape[0], *weight.words.shape[:2]
    split = target.dim() == 3
    grid = (-(-row_tiles // launch.tiles), -(-rows // launch.rows), len(target) if split else 1)
    gemv[grid](
        x, weight.words, weight.scale, weight.zero, bias, target,
        rows, weight.out_features, weight.in_features, x.stride(0), units,
        weight.scale.shape[1], share, code_mask(weight.bits, x.dtype),
        weight.bits, weight.group_size, weight.fold, weight.zero is not None,
        bias is not None, split, weight.in_features % 128 == 0,
        launch.rows, launch.tiles, launch.warps, launch.unroll,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _gemm(
    x: Tensor, weight: DeviceWeight, bias: Tensor | None, target: Tensor,
    launch: Launch, share: int, integer: bool,
) -> None:  # fmt: skip
    from quantforge_kernels.triton.device.arrange import arrange
    from quantforge_kernels.triton.device.gemm import gemm

    rows, row_tiles, units = x.shape[0], *weight.words.shape[:2]
    asymmetric, fold = weight.zero is not None, weight.fold
    padded = -(-rows // launch.rows) * launch.rows
    kind = torch.int8 if integer else x.dtype
    arranged = x.new_empty(padded, units * 128, dtype=kind)
    lead = x.new_empty(units * 128 // fold, padded, dtype=torch.float32)
    total = lead.new_empty(lead.shape) if asymmetric else None
    token_scale = lead.new_empty(padded) if integer else None
    arrange[(padded,)](
        x, arranged, lead, total, token_scale,
        rows, weight.in_features, x.stride(0), units, padded,
        weight.bits, fold, asymmetric, integer, ARRANGE_COLUMNS,
    )  # fmt: skip
    split = target.dim() == 3
    grid = (padded // launch.rows, -(-row_tiles // launch.tiles), len(target) if split else 1)
    gemm[grid](
        arranged, lead, total, token_scale, weight.words, weight.scale, weight.zero, bias, target,
        rows, weight.out_features, padded, units, weight.scale.shape[1], share,
        code_mask(weight.bits, None if integer else x.dtype),
        triton_dtype(x.dtype), weight.bits, weight.group_size, fold, asymmetric, integer,
        bias is not None, split, launch.rows, launch.tiles, launch.warps,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _reduce(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    from quantforge_kernels.triton.device.gemv import reduce

    grid = (-(-out.numel() // REDUCE_BLOCK),)
    reduce[grid](
        partial, bias, out, out.numel(), out.shape[-1], partial.shape[0],
        bias is not None, REDUCE_BLOCK,
    )  # fmt: skip


def _lookup(ids: Tensor | None, count: int, weight: DeviceWeight, dtype: torch.dtype) -> Tensor:
    from quantforge_kernels.triton.device.lookup import lookup

    out = weight.words.new_empty(count, weight.in_features, dtype=dtype)
    units = weight.words.shape[1]
    if count:
        with launching_on(out.device):
            # The overflow checks of Triton's debug mode are not wanted, only the one of the ids.
            lookup[(-(-count // LOOKUP_ROWS), units)](
                ids, weight.words, weight.scale, weight.zero, out,
                count, weight.out_features, weight.in_features, units, weight.scale.shape[1],
                code_mask(weight.bits, None),
                weight.bits, weight.group_size, weight.zero is not None, ids is not None,
                LOOKUP_ROWS, debug=ids is not None, sanitize_overflow=False,
            )  # fmt: skip
    return out


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is the current GPU: Triton launches there, not where tensors are.

    Args:
        device: of the tensors; one that is no GPU (the interpreter's) needs no context.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def code_mask(bits: int, dtype: torch.dtype | None) -> int:
    """A code's bits in both halves of a word; a nibble's where `dtype` cannot hold the code.

    Args:
        bits: width of a code.
        dtype: of the operand, None for integers.
    """
    width = 4 if bits == 8 and dtype == torch.bfloat16 else bits
    return ((1 << width) - 1) * 0x00010001


def triton_dtype(dtype: torch.dtype) -> object:
    """Triton's name of bfloat16 or float16."""
    import triton.language as tl

    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


@cache
def describe(device: torch.device) -> Device:
    """The device, as launches are chosen for it."""
    if device.type != "cuda":
        return Device(name=device.type, backend="cuda", processors=1)
    properties = torch.cuda.get_device_properties(device)
    hip = bool(torch.version.hip)
    return Device(
        name=properties.name,
        backend="hip" if hip else "cuda",
        processors=properties.multi_processor_count,
        capability=0 if hip else 10 * properties.major + properties.minor,
    )


def _shares(units: int, split: int) -> tuple[int, int]:
    """(programs, column tiles of each) so that no program is left without work."""
    share = -(-units // min(split, units))
    return -(-units // share), share
