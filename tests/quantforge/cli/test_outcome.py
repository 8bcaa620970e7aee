import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from quantforge.cli.outcome import explain, interruptible
from quantforge.errors import (
    BudgetError,
    CancelledError,
    InputError,
    QuantforgeError,
    ResourceError,
    UsageError,
)

ROOT = Path(__file__).resolve().parents[3]
QUANTIZE = ("quantize", "llama", "--budget", "3bit")


def raising(error: BaseException):
    def effect(options: dict) -> None:
        raise error

    return effect


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no such thing"), 2, "no such thing"),
        (InputError("x: truncated"), 3, "x: truncated"),
        (BudgetError("reachable: 2.03 to 8"), 4, "reachable: 2.03 to 8"),
        (ResourceError("disk"), 5, "disk"),
        (CancelledError("cancelled during search"), 130, "cancelled during search"),
        (QuantforgeError("a\nb \x1b[31mred\tc"), 1, "a b \ufffd[31mred c"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "out of memory"),
        (MemoryError("4 GB"), 5, "out of memory: 4 GB"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 5, "f: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 3, "f: Permission denied"),
        (
            ValueError("odd\nvalue"),
            1,
            "this is a bug in quantforge: ValueError: odd value (--debug shows where)",
        ),
        (
            OSError("no file"),
            1,
            "this is a bug in quantforge: OSError: no file (--debug shows where)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            5,
            "out of memory: DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_its_code(command, pipeline, error, code, line) -> None:
    pipeline.effect = raising(error)
    outcome = command(*QUANTIZE)
    assert outcome.code == code
    assert outcome.stderr == f"error: {line}\n"
    assert outcome.stdout == ""


def test_torchs_own_memory_error_is_a_resource_error() -> None:
    import torch

    assert explain(torch.OutOfMemoryError("GPU 0"))[0] == 5


@pytest.mark.parametrize("place", [0, 1, len(QUANTIZE)])
def test_debug_shows_the_traceback_wherever_it_stands(command, pipeline, place: int) -> None:
    pipeline.effect = raising(InputError("x: truncated"))
    words = list(QUANTIZE)
    words.insert(place, "--debug")
    outcome = command(*words)
    assert outcome.code == 3
    assert "Traceback (most recent call last)" in outcome.stderr
    assert outcome.stderr.endswith("error: x: truncated\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--wrong"], "No such option: --wrong"),
        (["foo"], "No such command 'foo'"),
        (["quantize"], "Missing argument 'MODEL'"),
        ([*QUANTIZE, "--sed", "1"], "No such option: --sed"),
        ([*QUANTIZE, "--seed", "x"], "Invalid value for '--seed'"),
        ([*QUANTIZE, "--seed", "-1"], "Invalid value for '--seed'"),
        ([*QUANTIZE, "--effort", "most"], "'most' is not one of 'fast', 'balanced', 'best'"),
        ([*QUANTIZE, "--set", "abc"], "--set abc: expected key=value"),
        (["eval", "out", "--windows", "0"], "Invalid value for '--windows'"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(command, pipeline, words, expected) -> None:
    outcome = command(*words)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert expected in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""
    assert pipeline.calls == []


def test_a_signal_sets_the_event_and_unwinds() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CancelledError, match="interrupted"), interruptible() as cancel:
        assert not cancel.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert cancel.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


# A real process whose pipeline holds a staging folder and works in small steps.
PROGRAM = """
import shutil, sys, time, types
from pathlib import Path
import quantforge
from quantforge.progress import Monitor

def quantize(model, *, output, progress, cancel, **options):
    staging = Path("staging.partial")
    try:
        staging.mkdir()  # inside: whoever waits for it may interrupt at once
        for step in range(200):
            Monitor(progress=progress, cancel=cancel).step("quantize", step, 200)
            time.sleep(0.05)
        raise AssertionError("was not interrupted")
    finally:
        shutil.rmtree(staging)

module = types.ModuleType("quantforge.pipeline")
module.quantize = quantize
def inspect(path):
    import warnings
    warnings.warn_explicit("ours,\\n in two lines", UserWarning, "f.py", 1, module="quantforge.x")
    warnings.warn_explicit("a library's", UserWarning, "g.py", 1, module="library")
    1 / 0

module.inspect = inspect
sys.modules["quantforge.pipeline"] = quantforge.pipeline = module
from quantforge.cli import main
main()
"""


def start(tmp_path: Path, *words: str, **options: object) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, str(program), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_cleans_up_and_says_so(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, *QUANTIZE, stdout=subprocess.PIPE)
    staging = tmp_path / "staging.partial"
    deadline = time.monotonic() + 30
    while not staging.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("[")] == ["error: interrupted"]
    assert out == ""
    assert not staging.exists()


def test_a_closed_stdout_is_not_an_error_message(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for words in (["--help"], ["quantize", "--help"], ["--version"]):
        process = start(tmp_path, *words, stdout=writing)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (141, ""), words
    os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_exit_code_5(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(tmp_path, "--version", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 5
    assert err == "error: No space left on device\n"


def test_own_warnings_are_one_line_and_the_libraries_none(tmp_path: Path) -> None:
    process = start(tmp_path, "inspect", "x", stdout=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    bug = "error: this is a bug in quantforge: ZeroDivisionError: division by zero"
    assert err == f"warning: ours, in two lines\n{bug} (--debug shows where)\n"
    process = start(tmp_path, "inspect", "x", "--debug", stdout=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" in err
    assert "a library's" in err


def test_a_narrow_encoding_does_not_fail(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start(tmp_path, "eval", "\u00fc\u2016.yaml", "--wrong\u2016", stdout=subprocess.PIPE)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("error: No such option: --wrong?")


def test_module_entry_point() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "quantforge", "--wrong"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: No such option: --wrong")
