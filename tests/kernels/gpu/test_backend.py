"""The entry `triton` of the table of backends, on machines with and without a GPU."""

import sys
from dataclasses import replace

import pytest
import torch
from quantforge_kernels import (
    BACKENDS,
    BackendError,
    Geometry,
    Request,
    choose_backend,
    pack,
    prepare,
    qlinear,
    qlinear_prepared,
    reference,
)
from quantforge_kernels.triton import backend
from quantforge_kernels.triton.repack import repack

REQUEST = Request(bits=3, group_size=64, symmetric=True, dtype=torch.bfloat16, device="cuda")


def table(reason):
    return {**BACKENDS, "triton": replace(BACKENDS["triton"], unavailable=lambda: reason)}


def test_importing_the_package_does_not_import_triton():
    import subprocess

    code = "import sys, quantforge_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_by_name_without_a_gpu_is_an_error_with_the_reason():
    with pytest.raises(BackendError, match=r"'triton' cannot run .*not available here: .+; use"):
        choose_backend("triton", REQUEST)


def test_by_name_on_the_cpu_is_an_error_with_the_reason():
    with pytest.raises(BackendError, match="tensors on cpu, supported: cuda"):
        choose_backend("triton", replace(REQUEST, device="cpu"))


def test_auto_takes_it_on_a_gpu_and_never_on_a_cpu():
    assert choose_backend("auto", REQUEST, table("")).name == "triton"
    assert choose_backend("auto", REQUEST, table("no GPU")).name == "reference"
    assert choose_backend("auto", replace(REQUEST, device="cpu"), table("")).name != "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_operators_without_a_gpu_run_on_cpu_and_refuse_the_name():
    """Not the choice alone: what `auto` chose computes, and a name asked for never falls back."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (40, 192), dtype=torch.uint8, generator=generator)
    words, scale = pack(codes, 3), torch.rand(40, 3, generator=generator).bfloat16()
    x = torch.randn(2, 192, generator=generator).bfloat16()
    geometry = Geometry(out_features=40, in_features=192, bits=3, group_size=64)
    weight = prepare(words, scale, None, geometry, torch.bfloat16)
    assert weight.backend == "cpu"
    same = reference.qlinear(x, words, scale, None, 3, 64)
    assert torch.allclose(qlinear_prepared(x, weight), same, rtol=0.02, atol=0.1)
    assert torch.allclose(qlinear(x, words, scale, None, 3, 64), same, rtol=0.02, atol=0.1)
    message = r"'triton' cannot run .*tensors on cpu, supported: cuda"
    with pytest.raises(BackendError, match=message):
        qlinear(x, words, scale, None, 3, 64, backend="triton")
    with pytest.raises(BackendError, match=message):
        prepare(words, scale, None, geometry, torch.bfloat16, backend="triton")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "inputs of torch.float32, supported: torch.bfloat16"),
        ({"group_size": 48}, r"group size 48, supported: -1, 32, 64, 96, \.\.\., 4096"),
    ],
)
def test_what_it_cannot_run_goes_to_the_reference(change, reason):
    with pytest.raises(BackendError, match=reason):
        choose_backend("triton", replace(REQUEST, **change), table(""))
    assert choose_backend("auto", replace(REQUEST, **change), table("")).name == "reference"


@pytest.mark.parametrize(
    ("installed", "built", "reason"),
    [
        (False, "12.8", "triton is not installed"),
        (True, "12.8", "torch finds no GPU"),
        (True, None, "this torch is built for the CPU only"),
    ],
)
def test_reasons(installed, built, reason, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    assert reason in backend.unavailable.__wrapped__()


def test_prepared_tensors_are_those_of_the_layout():
    codes = torch.randint(0, 8, (40, 192), dtype=torch.uint8)
    words, scale = pack(codes, 3), torch.rand(40, 3).bfloat16()
    geometry = Geometry(out_features=40, in_features=192, bits=3, group_size=64)
    made = backend.prepare(words, scale, None, geometry)
    expected = repack(words, scale, None, 3, 64, 192)
    assert torch.equal(made[0], expected.words)
    assert torch.equal(made[1], expected.scale)
    assert made[2] is None
