"""The C++ kernels equal the definition, for every width, grouping, shape, dtype and target."""

from __future__ import annotations

import ctypes
import itertools
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantforge_kernels import (
    BackendError,
    Geometry,
    cpu_backend,
    cpu_library,
    dequantize,
    native,
    pack,
    prepare,
    qembedding_prepared,
    qlinear,
    qlinear_prepared,
)

# rows, columns, group size: whole units, odd rows, a last unit that is not full, groups that begin
# inside a unit, groups of one and a half units
SHAPES = [(40, 96, 32), (33, 160, -1), (16, 256, 128), (17, 72, 24), (5, 40, -1), (48, 192, 48)]
TARGETS = {"native": "native", "AVX2": "x86-64-v3", "portable": "x86-64"}


def random_words(
    rows: int, columns: int, bits: int, group: int, *, symmetric: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    groups = 1 if group == -1 else columns // group
    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)  # of both signs
    zero = torch.randint(1 << bits, (rows, groups), generator=generator).to(torch.uint8)
    return pack(codes, bits), scale, None if symmetric else zero


def check(
    library: ctypes.CDLL, shape: tuple[int, int, int], bits: int, *, symmetric: bool, rows: int
) -> None:
    """Everything the library computes, against the weight of the definition."""
    out_features, in_features, group = shape
    words, scale, zero = random_words(out_features, in_features, bits, group, symmetric=symmetric)
    geometry = Geometry(
        out_features=out_features, in_features=in_features, bits=bits, group_size=group
    )
    weight = cpu_library.prepare(library, words, scale, zero, geometry)
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        dense = dequantize(words, scale, zero, bits, group, (out_features, in_features), dtype)
        tiles = weight.codes.shape[0]
        unpacked = cpu_library.unpack(library, weight, 0, tiles, dtype)
        assert torch.equal(unpacked[:, :out_features].t(), dense)
        ids = torch.tensor([out_features - 1, 0, 2])
        assert torch.equal(cpu_library.rows(library, weight, ids, dtype), dense[ids])
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        bias = torch.randn(out_features, generator=generator).to(dtype)
        expected = x.double() @ dense.double().t() + bias.double()
        size = x.double().abs() @ dense.double().abs().t() + bias.double().abs()
        exact = cpu_library.multiply(library, x, weight, bias, quantized=False)
        # float32 sums; then one rounding of the result to its dtype
        allowed = 1e-6 * size + torch.finfo(dtype).eps / 2 * expected.abs()
        assert ((exact.double() - expected).abs() <= allowed).all()
        rounded = cpu_library.multiply(library, x, weight, bias, quantized=True)
        # int8 by group: an activation is off by half a step, 1/254 of the group's largest at most,
        # and the weight is that of float32
        plain = dequantize(
            words, scale, zero, bits, group, (out_features, in_features), torch.float32
        ).double()
        step = x.double().abs().amax(-1, keepdim=True) / 254
        allowed = step * plain.abs().sum(-1) + 1e-6 * size + torch.finfo(dtype).eps * expected.abs()
        reference = x.double() @ plain.t() + bias.double()
        assert ((rounded.double() - reference).abs() <= allowed + 1e-6).all()


@pytest.fixture(scope="module", params=TARGETS)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    # less optimised: the same code, compiled in half the time
    extra = () if request.param == "native" else ("-O1",)
    options = replace(cpu_library.OPTIONS, target=TARGETS[request.param], extra=extra)
    if request.param != "native" and not sys.platform.startswith("linux"):
        pytest.skip("the other targets are those of x86-64")
    loaded = cpu_library.declared(native.load("packed", options))
    if request.param != "native":
        assert cpu_library.instructions(loaded) == request.param
    return loaded


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_definition(library: ctypes.CDLL, bits: int, symmetric: bool) -> None:
    for shape in SHAPES[:4]:
        check(library, shape, bits, symmetric=symmetric, rows=5)


