"""Choosing a launch is arithmetic on the problem and the device."""

import json
from dataclasses import replace

import pytest
from quantforge_kernels.triton.launch import (
    Device,
    Launch,
    candidates,
    choose_launch,
    problem,
    read_table,
    table_path,
    write_table,
)

H100 = Device(name="NVIDIA H100 80GB HBM3", backend="cuda", processors=132, capability=90)
A100 = Device(name="NVIDIA A100-SXM4-80GB", backend="cuda", processors=108, capability=80)
MI300 = Device(name="AMD Instinct MI300X", backend="hip", processors=304)


@pytest.mark.parametrize(
    ("m", "n", "k", "kernel", "rows", "tiles", "split"),
    [
        (1, 14336, 4096, "gemv", 8, 2, 4),  # 224 programs of 32 column tiles: 1056 are wanted
        (8, 4096, 14336, "gemv", 8, 1, 8),  # 128 programs
        (16, 128256, 4096, "gemv", 16, 2, 1),  # 2004 programs are enough
        (1, 192, 576, "gemv", 8, 2, 1),  # five column tiles: a split would leave too few
        (17, 4096, 4096, "gemm", 32, 4, 4),
        (2048, 14336, 4096, "gemm", 64, 4, 1),
    ],
)
def test_rules_on_an_h100(m, n, k, kernel, rows, tiles, split):
    launch = choose_launch(m, n, k, 4, 128, H100)
    assert (launch.kernel, launch.rows, launch.tiles, launch.split) == (kernel, rows, tiles, split)


def test_eight_bits_take_half_the_rows_since_two_operands_need_two_sums():
    assert choose_launch(2048, 4096, 4096, 8, 128, H100).rows == 32


@pytest.mark.parametrize(
    ("group", "integer", "asymmetric", "rows"),
    [
        (128, False, True, 64),
        (128, True, True, 64),
        (64, False, False, 64),
        (64, True, False, 64),
        (64, False, True, 32),
        (64, True, True, 32),
        (192, True, True, 32),  # 64 of its columns lie in a tile
        (32, False, False, 32),
        (96, False, False, 32),
        (288, True, False, 32),
    ],
)
def test_small_groups_take_fewer_rows_so_that_sums_fit_the_registers(
    group, integer, asymmetric, rows
):
    launch = choose_launch(2048, 4096, 4608, 4, group, H100, integer=integer, asymmetric=asymmetric)
    assert (launch.kernel, launch.rows) == ("gemm", rows)
    six = choose_launch(2048, 4096, 4608, 6, group, H100, asymmetric=asymmetric)
    assert six.rows == (64 if group == 128 else 32)


@pytest.mark.parametrize(
    ("bits", "integer", "rows"), [(3, False, 64), (4, False, 32), (4, True, 64)]
)
def test_operands_in_registers_leave_fewer_rows_before_hopper(bits, integer, rows):
    assert choose_launch(2048, 4096, 4608, bits, 64, A100, integer=integer).rows == rows
    assert choose_launch(2048, 4096, 4608, bits, 64, H100, integer=integer).rows == 64
    assert choose_launch(2048, 4096, 4608, bits, 128, A100, integer=integer).rows == 64


def test_zero_points_of_wide_codes_in_groups_of_32_take_one_tile_a_warp():
    for bits, group, asymmetric, tiles in [
        (7, 32, True, 1), (8, 96, True, 1), (6, 32, True, 2), (7, 32, False, 2), (7, 64, True, 2)
    ]:  # fmt: skip
        launch = choose_launch(1, 14336, 4608, bits, group, H100, asymmetric=asymmetric)
        assert (launch.kernel, launch.tiles) == ("gemv", tiles)


def test_a_third_stage_does_not_fit_int8_products_of_wide_codes_in_small_groups_on_an_a100():
    for group, bits, stages in [(64, 6, 2), (32, 8, 2), (128, 8, 3), (64, 5, 3)]:
        assert choose_launch(64, 4096, 4608, bits, group, A100, integer=True).stages == stages
        assert choose_launch(64, 4096, 4608, bits, group, H100, integer=True).stages == 3
        assert choose_launch(64, 4096, 4608, bits, group, A100).stages == 3


def test_amd_takes_sixteen_rows_and_four_tiles_and_loads_into_registers():
    launch = choose_launch(1, 14336, 4096, 4, 128, MI300)
    assert (launch.rows, launch.stages, launch.tiles) == (16, 1, 4)


