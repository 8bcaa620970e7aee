"""Tuning: what is measured is added to the table; where there is no GPU nothing is."""

import json

import pytest
import torch
import tune_kernels
from quantforge_kernels.triton import backend
from quantforge_kernels.triton.launch import (
    candidates,
    choose_launch,
    problem,
    read_table,
    table_path,
    write_table,
)
from quantforge_kernels.triton.linear import describe

CPU = torch.device("cpu")
OPTIONS = ("--shapes", "64x128", "--bits", "4", "--rows", "1", "--folder")


def tune(*options):
    """How many launches a run with these options adds."""
    return tune_kernels.tune(tune_kernels.arguments_parser().parse_args(map(str, options)), CPU)


def test_no_gpu_is_said_and_nothing_is_written(tmp_path, capsys):
    reason = backend.unavailable()
    if not reason:
        pytest.skip("there is a GPU here")
    assert tune_kernels.main(["--folder", str(tmp_path)]) == 1
    assert f"nothing to tune here: {reason}; nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture
def device(monkeypatch):
    """A device whose kernels are a float32 product, and whose time is what a test says."""
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    exact = {}

    class Machine:
        lacking = frozenset()  # launches that it has too little for
        time = staticmethod(lambda launch: 1.0)

    def sample(shape, bits, group, dtype, where, *, asymmetric):
        weight, decoded = drawn(shape, bits, group, dtype, where, asymmetric=asymmetric)
        exact[id(weight)] = decoded
        return weight, decoded

    def linear(x, weight, *, launch):
        if launch in Machine.lacking:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(300000, 233472, "shared memory")
        return (x.float() @ exact[id(weight)].T).to(x.dtype)

    drawn = tune_kernels.sample
    monkeypatch.setattr(tune_kernels, "FLUSH_BYTES", 16)
    monkeypatch.setattr(tune_kernels, "sample", sample)
    monkeypatch.setattr(tune_kernels, "linear", linear)
    monkeypatch.setattr(tune_kernels, "seconds", lambda x, weight, launch, *_: Machine.time(launch))
    return Machine


def test_a_candidate_without_room_is_left_out_and_the_run_goes_on(device, tmp_path, capsys):
    first, second = candidates(1, 4)[:2]
    device.lacking = frozenset({first})
    device.time = staticmethod(lambda launch: {first: 0.1, second: 0.2}.get(launch, 1.0))
    assert tune(*OPTIONS, tmp_path) == 1
    assert dict(read_table("cpu", tmp_path)) == {problem(1, 64, 128, 4, 128): second}
    assert f"left out: {first}: out of resource: shared memory" in capsys.readouterr().out


def test_a_problem_that_no_launch_fits_costs_no_other(device, tmp_path, capsys):
    device.lacking = frozenset(candidates(1, 4))
    assert tune(*OPTIONS, tmp_path, "--rows", 1, 32) == 1
    assert [key.m for key in read_table("cpu", tmp_path)] == [32]
    assert "1x64x128 4 bits: no launch runs on this device" in capsys.readouterr().out


def test_runs_add_to_the_table_and_dtype_and_zero_points_are_told_apart(device, tmp_path):
    every = candidates(1, 4)
    runs = [([], every[0]), (["--dtype", "fp16"], every[1]), (["--zero-points"], every[2])]
    for more, best in runs:
        device.time = staticmethod(lambda launch, best=best: 0.1 if launch == best else 1.0)
        assert tune(*OPTIONS, tmp_path, *more) == (2 if "--zero-points" in more else 1)
    table = read_table("cpu", tmp_path)
    assert len(table) == 3

    def chosen(**how):
        return choose_launch(1, 64, 128, 4, 128, describe(CPU), table=table, **how)

    assert chosen() == every[2]  # measured again in the third run
    assert chosen(dtype="fp16") == every[1]
    assert chosen(asymmetric=True) == every[2]
    assert chosen(dtype="fp16", asymmetric=True) not in every[:3]  # never measured: by rule
    rows = json.loads(table_path("cpu", tmp_path).read_text(encoding="utf-8"))["launches"]
    assert {row["measured"]["torch"] for row in rows} == {torch.__version__}


def test_a_wrong_launch_ends_the_run_and_keeps_the_table(device, tmp_path, monkeypatch):
    other = problem(8, 1, 1, 2, 128)
    write_table("cpu", {other: candidates(8, 2)[0]}, {}, tmp_path)
    monkeypatch.setattr(tune_kernels, "linear", lambda x, weight, *, launch: torch.zeros(1, 64))
    with pytest.raises(SystemExit, match=r"is wrong by 1\.000"):
        tune(*OPTIONS, tmp_path)
    assert list(read_table("cpu", tmp_path)) == [other]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_samples_are_what_they_say(asymmetric):
    weight, exact = tune_kernels.sample(
        (40, 256), 3, 64, torch.bfloat16, CPU, asymmetric=asymmetric
    )
    assert (weight.zero is not None) == asymmetric
    assert (weight.out_features, weight.in_features, weight.bits) == (40, 256, 3)
    assert exact.shape == (40, 256)
    assert weight.words.shape == (2, 2, 3, 8, 4, 4)
    scale = weight.scale[:4, :40].T.float().repeat_interleave(64, 1)
    zero = weight.zero[:4, :40].T.float().repeat_interleave(64, 1) if asymmetric else 4.0
    code = exact / scale + zero
    assert torch.allclose(code, code.round(), atol=1e-4)
    assert int(code.round().min()) == 0
    assert int(code.round().max()) == 7