@pytest.mark.full
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_the_definition_everywhere(library: ctypes.CDLL, bits: int) -> None:
    shapes = [*SHAPES, (576, 576, 192), (192, 1536, 96), (100, 576, 288), (64, 4096, -1)]
    shapes += [(33, 64 * 9, group) for group in (8, 16, 24, 64)]
    for shape, symmetric, rows in itertools.product(shapes, (True, False), (1, 2, 3, 4, 8, 9)):
        check(library, shape, bits, symmetric=symmetric, rows=rows)


def prepared(bits: int = 3, group: int = 32, **options: Any) -> Any:
    words, scale, zero = random_words(40, 96, bits, group, symmetric=False)
    geometry = Geometry(out_features=40, in_features=96, bits=bits, group_size=group)
    weight = prepare(words, scale, zero, geometry, torch.float32, backend="cpu", **options)
    dense = dequantize(words, scale, zero, bits, group, (40, 96), torch.float32)
    return weight, dense


@pytest.mark.parametrize("rows", [0, 1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_none(rows: int, dtype: torch.dtype) -> None:
    weight, _ = prepared()
    words, scale, zero = random_words(40, 96, 3, 32, symmetric=False)
    dense = dequantize(words, scale, zero, 3, 32, (40, 96), dtype)
    x = torch.randn(2, rows, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = qlinear_prepared(x, weight)
    assert y.shape == (2, rows, 40)
    expected = x.double() @ dense.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_strided_inputs_and_gradients() -> None:
    weight, dense = prepared()
    base = torch.randn(96, 7, generator=torch.Generator().manual_seed(0))
    x = base.t().requires_grad_()
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = qlinear_prepared(x, weight, bias)
    torch.testing.assert_close(y, x @ dense.t() + bias, rtol=1e-6, atol=3e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(7, 96), rtol=1e-5, atol=1e-4)
    assert torch.equal(bias.grad, torch.full((40,), 7.0))


def test_torch_checks_the_registration() -> None:
    weight, _ = prepared()
    tensors = (weight.codes, weight.scale, weight.zero)
    numbers = [40, 96, 3, 32]
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.zeros(40)
    operators = torch.ops.quantforge
    arguments = (x, *tensors, bias, numbers, "cpu", "exact")
    torch.library.opcheck(operators.qlinear_prepared.default, arguments)
    table = (torch.tensor([[39, 0]]), *tensors, numbers, "cpu", torch.bfloat16)
    torch.library.opcheck(operators.qembedding_prepared.default, table)


def test_compiles_into_one_graph() -> None:
    weight, dense = prepared()

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(qlinear_prepared(x, weight)).sum(-1)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled(x), torch.tanh(x @ dense.t()).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (3, False), (5, False)])
@pytest.mark.parametrize("rows", [1, 5])
def test_wide_scales_are_kept(bits: int, symmetric: bool, rows: int) -> None:
    words, _, zero = random_words(40, 96, bits, 32, symmetric=symmetric)
    scale = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    geometry = Geometry(out_features=40, in_features=96, bits=bits, group_size=32)
    for dtype in (torch.float32, torch.bfloat16):
        weight = prepare(words, scale, zero, geometry, dtype, backend="cpu")
        assert weight is not None
        dense = dequantize(words, scale, zero, bits, 32, (40, 96), dtype)
        assert torch.equal(qembedding_prepared(torch.arange(40), weight, dtype), dense)
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = x.double() @ dense.double().t()
        y = qlinear_prepared(x, weight).double()
        torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_words_in_the_order_of_the_file_run_too() -> None:
    words, scale, zero = random_words(40, 96, 6, -1, symmetric=True)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    y = qlinear(x, words, scale, zero, 6, -1, backend="cpu")
    reference = qlinear(x, words, scale, zero, 6, -1, backend="reference")
    torch.testing.assert_close(y, reference, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_prepared_weight_is_as_large_as_the_words(bits: int, symmetric: bool) -> None:
    words, scale, zero = random_words(576, 1536, bits, 96, symmetric=symmetric)
    geometry = Geometry(out_features=576, in_features=1536, bits=bits, group_size=96)
    weight = prepare(words, scale, zero, geometry, torch.float32, backend="cpu")
    assert weight is not None
    before = [t.nbytes for t in (words, scale, zero) if t is not None]
    after = [t.nbytes for t in (weight.codes, weight.scale, weight.zero) if t is not None]
    assert sum(after) == sum(before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 95), r"x must be \[..., 96\], got \(2, 95\)"),
        (torch.zeros(()), r"x must be \[..., 96\]"),
        (torch.zeros(2, 96, device="meta"), "x is on meta, the weight on cpu"),
        (torch.zeros(2, 96, dtype=torch.float16), "inputs of torch.float16, supported:"),
        (torch.zeros(2, 96, dtype=torch.int64), "inputs of torch.int64, supported:"),
    ],
)
def test_refuses_inputs(x: torch.Tensor, message: str) -> None:
    weight, _ = prepared()
    with pytest.raises(ValueError, match=message):
        qlinear_prepared(x, weight)


