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

from quantforge_kernels import reference
from quantforge_kernels.layout import WIDTHS

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
    """

    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What a backend can run.

    Attributes:
        bits: widths.
        group_sizes: group sizes (-1: whole row); None for all.
        dtypes: input dtypes.
        devices: device types; None for all.
        symmetric: accepted values of `Request.symmetric`.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None
    symmetric: tuple[bool, ...] = (True, False)

    def obstacle(self, request: Request) -> str:
        """Why the request cannot run; empty if it can."""
        if request.bits not in self.bits:
            return f"{request.bits} bits, supported: {_listed(self.bits)}"
        if self.group_sizes is not None and request.group_size not in self.group_sizes:
            return f"group size {request.group_size}, supported: {_listed(self.group_sizes)}"
        if request.dtype not in self.dtypes:
            return f"inputs of {request.dtype}, supported: {_listed(self.dtypes)}"
        if self.devices is not None and request.device not in self.devices:
            return f"tensors on {request.device}, supported: {_listed(self.devices)}"
        if request.symmetric not in self.symmetric:
            return "zero-points" if not request.symmetric else "weights without zero-points"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what a caller writes.
        capability: what it can run where it is available.
        unavailable: says why it cannot run on this machine; empty if it can.
        linear: `qlinear` with the signature of `reference.qlinear`, called on checked tensors.
    """

    name: str
    capability: Capability
    unavailable: Callable[[], str]
    linear: LinearFunction

    def obstacle(self, request: Request) -> str:
        """Why the request cannot run here; empty if it can."""
        reason = self.unavailable()
        return f"not available here: {reason}" if reason else self.capability.obstacle(request)


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

BACKENDS: Mapping[str, Backend] = MappingProxyType({REFERENCE.name: REFERENCE})


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
    return ", ".join(str(value) for value in values)
