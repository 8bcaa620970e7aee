"""Two processes that train together end where one does that runs all the sequences."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Loads the libraries and the network once, then forks: two ranks, and one alone.
SCRIPT = """
import json, os, sys, torch
import tests.quantforge.train.conftest as parts
from quantforge.progress import Monitor
from quantforge.train.config import TrainingConfig
from quantforge.train.loop import train
from quantforge.parallel import Share
from quantforge.testing import tiny_llama

torch.set_num_threads(1)
module = tiny_llama(blocks=1, hidden=32, intermediate=48, vocabulary=64, seed=3)

def run(rank, count, port):
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }
    case = parts.Case(module)
    config = TrainingConfig(
        tokens=4 * 5 * parts.LENGTH, batch=5, evaluate_every=2 * 5 * parts.LENGTH,
        weight_rate=0.01, precision="float32",
    )
    share = Share.of_this_process(torch.device("cpu"))
    assert (share.rank, share.count) == (rank, count), share
    made = train(case.task(), config, seed=0, monitor=Monitor(), share=share)
    codes = sum(int(weight.codes.sum()) for weight in made.weights.values())
    points = [[p.loss, p.kl, p.soft_kl] for p in made.outcome.points]
    return json.dumps({"points": points, "codes": codes, "steps": made.outcome.steps})

children = []
for rank, count in ((0, 2), (1, 2), (0, 1)):
    child = os.fork()
    if child == 0:
        text = run(rank, count, sys.argv[1])
        open(f"{sys.argv[2]}/{count}-{rank}.json", "w").write(text)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, port, str(folder)], cwd=root, check=False, timeout=500,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


def test_two_ranks_agree_to_the_bit(results):
    assert results["2-0"] == results["2-1"]


def test_two_ranks_are_one(results):
    together, alone = results["2-0"], results["1-0"]
    assert together["steps"] == alone["steps"] == 4
    assert len(together["points"]) == 3
    for one, other in zip(together["points"], alone["points"], strict=True):
        pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None]
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in pairs)
    assert alone["points"][-1][0] != alone["points"][1][0]  # it did train