def test_refuses_modes_biases_and_ids() -> None:
    weight, _ = prepared()
    with pytest.raises(BackendError, match="mode 'a4', supported: exact, a8"):
        qlinear_prepared(torch.zeros(2, 96), weight, mode="a4")
    with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \(40,\)"):
        qlinear_prepared(torch.zeros(2, 96), weight, torch.zeros(41))
    for wrong in (40, -1):
        with pytest.raises(IndexError, match=r"ids must be in \[0, 40\)"):
            qembedding_prepared(torch.tensor([0, wrong]), weight, torch.float32)
    with pytest.raises(ValueError, match="ids must be int32 or int64"):
        qembedding_prepared(torch.tensor([0.0]), weight, torch.float32)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise native.BuildError("no C++ compiler found")

    monkeypatch.setattr(cpu_library, "library", broken)
    cpu_backend.unavailable.cache_clear()
    yield
    cpu_backend.unavailable.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_a_compiler_the_reference_runs_with_one_warning() -> None:
    words, scale, zero = random_words(40, 96, 3, 32, symmetric=True)
    geometry = Geometry(out_features=40, in_features=96, bits=3, group_size=32)
    with pytest.warns(RuntimeWarning, match=r"run in torch, many times slower: no C\+\+ compiler"):
        assert prepare(words, scale, zero, geometry, torch.float32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qlinear(torch.ones(1, 96), words, scale, zero, 3, 32).shape == (1, 40)
    with pytest.raises(BackendError, match=r"'cpu' cannot run .*not available here: no C\+\+"):
        prepare(words, scale, zero, geometry, torch.float32, backend="cpu")


def test_a_failing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-cxx"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native.BuildError, match=r"not compile packed\.cpp: error: out of order"):
        native.build(native.SOURCES / "packed.cpp", tmp_path / "built", cpu_library.OPTIONS)
    monkeypatch.setenv("CXX", str(tmp_path / "nobody"))
    with pytest.raises(native.BuildError, match=r"no C\+\+ compiler found"):
        native.build(native.SOURCES / "packed.cpp", tmp_path / "built", cpu_library.OPTIONS)


_UNDER_SANITIZER = """
import ctypes, test_cpu
from quantforge_kernels import cpu_library
kernel = cpu_library.declared(ctypes.CDLL(library))
for bits in range(2, 9):
    for shape in test_cpu.SHAPES:
        for symmetric in (True, False):
            test_cpu.check(kernel, shape, bits, symmetric=symmetric, rows=5)
"""


@pytest.mark.full
def test_runs_under_the_sanitizers(sanitized) -> None:
    sanitized("packed.cpp", cpu_library.OPTIONS, _UNDER_SANITIZER)
