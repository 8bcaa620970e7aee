"""Compiles the kernels for a GPU that is not there.

`triton.compile` needs a signature, the constants and a target, no device: the result holds the
machine code (`cubin` for NVIDIA, `amdgcn` text for AMD). Integer arguments that are multiples of 16
and aligned pointers are declared so, as Triton's launcher finds them at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from quantforge_kernels.triton.launch import Launch
from quantforge_kernels.triton.repack import TILE_COLUMNS

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

# Parameters that are multiples of 16 where the columns are whole tiles.
_ALIGNED = frozenset({"k", "x_stride", "padded", "padded_rows"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is compiled.

    Attributes:
        target: a name of `TARGETS`.
        launch: kernel and tiling.
        bits: width of a code.
        group: columns that share a scale, a multiple of 32.
        dtype: "bf16" or "fp16", of inputs, scales and outputs.
        asymmetric: whether there are zero-points.
        integer: whether the input is int8 ("gemm" only).
        ones: arguments that are 1. Triton compiles them as constants, which have no methods.
    """

    target: str
    launch: Launch
    bits: int
    group: int = 128
    dtype: str = "bf16"
    asymmetric: bool = False
    integer: bool = False
    ones: tuple[str, ...] = ()


def compile_build(build: Build) -> Any:
    """Compile one kernel.

    Args:
        build: what to compile.

    Returns:
        Triton's compiled kernel: `.asm`, and `.metadata` with the shared memory in bytes.

    Raises:
        ValueError: an unknown target.
    """
    kernel, constants, pointers = _gemm(build) if build.launch.kernel == "gemm" else _gemv(build)
    options = {"num_warps": build.launch.warps, "num_stages": build.launch.stages}
    constants |= dict.fromkeys(build.ones, 1)
    return compile_kernel(kernel, constants, pointers, build.target, **options)


def compile_kernel(
    kernel: Any, constants: dict[str, Any], pointers: dict[str, str], target: str, **options: Any
) -> Any:
    """Compile any kernel; what is neither a constant nor a pointer is an int32.

    Args:
        kernel: the jitted function.
        constants: its constants by name, and arguments that are 1.
        pointers: types of its pointers by name, e.g. "*bf16"; all are aligned to 16 bytes.
        target: a name of `TARGETS`.
        options: of the compiler: `num_warps`, `num_stages`, `debug`, ...

    Returns:
        As `compile_build`.

    Raises:
        ValueError: an unknown target.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    names = kernel.arg_names
    signature, aligned = {}, {}
    for index, name in enumerate(names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name not in constants and (name in pointers or name in _ALIGNED):
            aligned[(index,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=values, attrs=aligned
    )
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _shared(build: Build) -> tuple[dict[str, Any], dict[str, str]]:
    launch, kind = build.launch, f"*{build.dtype}"
    constants = {
        "bits": build.bits,
        "group": build.group,
        "fold": gcd(build.group, TILE_COLUMNS),
        "asymmetric": build.asymmetric,
        "has_bias": False,
        "split": launch.split > 1,
        "tiles": launch.tiles,
        "warps": launch.warps,
    }
    pointers = {
        "x_ptr": "*i8" if build.integer else kind,
        "words_ptr": "*i32",
        "scale_ptr": kind,
        "zero_ptr": "*u8",
        "bias_ptr": kind,
        "out_ptr": "*fp32" if launch.split > 1 else kind,
    }
    return constants, pointers


def _gemv(build: Build) -> tuple[Any, dict[str, Any], dict[str, str]]:
    from quantforge_kernels.triton.device.gemv import gemv

    constants, pointers = _shared(build)
    constants |= {"even": True, "rows": build.launch.rows, "unroll": build.launch.unroll}
    return gemv, constants, pointers


def _gemm(build: Build) -> tuple[Any, dict[str, Any], dict[str, str]]:
    import triton.language as tl

    from quantforge_kernels.triton.device.gemm import gemm

    constants, pointers = _shared(build)
    dtype = tl.bfloat16 if build.dtype == "bf16" else tl.float16
    constants |= {"dtype": dtype, "integer": build.integer, "columns": build.launch.rows}
    floats = {"lead_ptr": "*fp32", "total_ptr": "*fp32", "token_scale_ptr": "*fp32"}
    return gemm, constants, pointers | floats
