"""Facts of the machine code that must hold, for GPUs that are not there."""

import importlib.util
import os
import re
from types import SimpleNamespace

import pytest
from quantforge_kernels.triton.ahead import TARGETS, Build, compile_build, compile_kernel
from quantforge_kernels.triton.launch import Launch
from quantforge_kernels.triton.machine_code import LOADS, Code, read_code, warps_resident

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
    group, asymmetric = options.get("group", 128), options.get("asymmetric", False)
    launch = inspected.launch_of(kernel, target, bits, group, asymmetric=asymmetric)
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
        # Two tiles; all of them are under way before the wait that precedes their first use.
        assert row["weight loads"] == row["in flight"] == 2 * bits >= 4
        assert row["matrix"] == 40  # 32 for two tiles of 32 x 128, 8 for the constants
        assert row["warps resident"] >= 16  # 50 kB in flight, twice what HBM3 needs


def test_the_matrix_product_on_sm_90(inspected):
    row = built(inspected, "gemm", "sm_90", 4)
    assert row["spills"] == 0
    assert row["matrix"] == 16  # HGMMA of 64 x 64 x 16 for 128 x 128 weights
    assert row["weight loads"] == 4
    assert row["per weight"] <= 3.0
    assert row["warps resident"] == 8  # two programs hide each other's unpacking


def test_the_matrix_product_on_gfx942_loads_64_bits(inspected):
    """A tile for each warp of 64 lanes: two words a lane. Larger tiles exceed 64 KiB of memory."""
    launch = inspected.launch_of("gemm", "gfx942", 4, 128)
    code = read_code(compile_build(Build(target="gfx942", launch=launch, bits=4)), "gfx942")
    assert code.spills == 0
    assert code.shared <= 65536
    assert code.count(inspected.LATER_WORDS) == 0
    assert code.count(inspected.LATER_WORDS.replace("dwordx4", "dwordx2")) == 3  # and the first


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_decoding_elsewhere(target, inspected):
    row = built(inspected, "gemv", target, 4)
    assert row["spills"] == 0
    assert row["weight loads"] == row["in flight"] == 8
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
    row = built(inspected, kernel, "sm_90", 3, group=group, asymmetric=asymmetric)
    assert row["matrix"] >= 8
    assert row["spills"] == 0


@pytest.mark.parametrize(
    ("kernel", "target", "group", "bits", "asymmetric"),
    [
        ("gemv", "sm_90", 32, 7, True),
        ("gemm", "sm_80", 32, 7, True),
        ("gemm", "sm_80", 64, 3, False),  # the widest that keeps 64 rows
        ("gemm", "sm_80", 64, 4, False),
        ("gemm", "sm_80", 64, 7, True),
        ("gemm", "sm_90", 64, 6, False),
        ("gemm", "sm_90", 64, 5, False),  # the widest that keeps 64 rows
        ("gemm int8", "sm_80", 32, 7, True),
        ("gemm int8", "sm_80", 64, 8, False),
        ("gemm int8", "sm_80", 64, 5, False),
    ],
)
def test_tiles_for_small_groups_do_not_spill(kernel, target, group, bits, asymmetric, inspected):
    row = built(inspected, kernel, target, bits, group=group, asymmetric=asymmetric)
    assert row["spills"] == 0


@pytest.mark.full
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kernel", ["gemv", "gemm", "gemm int8"])
def test_no_small_group_spills(kernel, target, group, bits, dtype, asymmetric, inspected):
    row = built(inspected, kernel, target, bits, group=group, dtype=dtype, asymmetric=asymmetric)
    assert row["spills"] == 0


# Arguments that are 1 are constants to the compiler: smallest outputs, inputs and weights.
SMALLEST = {
    "gemv": ("m", "n", "k", "x_stride", "units", "split_units"),
    "gemm": ("m", "n", "units", "split_units"),
}


@pytest.mark.parametrize("kernel", list(SMALLEST))
def test_products_of_size_one_compile(kernel):
    tiles = 1 if kernel == "gemv" else 4
    how = Launch(kernel=kernel, rows=16, tiles=tiles, warps=tiles, stages=1, split=2, unroll=1)
    compiled = compile_build(
        Build(target="sm_90", launch=how, bits=3, asymmetric=True, ones=SMALLEST[kernel])
    )
    assert compiled.asm["cubin"]


