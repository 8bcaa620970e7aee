"""Compiles the GPU kernels without a GPU and reads their machine code.

    python scripts/inspect_kernels.py                      the table of kernels/README.md
    python scripts/inspect_kernels.py --targets sm_90 --kernels gemv --bits 3 4 --json rows.json

A row is one kernel for one target: registers, spilled bytes and shared memory; instructions of the
inner loop for each weight (all of them, over the weights of an iteration a thread); 128-bit loads
of packed weights in an iteration, and how many of them are under way at once; matrix instructions;
and the warps that fit a multiprocessor. Nothing is run, so nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantforge_kernels.triton.ahead import TARGETS, Build, compile_build
from quantforge_kernels.triton.launch import Device, Launch, choose_launch
from quantforge_kernels.triton.machine_code import Code, read_code, warps_resident

DEVICES = {
    "sm_80": Device(name="A100", backend="cuda", processors=108, capability=80),
    "sm_90": Device(name="H100", backend="cuda", processors=132, capability=90),
    "gfx942": Device(name="MI300X", backend="hip", processors=304),
}
# m, n, k of a decoding and a prefill product of a model of eight billion weights
SHAPES = {"gemv": (1, 14336, 4096), "gemm": (2048, 14336, 4096), "gemm int8": (2048, 14336, 4096)}
# The names of matrix instructions, and of 128-bit loads.
MATRIX = {"cuda": r"[HI]G?MMA", "hip": r"v_mfma"}
COPIES = r"LDGSTS\S*\.128"
COLUMNS = (
    "target", "kernel", "dtype", "zero-points", "bits", "group", "rows", "per weight", "registers",
    "spills", "shared", "weight loads", "in flight", "matrix",
)  # fmt: skip
LATER_WORDS = (  # all of a lane's but its first
    rf"(global|buffer)_load_dwordx4 .*offset:({'|'.join(str(512 * i) for i in range(1, 8))})$"
)
DIRECT = r"LDG\S*\.EF\S*\.128"  # read once: only the weights of "gemv" are asked for so


def launch_of(
    kernel: str, target: str, bits: int, group: int, *, asymmetric: bool = False
) -> Launch:
    """What `choose_launch` takes for the shape of `SHAPES`."""
    return choose_launch(
        *SHAPES[kernel], bits, group, DEVICES[target],
        asymmetric=asymmetric, integer=kernel == "gemm int8",
    )  # fmt: skip


def weight_loads(code: Code, build: Build) -> tuple[int, int]:
    """128-bit loads of packed weights: those an iteration issues, and the most under way at once.

    AMD's are told by their offsets: a lane's words lie 512 bytes apart, nothing else does. On
    NVIDIA those that go straight into registers ask for another place in the cache; of a pipeline
    through shared memory the loads of the input are taken off: 128 columns of each of its rows, 16
    bytes a thread. There whole iterations under way hold each its weights.
    """
    backend, _, lanes = TARGETS[build.target]
    if backend == "hip":
        issued, flying = code.count(LATER_WORDS), code.loads_in_flight(LATER_WORDS)
        return issued * build.bits // (build.bits - 1), flying * build.bits // (build.bits - 1)
    direct = code.count(DIRECT)
    if direct:
        return direct, code.loads_in_flight(DIRECT)
    size = 1 if build.integer else 2
    inputs = max(1, 128 * build.launch.rows * size // (16 * lanes * build.launch.warps))
    issued = code.count(COPIES)
    iterations, rest = divmod(code.loads_in_flight(COPIES), issued)
    return issued - inputs, iterations * (issued - inputs) + max(0, rest - inputs)


def inspect(build: Build) -> dict[str, Any]:
    """One row of the table."""
    backend, _, lanes = TARGETS[build.target]
    code = read_code(compile_build(build), build.target)
    launch = build.launch
    weights = launch.tiles * 32 * 128 / (lanes * launch.warps) * launch.unroll
    loads, flying = weight_loads(code, build)
    row = {
        "target": build.target,
        "kernel": launch.kernel + (" int8" if build.integer else ""),
        "bits": build.bits,
        "group": build.group,
        "dtype": build.dtype,
        "zero-points": build.asymmetric,
        "rows": launch.rows,
        "warps": launch.warps,
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "loop": len(code.loop),
        "per weight": round(len(code.loop) / weights, 3),
        "weight loads": loads,
        "in flight": flying,
        "matrix": code.count(MATRIX[backend]),
        "mix": dict(code.histogram().most_common()),
    }
    if backend == "cuda":
        row["warps resident"] = warps_resident(code, build.target, launch.warps)
    return row


def builds(options: argparse.Namespace) -> list[Build]:
    """The rows asked for."""
    return [
        Build(
            target=target, launch=launch_of(kernel, target, bits, group, asymmetric=asymmetric),
            bits=bits, group=group, dtype=dtype, asymmetric=asymmetric,
            integer=kernel == "gemm int8",
        )
        for target in options.targets
        for kernel in options.kernels
        for dtype in options.dtypes
        for asymmetric in ((False, True) if options.zero_points else (False,))
        for group in options.groups
        for bits in options.bits
    ]  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as a line of a Markdown table."""
    cells = [str(row[name]) for name in COLUMNS] + [str(row.get("warps resident", ""))]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=list(SHAPES), default=["gemv", "gemm"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--groups", nargs="+", type=int, default=[128])
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp16"], default=["bf16"])
    parser.add_argument("--zero-points", action="store_true", help="with zero-points as well")
    parser.add_argument("--json", type=Path, help="write the rows, with the loop's instructions")
    options = parser.parse_args(arguments)
    rows = []
    print(f"| {' | '.join((*COLUMNS, 'warps'))} |")
    print("|" + "---|" * (len(COLUMNS) + 1))
    for build in builds(options):
        rows.append(inspect(build))
        print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
