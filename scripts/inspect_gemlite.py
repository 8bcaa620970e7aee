"""Compiles gemlite's 4-bit kernels for a GPU that is not there and counts their instructions.

    python scripts/inspect_gemlite.py --target sm_90

gemlite asks for a GPU when it is imported; the three questions are answered here with those of an
H100, and nothing else of it is touched. Its kernels are compiled by the installed Triton as its own
launcher would: int32 words of eight codes, float16, group 128, N = K = 4096, every tiling of its
NVIDIA list ("fast", its default), as it is compiled for symmetric weights (a scalar zero) and for
zero-points folded into the scales (its default for HQQ). The count is that of
`inspect_kernels.py`: all instructions of the inner loop over its weights a thread. Its GEMV for one
to four rows has no loop: there all instructions from the first load to the reduction over threads
are taken, which leaves its prologue and its end out.
"""

from __future__ import annotations

import argparse
import json
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quantforge_kernels.triton.ahead import TARGETS
from quantforge_kernels.triton.machine_code import Code, read_code

SIZE = 4096
GROUP = 128
# W_group_mode, zero_is_scalar
MODES = {"symmetric": (3, True), "zero-points": (4, False)}
POINTERS = {
    "a_ptr": "*fp16", "b_ptr": "*i32", "c_ptr": "*fp16", "scales_ptr": "*fp16",
    "zeros_ptr": "*fp16", "scales_a_ptr": "*fp16",
}  # fmt: skip


def kernels() -> dict[str, tuple[Any, list[Any]]]:
    """The GEMV and GEMM of gemlite with their NVIDIA tilings; it believes in an H100 meanwhile."""
    properties = types.SimpleNamespace(name="NVIDIA H100", multi_processor_count=132)
    target = types.SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    import triton

    driver = types.SimpleNamespace(get_current_target=lambda: target)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        from gemlite.triton_kernels import gemm_kernels, gemv_revsplitK_kernels
    return {
        "gemv": (
            gemv_revsplitK_kernels.gemv_INT_revsplitK_kernel,
            gemv_revsplitK_kernels.get_fast_autotune_config_nvidia(),
        ),
        "gemm": (gemm_kernels.gemm_INT_kernel, gemm_kernels.get_fast_autotune_config_nvidia()),
    }


def constants(mode: str, tiling: Any) -> dict[str, Any]:
    """Values of the constants that the two kernels have; each takes those it knows."""
    import triton.language as tl

    group_mode, scalar = MODES[mode]
    strides = {"am": SIZE, "ak": 1, "bk": SIZE, "bn": 1, "cm": SIZE, "cn": 1}
    strides |= {"meta_a_m": 1, "meta_a_g": 1, "meta_g": SIZE, "meta_n": 1}
    return {
        "N": SIZE, "K": SIZE, "W_nbits": 4, "group_size": GROUP, "unpack_mask": 15,
        "elements_per_sample": 8, "type_id": 0, "use_prehook": False, "a_sizeof": 2, "b_sizeof": 4,
        "input_dtype": tl.float16, "output_dtype": tl.float16, "acc_dtype": tl.float32,
        "meta_dtype": tl.float16, "channel_scale_mode": 0, "W_group_mode": group_mode,
        "zero_is_scalar": scalar, "data_contiguous": True, "dump_b_val": 0, "dot_prod_mode": 0,
        "meta_evict_policy": "", "atomic_mode": "relaxed", "a_evict": "", "b_evict": "evict_first",
        "EVEN_M": True, "EVEN_K": True, "EVEN_N": True, "block_quant_size": 128,
        "NUM_STAGES": tiling.num_stages, "use_tma": False, "use_5d_scales": False,
        "warp_specialize": False, "meta_scale_norm_ptr": None, "load_scales_as_block": False,
        **{f"stride_{name}": value for name, value in strides.items()},
        **tiling.kwargs,
    }  # fmt: skip


def compiled(kernel: Any, tiling: Any, mode: str, target: str) -> Any:
    """One of its kernels, compiled as its launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget

    while not hasattr(kernel, "arg_names") or not hasattr(kernel, "params"):
        kernel = kernel.fn
    names = kernel.arg_names
    fixed = {name: value for name, value in constants(mode, tiling).items() if name in names}
    pointers = POINTERS | ({"zeros_ptr": "*i32"} if MODES[mode][1] else {})
    signature, aligned = {}, {}
    for index, name in enumerate(names):
        signature[name] = "constexpr" if name in fixed else pointers.get(name, "i32")
        if signature[name] != "constexpr":
            aligned[(index,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in fixed.items()}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=values, attrs=aligned
    )
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def middle(code: Code) -> tuple[str, ...]:
    """Instructions from the first load to the last use of one: a kernel without a loop.

    The reduction over threads starts with the first shuffle or barrier after the last load.
    """
    loads = [index for index, line in enumerate(code.body) if line.startswith("LDG")]
    end = next(
        (
            index
            for index, line in enumerate(code.body)
            if index > loads[-1] and re.match(r"SHFL|BAR|STS|RED|STG|ATOM", line)
        ),
        len(code.body),
    )
    return code.body[loads[0] : end]


def rows(target: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Instructions a weight of every kernel, mode and tiling that compiles."""
    found = []
    for name, (kernel, tilings) in kernels().items():
        if name not in wanted:
            continue
        seen = set()
        for tiling in tilings:
            key = (tuple(tiling.kwargs.items()), tiling.num_warps, tiling.num_stages)
            if key in seen or (name == "gemm" and tiling.kwargs["BLOCK_SIZE_K"] > GROUP):
                continue  # its own pruning: a block of K lies in one group
            seen.add(key)
            for mode in MODES:
                code = read_code(compiled(kernel, tiling, mode, target), target)
                blocks = tiling.kwargs["BLOCK_SIZE_N"] * tiling.kwargs["BLOCK_SIZE_K"]
                weights = blocks / (32 * tiling.num_warps) * (2 if name == "gemv" else 1)
                counted = middle(code) if name == "gemv" else code.loop
                row = {
                    "target": target, "kernel": name, "mode": mode,
                    "tiling": {k: v for k, v in tiling.kwargs.items() if k.startswith("BLOCK")},
                    "warps": tiling.num_warps, "stages": tiling.num_stages,
                    "per weight": round(len(counted) / weights, 3),
                    "registers": code.registers, "spills": code.spills, "shared": code.shared,
                }  # fmt: skip
                found.append(row)
                sizes = "x".join(str(value) for value in row["tiling"].values())
                print(
                    f"{name} {mode:11} {sizes:12} warps {row['warps']} stages {row['stages']} "
                    f"per weight {row['per weight']:.3f} registers {row['registers']} "
                    f"spills {row['spills']}",
                    flush=True,
                )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every row and the least of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=["sm_80", "sm_90"], default="sm_90")
    parser.add_argument("--kernels", nargs="+", choices=["gemv", "gemm"], default=["gemv", "gemm"])
    parser.add_argument("--json", type=Path, help="write the rows")
    options = parser.parse_args(arguments)
    found = rows(options.target, options.kernels)
    for name in options.kernels:
        least = min(
            (row for row in found if row["kernel"] == name), key=lambda row: row["per weight"]
        )
        print(f"{name}: at least {least['per weight']:.3f} ({least['mode']}, {least['tiling']})")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
