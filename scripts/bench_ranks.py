"""Quantizing in several processes beside one: time, processor time, and whether bytes are equal.

    python scripts/bench_ranks.py --blocks 4 --ranks 2 --rounds 3 --json ranks.json
    python scripts/bench_ranks.py --model llama --calibration wiki2_valid.txt --rounds 1

Without `--model` it is a random Llama with blocks of SmolLM2-135M's size, calibrated on Python's
manual. One process and several take turns, with one thread for each process and an empty cache
every time; a ratio is the median over rounds of the ratio within a round. Two ratios: of wall-clock
time, which wants a core of its own for each process and nothing beside them, and of the processor
time of the busiest process to that of one alone, which a neighbour's load changes less, but in
which nobody waits for anybody. Start-up, imports and loading are in both. Exit code 1 says that
bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantforge.files import CACHE_VARIABLE, cache_root

SHARED = ("packages", "converted", "native")  # of the cache: what no run is to make anew


def main() -> int:
    """Run all rounds; print and write the numbers."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.model or str(_random_network(folder / "model", options.blocks))
        rounds = [_round(model, folder / str(i), options) for i in range(options.rounds)]
    result = {
        "model": options.model or f"{options.blocks} random blocks of SmolLM2-135M's size",
        "effort": options.effort,
        "ranks": options.ranks,
        "equal": all(one["equal"] for one in rounds),
        "wall_ratio": statistics.median(one["wall_ratio"] for one in rounds),
        "processor_ratio": statistics.median(one["processor_ratio"] for one in rounds),
        "rounds": rounds,
    }
    print(
        f"{options.ranks} ranks beside one: wall {result['wall_ratio']:.3f}, processor "
        f"{result['processor_ratio']:.3f}, bytes {'equal' if result['equal'] else 'DIFFER'}"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if result["equal"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Several processes beside one.")
    parser.add_argument("--model", help="recipe, folder or .gguf in the place of a random network")
    parser.add_argument("--blocks", type=int, default=4, help="of the random network")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--budget", default="3bit")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for all numbers")
    return parser.parse_args()


def _random_network(folder: Path, blocks: int) -> Path:
    """A Llama that was never trained, with a tokenizer of bytes."""
    from quantforge.testing import save_tiny_checkpoint

    save_tiny_checkpoint(
        folder, steps=0, hidden=576, intermediate=1536, heads=9, kv_heads=3, blocks=blocks
    )
    path = folder / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**described, "max_position_embeddings": 2048}), encoding="utf-8")
    return folder


def _round(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process, then several."""
    alone = _run(model, folder / "one", 1, options)
    together = _run(model, folder / "several", options.ranks, options)
    found = {
        "alone": alone,
        "together": together,
        "equal": alone.pop("digests") == together.pop("digests"),
        "wall_ratio": together["wall"] / alone["wall"],
        "processor_ratio": max(together["processor"]) / max(alone["processor"]),
    }
    print(json.dumps(found), flush=True)
    return found


def _run(model: str, folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the wall clock, of each process's processor time, and digests of the results."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    for name in SHARED:
        kept = cache_root() / name
        kept.mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(kept, target_is_directory=True)
    words = [
        sys.executable, "-m", "quantforge", "quantize", model, "--calibration",
        options.calibration, "--budget", options.budget, "--effort", options.effort,
        "-o", str(folder / "out"), *(word for one in options.set for word in ("--set", one)),
    ]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    began, processes = time.perf_counter(), []
    for rank in range(count):
        own = {**os.environ, CACHE_VARIABLE: str(cache), "OMP_NUM_THREADS": "1"}
        if count > 1:
            own |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        processes.append(subprocess.Popen(words, env=own, stdout=subprocess.DEVNULL))
    processor = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"a process ended in exit code {process.returncode}")
        processor.append(usage.ru_utime + usage.ru_stime)
    wall = time.perf_counter() - began
    results = sorted(path for path in (folder / "out").iterdir() if path.name != "run.json")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in results}
    return {"wall": wall, "processor": processor, "digests": digests}


if __name__ == "__main__":
    sys.exit(main())
