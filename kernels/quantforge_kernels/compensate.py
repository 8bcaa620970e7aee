"""Scale search and the error-feedback column loop: definitions in torch, and the C++ that runs.

The recurrence, for one row with columns taken in the order of the factor (GPTQ, arXiv 2210.17323;
GPTAQ, arXiv 2504.02692; FOEM, arXiv 2507.11017, here in its form C, one column at a time):

    w_j  ←  w_j − β (w_j − f_j)                    FOEM: pull towards the float weight f (j > 0)
    q_j  =  nearest grid point of w_j              of another given value for j = 0: Qronos
    e_j  =  ((w_j − q_j) − β (w_j − f_j)) / U_jj
    w_k  ←  w_k − e_j U_jk + f_j P_jk   for k > j  P is GPTAQ's mismatch term

with UᵀU the inverse of the damped gram. β = 0 and P = 0 is GPTQ. FOEM's other two forms pull all
remaining columns at each step, by the drift d = w − f that they have before it:

    A    e_j = (w_j − q_j) / U_jj                    w_k  ←  w_k − e_j U_jk − β (d UᵀU)_k over k ≥ j
    B    e_j = ((w_j − q_j) − β d_j) / U_jj          w_k  ←  w_k − e_j U_jk − β d_k

Nothing here depends on a block size, so FOEM's pull cannot be lost at a block's end and GPTAQ
charges the same weight everywhere.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from quantforge_kernels import native
from quantforge_kernels.native import pointer as _pointer

PullForm = Literal["A", "B", "C"]

# The smallest multiple of (largest magnitude / 2^(bits-1)) that is tried as a scale, by bits. At 2
# bits the best grid of a row with outliers covers little more than a standard deviation on each
# side; at 8 bits it always covers nearly everything, and finer steps there are worth more.
LOWEST_FACTOR = {2: 0.18, 3: 0.24, 4: 0.35, 5: 0.5, 6: 0.6, 7: 0.7, 8: 0.75}
HIGHEST_FACTOR = 1.06
FACTOR_STEPS = 32
REFITS = 3


def scale_factors(bits: int) -> list[float]:
    """Multiples of (largest magnitude / 2^(bits-1)) tried as scales, in geometric steps."""
    ratio = (LOWEST_FACTOR[bits] / HIGHEST_FACTOR) ** (1 / (FACTOR_STEPS - 1))
    return [HIGHEST_FACTOR * ratio**step for step in range(FACTOR_STEPS)]


def _library() -> ctypes.CDLL | None:
    """The native library, or None (with one warning) where it cannot be built."""
    return native.optional(
        "compensate",
        "compensation runs in torch, several times slower",
        ("qf_search_scales", "qf_column_loop"),
    )


def search_scales(
    weight: Tensor,
    importance: Tensor,
    *,
    bits: int,
    width: int,
    free_sign: bool = True,
    native_code: bool = True,
) -> Tensor:
    """Scales that minimise Σ importance (w − s q)² in each group, over size and sign.

    The sign of a scale is free in the symmetric format and decides on which side the grid has its
    extra level; values are bfloat16-representable.

    Args:
        weight: [out, in] float32.
        importance: [in] float32, non-negative.
        bits: width of the codes.
        width: weights that share a scale; divides `in`.
        free_sign: try negative scales too.
        native_code: use the C++ version where it can be built.

    Returns:
        [out, in / width] float32; 1 for a group of zeros.
    """
    weight, importance = weight.contiguous(), importance.float().contiguous()
    library = _library() if native_code and weight.device.type == "cpu" else None
    if library is None:
        return search_scales_reference(
            weight, importance, bits=bits, width=width, free_sign=free_sign
        )
    rows, columns = weight.shape
    scale = torch.empty(rows, columns // width)
    factors = (ctypes.c_float * FACTOR_STEPS)(*scale_factors(bits))
    library.qf_search_scales(
        _pointer(weight),
        _pointer(importance),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int64(width),
        ctypes.c_int(bits),
        factors,
        ctypes.c_int(FACTOR_STEPS),
        ctypes.c_int(REFITS),
        ctypes.c_int(free_sign),
        ctypes.c_int(torch.get_num_threads()),
        _pointer(scale),
    )
    return scale


def search_scales_reference(
    weight: Tensor, importance: Tensor, *, bits: int, width: int, free_sign: bool = True
) -> Tensor:
    """`search_scales` in plain torch: the definition."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    groups = weight.view(weight.shape[0], -1, width)
    weights = importance.view(-1, width)
    largest = groups.abs().amax(-1)
    best, best_error = torch.ones_like(largest), torch.full_like(largest, torch.inf)

    def codes_of(scale: Tensor) -> Tensor:
        return (groups / scale.unsqueeze(-1)).round().clamp(low, high)

    def error_of(scale: Tensor) -> Tensor:
        difference = groups - codes_of(scale) * scale.unsqueeze(-1)
        return (weights * difference * difference).sum(-1).nan_to_num(torch.inf, torch.inf)

    def storable(scale: Tensor) -> Tensor:
        return scale.bfloat16().float()

    for sign in (-1.0, 1.0) if free_sign else (1.0,):
        local, local_error = torch.ones_like(largest), torch.full_like(largest, torch.inf)
        for factor in scale_factors(bits):
            trial = storable(sign * factor * largest / -low)
            error = torch.where(trial == 0, torch.inf, error_of(trial))
            local = torch.where(error < local_error, trial, local)
            local_error = torch.minimum(error, local_error)
        for _ in range(REFITS):
            codes = codes_of(local)
            square = (weights * codes * codes).sum(-1)
            trial = storable((weights * groups * codes).sum(-1) / square)
            trial = torch.where((square > 0) & (trial != 0), trial, local)
            error = error_of(trial)
            local = torch.where(error < local_error, trial, local)
            local_error = torch.minimum(error, local_error)
        best = torch.where(local_error < best_error, local, best)
        best_error = torch.minimum(local_error, best_error)
    return torch.where(largest > 0, best, torch.ones_like(best))