@pytest.mark.parametrize("ones", [(), ("n",), ("size", "n")])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_sum_of_a_split_compiles_for_outputs_of_one_element(target, ones):
    from quantforge_kernels.triton.device.gemv import reduce

    constants = {"has_bias": True, "block": 1024, **dict.fromkeys(ones, 1)}
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    compiled = compile_kernel(reduce, constants, pointers, target)
    code = read_code(compiled, target)
    assert code.spills == 0
    loads = [line for line in code.loop if re.match(r"LDG|(global|buffer)_load", line)]
    assert loads  # the partial sums are added in a loop over the split


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("ones", [(), ("m", "k", "x_stride", "units")])
def test_arranging_compiles(ones, integer):
    from quantforge_kernels.triton.device.arrange import arrange
    from quantforge_kernels.triton.linear import ARRANGE_COLUMNS

    constants = {
        "bits": 3, "fold": 32, "asymmetric": True, "integer": integer, "block": ARRANGE_COLUMNS,
        **dict.fromkeys(ones, 1),
    }  # fmt: skip
    pointers = {
        "x_ptr": "*bf16", "out_ptr": "*i8" if integer else "*bf16", "lead_ptr": "*fp32",
        "total_ptr": "*fp32", "token_scale_ptr": "*fp32",
    }  # fmt: skip
    assert read_code(compile_kernel(arrange, constants, pointers, "sm_90"), "sm_90").spills == 0


@pytest.mark.parametrize("ones", [(), ("count", "n", "k", "units")])
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("target", "text", "trap"),
    [("sm_90", "ptx", "__assertfail"), ("gfx942", "amdgcn", "s_trap")],
)
def test_lookups_compile_and_assert_their_ids(target, text, trap, debug, ones):
    from quantforge_kernels.triton.device.lookup import lookup
    from quantforge_kernels.triton.linear import LOOKUP_ROWS

    constants = {
        "bits": 3, "group": 64, "asymmetric": True, "has_ids": True, "block": LOOKUP_ROWS,
        **dict.fromkeys(ones, 1),
    }  # fmt: skip
    pointers = {
        "ids_ptr": "*i64", "words_ptr": "*i32", "scale_ptr": "*bf16", "zero_ptr": "*u8",
        "out_ptr": "*bf16",
    }  # fmt: skip
    compiled = compile_kernel(
        lookup, constants, pointers, target, debug=debug, sanitize_overflow=False
    )
    assert (trap in compiled.asm[text]) == debug
    assert compiled.asm[text].count("an id is no row") == 0 or debug


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
        /*0050*/                   HMMA.16816.F32.BF16 R20, R12, R8, R16 ;
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


def in_flight(*lines, pattern=LOADS):
    return Code(registers=0, spills=0, shared=0, loop=lines, body=()).loads_in_flight(pattern)


def test_copies_wait_for_their_barrier_not_for_each_other():
    copy, end = "LDGSTS.E.BYPASS.128 [R8+UR4], desc[UR5][R22.64]", "LDGDEPBAR"
    assert in_flight("DEPBAR.LE SB0, 0x0", "FADD R1, R2, R3", copy, copy, end, copy, end) == 3
    assert in_flight("DEPBAR.LE SB0, 0x1", copy, end, copy, copy, end) == 5
    assert in_flight(copy, end, "DEPBAR.LE SB0, 0x0", copy, end, "DEPBAR.LE SB0, 0x0") == 1


def test_loads_into_registers_wait_for_their_first_use_or_amd_s_count():
    first, second = "LDG.E.EF.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x200]"
    use = "FADD R1, R7, R10"
    assert in_flight(first, second, use) == 2
    assert in_flight(first, "FADD R1, R7, R7", second, use) == 1
    assert in_flight(first, second, use, pattern=r"LDG\S*\.EF\S*\.128") == 1
    load, small = "global_load_dwordx4 v[0:3], v[8:9], off", "global_load_dwordx2 v[4:5], v8, off"
    assert in_flight(load, load, load, "s_waitcnt vmcnt(0)") == 3
    assert in_flight(load, small, load, "s_waitcnt vmcnt(1) lgkmcnt(0)", load) == 4
    assert in_flight(load, "s_waitcnt vmcnt(0)", load, "s_waitcnt lgkmcnt(0)", load) == 3


AMDGCN = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
	global_load_dwordx4 v[0:3], v[8:9], off ; a comment
	s_cbranch_execz .LBB0_1
	global_load_dwordx4 v[4:7], v[8:9], off offset:512
	s_waitcnt vmcnt(0)
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.section	.rodata
    .vgpr_count:     60
    .vgpr_spill_count: 2
    .sgpr_spill_count: 1
"""


def test_branches_back_to_one_place_are_one_loop():
    compiled = SimpleNamespace(asm={"amdgcn": AMDGCN}, metadata=SimpleNamespace(shared=64))
    code = read_code(compiled, "gfx942")
    assert (code.registers, code.spills, code.shared) == (60, 3, 64)
    assert len(code.loop) == 5
    assert code.loop[-1] == "s_cbranch_scc1 .LBB0_1"
    assert code.loads_in_flight() == 2


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
