"""A run that is killed, and the same command after it: the bytes of an uninterrupted run."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import cycle, pairwise

import pytest

from quantforge.testing import save_tiny_checkpoint

SETTINGS = {
    "calibration.sequences": 20,
    "calibration.sequence_length": 48,
    "search.group_sizes": [32, -1],
    "search.bits": [2, 3],
    "evaluate.curve_windows": 2,
    "search.refine": 0,
    "evaluate.curve_bits": [2, 3],
    "evaluate.tokens": 2,
    "quantize.tuning.steps": 3,
    "quantize.tuning.batch": 1,
}
# Everything that changes what a block leaves behind, and a generator that goes on between blocks.
THOROUGH = {
    "quantize.method": "gptaq",
    "quantize.awq": True,
    "quantize.true_sequential": True,
    "quantize.rounding.steps": 3,
    "quantize.rounding.check_every": 1,
    "quantize.rounding.patience": 1,
    "quantize.rounding.share": 0.5,
    "quantize.order": "groups",
    "search.asymmetric": True,
}

# Every stage that there is.
EVERYTHING = THOROUGH | {
    "calibration.sequences": 12,
    "calibration.sequence_length": 32,
    "calibrate.gradient_sequences": 5,
    "quantize.token_weighting": 0.5,
    "search.refine": 1,
    "training.block_steps": 2,
    "training.tokens": 256,
    "training.batch": 2,
    "training.evaluate_every": 128,
}
KILLS = 30
LAST = "export and report"  # what comes after the last step that is told

# Loads the libraries once and forks for every run. A run says what it reports, and dies when it is
# told to: at a step of a stage or at the checkpoint's verification by itself, so many seconds after
# so many reports by this process, whatever it is doing then.
SERVER = """
import json, os, signal, sys, time
import torch, transformers, transformers.models.llama.modeling_llama
import quantforge, quantforge.delivery, quantforge.load.huggingface
from quantforge.cli.outcome import explain

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def run(order, pipe):
    kill, events, began = order.pop("kill"), open(order.pop("events"), "w"), time.monotonic()
    times = open(events.name + "-times", "w")

    def progress(event):
        print(time.monotonic() - began, file=times, flush=True)
        os.write(pipe, b".")
        print(json.dumps([event.stage, event.done, event.message]), file=events, flush=True)
        if kill == [event.stage, event.done]:
            die()

    if kill == ["export"]:
        quantforge.delivery.verify_checkpoint = die
    try:
        getattr(quantforge, order.pop("call"))(**order, progress=progress)
        print(time.monotonic() - began, file=times, flush=True)
    except Exception as error:
        print(json.dumps(["error", *explain(error)]), file=events, flush=True)
        os._exit(1)
    os._exit(0)

def ended(child, pipe, reports, seconds):
    while reports and os.read(pipe, 1):
        reports -= 1
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

print("ready", flush=True)
for line in sys.stdin:
    order, (read, write) = json.loads(line), os.pipe()
    child = os.fork()
    if child == 0:
        run(order, write)
    os.close(write)
    kill = order["kill"] or [""]
    if kill[0] == "moment":
        status = ended(child, read, *kill[1:])
    else:
        status = os.waitpid(child, 0)[1]
    os.close(read)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", blocks=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the runs say on stderr."""
    return tmp_path_factory.mktemp("told") / "stderr"


@pytest.fixture(scope="module")
def call(cache, checkpoint, told, tmp_path_factory):
    """Runs a call in a process of its own; gives its exit code and events."""
    folder = tmp_path_factory.mktemp("calls")
    with ExitStack() as stack:
        errors = stack.enter_context(told.open("w"))
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, env={**os.environ, "QUANTFORGE_CACHE": str(cache)},
        )  # fmt: skip
        stack.enter_context(server)
        stack.callback(server.stdin.close)
        assert server.stdout.readline() == "ready\n"

        def run(output, *, kill=None, budget="2.6bit", name="quantize", **options):
            settings = SETTINGS | options.pop("settings", {})
            order = {
                "call": name, "model": str(checkpoint), "budget": budget, "kill": kill,
                "calibration": "pydoc", "settings": settings, "output": str(output),
                "events": str(folder / "events"), **options,
            }  # fmt: skip
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            lines = (folder / "events").read_text().splitlines()
            return code, [json.loads(line) for line in lines]

        run.times = folder / "events-times"
        yield run


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "run.json"
    }


def journals(cache):
    """Journals that there are, by name."""
    folder = cache / "journals"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def resumptions(events):
    return [
        (stage, message.removeprefix("resumed "))
        for stage, _, message in events
        if message.startswith("resumed")
    ]


@pytest.fixture(
    scope="module",
    params=[pytest.param({}, marks=pytest.mark.full), THOROUGH],
    ids=["default", "thorough"],
)
def chain(request, call, cache, tmp_path_factory):
    """One command, killed again and again; its output beside that of an uninterrupted run."""
    work, settings = tmp_path_factory.mktemp("work"), request.param
    points = [
        ["candidates", 2], ["gradients", 26], ["measure uniform networks", 2],
        ["quantize", 1], ["quantize", 2], ["tune scales", 2], ["export"],
    ]  # fmt: skip
    before, seen = journals(cache), []
    partial = set(cache.glob("measurements/*/journal"))  # of runs that other tests broke off
    for point in points:
        code, events = call(work / "out", kill=point, settings=settings)
        assert code == -9, (point, events)
        seen.append(events)
    code, events = call(work / "out", settings=settings)
    assert code == 0
    seen.append(events)
    # A finished run leaves none; older ones of other tests may have made room.
    assert journals(cache) <= before
    assert set(cache.glob("measurements/*/journal")) <= partial
    code, whole = call(work / "whole", settings=settings, fresh=True)
    assert code == 0
    return work, seen, whole


