"""Who can run an operator: backends declare it as data, and choosing one is a pure function.

A backend named by the caller either runs or is an error with the reason; only `auto` chooses. The
table holds what exists; it is ordered, fastest first, and `reference`, which runs everywhere, last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from quantforge_kernels import cpu_backend, reference
from quantforge_kernels.geometry import Geometry
from quantforge_kernels.layout import WIDTHS
from quantforge_kernels.triton import backend as triton_backend

AUTO = "auto"

LinearFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int, Tensor | None], Tensor]


class BackendError(ValueError):
    """A backend was asked for that is unknown or cannot run the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an operator is about to compute.

    Attributes:
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        symmetric: whether there is no zero-point.
        dtype: of the input, and of the computation.
        device: type of the device, e.g. "cpu" or "cuda".
        mode: how the input enters the product: "exact" as it is, "a8" rounded to int8 by group.
    """

    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    device: str
    mode: str = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What a backend can run.

    Attributes:
        bits: widths.
        group_sizes: group sizes (-1: whole row); None for all.
        dtypes: input dtypes.
        devices: device types; None for all.
        symmetric: accepted values of `Request.symmetric`.
        modes: accepted values of `Request.mode`.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None
    symmetric: tuple[bool, ...] = (True, False)
    modes: tuple[str, ...] = ("exact",)

    def obstacle(self, request: Request) -> str:
        """Why the request cannot run; empty if it can."""
        groups, devices = self.group_sizes, self.devices
        found = (
            (f"{request.bits} bits", self.bits, request.bits),
            (f"group size {request.group_size}", groups, request.group_size),
            (f"inputs of {request.dtype}", self.dtypes, request.dtype),
            (f"tensors on {request.device}", devices, request.device),
            (f"mode {request.mode!r}", self.modes, request.mode),
        )
        for text, accepted, value in found:
            if accepted is not None and value not in accepted:
                return f"{text}, supported: {_listed(accepted)}"
        if request.symmetric not in self.symmetric:
            return "zero-points" if not request.symmetric else "weights without zero-points"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The operators over a weight in the backend's own order.

    In all of them a weight is the three tensors that `prepare` returned, and a `Geometry`. They
    take within 2 % of the bytes of the words, scales and zero-points that they replace.

    Attributes:
        prepare: (words, scale, zero, geometry) → (codes, scale, zero or None), on their device.
        linear: (x, codes, scale, zero, geometry, bias, mode) → `x @ weight.T + bias`.
        input_gradient: (gradient, codes, scale, zero, geometry) → `gradient @ weight`.
        embedding: (ids, codes, scale, zero, geometry, dtype) → rows of the weight.
    """

    prepare: Callable[
        [Tensor, Tensor, Tensor | None, Geometry], tuple[Tensor, Tensor, Tensor | None]
    ]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, Geometry, Tensor | None, str], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor, Tensor | None, Geometry], Tensor]
    embedding: Callable[[Tensor, Tensor, Tensor, Tensor | None, Geometry, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what a caller writes.
        capability: what it can run where it is available.
        unavailable: says why it cannot run on this machine; empty if it can.
        linear: `qlinear` with the signature of `reference.qlinear`, called on checked tensors.
        prepared: the operators over its own order of the weight; None if it reads the file's.
    """

    name: str
    capability: Capability
    unavailable: Callable[[], str]
    linear: LinearFunction
    prepared: Prepared | None = None

    def obstacle(self, request: Request) -> str:
        """Why the request cannot run here; empty if it can."""
        reason = self.capability.obstacle(request)
        if reason:
            return reason
        reason = self.unavailable()  # may build a library: asked last
        return f"not available here: {reason}" if reason else ""


def _always() -> str:
    return ""


REFERENCE = Backend(
    name="reference",
    capability=Capability(
        bits=WIDTHS,
        group_sizes=None,
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        devices=None,
    ),
    unavailable=_always,
    linear=reference.qlinear,
)

CPU = Backend(
    name="cpu",
    capability=Capability(
        bits=WIDTHS,
        group_sizes=None,
        dtypes=(torch.float32, torch.bfloat16),
        devices=("cpu",),
        modes=("exact", "a8"),
    ),
    unavailable=cpu_backend.unavailable,
    linear=cpu_backend.unprepared_linear,
    prepared=Prepared(
        prepare=cpu_backend.prepare,
        linear=cpu_backend.linear,
        input_gradient=cpu_backend.input_gradient,
        embedding=cpu_backend.embedding,
    ),
)

TRITON = Backend(
    name="triton",
    capability=Capability(
        bits=WIDTHS,
        group_sizes=triton_backend.GROUP_SIZES,
        dtypes=triton_backend.DTYPES,
        devices=("cuda",),
        modes=("exact", "a8"),
    ),
    unavailable=triton_backend.unavailable,
    linear=triton_backend.unprepared_linear,
    prepared=Prepared(
        prepare=triton_backend.prepare,
        linear=triton_backend.linear,
        input_gradient=triton_backend.input_gradient,
        embedding=triton_backend.embedding,
    ),
)

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (TRITON, CPU, REFERENCE)}
)


def choose_backend(
    name: str, request: Request, backends: Mapping[str, Backend] = BACKENDS
) -> Backend:
    """The backend that runs `request`.

    Args:
        name: a backend's name, or "auto" for the first of the table that can.
        request: what is to be computed.
        backends: the table.

    Raises:
        BackendError: the name is unknown, the named backend cannot run the request, or none can.
    """
    if name == AUTO:
        reasons = []
        for backend in backends.values():
            reason = backend.obstacle(request)
            if not reason:
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise BackendError(f"no backend runs this layer ({'; '.join(reasons)})")
    if name not in backends:
        raise BackendError(f"unknown backend {name!r}; known: {_listed((AUTO, *backends))}")
    reason = backends[name].obstacle(request)
    if reason:
        raise BackendError(f"backend {name!r} cannot run this layer ({reason}); use {AUTO!r}")
    return backends[name]


def _listed(values: tuple[object, ...]) -> str:
    if len(values) > 12:
        values = (*values[:4], "...", values[-1])
    return ", ".join(str(value) for value in values)
