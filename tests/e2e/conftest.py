"""One tiny trained checkpoint and one compiled folder, shared by the end-to-end tests."""

import json
import pydoc_data.topics
import subprocess
import sys

import pytest

from quantforge.testing import save_tiny_checkpoint

SMALL = [
    "--set", "calibration.sequences=24",
    "--set", "calibration.sequence_length=64",
    "--set", "search.group_sizes=[32, 64, -1]",
    "--set", "evaluate.curve_windows=2", "--set", "search.refine=0",
    "--set", "evaluate.tokens=4",
]  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", shards=2)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(pydoc_data.topics.topics.values())[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small():
    """Options that make a run take seconds."""
    return SMALL


@pytest.fixture(scope="session")
def run():
    """Runs the command as a user would; returns the finished process."""

    def call(*arguments, cwd):
        return subprocess.run(
            [sys.executable, "-m", "quantforge", *map(str, arguments)],
            cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def compiled(run, checkpoint, text, tmp_path_factory):
    """Folder of a 3.3-bit compilation, and the JSON it printed."""
    cwd = tmp_path_factory.mktemp("work")
    done = run(
        "quantize", checkpoint, "--budget", "3.3bit", "--calibration", text, "-o", "out",
        "--json", *SMALL, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cwd / "out", json.loads(done.stdout)
