"""The GPU kernels in Triton's interpreter, against float64 and against the reference.

Run by `test_interpreter.py` in a process of its own: whether kernels are interpreted is decided
when Triton is imported. Every tensor that the operators allocate, inputs too, lies in a larger one:
NaN around it and in it, so that a read beyond a border, or a place that is never written, is seen
in the result, and a write beyond a border in the frame. Weights end at a page without access.

The tolerance is a bound, not a guess: half a unit of the output's last place, and the rounding of
float32 sums of `(constant + code) * scale * x`. The second assertion is relative to the reference
in the same dtype, whose weights are rounded and ours are not: our error is not larger than its.
"""

import ctypes
import itertools
import mmap
import os

import pytest
import torch
from quantforge_kernels import dequantize, pack, reference
from quantforge_kernels.geometry import Geometry
from quantforge_kernels.triton import backend, linear
from quantforge_kernels.triton.launch import Launch
from quantforge_kernels.triton.repack import repack
from torch.nn import functional

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_interpreter.py"

NO_ACCESS = 0
FRAME = 96  # elements of the frame before and after a tensor
BF16, FP16 = torch.bfloat16, torch.float16
HALF_UNIT = {BF16: 2.0**-8, FP16: 2.0**-11}
SUBNORMAL = {BF16: 0.0, FP16: 2.0**-25}
ALL_BITS = range(2, 9)
# rows of x, out, in, group size: odd in every way
SHAPES = [
    (1, 37, 256, 128),
    (3, 64, 576, 64),
    (8, 33, 288, 96),
    (5, 70, 384, 192),
    (16, 31, 100, -1),
    (2, 96, 576, 288),
    (9, 65, 160, 32),
    (11, 5, 512, 256),
    (4, 40, 200, -1),
]


class Frames:
    """Allocates tensors inside larger ones of NaN, and looks whether the frames are whole."""

    def __init__(self):
        self.made = []
        self.working = []  # what the operators allocated: outputs and what lies between

    def new(self, shape, dtype):
        count = torch.Size(shape).numel()
        raw = torch.empty(count + 2 * FRAME, dtype=dtype)
        raw.fill_(float("nan") if dtype.is_floating_point else 77)
        self.made.append((raw, count))
        return raw[FRAME : FRAME + count].view(shape)

    def put(self, tensor):
        """A copy that ends where the process may not read: one element more is a crash."""
        if tensor is None:
            return None
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        library = ctypes.CDLL(None, use_errno=True)
        forbidden = ctypes.c_void_p(start + pages)
        assert library.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) == 0
        made = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size
        )
        return made.view(tensor.shape).copy_(tensor)

    def rows(self, tensor):
        """[m, k] with NaN between its rows, before and after."""
        made = self.new((tensor.shape[0], tensor.shape[1] + 8), tensor.dtype)
        made[:, : tensor.shape[1]] = tensor
        return made[:, : tensor.shape[1]]

    def check(self):
        for raw, count in self.made:
            for part in (raw[:FRAME], raw[FRAME + count :]):
                whole = part.isnan() if raw.is_floating_point() else part == 77
                assert bool(whole.all()), "written outside a tensor"
        for tensor in self.working:
            assert not tensor.isnan().any(), "never written, or made of what lies outside"


@pytest.fixture
def frames(monkeypatch):
    kept = Frames()

    def new_empty(tensor, *shape, dtype=None, **_):
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        made = kept.new(size, dtype or tensor.dtype)
        if made.dtype.is_floating_point:
            kept.working.append(made)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield kept
    kept.check()


