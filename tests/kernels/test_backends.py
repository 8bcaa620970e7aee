"""Choosing a backend is a pure function of the table and the request."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from quantforge_kernels import BACKENDS, Backend, BackendError, Capability, Request, choose_backend
from quantforge_kernels.reference import qlinear

REQUEST = Request(bits=4, group_size=64, symmetric=True, dtype=torch.bfloat16, device="cuda")
FAST = Backend(
    name="fast",
    capability=Capability(
        bits=(4, 8),
        group_sizes=(-1, 64),
        dtypes=(torch.bfloat16,),
        devices=("cuda",),
        symmetric=(True,),
    ),
    unavailable=str,  # str() is the empty reason: it is available
    linear=qlinear,
)
TABLE = {"fast": FAST, **BACKENDS}


def test_auto_takes_the_first_that_can() -> None:
    assert choose_backend("auto", REQUEST, TABLE).name == "fast"
    assert choose_backend("auto", replace(REQUEST, bits=3), TABLE).name == "reference"
    assert choose_backend("auto", replace(REQUEST, device="cpu")).name == "cpu"
    # a width of input the kernels do not have
    half = replace(REQUEST, device="cpu", dtype=torch.float16)
    assert choose_backend("auto", half).name == "reference"
    with pytest.raises(BackendError, match=r"'cpu' cannot run this layer .inputs of torch.float16"):
        choose_backend("cpu", half)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "3 bits, supported: 4, 8"),
        ({"group_size": 32}, "group size 32, supported: -1, 64"),
        ({"dtype": torch.float32}, "inputs of torch.float32, supported: torch.bfloat16"),
        ({"device": "cpu"}, "tensors on cpu, supported: cuda"),
        ({"symmetric": False}, "zero-points"),
    ],
)
def test_a_named_backend_that_cannot_is_an_error_with_the_reason(
    change: dict[str, object], reason: str
) -> None:
    with pytest.raises(BackendError, match=rf"'fast' cannot run this layer \({reason}\)"):
        choose_backend("fast", replace(REQUEST, **change), TABLE)


def test_unavailable_is_an_error_by_name_and_skipped_by_auto() -> None:
    table = {**TABLE, "fast": replace(FAST, unavailable=lambda: "no driver")}
    with pytest.raises(BackendError, match="not available here: no driver"):
        choose_backend("fast", REQUEST, table)
    assert choose_backend("auto", REQUEST, table).name == "reference"


def test_nobody_can_is_an_error_with_every_reason() -> None:
    request = replace(REQUEST, bits=3)
    with pytest.raises(BackendError, match=r"no backend .*\(fast: 3 bits, supported: 4, 8\)"):
        choose_backend("auto", request, {"fast": FAST})


def test_the_reference_runs_everything() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    grid = itertools.product(range(2, 9), (-1, 32, 96), (True, False), dtypes, ("cpu", "cuda"))
    for bits, group, symmetric, dtype, device in grid:
        request = Request(
            bits=bits, group_size=group, symmetric=symmetric, dtype=dtype, device=device
        )
        assert choose_backend("reference", request).name == "reference"
