"""Times of packed and plain layers on this machine, through the operator that runs them.

A step of decoding goes through all layers once, so that a layer's weights come from memory and not
from the cache of the call before. Measured likewise: a round calls every layer and candidate once,
and the rounds, not the calls of one candidate, are what the median is taken over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quantforge.format.levels import uniform_spec
from quantforge.progress import Monitor
from quantforge.runtime.linear import QuantLinear
from quantforge.runtime.load import require_backend
from quantforge.types import QuantizedWeight, QuantSpec

Shape = tuple[int, int]
WARM_UP = 2


def time_layers(
    candidates: Mapping[Shape, Sequence[QuantSpec]],
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    repeats: int,
    monitor: Monitor,
) -> dict[tuple[Shape, QuantSpec | None], list[float]]:
    """Seconds of single calls, `repeats` of them for every shape and candidate that fits it.

    Args:
        candidates: (out, in) of the layers → specs; plain weights in `dtype` are timed beside them.
        batch: rows of the input.
        dtype: of inputs and of plain weights.
        device: where it runs.
        backend: kernels, or "auto".
        repeats: rounds after the warm-up.
        monitor: progress and cancellation.

    Raises:
        UsageError: the kernels cannot run a candidate.
    """
    for found in candidates.values():
        require_backend(backend, "exact", found, dtype, device)
    generator = torch.Generator().manual_seed(0)
    calls: dict[tuple[Shape, QuantSpec | None], Callable[[], Tensor]] = {}
    for shape, specs in candidates.items():
        inputs = torch.randn(batch, shape[1], generator=generator).to(device, dtype)
        plain = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)
        plain.requires_grad_(False)
        calls[shape, None] = _call(plain, inputs)
        for spec in specs:
            if spec.divides(shape[1]):
                weight = _random(shape, uniform_spec(spec), generator, device)  # as it will run
                packed = QuantLinear.from_weight(weight, backend=backend)
                packed.prepare(dtype, backend=backend)
                calls[shape, spec] = _call(packed, inputs)
    taken: dict[tuple[Shape, QuantSpec | None], list[float]] = {key: [] for key in calls}
    for number in range(WARM_UP + repeats):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= WARM_UP:
                taken[key].append(time.perf_counter() - began)
        monitor.step("profile", number + 1, WARM_UP + repeats)
    return taken


def _call(layer: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            output: Tensor = layer(inputs)
        return output

    return call


def _random(
    shape: Shape, spec: QuantSpec, generator: torch.Generator, device: torch.device
) -> QuantizedWeight:
    """A weight of random codes and scales around 0.01."""
    groups, top = spec.groups(shape[1]), 1 << spec.bits
    codes = torch.randint(top, shape, generator=generator).to(torch.uint8)
    zero = torch.randint(top, (shape[0], groups), generator=generator).to(torch.uint8)
    scale = 0.01 + 0.001 * torch.rand(shape[0], groups, generator=generator)
    return QuantizedWeight(
        codes=codes.to(device),
        scale=scale.bfloat16().to(device),
        zero=None if spec.symmetric else zero.to(device),
        spec=spec,
    )
