"""Memory of `quantize` against the depth of the network, stage by stage.

    python scripts/bench_memory.py --effort balanced --json memory.json

Two networks of one width, one with `--factor` times the blocks of the other, are quantized in a
process each, and the largest anonymous memory (RssAnon: what is in no file and cannot leave memory)
is noted for every stage that reports progress. What is there before the network is opened (Python,
torch, transformers) is in the figures, and in the first row. Weights are random: what is found says
nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from quantforge.memory import anonymous_bytes
from quantforge.progress import ProgressEvent

INTERVAL_S = 0.003
WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "that", "on", "as", "with", "by")
# Enough text for every stage, few enough candidates to be done in minutes.
SETTINGS: dict[str, Any] = {
    "search.bits": [2, 4],
    "search.group_sizes": [128],
    "calibration.sequences": 16,
    "calibration.sequence_length": 64,
    "calibrate.gradient_sequences": 8,
    "evaluate.curve_windows": 2,
    "evaluate.tokens": 2,
    "quantize.tuning.steps": 2,
}


class Watch:
    """Notes the largest anonymous memory of every stage while it is open."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {"before": anonymous_bytes() or 0}
        self._stage, self._ended = "open", threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def note(self, event: ProgressEvent) -> None:
        """A stage has made a step; what follows its last one belongs to it until another steps."""
        self._look()
        self._stage = event.stage

    def _look(self) -> None:
        self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), anonymous_bytes() or 0)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._look()


def quantized(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Stage → largest anonymous memory in bytes of one run, in this process."""
    from quantforge.pipeline import quantize

    settings = {**SETTINGS, **json.loads(options.settings)}
    with tempfile.TemporaryDirectory() as output, Watch() as watch:
        quantize(
            folder, budget=options.budget, calibration=folder / "text.txt", effort=options.effort,
            output=Path(output) / "out", settings=settings, fresh=True, progress=watch.note,
        )  # fmt: skip
    return watch.peaks


def make(folder: Path, blocks: int, options: argparse.Namespace) -> None:
    """A network of so many blocks, stored in bfloat16 as most are, and a text to calibrate on."""
    from safetensors.torch import load_file, save_file

    from quantforge.testing import save_tiny_checkpoint

    save_tiny_checkpoint(
        folder, steps=0, blocks=blocks, hidden=options.hidden, intermediate=options.intermediate
    )
    path = folder / "model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})
    text = " ".join(WORDS[(7 * i + i * i // 3) % len(WORDS)] for i in range(20_000))
    (folder / "text.txt").write_text(text, encoding="utf-8")


def in_a_process(blocks: int, options: argparse.Namespace) -> dict[str, int]:
    """`quantized` for a network of so many blocks, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), blocks, options)
        found = subprocess.run(
            [
                sys.executable, __file__, "--folder", folder, "--effort", options.effort,
                "--budget", options.budget, "--settings", options.settings,
            ],
            check=True, stdout=subprocess.PIPE,
        )  # fmt: skip
    peaks: dict[str, int] = json.loads(found.stdout.splitlines()[-1])
    return peaks


def report(shallow: dict[str, int], deep: dict[str, int]) -> dict[str, float]:
    """Print stages beside each other; return the peaks in MB and the growth."""
    for stage in deep:
        low, high = (one.get(stage, 0) / 2**20 for one in (shallow, deep))
        print(f"{stage:28} {low:8.1f} MB {high:8.1f} MB {high - low:+8.1f} MB")
    low, high = (max(one.values()) / 2**20 for one in (shallow, deep))
    print(f"{'peak':28} {low:8.1f} MB {high:8.1f} MB {high / low - 1:+8.1%}")
    return {"shallow_mb": low, "deep_mb": high, "growth": high / low - 1}


def main() -> None:
    """Parse options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--budget", default="3bit")
    parser.add_argument("--settings", default="{}", help="recipe keys as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(quantized(options.folder, options)))
        return
    shallow, deep = (
        in_a_process(blocks, options)
        for blocks in (options.blocks, options.factor * options.blocks)
    )
    found = report(shallow, deep)
    if options.json is not None:
        stages = {"shallow": shallow, "deep": deep}
        options.json.write_text(json.dumps({**found, "bytes": stages}, indent=2) + "\n")


if __name__ == "__main__":
    main()
