"""Runs `interpreted.py` in a process in which Triton interprets its kernels.

Whether it does is decided at its import, for the whole process: these tests must not share one with
tests that compile kernels, nor decide it for whatever else runs in this process.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TIMEOUT_S = 1500

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)"
    ),
    pytest.mark.timeout(TIMEOUT_S),
]


def interpret(*options: str) -> tuple[int, int, str]:
    """Tests passed, tests not passed, and what was printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x",
         "-o", "timeout=0", str(HERE / "interpreted.py"), *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", answer.stdout)}
    others = sum(counts.get(word, 0) for word in ("failed", "error", "errors", "skipped"))
    return counts.get("passed", 0), others, answer.stdout[-6000:] + answer.stderr[-2000:]


def test_kernels_equal_the_reference():
    passed, others, printed = interpret("-k", "not block")
    assert (passed, others) == (106, 0), printed


def test_a_block_equals_the_reference():
    passed, others, printed = interpret("-k", "block")
    assert (passed, others) == (2, 0), printed


@pytest.mark.full
def test_the_whole_grid_equals_the_reference():
    passed, others, printed = interpret("-m", "full")
    assert (passed, others) == (224, 0), printed
