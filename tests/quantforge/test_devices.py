"""A compilation on a device that is not there: nothing is mixed with tensors of the CPU.

The device is made of tensors that hold their data on the CPU, say they are on another ("meta", the
one that torch's autograd serves anywhere), and refuse an operation with a tensor that is not of
their kind. Scalars and copies are allowed, as they are on GPUs.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from quantforge.delivery import deliver
from quantforge.methods.scaled_linear import ScaledLinear
from quantforge.opening import configure, open_job
from quantforge.search.budget import Budget
from quantforge.testing import markov_tokens, tiny_llama

AWAY = torch.device("meta")


class Away(torch.Tensor):
    """A tensor of the other device; `data_here` holds it."""

    @staticmethod
    def __new__(cls, data_here):
        return torch.Tensor._make_wrapper_subclass(
            cls, data_here.shape, strides=data_here.stride(), dtype=data_here.dtype, device=AWAY,
            storage_offset=data_here.storage_offset(),
        )  # fmt: skip

    def __init__(self, data_here):
        self.data_here = data_here

    def tolist(self):
        return self.data_here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return execute(function, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Sends what is made on the other device there, and what comes back from it back."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return execute(function, args, kwargs or {})


class AwayGenerator(torch.Generator):
    """A generator of the CPU that says of which device it was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.asked = torch.device(device)
        return made


def execute(function, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    away = [one for one in leaves if isinstance(one, Away)]
    here = [one for one in leaves if isinstance(one, torch.Tensor) and not isinstance(one, Away)]
    copies = function.name().startswith("aten::copy_")
    if away and not copies and any(one.ndim for one in here):
        raise AssertionError(f"{function.name()} mixes devices")
    goes_away = isinstance(args[0], Away) if copies else bool(away)
    if kwargs.get("device") is not None:
        goes_away = torch.device(kwargs["device"]) == AWAY
        kwargs = {**kwargs, "device": torch.device("cpu")}
    data = tree_map(lambda one: one.data_here if isinstance(one, Away) else one, (args, kwargs))
    out = function(*data[0], **data[1])
    if not goes_away:
        return out
    out = tree_map(lambda one: Away(one) if isinstance(one, torch.Tensor) else one, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if away else out


def send_away(module):
    moved = {}
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                new = nn.Parameter(Away(tensor.detach()))
                part._parameters[name] = moved.setdefault(id(tensor), new)
        for name, tensor in part._buffers.items():
            part._buffers[name] = None if tensor is None else Away(tensor)


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    real, forward = torch.autocast, ScaledLinear.forward

    def autocast(kind, **options):  # torch has none for this device; then all is float32
        return contextlib.nullcontext() if kind == AWAY.type else real(kind, **options)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(ScaledLinear, "forward", lambda layer, x: forward(layer, x).float())
    monkeypatch.setattr(torch, "Generator", AwayGenerator)


def compiled(folder, settings, *, away):
    module = tiny_llama(blocks=1, hidden=32, intermediate=64, heads=2, kv_heads=1)
    given = {
        "search.bits": [2, 3],
        "search.group_sizes": [32, -1],
        "evaluate.curve_windows": 2,
        "search.refine": 0,
        "quantize.tuning.steps": 1,
        "quantize.tuning.batch": 1,
        **{f"{stage}.precision": "float32" for stage in ("calibrate", "evaluate", "quantize")},
        **settings,
    }
    batches = [markov_tokens(2, 12, seed=seed) for seed in range(4)]
    job = open_job(module, configure(module, settings=given), calibration=batches)
    if away:
        send_away(job.model.module)
        assert job.model.device == AWAY
    with Devices() if away else contextlib.nullcontext(), job.measure(fresh=True) as measured:
        chosen = job.search(measured, Budget.parse("2.8bit"))
        return deliver(job, job.quantize(chosen.plan, chosen.measured), chosen, folder, folder)


def test_the_device_refuses_what_a_gpu_refuses():
    with Devices():
        away, here = torch.arange(3.0, device=AWAY), torch.ones(3)
        assert float((away * 2).sum()) == 6.0
        with pytest.raises(AssertionError, match="mixes devices"):
            away + here
        here[1:] = away[1:]
        assert here.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "settings",
    [{"quantize.rounding": {"steps": 1}}, {"quantize.sequential": False}],
    ids=["block by block", "from the store"],
)
def test_a_whole_compilation_stays_on_the_network_s_device(settings, tmp_path):
    for name in ("here", "away"):
        (tmp_path / name).mkdir()
    away = compiled(tmp_path / "away", settings, away=True)
    here = compiled(tmp_path / "here", settings, away=False)
    assert away.plan.assignment == here.plan.assignment
    assert away.quality.kl == pytest.approx(here.quality.kl, rel=0.02)
