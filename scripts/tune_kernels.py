"""Measures the GPU kernels' launches on the GPU that is there, and writes the fastest as a table.

    python scripts/tune_kernels.py --shapes 14336x4096 4096x14336 --bits 3 4 --rows 1 8 64 2048

The table, `quantforge_kernels/triton/tuned/<device>.json`, is read by `choose_launch` from then on.
Every candidate of a problem is first checked against the float32 product, then timed with the cache
flushed before each call: the median of `--repeats`. Without a GPU nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from quantforge_kernels import dequantize, pack
from quantforge_kernels.triton import backend
from quantforge_kernels.triton.launch import TUNED, Launch, candidates, problem, write_table
from quantforge_kernels.triton.linear import describe, linear
from quantforge_kernels.triton.repack import DeviceWeight, repack

FLUSH_BYTES = 256 << 20  # larger than any L2 cache


def sample(
    n: int, k: int, bits: int, group: int, dtype: torch.dtype
) -> tuple[DeviceWeight, torch.Tensor]:
    """A random weight on the GPU, and the same in float32."""
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    groups = 1 if group == -1 else k // group
    scale = torch.rand(n, groups, device="cuda").add(0.5).to(dtype)
    words = pack(codes, bits)
    weight = repack(words, scale, None, bits, group, k)
    return weight, dequantize(words, scale, None, bits, group, (n, k), torch.float32)


def seconds(
    x: torch.Tensor, weight: DeviceWeight, launch: Launch, flush: torch.Tensor, repeats: int
) -> float:
    """Median time of a call, the weight coming from memory."""
    times = []
    for _ in range(repeats + 3):  # the first calls compile and warm up
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        linear(x, weight, launch=launch)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def fastest(
    x: torch.Tensor, weight: DeviceWeight, exact: torch.Tensor, flush: torch.Tensor, repeats: int
) -> tuple[Launch, float]:
    """The fastest candidate; every one of them must be right.

    Raises:
        SystemExit: a launch computes something else.
    """
    expected = x.float() @ exact.T
    best: tuple[Launch, float] | None = None
    for launch in candidates(x.shape[0], weight.bits):
        error = (linear(x, weight, launch=launch).float() - expected).norm() / expected.norm()
        if not float(error) < 0.01:
            raise SystemExit(f"{launch} is wrong by {float(error):.3f}; nothing is written")
        time = seconds(x, weight, launch, flush, repeats)
        if best is None or time < best[1]:
            best = (launch, time)
    if best is None:
        raise SystemExit("no candidates")
    return best


def tune(options: argparse.Namespace) -> Path:
    """Measure every problem and write the table."""
    import triton

    device = describe(torch.device("cuda", torch.cuda.current_device()))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    launches = {}
    for shape in options.shapes:
        n, k = (int(size) for size in shape.split("x"))
        for bits in options.bits:
            weight, exact = sample(n, k, bits, options.group, dtype)
            for m in options.rows:
                x = torch.randn(m, k, device="cuda").to(dtype)
                launch, time = fastest(x, weight, exact, flush, options.repeats)
                launches[problem(m, n, k, bits, weight.group_size)] = launch
                moved = weight.words.numel() * 4 / time / 1e9
                print(f"{m}x{n}x{k} {bits} bits: {time * 1e6:.1f} us, {moved:.0f} GB/s, {launch}")
    about = {"triton": triton.__version__, "torch": torch.__version__, "dtype": options.dtype}
    return write_table(device.name, launches, about, options.folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["14336x4096", "4096x14336", "6144x4096"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 64, 512, 2048])
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=TUNED)
    options = parser.parse_args(arguments)
    reason = backend.unavailable()
    if reason:
        print(f"nothing to tune here: {reason}; nothing was written")
        return 1
    print(f"wrote {tune(options)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
