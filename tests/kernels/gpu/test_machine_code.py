"""Facts of the machine code that must hold, for GPUs that are not there."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
from quantforge_kernels.triton.ahead import TARGETS, Build, compile_build
from quantforge_kernels.triton.launch import Launch
from quantforge_kernels.triton.machine_code import Code, read_code, warps_resident

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, not compiled"
    ),
    # Triton announces a change of a default; the kernels do not depend on it.
    pytest.mark.filterwarnings("ignore:.*FP_FUSION"),
]


@pytest.fixture(scope="module")
def inspected():
    import inspect_kernels

    return inspect_kernels


def built(inspected, kernel, target, bits, **options):
    launch = inspected.launch_of(kernel, target, bits, 128)
    return inspected.inspect(
        Build(target=target, launch=launch, bits=bits, integer=kernel == "gemm int8", **options)
    )


def test_decoding_on_sm_90(inspected):
    """The bars: 1.5 instructions a weight at 4 bits, 2.0 at 3, and 3 bits near 4."""
    rows = {bits: built(inspected, "gemv", "sm_90", bits) for bits in (3, 4)}
    assert rows[4]["per weight"] <= 1.5
    assert rows[3]["per weight"] <= 2.0
    assert rows[3]["per weight"] <= 1.25 * rows[4]["per weight"]
    for bits, row in rows.items():
        assert row["spills"] == 0
        assert row["weight loads"] == 2 * bits  # two tiles, all of them issued before their use
        assert row["matrix"] == 40  # 32 for two tiles of 32 x 128, 8 for the constants
        assert row["warps resident"] >= 16  # 50 kB in flight, twice what HBM3 needs


def test_the_matrix_product_on_sm_90(inspected):
    row = built(inspected, "gemm", "sm_90", 4)
    assert row["spills"] == 0
    assert row["matrix"] == 16  # HGMMA of 64 x 64 x 16 for 128 x 128 weights
    assert row["weight loads"] == 4
    assert row["per weight"] <= 3.0
    assert row["warps resident"] == 8  # two programs hide each other's unpacking


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_decoding_elsewhere(target, inspected):
    row = built(inspected, "gemv", target, 4)
    assert row["spills"] == 0
    assert row["weight loads"] >= 4
    assert row["matrix"] >= 32


def test_unpacked_weights_go_straight_to_the_matrix_instruction():
    """No shuffle, and shared memory is read for loaded words only: the layout fits the operand."""
    launch = Launch(kernel="gemv", rows=8, tiles=2, warps=1, stages=1, split=1, unroll=1)
    code = read_code(compile_build(Build(target="sm_90", launch=launch, bits=4)), "sm_90")
    assert code.shared == 0
    assert not set(code.histogram()) & {"SHFL", "LDS", "STS", "BAR", "I2F", "I2FP", "F2F"}
    assert code.count("LDG.*EF.*128") == 8


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 192])
@pytest.mark.parametrize("kernel", ["gemv", "gemm", "gemm int8"])
def test_every_part_of_a_unit_that_shares_a_scale_compiles(kernel, group, asymmetric, inspected):
    """The interpreter runs what the compiler refuses, and groups of 128 have one part a unit."""
    launch = inspected.launch_of(kernel, "sm_90", 3, group)
    build = Build(
        target="sm_90", launch=launch, bits=3, group=group, asymmetric=asymmetric,
        integer=kernel == "gemm int8",
    )  # fmt: skip
    row = inspected.inspect(build)
    assert row["matrix"] >= 8
    if kernel == "gemv":
        assert row["spills"] == 0


@pytest.mark.full
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", ["gemv", "gemm", "gemm int8"])
def test_nothing_spills(kernel, target, bits, dtype, asymmetric, inspected):
    row = built(inspected, kernel, target, bits, dtype=dtype, asymmetric=asymmetric)
    assert row["spills"] == 0
    assert row["matrix"] >= 8


SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x200] ;
        /*0030*/                   LOP3.LUT R12, R4, 0xf, RZ, 0xc0, !PT ;
        /*0040*/              @!P0 LDG.E.EF.128 R16, desc[UR4][R2.64+0x400] ;
        /*0050*/                   HMMA.16816.F32.BF16 R20, R12, R8, R20 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""


def test_a_listing_is_read(monkeypatch):
    usage = " Function kernel:\n  REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:400"
    monkeypatch.setattr(
        "quantforge_kernels.triton.machine_code._tool",
        lambda name, *_: SASS if name == "nvdisasm" else usage,
    )
    compiled = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=2048))
    code = read_code(compiled, "sm_90")
    assert (code.registers, code.spills, code.shared) == (40, 24, 2048)
    assert [line.split()[0] for line in code.loop] == [
        "LDG.E.EF.128", "LDG.E.EF.128", "LOP3.LUT", "LDG.E.EF.128", "HMMA.16816.F32.BF16", "BRA",
    ]  # fmt: skip
    assert code.histogram()["LDG"] == 3
    assert code.loads_in_flight() == 2  # the first has been read when the third is issued


def test_occupancy_is_bound_by_what_runs_out_first():
    def warps(registers, shared, each):
        code = Code(registers=registers, spills=0, shared=shared, loop=(), body=())
        return warps_resident(code, "sm_90", each)

    assert warps(96, 0, 1) == 21  # 65536 // (96 * 32)
    assert warps(255, 0, 4) == 8
    assert warps(32, 0, 1) == 32  # blocks
    assert warps(32, 65536, 4) == 12  # three programs of 65 KiB in 228
    assert warps(32, 0, 4) == 64


def test_unknown_targets_are_refused():
    launch = Launch(kernel="gemv", rows=8, tiles=1, warps=1, stages=1, split=1, unroll=1)
    with pytest.raises(ValueError, match="unknown target 'sm_10'"):
        compile_build(Build(target="sm_10", launch=launch, bits=4))
