"""Softly quantizing a layer: the two native passes beside the same in torch, all levels or few.

    python scripts/bench_soft_grid.py --threads 1 --json soft_grid.json

A step makes the weight from a float32 weight and takes its gradient back to weight and scale. It
is done by the C++, by its definition in torch with the same few levels, and by autograd through a
softmax over all levels, as published. All take turns; a ratio is the median over rounds of the
ratio within a round. Times are of the processor, all threads together, so that a neighbour's load
counts little. For scale, `copy` is what it takes to copy the weight once; the two native passes
read or write as much five times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantforge_kernels.soft_grid import SoftGrid, soft_grid, soft_grid_reference
from torch import Tensor

SHAPES = ((1536, 576, 192), (2048, 2048, 128))  # out, in, group
# Largest code, code that means 0, and the temperature it starts at with Gaussian weights.
GRIDS = {"ternary": (2, 1.0, 0.351), "2 bits": (3, 2.0, 0.39), "4 bits": (15, 8.0, 0.56)}


def layer(shape: tuple[int, int, int], spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its scales and a gradient."""
    out, columns, group = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator)
    scale = torch.full((out, columns // group), 1.0 / spread)
    return weight, scale, torch.randn(out, columns, generator=generator)


def seconds(
    step: Callable[[Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor, Tensor]
) -> float:
    """Processor seconds of one step, forward and backward."""
    weight, scale = (one.detach().requires_grad_() for one in given[:2])
    began = time.process_time()
    step(weight, scale).backward(given[2])  # type: ignore[no-untyped-call]
    return time.process_time() - began


def copying(weight: Tensor) -> float:
    """Processor seconds of one copy into memory that is there already."""
    target = torch.empty_like(weight)
    target.copy_(weight)
    began = time.process_time()
    target.copy_(weight)
    return time.process_time() - began


def measure(shape: tuple[int, int, int], name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds and ratios of one shape and grid."""
    top, centre, temperature = GRIDS[name]
    grid, zero = SoftGrid(top=top, temperature=temperature), torch.tensor(centre)
    given = layer(shape, math.sqrt(top))

    def few(weight: Tensor, scale: Tensor, native_code: bool = False) -> Tensor:
        return soft_grid(weight, scale, zero, grid, native_code=native_code)

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "native": lambda weight, scale: few(weight, scale, native_code=True),
        "few": few,
        "all": lambda weight, scale: soft_grid_reference(weight, scale, zero, grid),
    }
    times: dict[str, list[float]] = {way: [] for way in (*ways, "copy")}
    for _ in range(rounds + 1):
        for way, step in ways.items():
            times[way].append(seconds(step, given))
        times["copy"].append(copying(given[0]))
    kept = {way: taken[1:] for way, taken in times.items()}  # the first warms up

    def ratio(way: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(kept[way], kept[other], strict=True))

    return {
        "shape": list(shape),
        "grid": name,
        "radius": grid.radius(),
        **{f"{way}_ms": 1e3 * statistics.median(taken) for way, taken in kept.items()},
        "few_by_native": ratio("few", "native"),
        "all_by_native": ratio("all", "native"),
        "native_by_copy": ratio("native", "copy"),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for shape in SHAPES:
        for name in GRIDS:
            row = measure(shape, name, options.rounds)
            rows.append(row)
            print(
                f"{shape!s:18} {name:8}  native {row['native_ms']:8.3f} ms"
                f"  torch / native {row['few_by_native']:6.1f}"
                f"  all levels / native {row['all_by_native']:6.1f}"
                f"  native / copy {row['native_by_copy']:6.1f}",
                flush=True,
            )
    if options.json:
        described = {"torch": torch.__version__, "threads": options.threads, "rows": rows}
        Path(options.json).write_text(json.dumps(described, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
