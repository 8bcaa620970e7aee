"""Wrong input ends in one line, the documented code, and nothing on disk."""

import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantforge
from quantforge.errors import CancelledError


@pytest.fixture
def fails(run):
    """Runs a command that must end in one line, the code given, and nothing on disk."""

    def check(code, *arguments, cwd, says):
        done = run(*arguments, cwd=cwd)
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert done.returncode == code, done.stderr
        assert len(errors) == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert says in errors[0]
        assert done.stdout == ""
        assert not list(cwd.glob("out*"))
        assert not list(cwd.glob(".*partial"))

    return check


def damaged(checkpoint, folder, change):
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


def poison(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("budget", ["three bits", "0bit", "99bit", "bit", "latency:25%", "2x"])
def test_wrong_budget(fails, checkpoint, tmp_path, budget):
    fails(2, "quantize", checkpoint, "--budget", budget, "-o", "out", cwd=tmp_path, says="budget")


@pytest.mark.parametrize(
    ("budget", "says"), [("0.5bit", "raise --budget to at least"), ("0.01x", "smallest plan")]
)
def test_a_budget_below_the_floor_is_refused_before_any_text_is_read(
    fails, checkpoint, tmp_path, budget, says
):
    """The text is missing, which is found out later."""
    command = ("quantize", checkpoint, "--calibration", "missing.txt", "-o", "out")
    fails(4, *command, "--budget", budget, cwd=tmp_path, says=says)
    only = ("--set", "search.solver=uniform", "--set", "search.bits=[3]")
    only += ("--set", "search.group_sizes=[32]")
    fails(4, *command, *only, "--budget", "3.2bit", cwd=tmp_path, says="takes 3.500 stored bits")


def test_evaluating_what_is_not_there(run, tmp_path):
    done = run("eval", "./nowhere", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1] == "error: nowhere does not exist"


def test_a_missing_budget(fails, checkpoint, tmp_path):
    fails(2, "quantize", checkpoint, "-o", "out", cwd=tmp_path, says="no budget is given")


def test_a_plan_that_does_not_fit(fails, checkpoint, text, tmp_path):
    command = ("quantize", checkpoint, "--calibration", text, "-o", "out", "--plan", "p.json")
    fails(3, *command, cwd=tmp_path, says="p.json is not a file")
    (tmp_path / "p.json").write_text('{"assignment": {"model.layers.0.mlp.up_proj": "3b-g48"}}')
    fails(3, *command, cwd=tmp_path, says="p.json, line 1: model.layers.0.mlp.up_proj: 3b-g48")
    fails(2, *command, "--budget", "3bit", cwd=tmp_path, says="give one")


def test_a_published_setting_needs_a_model_that_it_fits(fails, checkpoint, tmp_path):
    """The checkpoint's rows are 64 and 128 long."""
    command = ("quantize", "gptq-w4g128", "-o", "out", "--set", "calibration.sequence_length=64")
    fails(3, *command, cwd=tmp_path, says="--model")
    fails(3, *command, "--model", checkpoint, cwd=tmp_path, says="that divide all: 32, -1")


def test_unknown_recipe_flag_and_setting(fails, checkpoint, tmp_path):
    command = ("quantize", checkpoint, "--budget", "3bit", "-o", "out")
    fails(2, "quantize", "lama", "--budget", "3bit", cwd=tmp_path, says="llama")
    fails(2, *command, "--nonsense", cwd=tmp_path, says="--nonsense")
    fails(2, *command, "--set", "search.bit=[2]", cwd=tmp_path, says="search.bits")


def test_missing_model(fails, tmp_path):
    fails(3, "quantize", "./nowhere", "--budget", "3bit", "-o", "out", cwd=tmp_path, says="nowhere")


@pytest.mark.parametrize("change", [truncate, lose_a_shard, poison])
def test_damaged_model(fails, checkpoint, text, tmp_path, change):
    bad = damaged(checkpoint, tmp_path / "bad", change)
    fails(
        3, "quantize", bad, "--budget", "3bit", "--calibration", text, "-o", "out",
        cwd=tmp_path, says="bad",
    )  # fmt: skip


def test_empty_calibration(fails, small, checkpoint, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    fails(
        3, "quantize", checkpoint, "--budget", "3bit", "--calibration", "empty.txt", "-o", "out",
        *small, cwd=tmp_path, says="empty.txt",
    )  # fmt: skip


def test_budget_below_the_floor(fails, small, checkpoint, text, tmp_path):
    fails(
        4, "quantize", checkpoint, "--budget", "2.1bit", "--calibration", text, "-o", "out",
        *small, cwd=tmp_path, says="at least 2.",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "says"),
    [("30kB", "embeddings, head and norms"), ("vram:1MB@100k", "keys and values"), ("0.1x", "x")],
)
def test_bytes_below_the_floor(fails, small, checkpoint, text, tmp_path, budget, says):
    fails(
        4, "quantize", checkpoint, "--budget", budget, "--calibration", text, "-o", "out",
        *small, cwd=tmp_path, says=says,
    )  # fmt: skip


def test_an_existing_folder_is_kept(fails, checkpoint, text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    command = ("quantize", checkpoint, "--budget", "3bit", "--calibration", text, "-o", "mine")
    fails(2, *command, cwd=tmp_path, says="exists")
    fails(2, *command, "--force", cwd=tmp_path, says="not written by quantforge")
    assert (tmp_path / "mine" / "precious.txt").read_text() == "x"


def test_an_interrupt_leaves_nothing(small, checkpoint, text, tmp_path):
    command = [
        sys.executable, "-m", "quantforge", "quantize", str(checkpoint), "--budget", "3.3bit",
        "--calibration", str(text), "-o", "out", "--fresh", *small,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "candidates" in line or "gradients" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "error: interrupted" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_set_cancel_event_stops_the_run(checkpoint, text, tmp_path):
    cancel = threading.Event()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        quantforge.quantize(
            checkpoint, budget="3.3bit", calibration=text, output=tmp_path / "out", fresh=True,
            cancel=cancel, progress=lambda event: cancel.set(),
            settings={"calibration.sequences": 24, "calibration.sequence_length": 64},
        )  # fmt: skip
    assert time.monotonic() - began < 100
    assert not list(tmp_path.iterdir())
