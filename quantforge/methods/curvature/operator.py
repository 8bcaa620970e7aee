"""What the estimators have in common: symmetric operators known by their products, and probes.

An operator acts on flat vectors. Where it has blocks (the weights of several layers, the heads of
a layer), they lie one behind the other, and their sizes are given beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from quantforge.errors import UsageError
from quantforge.numerics import OVERFLOW, require_finite

# A symmetric linear map of vectors [n]; it must not change its argument.
Matvec = Callable[[Tensor], Tensor]
Probe = Literal["rademacher", "gaussian"]


def draw_probe(
    dimension: int,
    generator: torch.Generator,
    *,
    kind: Probe = "rademacher",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[dimension] independent entries of mean 0 and variance 1, on the generator's device.

    Args:
        dimension: number of entries.
        generator: draws them.
        kind: "rademacher" for ±1, "gaussian" for normal ones.
        dtype: of the entries.
    """
    empty = torch.empty(dimension, dtype=dtype, device=generator.device)
    if kind == "gaussian":
        return empty.normal_(generator=generator)
    return empty.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def checked_product(matvec: Matvec, vector: Tensor) -> Tensor:
    """`matvec(vector)`, refused where it is not finite or has another shape.

    Raises:
        UsageError: the product is not a vector of the operator's dimension.
        InputError: it holds NaN or Inf.
    """
    product = matvec(vector)
    if product.shape != vector.shape:
        raise UsageError(
            f"the operator made {tuple(product.shape)} of a vector {tuple(vector.shape)}; "
            "give the dimension of the operator"
        )
    require_finite(product, "a product with the Hessian", OVERFLOW)
    return product


def restricted(matvec: Matvec, dimension: int, start: int, size: int) -> Matvec:
    """The operator's diagonal block of entries start .. start + size - 1, on vectors [size].

    A product costs one of the whole operator.
    """

    def block(vector: Tensor) -> Tensor:
        whole = vector.new_zeros(dimension)
        whole[start : start + size] = vector
        return matvec(whole)[start : start + size]

    return block


def dot(first: Tensor, second: Tensor) -> Tensor:
    """[] float64 inner product; float32 sums of very long vectors would lose digits."""
    return (first * second).sum(dtype=torch.float64)


def require_at_least(value: int, least: int, name: str) -> None:
    """Refuse a count that is too small.

    Raises:
        UsageError: `value` is below `least`.
    """
    if value < least:
        raise UsageError(f"{name} is {value}; it must be at least {least}")