def test_int8_inputs_take_the_matrix_product_at_any_size():
    launch = choose_launch(1, 14336, 4096, 4, 128, H100, integer=True)
    assert (launch.kernel, launch.rows) == ("gemm", 16)


def test_every_split_has_work_and_none_is_below_one():
    for m in (1, 3, 16, 40, 3000):
        for n in (1, 100, 5000, 150000):
            for k in (1, 576, 4096, 28672):
                launch = choose_launch(m, n, k, 3, 128, H100)
                assert 1 <= launch.split <= max(1, -(-k // 128) // 4)


def test_a_measured_launch_wins_for_rows_up_to_its_power_of_two():
    measured = Launch(kernel="gemv", rows=8, tiles=1, warps=1, stages=3, split=2, unroll=1)
    table = {problem(4, 512, 1024, 3, 64): measured}
    assert choose_launch(3, 512, 1024, 3, 64, H100, table=table) == measured
    assert choose_launch(5, 512, 1024, 3, 64, H100, table=table) != measured
    assert choose_launch(3, 512, 1024, 3, 64, H100, table=table, integer=True).kernel == "gemm"


def test_dtypes_and_zero_points_are_problems_of_their_own():
    measured = Launch(kernel="gemv", rows=8, tiles=1, warps=1, stages=3, split=2, unroll=1)
    table = {problem(4, 512, 1024, 3, 64, dtype="fp16", asymmetric=True): measured}

    def chosen(**how):
        return choose_launch(4, 512, 1024, 3, 64, H100, table=table, **how)

    assert chosen(dtype="fp16", asymmetric=True) == measured
    for how in ({}, {"dtype": "fp16"}, {"asymmetric": True}):
        assert chosen(**how) == choose_launch(4, 512, 1024, 3, 64, H100, **how) != measured


def test_writing_adds_to_a_table_and_replaces_what_was_measured_again(tmp_path):
    first, second, third = candidates(1, 3)[:3]
    one, other = problem(1, 512, 1024, 3, 64), problem(1, 512, 1024, 3, 64, dtype="fp16")
    write_table(H100.name, {one: first, other: second}, {"triton": "3.8"}, tmp_path)
    assert read_table(H100.name, tmp_path)[one] == first
    path = write_table(H100.name, {one: third}, {"triton": "3.9"}, tmp_path)
    assert dict(read_table(H100.name, tmp_path)) == {one: third, other: second}
    rows = json.loads(path.read_text(encoding="utf-8"))["launches"]
    assert [(row["dtype"], row["measured"]["triton"]) for row in rows] == [
        ("bf16", "3.9"),
        ("fp16", "3.8"),
    ]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="not a table of launches"):
        write_table(H100.name, {one: first}, {}, tmp_path)
    assert path.read_text(encoding="utf-8") == "{}"


def test_tables_come_back_and_damaged_ones_are_errors(tmp_path):
    launches = {problem(m, 512, 1024, 3, 64): candidates(m, 3)[m % 3] for m in (1, 16, 64)}
    path = write_table(H100.name, launches, {"triton": "3.9"}, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text(encoding="utf-8"))["device"] == H100.name
    assert dict(read_table(H100.name, tmp_path)) == launches
    assert not read_table("another", tmp_path)
    table_path("broken", tmp_path).write_text('{"launches": [{"m": 1}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="not a table of launches"):
        read_table("broken", tmp_path)


@pytest.mark.parametrize("m", [1, 16, 17, 64, 4096])
def test_candidates_are_launches_of_the_right_kernel(m):
    found = candidates(m, 4)
    assert len(set(found)) == len(found) >= 12
    assert {one.kernel for one in found} == {"gemv" if m <= 16 else "gemm"}
    assert all(one.rows < 2 * max(m, 8) for one in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "axpy"}, "no kernel 'axpy'"),
        ({"rows": 12}, "not 12"),
        ({"tiles": 3, "warps": 2}, "3 tiles are not shared evenly by 2 warps"),
        ({"split": 0}, "at least 1"),
    ],
)
def test_impossible_launches_are_refused(change, message):
    good = Launch(kernel="gemv", rows=8, tiles=2, warps=1, stages=1, split=1, unroll=1)
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_empty_problems_are_refused():
    with pytest.raises(ValueError, match="nothing to multiply: m=0"):
        choose_launch(0, 1, 1, 4, 128, H100)
