"""Second moments of layer inputs, total += leftᵀ right: definition in torch, and the C++ that runs.

Rows that a layer reads in bfloat16 are multiplied as bfloat16 and summed in float32, which is exact
up to float32 sums and twice as fast as float32 products where the processor can do it. torch's own
bfloat16 product rounds the sums to bfloat16 as well, and a gram does not survive that.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from quantforge_kernels import native

# A gram is computed in strips of columns: a strip needs only the rows from its own diagonal down,
# which saves up to half of the products.
STRIPS = 4


@cache
def _library() -> ctypes.CDLL | None:
    """The native library; None where it cannot be built or the processor lacks the instruction."""
    library = native.optional(
        "moment", "grams are formed in float32, more slowly", ("qf_add_moment",)
    )
    return library if library is not None and library.qf_moment_available() else None


def add_gram(total: Tensor, rows: Tensor, *, native_code: bool = True) -> None:
    """Add the lower triangle of rowsᵀ rows to `total`, whose upper triangle then means nothing.

    Args:
        total: [in, in] float32, contiguous; changed in place.
        rows: [tokens, in]; bfloat16 rows are multiplied as they are, others as float32.
        native_code: use the C++ version where there is one.
    """
    if not (native_code and _add(total, rows, None)):
        wide = rows.float()
        features = wide.shape[1]
        strip = -(-features // STRIPS)
        for start in range(0, features, strip):
            stop = min(start + strip, features)
            total[start:, start:stop].addmm_(wide[:, start:].T, wide[:, start:stop])


def add_cross(total: Tensor, left: Tensor, right: Tensor, *, native_code: bool = True) -> None:
    """Add leftᵀ right to `total`.

    Args:
        total: [left, right] float32, contiguous; changed in place.
        left: [tokens, left].
        right: [tokens, right]; where both are bfloat16 they are multiplied as they are.
        native_code: use the C++ version where there is one.
    """
    if not (native_code and _add(total, left, right)):
        total.addmm_(left.float().T, right.float())


def _add(total: Tensor, left: Tensor, right: Tensor | None) -> bool:
    """Run the native version if it applies."""
    given = [left] if right is None else [left, right]
    if any(part.dtype != torch.bfloat16 or part.device.type != "cpu" for part in given):
        return False
    library = _library()
    if library is None:
        return False
    left, right = left.contiguous(), None if right is None else right.contiguous()
    library.qf_add_moment(
        native.pointer(left),
        native.pointer(right),
        ctypes.c_int64(len(left)),
        ctypes.c_int64(left.shape[1]),
        ctypes.c_int64(total.shape[1]),
        ctypes.c_int(torch.get_num_threads()),
        native.pointer(total),
    )
    return True
