"""Several processes make the bytes of one, and end together."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from quantforge.cli.outcome import interruptible
from quantforge.files import cache_root
from quantforge.launcher import is_alone, is_main
from quantforge.numerics import GramAccumulator
from quantforge.parallel import LANES, Message, Share, Tally, summed
from quantforge.testing import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "calibration.sequences": 20,
    "calibration.sequence_length": 32,
    "calibrate.gradient_sequences": 10,  # batches of 4, 4 and 2: shares of different sizes
    "search.group_sizes": [32, -1],
    "search.bits": [2, 3],
    "search.refine": 0,
    "evaluate.curve_windows": 3,
    "evaluate.curve_bits": [3],
    "evaluate.tokens": 2,
    "quantize.batch_size": 2,
    "quantize.awq": True,
    "quantize.token_weighting": 0.5,
    "quantize.mismatch": [0.25, 0.5],  # chosen on held-out sequences
    "quantize.rounding.steps": 4,
    "quantize.rounding.check_every": 2,
    "quantize.tuning.steps": 2,
    "quantize.tuning.batch": 3,
}

# Loads the libraries once and forks for every process. Each runs the command line; what is to
# happen to it on the way happens when it notes a block.
SERVER = """
import json, os, signal, sys
import torch, accelerate, transformers, transformers.models.llama.modeling_llama
import quantforge.pipeline
from quantforge.cli import main
from quantforge.errors import InputError
from quantforge.journal import Journal

def disturb(what, entry):
    write = Journal.write
    def disturbed(self, name, *rest):
        if name == entry:
            if what == "error":
                raise InputError("nothing is right here")
            os.kill(os.getpid(), getattr(signal, what))
        write(self, name, *rest)
    Journal.write = disturbed

