"""Networks in scratch files: the same bytes, and memory that does not grow with their depth."""

import subprocess
import sys

import pytest

from quantforge import quantize, scratch
from quantforge.memory import anonymous_bytes, release_freed, trim_heap
from quantforge.testing import save_tiny_checkpoint, tiny_llama

TEXT = " ".join(f"the {n} of {7 * n % 11} and so on," for n in range(2000))
SETTINGS = {
    "calibration.sequences": 12,
    "calibration.sequence_length": 48,
    "search.bits": [2, 4],
    "search.group_sizes": [32, 128],
    "search.refine": 1,
    "evaluate.curve_windows": 2,
    "evaluate.tokens": 2,
    "quantize.rounding.steps": 2,
    "quantize.tuning.steps": 2,
    "quantize.tuning.batch": 1,
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_scratch_files_change_no_byte(tmp_path, text, monkeypatch):
    folder = save_tiny_checkpoint(tmp_path / "net", steps=0, blocks=2)
    results = []
    for small in (scratch.SMALL_BYTES, 0):
        monkeypatch.setattr(scratch, "SMALL_BYTES", small)
        output = tmp_path / str(small)
        quantize(folder, budget="3bit", calibration=text, output=output, settings=SETTINGS,
                 fresh=True)  # fmt: skip
        assert (tmp_path / "cache" / "scratch").exists() == (small == 0)
        files = {path.name: path.read_bytes() for path in output.iterdir()}
        files.pop("run.json")
        results.append(files)
    assert "model.safetensors" in results[0]
    assert results[0] == results[1]
    assert list((tmp_path / "cache" / "scratch").iterdir()) == []


@linux
def test_four_times_the_blocks_take_no_more_memory(tmp_path, text, monkeypatch):
    """What is held at any step grows by less than a tenth of the weights that are added."""
    monkeypatch.setattr(scratch, "SMALL_BYTES", 0)
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith("quantize.rounding")}
    settings |= {"search.group_sizes": [128], "search.refine": 0}
    held, weights = [], []
    for blocks in (1, 1, 4):  # the first run makes what the process keeps
        folder = tmp_path / f"net-{len(held)}"
        save_tiny_checkpoint(folder, steps=0, blocks=blocks, hidden=512, intermediate=1024)
        release_freed()
        before, seen = anonymous_bytes(), []

        def look(_, seen=seen):
            trim_heap()
            seen.append(anonymous_bytes())

        quantize(folder, budget="3bit", calibration=text, output=tmp_path / f"out-{len(held)}",
                 effort="fast", settings=settings, fresh=True, progress=look)  # fmt: skip
        held.append(max(seen) - before)
        weights.append((folder / "model.safetensors").stat().st_size)
    assert held[2] - held[1] < 0.1 * (weights[2] - weights[1])


# A command under a limit of data that its weights are over: first in memory, then in files.
LIMITED = """
import os, resource, sys
import torch, transformers, transformers.models.llama.modeling_llama
import quantforge.pipeline, quantforge.scratch
from quantforge.cli import main
from quantforge.memory import _status

limit = _status("VmData") + int(sys.argv.pop(1))
small = quantforge.scratch.SMALL_BYTES
for quantforge.scratch.SMALL_BYTES in (1 << 40, small):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        main()
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ROOM = 200 << 20
# Under a limit that counts the interpreter and its libraries.
CAPPED = """
import resource, sys
from quantforge.cli import main

limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
main()
"""
DEEP = 100


@linux
def test_a_network_larger_than_the_limit_of_data_goes_through(tmp_path, text):
    """The one shard alone is larger, and so is the float network."""
    folder = save_tiny_checkpoint(tmp_path / "net", steps=0, blocks=1)
    module = tiny_llama(hidden=512, intermediate=512, blocks=44, vocabulary=256)
    module.save_pretrained(folder, max_shard_size="1TB")
    shard = (folder / "model.safetensors").stat().st_size
    assert shard > 1.3 * ROOM
    settings = [
        "search.solver=uniform", "search.bits=[4]", "search.group_sizes=[128]",
        "quantize.method=rtn", "quantize.tuning.steps=0", "quantize.rounding.steps=0",
        "calibration.sequences=8", "calibration.sequence_length=32", "evaluate.prompts=[]",
    ]  # fmt: skip
    options = [word for setting in settings for word in ("--set", setting)]
    output = tmp_path / "out"
    ended = subprocess.run(
        [
            sys.executable, "-c", LIMITED, str(ROOM), "quantize", str(folder), "--output",
            str(output), "--calibration", str(text), *options,
        ],
        check=False, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = [line for line in ended.stdout.splitlines() if line.startswith("ended")]
    assert said == ["ended 5", "ended 0"], ended.stdout + ended.stderr
    assert "cannot be loaded" in ended.stderr
    assert "allocate memory" in ended.stderr
    assert (output / "model.safetensors").stat().st_size < shard / 6


@linux
@pytest.mark.full
@pytest.mark.timeout(5400)
def test_every_method_goes_through_under_a_limit_below_the_one_shard(tmp_path, text):
    """The limit is of the whole process, libraries included; every stage runs, none is cut short.

    Three quarters of the float32 weights, in one file: compensation, learned rounding, refinement
    of the plan and tuning see a block at a time.
    """
    folder = save_tiny_checkpoint(tmp_path / "net", steps=0, blocks=1)
    module = tiny_llama(hidden=512, intermediate=1536, blocks=DEEP, vocabulary=256)
    module.save_pretrained(folder, max_shard_size="1TB")
    shard = (folder / "model.safetensors").stat().st_size
    limit = shard * 3 // 4
    output, options = tmp_path / "out", []
    for key, value in SETTINGS.items():
        options += ["--set", f"{key}={value}"]
    ended = subprocess.run(
        [
            sys.executable, "-c", CAPPED, str(limit), "quantize", str(folder), "--budget", "3bit",
            "--output", str(output), "--calibration", str(text), *options,
        ],
        check=False, capture_output=True, text=True, timeout=5400,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (output / "model.safetensors").stat().st_size < shard / 6