def test_a_run_killed_at_every_stage_gives_the_bytes_of_one_that_was_not(chain):
    work, _, whole = chain
    assert resumptions(whole) == []
    assert hashes(work / "out") == hashes(work / "whole")
    assert sorted(path.name for path in work.iterdir()) == ["out", "whole"]


def test_it_goes_on_where_it_was_and_says_so(chain):
    _, seen, _ = chain
    found = [resumptions(events) for events in seen]
    assert found[0] == []
    assert found[1] == [("candidates", "at block 3 of 3")]
    assert found[2][1][1].startswith("at block")
    assert found[4] == [("quantize", "at block 2 of 3")]
    assert found[5] == [("quantize", "at block 3 of 3")]
    assert found[6] == [("quantize", "after block 3 of 3"), ("tune scales", "at step 3 of 3")]
    assert found[7] == [("quantize", "after block 3 of 3"), ("tune scales", "after step 3 of 3")]
    assert ["measure uniform networks", 1, ""] not in seen[3]  # measured before it was killed
    assert "candidates" not in {event[0] for event in seen[4]}


def test_the_further_gradients_go_on_too(call, tmp_path):
    """In passes of 5 sequences, 4 a batch: the third pass is killed in its second block."""
    settings = {"calibrate.gradient_sequences": 5, "quantize.token_weighting": 0.5}
    code, _ = call(tmp_path / "whole", settings=settings, fresh=True)
    assert code == 0
    code, _ = call(tmp_path / "out", settings=settings, fresh=True, kill=["token gradients", 24])
    assert code == -9
    code, events = call(tmp_path / "out", settings=settings)
    assert code == 0
    assert [message for stage, message in resumptions(events) if stage == "token gradients"] == [
        "after block 3 of 3", "at block 2 of 3",
    ]  # fmt: skip
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_another_budget_or_setting_takes_the_calibration_and_not_the_journal(call, tmp_path):
    code, _ = call(tmp_path / "out", kill=["quantize", 2], fresh=True)
    assert code == -9
    for changed in ({"budget": "2.7bit"}, {"settings": {"quantize.damping": 0.02}}, {"seed": 1}):
        code, events = call(tmp_path / "other", kill=["quantize", 1], **changed)
        assert code == -9
        assert resumptions(events) == []
        if "seed" not in changed:
            assert "candidates" not in {event[0] for event in events}
    code, events = call(tmp_path / "out", kill=["quantize", 3])
    assert resumptions(events) == [("quantize", "at block 3 of 3")]
    code, events = call(tmp_path / "out", fresh=True, kill=["candidates", 1])
    assert resumptions(events) == []


def test_a_damaged_entry_is_passed_over_with_one_line(call, cache, told, tmp_path):
    code, _ = call(tmp_path / "whole")
    assert code == 0
    code, _ = call(tmp_path / "out", kill=["tune scales", 1])
    assert code == -9
    (journal,) = (
        path for path in (cache / "journals").iterdir() if (path / "tuning.safetensors").is_file()
    )
    entry = journal / "block-00001.safetensors"
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(bytes(content))
    (journal / "tuning.safetensors").write_bytes(b"cut")
    before = len(told.read_text())
    code, events = call(tmp_path / "out")
    assert code == 0
    assert resumptions(events) == [("quantize", "at block 2 of 3")]
    said = told.read_text()[before:]
    assert said.count("block-00001.safetensors is damaged") == 1
    assert said.count("tuning.safetensors is damaged") == 1
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def moments(events, times, seed):
    """Stages in turn, each with a moment in it: so many reports, and so many seconds after them.

    What leads to a report belongs to the report's stage.
    """
    stages = [stage for stage, _, _ in events] + [LAST]
    spans = [end - start for start, end in pairwise([0.0, *times])]
    generator = random.Random(seed)
    for stage in cycle(dict.fromkeys(stages)):
        places = [place for place, one in enumerate(stages) if one == stage]
        (place,) = generator.choices(places, [spans[one] for one in places])
        yield stages, place, generator.uniform(0.0, spans[place])


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_thirty_random_moments_of_all_stages(call, tmp_path):
    """Run anew, killed from outside at a moment; then the same command."""
    code, events = call(tmp_path / "whole", settings=EVERYTHING, fresh=True)
    assert code == 0, events
    expected = hashes(tmp_path / "whole")
    # The times are those of a second run: the first one builds and reads what stays.
    code, events = call(tmp_path / "out", settings=EVERYTHING, fresh=True)
    assert code == 0, events
    assert hashes(tmp_path / "out") == expected
    plan = moments(events, [float(line) for line in call.times.read_text().split()], seed=0)
    wanted = {
        "load", "candidates", "gradients", "quantize", "train blocks", "tune scales", "train", LAST,
    }  # fmt: skip
    killed: Counter[str] = Counter()
    while killed.total() < KILLS or not wanted <= set(killed):
        stages, reports, seconds = next(plan)
        kill = ["moment", reports, seconds]
        code, seen = call(tmp_path / "out", settings=EVERYTHING, fresh=True, kill=kill, force=True)
        assert code in (-9, 0), seen
        if code == -9:  # a run may be faster than the one that was measured
            killed[stages[len(seen)]] += 1
            code, seen = call(tmp_path / "out", settings=EVERYTHING, force=True)
            assert code == 0, seen
        assert hashes(tmp_path / "out") == expected
        assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    print(dict(killed))
