"""Runs that share a cache: one makes a measurement, others use it, none goes under a reader."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantforge
from quantforge import claims, measurements
from quantforge.claims import require_room
from quantforge.cli.outcome import explain
from quantforge.errors import CancelledError, ResourceError
from quantforge.measurements import measurement
from quantforge.progress import Monitor
from quantforge.testing import markov_tokens, tiny_llama

DONE = "done"
KEY = "k" * 64

# A run in a process of its own: says when it makes the measurement and when it reads it, and takes
# a line of input to go on after either.
RUN = f"""
import sys
from quantforge.measurements import measurement
from quantforge.progress import Monitor

def make(folder):
    print("making", flush=True)
    sys.stdin.readline()
    (folder / "{DONE}").write_text("by a child")

told = Monitor(progress=lambda event: print(event.stage, event.message, flush=True))
with measurement("{KEY}", make, complete="{DONE}", fresh="fresh" in sys.argv, monitor=told):
    print("reading", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def child():
    """Starts runs; those still alive at the end are killed."""
    with ExitStack() as stack:

        def start(*arguments):
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def line(process):
    return process.stdout.readline().strip()


def never(folder):
    raise AssertionError("made although it was there")


def write(folder):
    (folder / DONE).write_text("here")


def claim(make=write, *, key=KEY, fresh=False, cancel=None, progress=None):
    monitor = Monitor(cancel=cancel, progress=progress)
    return measurement(key, make, complete=DONE, fresh=fresh, monitor=monitor)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_second_run_waits_and_uses_what_the_first_made(child, cache):
    first = child()
    assert line(first) == "making"
    second = child()
    assert line(second).startswith("wait another run makes this measurement")
    time.sleep(2 * measurements.POLL_S)
    go_on(first)
    assert line(first) == "reading"
    assert line(second) == "reading"  # while the first still reads, and without making it
    with claim(never) as folder:
        assert (folder / DONE).read_text() == "by a child"
    for process in (first, second):
        go_on(process)
        assert process.wait(timeout=60) == 0
    assert names(cache / "measurements") == [KEY[:32]]
    assert names(cache / "locks") == ["registry.lock"]


def test_a_killed_run_leaves_nothing_stuck(child, cache):
    first = child()
    assert line(first) == "making"
    second = child()
    assert line(second).startswith("wait")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    assert line(second) == "making"
    go_on(second)
    assert line(second) == "reading"
    go_on(second)
    second.wait(timeout=60)
    assert names(cache / "locks") == ["registry.lock"]


def test_a_run_that_waits_can_be_cancelled_and_says_once_what_it_waits_for(child):
    first = child()
    assert line(first) == "making"
    cancel = threading.Event()
    seen = []
    timer = threading.Timer(3 * measurements.POLL_S, cancel.set)
    timer.start()
    with pytest.raises(CancelledError), claim(never, cancel=cancel, progress=seen.append):
        pass
    assert [event.stage for event in seen] == ["wait"]
    go_on(first)
    assert line(first) == "reading"  # undisturbed


def test_what_is_read_is_neither_removed_nor_made_anew(child, cache):
    reader = child()
    go_on(reader)
    assert [line(reader), line(reader)] == ["making", "reading"]
    os.utime(cache / "measurements" / KEY[:32], (0, 0))
    for number in range(measurements.KEPT_MEASUREMENTS + 1):
        with claim(key=f"{number}" * 64):
            pass
    assert KEY[:32] in names(cache / "measurements")
    again = child("fresh")
    assert line(again).startswith("wait another run uses this measurement")
    go_on(reader)
    assert line(again) == "making"
    go_on(again)
    assert line(again) == "reading"
    go_on(again)
    again.wait(timeout=60)
    with claim(key="z" * 64):  # nobody reads it now, and others are younger
        pass
    assert len(names(cache / "measurements")) == measurements.KEPT_MEASUREMENTS


def test_a_run_that_fails_lets_the_next_one_make_it(cache):
    def fail(folder):
        (cache / "nowhere").read_text()

    def fail_elsewhere(folder):
        Path("/nowhere").read_text()

    with pytest.raises(ResourceError, match="QUANTFORGE_CACHE"), claim(fail):
        pass
    with pytest.raises(FileNotFoundError, match="/nowhere"), claim(fail_elsewhere):
        pass
    assert names(cache / "locks") == ["registry.lock"]
    with claim() as folder:
        assert (folder / DONE).read_text() == "here"


def test_a_removal_that_is_interrupted_leaves_no_measurement_to_trust(monkeypatch, cache):
    with claim():
        pass
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removed any
        with claim(lambda folder: (folder / DONE).write_text("anew"), fresh=True) as folder:
            assert (folder / DONE).read_text() == "anew"
    assert len(names(cache / "measurements")) == 2
    with claim(never):  # what was left goes with the next run
        assert names(cache / "measurements") == [KEY[:32]]


def test_only_the_latest_measurements_are_kept(cache):
    for number in range(measurements.KEPT_MEASUREMENTS + 2):
        with claim(key=f"{number}" * 64) as folder:
            pass
        os.utime(folder, (number, number))
    latest = [f"{number}" for number in range(2, measurements.KEPT_MEASUREMENTS + 2)]
    assert [name[0] for name in names(cache / "measurements")] == latest


def test_a_cache_that_cannot_be_written_is_named_with_what_moves_it(monkeypatch, cache):
    (cache / "file").touch()
    monkeypatch.setenv("QUANTFORGE_CACHE", str(cache / "file" / "deep"))
    with pytest.raises(ResourceError) as caught, claim(never):
        pass
    code, text = explain(caught.value)
    assert code == 5
    assert str(cache / "file" / "deep") in text
    assert "QUANTFORGE_CACHE" in text


def test_a_full_disk_is_a_lack_of_resources(cache):
    def fill(folder):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            save_file({"a": torch.zeros(1000)}, folder / "a.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(ResourceError, match="File too large") as caught, claim(fill):
        pass
    assert str(cache) in explain(caught.value)[1]


def test_a_disk_that_is_too_small_is_said_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=900_000_000)
    monkeypatch.setattr(claims.shutil, "disk_usage", lambda _: usage)
    require_room(900_000_000, tmp_path)
    with pytest.raises(ResourceError, match=r"writes 0\.95 GB to the cache .* has 0\.90 GB left"):
        require_room(950_000_000, tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "part").write_bytes(bytes(50_000_000))  # of an interrupted run
    (tmp_path / "tmpabc").mkdir()
    (tmp_path / "tmpabc" / "states").write_bytes(bytes(50_000_000))  # its scratch
    require_room(950_000_000, tmp_path, tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ResourceError):
        require_room(960_000_000, tmp_path, tmp_path / "kept")


def test_calibration_asks_for_room_first(monkeypatch):
    network = tiny_llama(blocks=1)
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(claims.shutil, "disk_usage", lambda _: usage)
    seen = []
    with pytest.raises(ResourceError, match="QUANTFORGE_CACHE"):
        quantforge.quantize(
            network, budget="3bit", calibration=list(markov_tokens(16, 16)),
            settings={"evaluate.prompts": []}, progress=lambda event: seen.append(event.stage),
        )  # fmt: skip
    assert "candidates" not in seen