class Case:
    """Random codes, scales of both signs, zero-points, an input and a bias."""

    def __init__(self, bits, shape, dtype, *, asymmetric, seed=0, scale_dtype=None):
        self.m, self.n, self.k, self.group = shape
        self.bits, self.dtype = bits, dtype
        generator = torch.Generator().manual_seed(1000 * bits + seed)
        width = self.k if self.group == -1 else self.group
        size = (self.n, self.k // width)
        self.codes = torch.randint(
            0, 2**bits, (self.n, self.k), dtype=torch.uint8, generator=generator
        )
        scale = (torch.rand(size, generator=generator) + 0.5) * 2.0 ** (1 - bits)
        scale *= torch.randint(0, 2, size, generator=generator) * 2 - 1
        self.scale = scale.to(scale_dtype or dtype)
        self.zero = None
        if asymmetric:
            self.zero = torch.randint(0, 2**bits, size, dtype=torch.uint8, generator=generator)
        self.x = torch.randn(self.m, self.k, generator=generator).to(dtype)
        self.bias = torch.randn(self.n, generator=generator).to(dtype)
        self.words = pack(self.codes, bits)

    def weight(self, frames):
        made = repack(self.words, self.scale, self.zero, self.bits, self.group, self.k)
        parts = {name: frames.put(getattr(made, name)) for name in ("words", "scale", "zero")}
        return type(made)(
            **parts, bits=made.bits, group_size=made.group_size, out_features=self.n,
            in_features=self.k,
        )  # fmt: skip

    def truth(self, x):
        """float64 result, and the sum of magnitudes that bounds its float32 rounding."""
        scale = self.scale.to(self.dtype)
        shape = (self.n, self.k)
        exact = dequantize(
            self.words, scale, self.zero, self.bits, self.group, shape, torch.float64
        )
        width = self.k if self.group == -1 else self.group
        constant = 1024 if self.dtype == FP16 else 128 if self.bits < 8 else 2176
        steps = scale.double().abs().repeat_interleave(width, 1)
        size = x.double().abs() @ ((self.codes.double() + constant + 255) * steps).T
        return x.double() @ exact.T, size


def launch(kernel, rows, tiles, warps, split=1, stages=1):
    return Launch(
        kernel=kernel, rows=rows, tiles=tiles, warps=warps, stages=stages, split=split, unroll=1
    )


def assert_close(result, truth, size, dtype):
    bound = HALF_UNIT[dtype] * truth.abs() + SUBNORMAL[dtype] + 2.0**-22 * size
    error = (result.double() - truth).abs()
    assert bool((error <= bound).all()), f"error {(error / bound).max():.2f} times its bound"


def check_product(case, frames, how, *, bias):
    x = frames.rows(case.x)
    added = frames.put(case.bias) if bias else None
    result = linear.linear(x, case.weight(frames), added, launch=how)
    assert result.dtype == case.dtype
    truth, size = case.truth(case.x)
    if bias:
        truth = truth + case.bias.double()
        size = size + case.bias.double().abs()
    assert_close(result, truth, size, case.dtype)
    same = reference.qlinear(
        case.x, case.words, case.scale, case.zero, case.bits, case.group,
        case.bias if bias else None,
    )  # fmt: skip
    error, allowed = (float((y.double() - truth).norm()) for y in (result, same))
    # Where nothing is rounded but the result, both have the same error: half a unit, at random.
    assert error <= 1.15 * allowed + 1e-3 * float(truth.norm())


SPLITS = (1, 2, 3)
KINDS = list(itertools.product(ALL_BITS, (BF16, FP16), (False, True)))


def pairs(start=0):
    """Every (bits, dtype, asymmetric), and every (shape, split), each at least once.

    The 27 pairs are gone through once and then from the start again, beside the 28 kinds; another
    `start` lets other kinds meet them.
    """
    both = list(itertools.product(SHAPES, SPLITS))
    return [(*kind, *both[(at + start) % len(both)]) for at, kind in enumerate(KINDS)]


def test_the_cases_hold_every_kind_and_every_pair():
    for start in (0, 10, 20):
        cases = pairs(start)
        assert len(cases) == 28
        assert {case[:3] for case in cases} == set(KINDS)
        assert {case[3:] for case in cases} == set(itertools.product(SHAPES, SPLITS))


@pytest.mark.parametrize(("bits", "dtype", "asymmetric", "shape", "split"), pairs())
def test_decoding(bits, dtype, asymmetric, shape, split, frames):
    case = Case(bits, shape, dtype, asymmetric=asymmetric)
    rows, tiles = (8, 1) if split == 1 else (16, 2)
    check_product(case, frames, launch("gemv", rows, tiles, 1, split), bias=split != 2)


@pytest.mark.parametrize(("bits", "dtype", "asymmetric", "shape", "split"), pairs(10))
def test_many_rows(bits, dtype, asymmetric, shape, split, frames):
    m, n, k, group = shape
    case = Case(bits, (m + 10, n, k, group), dtype, asymmetric=asymmetric, seed=1)
    check_product(case, frames, launch("gemm", 16, 4, 4, split), bias=split != 2)


@pytest.mark.parametrize(("bits", "dtype", "asymmetric", "shape", "split"), pairs(20))
def test_inputs_rounded_to_int8(bits, dtype, asymmetric, shape, split, frames):
    case = Case(bits, shape, dtype, asymmetric=asymmetric, seed=2)
    if case.m > 2:
        case.x[1] = 0  # a token of zeros has no scale
    result = linear.linear_int8(
        frames.rows(case.x), case.weight(frames), launch=launch("gemm", 16, 4, 4, split)
    )
    peak = case.x.float().abs().amax(1, keepdim=True)
    step = torch.where(peak > 0, 127 / peak, 0.0)
    # What was multiplied, out of the order of the operand: nearest, and 127 at the peak.
    arranged = next(raw for raw, _ in frames.made if raw.dtype == torch.int8)[FRAME:-FRAME]
    column = torch.arange(case.k)
    pair, j, half = column % 8 // 2, column % 32 // 8, column % 2
    place = column // 32 * 32 + pair // 2 * 16 + j * 4 + half * 2 + pair % 2
    rounded = arranged.view(16, -1)[: case.m, place].float()
    assert (rounded - case.x.float() * step).abs().max() <= 0.5 + 1e-4
    assert rounded.abs().max() == 127
    assert int(arranged.ne(0).sum()) == int(rounded.ne(0).sum())  # all the rest is padding
    truth, size = case.truth(rounded.double() * (peak / 127).double())
    assert_close(result, truth, size, dtype)
    # and the rounding itself: a uniform error of a 127th of the peak, half a step at most
    exact, _ = case.truth(case.x)
    shape = (case.n, case.k)
    weight = dequantize(case.words, case.scale, case.zero, bits, case.group, shape, torch.float64)
    most = 0.5001 * (peak / 127).double() * weight.abs().sum(1)
    assert bool(((truth - exact).abs() <= most + 1e-12).all())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_rows_equal_the_reference_bit_by_bit(bits, dtype, frames):
    case = Case(bits, SHAPES[bits], dtype, asymmetric=bits % 2 == 1, seed=3)
    weight = case.weight(frames)
    shape = (case.n, case.k)
    same = dequantize(case.words, case.scale, case.zero, bits, case.group, shape, dtype)
    assert torch.equal(linear.dequantize(weight, dtype), same)
    ids = torch.tensor([[case.n - 1, 0, 3], [1, 1, case.n // 2]], dtype=torch.int64)
    assert torch.equal(linear.embedding(ids, weight, dtype), same[ids])
    wide = dequantize(case.words, case.scale, case.zero, bits, case.group, shape, torch.float32)
    assert torch.equal(linear.dequantize(weight, torch.float32), wide)


def test_ids_outside_the_table_are_nan(frames):
    case = Case(4, (1, 40, 200, -1), BF16, asymmetric=False)
    rows = linear.embedding(torch.tensor([0, 40, -1]), case.weight(frames), BF16)
    assert rows.isnan().all(1).tolist() == [False, True, True]
    assert not rows[0].isnan().any()
    frames.working.clear()


@pytest.mark.parametrize("wrong", [40, -1])
def test_the_backend_refuses_them_where_looking_costs_nothing(wrong, frames):
    case = Case(4, (1, 40, 200, -1), BF16, asymmetric=False)
    geometry = Geometry(out_features=40, in_features=200, bits=4, group_size=-1)
    prepared = backend.prepare(case.words, case.scale, case.zero, geometry)
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 40\), got {wrong}"):
        backend.embedding(torch.tensor([0, wrong]), *prepared, geometry, BF16)
    ids = torch.empty(0, 2, dtype=torch.int64)
    assert backend.embedding(ids, *prepared, geometry, BF16).shape == (0, 2, 200)


def test_one_output_of_a_split(frames):
    case = Case(3, (1, 1, 576, 64), BF16, asymmetric=True, seed=5)
    check_product(case, frames, launch("gemv", 8, 1, 1, 3), bias=True)


def test_scales_of_another_dtype_are_rounded_to_the_computation_s(frames):
    for kernel, rows, tiles, warps in (("gemv", 8, 1, 1), ("gemm", 16, 4, 4)):
        case = Case(4, SHAPES[1], BF16, asymmetric=True, scale_dtype=torch.float32)
        check_product(case, frames, launch(kernel, rows, tiles, warps), bias=False)


def test_fused_parts_are_the_parts(frames):
    parts = [Case(3, (4, n, 576, 64), BF16, asymmetric=False, seed=n) for n in (576, 192, 192)]
    x = parts[0].x
    weight, sizes = linear.concatenate(
        [(part.words, part.scale, part.zero) for part in parts], 3, 64, 576
    )
    how = launch("gemv", 8, 8, 8)
    outputs = linear.linear(x, weight, launch=how).split(sizes, -1)
    assert [tuple(one.shape) for one in outputs] == [(4, 576), (4, 192), (4, 192)]
    for part, output in zip(parts, outputs, strict=True):
        part.x = x
        assert_close(output, *part.truth(x), BF16)


def test_the_backend_s_operators(frames):
    case = Case(5, (3, 70, 384, 192), BF16, asymmetric=True, seed=4)
    geometry = Geometry(out_features=70, in_features=384, bits=5, group_size=192)
    prepared = backend.prepare(case.words, case.scale, case.zero, geometry)
    truth, size = case.truth(case.x)
    x = case.x.view(1, 3, 384)
    result = backend.linear(x, *prepared, geometry, None, "exact")
    assert result.shape == (1, 3, 70)
    assert_close(result[0], truth, size, BF16)
    raw = backend.unprepared_linear(case.x, case.words, case.scale, case.zero, 5, 192)
    assert torch.equal(raw, result[0])
    int8 = backend.linear(case.x, *prepared, geometry, None, "a8")
    assert 1e-3 < float((int8.double() - truth).norm() / truth.norm()) < 2e-2
    weight = dequantize(case.words, case.scale, case.zero, 5, 192, (70, 384), BF16)
    gradient = torch.randn(3, 70).to(BF16)
    assert torch.equal(backend.input_gradient(gradient, *prepared, geometry), gradient @ weight)
    ids = torch.tensor([69, 2])
    assert torch.equal(backend.embedding(ids, *prepared, geometry, BF16), weight[ids])
    assert backend.linear(x[:, :0], *prepared, geometry, None, "exact").shape == (1, 0, 70)


HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 576, 1536, 9, 3, 64  # SmolLM2-135M


def block(x, product):
    """A decoder layer; `product(x, names)` gives the outputs of layers that read the same input."""

    def normalized(values):
        scale = values.double().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        return (values.double() * scale).to(values.dtype)

    def turned(values):
        angle = torch.arange(len(x)).double()[:, None] * 1e4 ** (-torch.arange(0, 32) / 32.0)
        first, second = values.double().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    q, k, v = product(normalized(x), ("q", "k", "v"))
    q, k, v = (y.view(len(x), -1, HEAD).transpose(0, 1) for y in (q, k, v))
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, 0) for y in (turned(k), v))
    mixed = functional.scaled_dot_product_attention(
        turned(q)[None], k[None], v[None], is_causal=True
    )
    x = x + product(mixed[0].transpose(0, 1).reshape(len(x), HIDDEN), ("o",))[0]
    gate, up = product(normalized(x), ("gate", "up"))
    return x + product(functional.silu(gate) * up, ("down",))[0]


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_whole_block_of_smollm2(tokens):
    sizes = {
        "q": (3, HIDDEN, HIDDEN, 64), "k": (3, KV_HEADS * HEAD, HIDDEN, 64),
        "v": (3, KV_HEADS * HEAD, HIDDEN, 64), "o": (4, HIDDEN, HIDDEN, 96),
        "gate": (2, INNER, HIDDEN, 32), "up": (2, INNER, HIDDEN, 32),
        "down": (5, HIDDEN, INNER, 128),
    }  # fmt: skip
    cases = {
        name: Case(bits, (1, n, k, group), BF16, asymmetric=name == "o", seed=len(name))
        for name, (bits, n, k, group) in sizes.items()
    }
    for case in cases.values():
        case.scale = (case.scale.double() / case.k**0.5).to(BF16)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0))
    how = launch("gemv", 8, 16, 16) if tokens <= 16 else launch("gemm", 32, 16, 16)

    def exact(values, names):
        return [cases[name].truth(values)[0] for name in names]

    def expected(values, names):
        return [
            reference.qlinear(values, one.words, one.scale, one.zero, one.bits, one.group)
            for one in (cases[name] for name in names)
        ]

    def ours(values, names):
        first = cases[names[0]]
        parts = [(cases[name].words, cases[name].scale, cases[name].zero) for name in names]
        weight, rows = linear.concatenate(parts, first.bits, first.group, first.k)
        return linear.linear(values, weight, launch=how).split(rows, -1)

    truth = block(x.to(BF16).double(), exact)
    same, result = block(x.to(BF16), expected), block(x.to(BF16), ours)
    error, allowed = (float((y.double() - truth).norm() / truth.norm()) for y in (result, same))
    assert allowed < 0.01
    assert error <= 1.1 * allowed  # as far from float64 as the reference in bfloat16
    assert float((result.double() - same.double()).norm() / truth.norm()) < 0.01


GROUPS = (32, 64, 96, 128, 192, 256, 288, -1)


@pytest.mark.full
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_whole_grid(bits, group, dtype, asymmetric, frames):
    generator = torch.Generator().manual_seed(bits * 100 + group)
    for kernel, split in itertools.product(("gemv", "gemm"), (1, 3)):
        drawn = torch.randint(1, 90, (3,), generator=generator).tolist()
        width = 1 + drawn[2] * 7 if group == -1 else group * (1 + drawn[2] % 3)
        m = 1 + drawn[0] % 17 if kernel == "gemv" else drawn[0]
        case = Case(bits, (m, drawn[1], width, group), dtype, asymmetric=asymmetric, seed=split)
        rows = (8, 16)[split % 2] if kernel == "gemv" else (16, 64)[split % 2]
        how = launch(kernel, rows, 2 if kernel == "gemv" else 4, 1, split)
        check_product(case, frames, how, bias=True)
