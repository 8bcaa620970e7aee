"""Who may import whom, and what a cheap command costs."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "datasets", "scipy", "matplotlib", "numpy", "pydantic", "yaml")


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_contracts_hold() -> None:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys
from quantforge.cli.app import application
from quantforge.cli.outcome import run
for words in (["--help"], ["quantize", "--help"], ["--version"], ["--wrong"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(application(), words)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    # the option parser itself takes pydantic once it has a value to convert
    print(words, [name for name in loaded if name != "pydantic" or words == ["--help"]])
"""
    assert [line.rpartition("] ")[2] for line in python(code).splitlines()] == ["[]"] * 4


def test_help_starts_fast() -> None:
    fastest = float("inf")
    for _ in range(3):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(
            [sys.executable, "-m", "quantforge", "--help"],
            capture_output=True,
            check=True,
            cwd=ROOT,
        )
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime
        fastest = min(fastest, spent)
        assert b"quantize" in run.stdout
    # Processor time: the promise is half a second on an idle machine, whatever else runs here.
    assert fastest < 0.5


def test_kernels_import_alone() -> None:
    others = ("quantforge", "transformers", "triton")
    code = f"import sys, quantforge_kernels; print([m for m in {others} if m in sys.modules])"
    assert python(code).strip() == "[]"