def column_loop(
    weight: Tensor,
    upper: Tensor,
    order: Tensor,
    scale: Tensor,
    *,
    bits: int,
    width: int,
    zero: Tensor | None = None,
    original: Tensor | None = None,
    mismatch: Tensor | None = None,
    pull: float = 0.0,
    pull_form: PullForm = "C",
    first: Tensor | None = None,
    top: int | None = None,
    native_code: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize column by column, pushing each column's error onto the columns still to come.

    Forms A and B of the pull run in torch, form A with one product of [out, in] and [in, in] a
    column: they are for comparison, not for large layers.

    Args:
        weight: [out, in] float32, columns in their original order.
        upper: [in, in] float32 U, in the order of `order`; UᵀU is the inverse damped gram.
        order: [in] int64, original index of the j-th column to be quantized.
        scale: [out, in / width] float32, fixed before the loop.
        bits: width of the codes.
        width: weights that share a scale, in the original order.
        zero: [out, in / width] float32 zero-points; None is the symmetric grid.
        original: [out, in] float32 float weights f; None stands for `weight`.
        mismatch: [in, in] float32 P, strictly upper, in the order of `order`.
        pull: FOEM's β; in form A in units of the gram.
        pull_form: which of FOEM's rules, see the module's header.
        first: [out] float32, what the code of the first column is chosen for; None is its weight.
        top: the largest code, where that is not 2^bits − 1; zero-points, whole or not, go with it.
        native_code: use the C++ version where it can be built.

    Returns:
        codes [out, in] uint8 in the original order, and the loss Σ_j ((w_j − q_j) / U_jj)² of every
        row, [out] float64, which equals the row's error in the damped gram.
    """
    native_form = pull == 0.0 or pull_form == "C"
    library = _library() if native_code and native_form and weight.device.type == "cpu" else None
    if library is None:
        return column_loop_reference(
            weight, upper, order, scale, bits=bits, width=width, zero=zero, original=original,
            mismatch=mismatch, pull=pull, pull_form=pull_form, first=first, top=top,
        )  # fmt: skip
    kept = weight if original is None else original
    needed = kept if (mismatch is not None or pull != 0.0) else None
    return _column_loop_native(
        library, weight, needed, upper, mismatch, scale, zero, first,
        order=order, bits=bits, width=width, pull=pull, top=top,
    )  # fmt: skip


def _column_loop_native(
    library: ctypes.CDLL,
    weight: Tensor,
    *tensors: Tensor | None,
    order: Tensor,
    bits: int,
    width: int,
    pull: float,
    top: int | None,
) -> tuple[Tensor, Tensor]:
    """The C++ loop; `tensors` are original, upper, mismatch, scale, zero and first, as it wants."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    loss = torch.empty(rows, dtype=torch.float64)
    held = [None if t is None else t.float().contiguous() for t in (weight, *tensors)]
    order = order.contiguous()
    library.qf_column_loop(
        _pointer(held[0]),
        _pointer(held[1]),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        _pointer(order),
        *[_pointer(t) for t in held[2:]],
        ctypes.c_int64(width),
        ctypes.c_float((1 << bits) - 1 if top is None else top),
        ctypes.c_float(1 << (bits - 1)),
        ctypes.c_float(pull),
        ctypes.c_int(torch.get_num_threads()),
        _pointer(codes),
        _pointer(loss),
    )
    return codes, loss


def column_loop_reference(
    weight: Tensor,
    upper: Tensor,
    order: Tensor,
    scale: Tensor,
    *,
    bits: int,
    width: int,
    zero: Tensor | None = None,
    original: Tensor | None = None,
    mismatch: Tensor | None = None,
    pull: float = 0.0,
    pull_form: PullForm = "C",
    first: Tensor | None = None,
    top: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`column_loop` in plain torch, one column at a time: the definition, in the weight's dtype."""
    rows, columns = weight.shape
    latent = weight[:, order].T.contiguous()  # [in, out]
    fixed = latent.clone() if original is None else original[:, order].T.contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    top, centre = (1 << bits) - 1 if top is None else top, float(1 << (bits - 1))
    for j, column in enumerate(order.tolist()):
        if j > 0 and pull_form == "C":
            latent[j] -= pull * (latent[j] - fixed[j])
        s = scale[:, column // width]
        z = centre if zero is None else zero[:, column // width]
        wanted = latent[j] if j > 0 or first is None else first
        code = (wanted / s + z).round().clamp(0.0, top)
        residual = latent[j] - (code - z) * s
        loss += (residual / upper[j, j]).double() ** 2
        codes[column] = code.to(torch.uint8)
        drift = latent[j:] - fixed[j:]
        error = residual if pull_form == "A" else residual - pull * drift[0]
        latent[j + 1 :] -= torch.outer(upper[j, j + 1 :], error / upper[j, j])
        if pull != 0.0 and pull_form != "C":
            rest = upper[j:, j:]
            step = drift if pull_form == "B" else rest.T @ (rest @ drift)
            latent[j + 1 :] -= pull * step[1:]
        if mismatch is not None:
            latent[j + 1 :] += torch.outer(mismatch[j, j + 1 :], fixed[j])
    return codes.T.contiguous(), loss
