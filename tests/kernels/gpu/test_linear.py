"""Launches on machines without a GPU: which device they go to."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from quantforge_kernels.triton import linear
from quantforge_kernels.triton.launch import Launch
from quantforge_kernels.triton.repack import DeviceWeight
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)"
)
PACKAGE = "quantforge_kernels.triton.device"
KERNELS = {
    "gemv": ("gemv", "reduce"),
    "gemm": ("gemm",),
    "arrange": ("arrange",),
    "lookup": ("lookup",),
}
SECOND = torch.device("cuda:1")


class Kernel:
    """Notes which device is current, and the options, instead of launching."""

    def __init__(self, name, entered, launched):
        self.name, self.entered, self.launched = name, entered, launched

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append(
            (self.name, tuple(self.entered), options)
        )


@pytest.fixture
def launched(monkeypatch):
    """Launches as (kernel, devices entered, options)."""
    entered, seen = [], []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.remove(self.device)

    for module, names in KERNELS.items():
        made = SimpleNamespace(**{name: Kernel(name, entered, seen) for name in names})
        monkeypatch.setitem(sys.modules, f"{PACKAGE}.{module}", made)
    monkeypatch.setattr(torch.cuda, "device", Current)
    yield seen
    assert not entered


def weight_on(device):
    return DeviceWeight(
        words=torch.empty(2, 16, 4, 8, 4, 4, dtype=torch.int32, device=device),
        scale=torch.empty(16, 64, dtype=torch.bfloat16, device=device),
        zero=None,
        bits=4,
        group_size=128,
        out_features=64,
        in_features=2048,
    )


@pytest.mark.parametrize(
    ("kernel", "split", "expected"),
    [
        ("gemv", 1, ["gemv"]),
        ("gemv", 4, ["gemv", "reduce"]),
        ("gemm", 1, ["arrange", "gemm"]),
        ("gemm", 4, ["arrange", "gemm", "reduce"]),
    ],
)
def test_products_are_launched_where_the_input_is(kernel, split, expected, launched):
    tiles = 1 if kernel == "gemv" else 4
    how = Launch(kernel=kernel, rows=16, tiles=tiles, warps=tiles, stages=1, split=split, unroll=1)
    with FakeTensorMode():
        x = torch.empty(3, 2048, dtype=torch.bfloat16, device=SECOND)
        assert linear.linear(x, weight_on(SECOND), launch=how).device == SECOND
    assert [(name, devices) for name, devices, _ in launched] == [
        (name, (SECOND,)) for name in expected
    ]


def test_lookups_are_launched_where_the_weight_is_and_assert_their_ids(launched):
    with FakeTensorMode():
        weight = weight_on(SECOND)
        ids = torch.empty(5, dtype=torch.int64, device=SECOND)
        assert linear.embedding(ids, weight, torch.bfloat16).shape == (5, 2048)
        assert linear.dequantize(weight, torch.bfloat16).shape == (64, 2048)
    assert [(name, devices) for name, devices, _ in launched] == [("lookup", (SECOND,))] * 2
    assert [options["debug"] for _, _, options in launched] == [True, False]


def test_tensors_on_the_cpu_need_no_gpu(launched):
    how = Launch(kernel="gemv", rows=8, tiles=1, warps=1, stages=1, split=1, unroll=1)
    x = torch.zeros(3, 2048, dtype=torch.bfloat16)
    linear.linear(x, weight_on(torch.device("cpu")), launch=how)
    assert [(name, devices) for name, devices, _ in launched] == [("gemv", ())]
