"""A step of learned rounding on one layer: the two native passes beside their definition in torch.

    python scripts/bench_rounding.py --threads 1 --json rounding.json

A step makes the bfloat16 weight, and moves latents, scales and running means by a bfloat16
gradient; the products between the two are not part of it. Both take turns; a ratio is the median
over rounds of the ratio within a round, so that a neighbour's load hits both sides of it. For scale
the layer's three products are timed as well: output, gradient of the input, gradient of the weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from quantforge_kernels.rounding import Latents
from torch import Tensor

SHAPES = ((576, 576, 192), (1536, 576, 192), (576, 1536, 192), (4096, 4096, 128))  # out, in, group
TOP = 7  # the largest code of 3 bits


def layer(shape: tuple[int, int, int]) -> tuple[Latents, Tensor]:
    """A layer of random latents, some outside the grid, and a gradient of its weight."""
    out, columns, group = shape
    generator = torch.Generator().manual_seed(0)
    latent = torch.rand(out, columns, generator=generator) * (TOP + 2) - 1
    scale = torch.rand(out, columns // group, generator=generator) + 0.1
    gradient = torch.randn(out, columns, generator=generator).bfloat16()
    return Latents.start(latent, scale, torch.tensor(4.0), TOP), gradient


def step(latents: Latents, gradient: Tensor, *, native_code: bool) -> float:
    """Seconds of one."""
    began = time.perf_counter()
    latents.weight(torch.bfloat16, native_code=native_code)
    latents.step(
        gradient, latent_step=1e-3, scale_step=1e-4, keep=0.8, take=0.2, native_code=native_code
    )
    return time.perf_counter() - began


def products(inputs: Tensor, weight: Tensor, slope: Tensor) -> float:
    """Seconds of a layer's products in a training step."""
    began = time.perf_counter()
    torch.mm(inputs, weight.T)
    torch.mm(slope, weight)
    torch.mm(slope.T, inputs)
    return time.perf_counter() - began


def measure(shape: tuple[int, int, int], tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and ratios of one shape."""
    native, gradient = layer(shape)
    plain = copy.deepcopy(native)
    inputs, slope = (torch.randn(tokens, size).bfloat16() for size in (shape[1], shape[0]))
    weight = native.weight(torch.bfloat16)
    times = []
    for _ in range(rounds + 1):
        fused = step(native, gradient, native_code=True)
        stock = step(plain, gradient, native_code=False)
        times.append((fused, stock, products(inputs, weight, slope)))
    times = times[1:]  # the first warms up
    return {
        "shape": list(shape),
        "native_ms": 1e3 * statistics.median(one[0] for one in times),
        "torch_ms": 1e3 * statistics.median(one[1] for one in times),
        "ratio": statistics.median(one[1] / one[0] for one in times),
        "products_ms": 1e3 * statistics.median(one[2] for one in times),
        "share_of_products": statistics.median(one[0] / one[2] for one in times),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=512, help="a step's, for the products")
    parser.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, options.tokens, options.rounds))
        row = rows[-1]
        print(
            f"{shape!s:18}  native {row['native_ms']:7.3f} ms  torch {row['torch_ms']:8.3f} ms"
            f"  ratio {row['ratio']:6.1f}  products {row['products_ms']:8.2f} ms"
            f"  native / products {row['share_of_products']:5.3f}"
        )
    if options.json:
        described = {"torch": torch.__version__, "threads": options.threads, "rows": rows}
        Path(options.json).write_text(json.dumps(described, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