def run(order, rank):
    os.environ |= {"QUANTFORGE_CACHE": order["cache"]}
    if order["count"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["count"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"],
        }
    if order["disturb"] and rank == order["disturb"][0]:
        disturb(*order["disturb"][1:])
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['said']}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    code = 1
    try:
        main(order["words"] + order["last"] * (rank == order["count"] - 1))
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    children = []
    for rank in range(order["count"]):
        children.append(os.fork())
        if children[-1] == 0:
            run(order, rank)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", blocks=2, steps=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 105, (4000,), generator=generator).tolist()
    path.write_text("".join(map(chr, letters)))
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command in so many processes; gives their exit codes, and what they said."""
    folder = tmp_path_factory.mktemp("said")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with server:
        assert server.stdout.readline() == "ready\n"

        def run(*words, count=2, cache, disturb=None, last=()):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            said = folder / str(len(list(folder.iterdir())))
            cache.mkdir(parents=True, exist_ok=True)
            if not (cache / "native").exists():  # built kernels: what no test is about
                (cache / "native").symlink_to(cache_root() / "native", target_is_directory=True)
            order = {
                "words": list(map(str, words)), "count": count, "cache": str(cache), "port": port,
                "said": str(said), "disturb": disturb, "last": list(last),
            }  # fmt: skip
            print(json.dumps(order), file=server.stdin, flush=True)
            codes = json.loads(server.stdout.readline())
            out, err = (
                [Path(f"{said}.{rank}.{kind}").read_text() for rank in range(count)]
                for kind in ("out", "err")
            )
            return codes, out, [[x for x in one.splitlines() if x[0] != "["] for one in err]

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def words(checkpoint, text):
    """Of a command that quantizes into a folder."""

    def made(output):
        settings = [x for k, v in SETTINGS.items() for x in ("--set", f"{k}={json.dumps(v)}")]
        return [
            "quantize", checkpoint, "--budget", "2.6bit", "--calibration", text, "-o", output,
            *settings,
        ]  # fmt: skip

    return made


def contents(folder):
    """Name → digest of every file that is a result."""
    files = [path for path in folder.iterdir() if path.name != "run.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def alone(command, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    codes, _, err = command(*words(folder / "out"), count=1, cache=folder / "cache")
    assert codes == [0], err
    return folder / "out"


def test_two_ranks_write_the_bytes_of_one(command, words, alone, tmp_path):
    codes, out, err = command(*words(tmp_path / "out"), cache=tmp_path / "cache")
    assert codes == [0, 0], err
    assert contents(tmp_path / "out") == contents(alone)
    assert {"model.safetensors", "plan.json", "sensitivity.json"} <= set(contents(alone))
    assert out[0]
    assert (out[1], err[1]) == ("", [])


@pytest.mark.full
def test_three_ranks_refine_a_plan_as_one(command, words, tmp_path):
    for count in (1, 3):
        folder = tmp_path / str(count)
        more = ["--set", "search.refine=1"]
        codes, _, err = command(*words(folder / "out"), *more, count=count, cache=folder / "cache")
        assert codes == [0] * count, err
    assert contents(tmp_path / "3" / "out") == contents(tmp_path / "1" / "out")


def test_two_ranks_evaluate_as_one(command, alone, text, tmp_path):
    windows = ["--windows", 9, "--window-length", 24]
    words = ["eval", alone, "--text", text, *windows, "--json"]
    (together, *silent), (one,) = (
        command(*words, count=count, cache=tmp_path)[1] for count in (2, 1)
    )
    assert together == one
    assert silent == [""]
    assert json.loads(one)["quality"]["windows"] == 9


def test_a_lost_rank_ends_the_other_and_one_process_goes_on(command, words, alone, tmp_path):
    output, cache = tmp_path / "out", tmp_path / "cache"
    codes, _, err = command(*words(output), cache=cache, disturb=[1, "SIGKILL", "block-00000"])
    assert codes == [5, -signal.SIGKILL]
    assert len(err[0]) == 1
    assert "another process of this run was lost" in err[0][0]
    assert not output.exists()
    codes, *_ = command(*words(output), count=1, cache=cache)
    assert codes == [0]
    assert contents(output) == contents(alone)


@pytest.mark.full
def test_the_others_say_that_the_first_rank_was_lost(command, words, tmp_path):
    disturb = [0, "SIGKILL", "candidates-00000"]
    codes, _, err = command(*words(tmp_path / "out"), cache=tmp_path / "cache", disturb=disturb)
    assert codes == [-signal.SIGKILL, 5]
    assert [len(one) for one in err] == [0, 1]
    assert "another process of this run was lost" in err[1][0]


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("error", 3, "error: nothing is right here"),
        pytest.param(
            "SIGINT", 130, "error: cancelled during candidates (1 of 2)", marks=pytest.mark.full
        ),
    ],
)
def test_an_error_of_one_rank_is_said_once_and_ends_all(command, words, tmp_path, what, code, line):
    disturb = [1, what, "candidates-00000"]
    codes, _, err = command(*words(tmp_path / "out"), cache=tmp_path / "cache", disturb=disturb)
    assert codes == [code, code]
    assert err == [[line], []]
    assert list(tmp_path.glob("*out*")) == []


def test_ranks_that_were_given_other_things_are_refused(command, alone, checkpoint, text, tmp_path):
    """Where nothing is searched, and where a network is evaluated."""
    settled = [
        "search.solver=uniform", "search.bits=[4]", "search.group_sizes=[32]",
        "quantize.method=rtn", "quantize.tuning.steps=0", "quantize.rounding.steps=0",
        "calibration.sequences=20", "calibration.sequence_length=32",
    ]  # fmt: skip
    words = ["quantize", checkpoint, "--calibration", text, "-o", tmp_path / "out"]
    words += [word for one in settled for word in ("--set", one)]
    codes, _, err = command(*words, cache=tmp_path, last=["--seed", "1"])
    assert codes == [2, 2]
    assert err[0][0].startswith("error: process 1 of this run has another model, text, config")
    assert not (tmp_path / "out").exists()
    words = ["eval", alone, "--text", text, "--windows", 2, "--window-length", 24]
    codes, _, err = command(*words, cache=tmp_path, last=["--windows", "3"])
    assert codes == [2, 2]
    assert err[0][0].startswith("error: process 1 of this run has another reference, text or prec")


def test_commands_of_one_process_are_refused(command, alone, tmp_path):
    codes, out, err = command("inspect", alone, cache=tmp_path)
    assert (codes, out) == ([2, 2], ["", ""])
    assert err[0][0].startswith("error: quantforge inspect runs in one process")
    assert err[1] == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16, 30])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_lanes_are_the_same_for_any_number_of_ranks(count, ranks):
    shares = [Share(rank=rank, count=ranks) for rank in range(ranks)]
    lanes = [lane for share in shares for lane in share.lanes(count)]
    assert lanes == Share().lanes(count)
    assert [index for share in shares for index in share.batches(count)] == list(range(count))
    assert len(lanes) <= LANES
    assert len(lanes) & (len(lanes) - 1) == 0
    assert all(len(run) for _, run in lanes)
    if count >= 2 * ranks and ranks in (1, 2, 4):
        sizes = [len(share.batches(count)) for share in shares]
        assert max(sizes) - min(sizes) <= LANES // ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_spans_are_runs_of_about_the_same_cost(ranks):
    costs = [1.0, 1.0, 4.0, 2.0, 2.0, 6.0, 1.0, 1.0]
    spans = [Share(rank=rank, count=ranks).span(costs) for rank in range(ranks)]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(costs)
    assert all(one[1] == other[0] for one, other in pairwise(spans))
    taken = [sum(costs[first:last]) for first, last in spans]
    assert max(taken) <= sum(costs) / ranks + max(costs)
    assert Share().span([]) == (0, 0)


class _Together(Share):
    """A share that hears what a list holds in the place of the others."""

    heard: ClassVar[list[Message]]

    def exchange(self, tensors=None, facts=None):
        if len(self.heard) < self.count:  # nobody answers yet
            self.heard.append(Message({name: one.clone() for name, one in tensors.items()}))
            return [Message()] * self.rank + [Message(tensors)]
        return [Message({n: t.clone() for n, t in one.tensors.items()}) for one in self.heard]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_a_sum_does_not_depend_on_the_number_of_ranks(ranks, monkeypatch):
    values = torch.randn(LANES, 2000, generator=torch.Generator().manual_seed(1)) * 1e3
    first, second, third, fourth = values
    expected = ((first + second) + third) + fourth
    assert not torch.equal((first + second) + (third + fourth), expected)
    monkeypatch.setattr(_Together, "heard", [], raising=False)
    totals = []
    for rank in (*range(ranks), *range(ranks)):  # the first time all say what they have
        share = _Together(rank=rank, count=ranks)
        tally = Tally(share)
        for lane, _ in share.lanes(LANES):
            tally.put(lane, [values[lane].clone(), torch.tensor(lane)])
        answered = len(share.heard) == ranks
        with nullcontext() if answered or ranks == 1 else suppress(KeyError):
            totals.append(tally.total())
    assert len(totals[-ranks:]) == ranks
    for total, lanes in totals[-ranks:]:
        assert torch.equal(total, expected)
        assert int(lanes) == sum(range(LANES))


def test_a_gram_is_summed_in_lanes():
    batches = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(2))
    found = summed(
        Share(), 6, lambda: {"x": GramAccumulator(8)}, lambda made, i: made["x"].add(batches[i])
    )["x"]
    assert found.tokens == 30
    edges = [0, 1, 3, 4, 6]
    parts = []
    for start, stop in pairwise(edges):
        part = GramAccumulator(8)
        for batch in batches[start:stop]:
            part.add(batch)
        parts.append(part.total)
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert torch.equal(found.total.tril(), expected.tril())


@pytest.mark.parametrize(
    ("variables", "alone", "first"),
    [
        ({}, True, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, True, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, False, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False, False),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}, False, False),
    ],
)
def test_what_a_launcher_says(monkeypatch, variables, alone, first):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_alone(), is_main()) == (alone, first)


def test_an_interrupt_beside_others_waits_for_the_next_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interruptible() as cancel:
        for _ in range(2):  # the terminal's, and the launcher's, which passes it on
            os.kill(os.getpid(), signal.SIGINT)
        assert cancel.wait(5)
