"""Measures the GPU kernels' launches on the GPU that is there, and adds the fastest to its table.

    python scripts/tune_kernels.py --shapes 14336x4096 4096x14336 --bits 3 4 --rows 1 8 64 2048

The table, `quantforge_kernels/triton/tuned/<device>.json`, is read by `choose_launch` from then on.
Every candidate of a problem is first checked against the float32 product, then timed with the cache
flushed before each call: the median of `--repeats`. A candidate that asks for more registers or
shared memory than the device has is left out. Each problem is written as soon as it is measured;
what the table has of other problems stays. Without a GPU nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from quantforge_kernels import dequantize, pack
from quantforge_kernels.triton import backend
from quantforge_kernels.triton.launch import (
    TUNED,
    Launch,
    candidates,
    problem,
    table_path,
    write_table,
)
from quantforge_kernels.triton.linear import DTYPE_NAMES, describe, linear
from quantforge_kernels.triton.repack import DeviceWeight, repack

FLUSH_BYTES = 256 << 20  # larger than any L2 cache
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def sample(
    shape: tuple[int, int],
    bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    asymmetric: bool,
) -> tuple[DeviceWeight, torch.Tensor]:
    """A random weight of `shape` [out, in] on the device, and the same in float32."""
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)
    size = (shape[0], 1 if group == -1 else shape[1] // group)
    scale = torch.rand(size, device=device).add(0.5).to(dtype)
    zero = None
    if asymmetric:
        zero = torch.randint(0, 2**bits, size, dtype=torch.uint8, device=device)
    words = pack(codes, bits)
    weight = repack(words, scale, zero, bits, group, shape[1])
    return weight, dequantize(words, scale, zero, bits, group, shape, torch.float32)


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
) -> tuple[Launch, float] | None:
    """The fastest candidate and its time in seconds; every one that runs must be right.

    Returns:
        None if the device has too little for all of them.

    Raises:
        SystemExit: a launch computes something else.
    """
    from triton.runtime.errors import OutOfResources

    expected = x.float() @ exact.T
    best: tuple[Launch, float] | None = None
    for launch in candidates(x.shape[0], weight.bits):
        try:
            result = linear(x, weight, launch=launch)
        except OutOfResources as error:
            print(f"left out: {launch}: {error}")
            continue
        wrong = float((result.float() - expected).norm() / expected.norm())
        if not wrong < 0.01:
            raise SystemExit(f"{launch} is wrong by {wrong:.3f}; no more is written")
        time = seconds(x, weight, launch, flush, repeats)
        if best is None or time < best[1]:
            best = (launch, time)
    return best


def tune(options: argparse.Namespace, device: torch.device) -> int:
    """Measure every problem and add it to the table; how many were added."""
    import triton

    name = describe(device).name
    about = {"triton": triton.__version__, "torch": torch.__version__}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    dtype, added = DTYPES[options.dtype], 0
    kinds = (False, True) if options.zero_points else (False,)
    for shape, bits, asymmetric in itertools.product(options.shapes, options.bits, kinds):
        n, k = (int(size) for size in shape.split("x"))
        weight, exact = sample((n, k), bits, options.group, dtype, device, asymmetric=asymmetric)
        for m in options.rows:
            what = f"{m}x{n}x{k} {bits} bits{', zero-points' if asymmetric else ''}"
            x = torch.randn(m, k, device=device).to(dtype)
            found = fastest(x, weight, exact, flush, options.repeats)
            if found is None:
                print(f"{what}: no launch runs on this device; nothing is written for it")
                continue
            launch, time = found
            key = problem(
                m, n, k, bits, weight.group_size, dtype=options.dtype, asymmetric=asymmetric
            )
            write_table(name, {key: launch}, about, options.folder)
            added += 1
            moved = weight.words.numel() * 4 / time / 1e9
            print(f"{what}: {time * 1e6:.1f} us, {moved:.0f} GB/s, {launch}")
    return added


def arguments_parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["14336x4096", "4096x14336", "6144x4096"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 64, 512, 2048])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--zero-points", action="store_true", help="with zero-points as well")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=TUNED)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, or say why not."""
    options = arguments_parser().parse_args(arguments)
    reason = backend.unavailable()
    if reason:
        print(f"nothing to tune here: {reason}; nothing was written")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    added = tune(options, device)
    print(f"{added} launches added to {table_path(describe(device).name, options.folder)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
