"""Outputs are whole or absent."""

import os
import subprocess
import sys

import pytest

import quantforge
from quantforge.errors import UsageError
from quantforge.testing import markov_tokens, tiny_llama
from quantforge.workspace import reserved, staging


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(text)


def test_an_error_keeps_what_was_there_and_leaves_nothing_else(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    with pytest.raises(KeyboardInterrupt), staging(output, force=True) as folder:
        write(folder, "new")
        raise KeyboardInterrupt
    assert (output / "plan.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_force_replaces_the_whole_folder(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    (output / "stale").touch()
    with pytest.raises(UsageError), staging(output, force=False):
        pass
    with staging(output, force=True) as folder:
        write(folder, "new")
    assert (output / "plan.json").read_text() == "new"
    assert not (output / "stale").exists()
    assert list(tmp_path.iterdir()) == [output]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(output, "old")
    rename = type(output).replace

    def fails(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(output), "replace", fails)
    with pytest.raises(OSError, match="no"), staging(output, force=True) as folder:
        write(folder, "new")
    assert (output / "plan.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


KILLED = """
import os, pathlib, signal, sys
from quantforge.workspace import staging
renames = 0
rename = pathlib.Path.replace

def counted(path, target):
    global renames
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames += 1
    return rename(path, target)

pathlib.Path.replace = counted
with staging(pathlib.Path(sys.argv[1]), force=True) as folder:
    (folder / "plan.json").write_text("of a killed run")
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_the_next_run_clears_up_after_one_that_was_killed(tmp_path, renames):
    output = tmp_path / "out"
    write(output, "old")
    command = [sys.executable, "-c", KILLED, str(output), str(renames)]
    subprocess.run(command, check=False)
    assert len(list(tmp_path.glob(".*.lock"))) == 1  # nobody holds it any more
    assert len(list(tmp_path.iterdir())) == 3
    assert output.exists() == (renames == 0)  # between the renames there is only the copy
    with pytest.raises(UsageError, match="--force"), staging(output, force=False):
        pass
    assert (output / "plan.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_only_what_dead_runs_to_the_same_output_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    output, dead, alive = tmp_path / "out", ended.pid, os.getppid()
    stale = [f".out.{dead}.partial", f".out.{dead}.old", f".out.{os.getpid()}.old"]
    others = [
        f".out.{alive}.partial", f".out.{alive}.old", f".out.2.{dead}.partial", ".out.x.old",
        f".other.{dead}.partial", f"out.{dead}.partial", f".out.{dead}.partial.txt",
    ]  # fmt: skip
    for name in (*stale, *others, "out"):
        write(tmp_path / name, name)
    (tmp_path / f".out.{dead + 1}.partial").touch()  # a file: not what a run leaves
    with staging(output, force=True) as folder:
        write(folder, "new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "out", f".out.{dead + 1}.partial"}
    assert (output / "plan.json").read_text() == "new"


def test_an_empty_output_does_not_hide_the_only_copy(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write(tmp_path / f".out.{os.getpid()}.old", "old")
    with staging(output, force=True) as folder:
        assert (output / "plan.json").read_text() == "old"
        write(folder, "new")
    assert (output / "plan.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


HOLDER = """
import pathlib, sys
from quantforge.workspace import staging
with staging(pathlib.Path(sys.argv[1]), force=False) as folder:
    (folder / "plan.json").write_text("first")
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_the_second_of_two_runs_to_one_output_stops_and_the_first_goes_on(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(output)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "holds\n"
        with pytest.raises(UsageError, match=f"another run is writing {output}"):
            staging(output, force=True).__enter__()
        with staging(tmp_path / "other", force=False) as folder:  # another output is free
            write(folder, "other")
        first.communicate("\n")
    assert first.returncode == 0
    assert (output / "plan.json").read_text() == "first"
    with staging(output, force=True) as folder:
        write(folder, "next")
    assert (output / "plan.json").read_text() == "next"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("call", ["quantize", "plan", "pareto"])
def test_a_call_finds_the_other_run_before_it_has_done_anything(tmp_path, call):
    seen = []
    options = {} if call == "pareto" else {"budget": "3bit"}
    with reserved(tmp_path / "out"), pytest.raises(UsageError, match="another run") as caught:
        getattr(quantforge, call)(
            tiny_llama(blocks=1), calibration=[markov_tokens(4, 24)], output=tmp_path / "out",
            progress=seen.append, **options,
        )  # fmt: skip
    assert caught.value.exit_code == 2
    assert seen == []
    assert list(tmp_path.iterdir()) == []
