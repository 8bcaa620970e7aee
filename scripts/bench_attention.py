"""Fused causal attention beside torch's own, forward and backward, both in bfloat16.

    python scripts/bench_attention.py --threads 1 --json attention.json

Both take turns; a ratio is the median over rounds of the ratio within a round, so that a
neighbour's load hits both sides of it. Gigaflops count the products below the diagonal: two
forward, five backward. Errors are the norm of the difference from the definition in float64 over
its own, for output and gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantforge_kernels.attention import available, causal_attention, causal_attention_reference
from torch import Tensor

# batch, heads, key heads, length, size of a head
SHAPES = ((1, 9, 3, 512, 64), (4, 9, 3, 512, 64), (1, 32, 8, 1024, 128))
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def stock(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Torch's own."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def operands(shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Query, key and value that want gradients, and a gradient of the output."""
    batch, heads, key_heads, length, size = shape
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> Tensor:
        drawn = torch.randn(batch, length, count, size, generator=generator)
        return drawn.bfloat16().transpose(1, 2)

    given = [random(count).requires_grad_() for count in (heads, key_heads, key_heads)]
    return given, random(heads)


def errors(function: Attention, shape: tuple[int, ...]) -> list[float]:
    """Of output and gradients against the definition."""
    given, slope = operands(shape)
    exact = [one.detach().double().requires_grad_() for one in given]
    found = []
    for compute, tensors in ((function, given), (causal_attention_reference, exact)):
        out = compute(*tensors, shape[-1] ** -0.5)
        found.append([out.detach(), *torch.autograd.grad(out, tensors, slope.to(out.dtype))])
    return [
        float((one.double() - right).norm() / right.norm())
        for one, right in zip(*found, strict=True)
    ]


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds of both, ratios and errors of one shape."""
    given, slope = operands(shape)
    scale = shape[-1] ** -0.5
    contenders: dict[str, Attention] = {"fused": causal_attention, "torch": stock}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, function in contenders.items():
            began = time.perf_counter()
            out = function(*given, scale)
            between = time.perf_counter()
            torch.autograd.grad(out, given, slope)
            ended = time.perf_counter()
            if turn:  # the first warms up
                times[name].append((between - began, ended - between))
    batch, heads, _, length, size = shape
    product = batch * heads * length * (length + 1) * size  # two operations a multiply-add
    row: dict[str, Any] = {"shape": list(shape)}
    for index, (direction, products) in enumerate((("forward", 2), ("backward", 5))):
        fused, other = ([one[index] for one in times[name]] for name in ("fused", "torch"))
        ratios = [b / a for a, b in zip(fused, other, strict=True)]
        row[direction] = {
            "fused_ms": 1e3 * statistics.median(fused),
            "torch_ms": 1e3 * statistics.median(other),
            "ratio": statistics.median(ratios),
            "fused_gigaflops": 1e-9 * products * product / statistics.median(fused),
        }
    row["errors"] = {name: errors(function, shape) for name, function in contenders.items()}
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(argv)
    if not available():
        raise SystemExit("the fused attention needs a compiler and AVX-512 with bfloat16")
    torch.set_num_threads(options.threads)
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, options.rounds))
        for direction in ("forward", "backward"):
            one = rows[-1][direction]
            print(
                f"{shape!s:24} {direction:8}  fused {one['fused_ms']:7.2f} ms"
                f"  torch {one['torch_ms']:7.2f} ms  ratio {one['ratio']:5.2f}"
                f"  {one['fused_gigaflops']:5.0f} Gflop/s"
            )
        for name, found in rows[-1]["errors"].items():
            print(f"{'':24} errors of {name}: " + " ".join(f"{one:.4f}" for one in found))
    if options.json:
        described = {"torch": torch.__version__, "threads": options.threads, "rows": rows}
        Path(options.json).write_text(json.dumps(described, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
