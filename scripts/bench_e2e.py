"""Runs the whole compiler as a user would and prints time, CPU seconds, memory and quality.

    python scripts/bench_e2e.py llama --budget 3bit --effort fast balanced

One row an effort, each in a process of its own with `--fresh`, so that nothing measured before is
used. Other arguments after `--` go to `quantforge quantize`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run every effort and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--budget", default="3bit")
    parser.add_argument("--effort", nargs="+", default=["fast", "balanced"])
    parser.add_argument("rest", nargs="*", help="after --: arguments of quantforge quantize")
    options = parser.parse_args(argv)
    print("| effort | wall s | CPU s | peak GB | stored bits | held-out KL | load average |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for effort in options.effort:
        print(measure(options.model, options.budget, effort, options.rest), flush=True)


def measure(model: str, budget: str, effort: str, rest: Sequence[str]) -> str:
    """One row: compile into a temporary folder and read what the run recorded."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        command = [sys.executable, "-m", "quantforge", "quantize", model, "--budget", budget]
        command += ["--effort", effort, "-o", str(output), "--fresh", "--json", *rest]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        wall = time.perf_counter() - began
        report = json.loads(done.stdout)
        run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    quality = report["quality"]
    cells = [
        effort,
        f"{wall:.0f}",
        f"{run['cpu_seconds']:.0f}",
        f"{run['peak_memory_bytes'] / 1e9:.2f}",
        f"{report['plan']['stored_bits']:.3f}",
        f"{quality['kl']:.4f} ± {quality['kl_stderr']:.4f}",
        f"{os.getloadavg()[0]:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
