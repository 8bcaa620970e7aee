"""The layout of the GPU kernels, read back by its description."""

import pytest
import torch
from quantforge_kernels import pack
from quantforge_kernels.triton.repack import PAIRS, pieces, repack


def read(weight):
    """[padded rows, padded columns] codes, one bit range after the other."""
    row_tiles, column_tiles, bits = weight.words.shape[:3]
    words = weight.words.long() & 0xFFFFFFFF
    codes = torch.zeros(row_tiles * 32, column_tiles * 128, dtype=torch.int64)
    for pair in range(PAIRS):
        for half in (0, 1):
            for j in range(4):
                column = 32 * (pair // 4) + 8 * j + 2 * (pair % 4) + half
                value = torch.zeros(row_tiles, column_tiles, 8, 4, dtype=torch.int64)
                for word, position, start, width in pieces(bits, pair):
                    field = words[:, :, word, :, j, :] >> (16 * half + position)
                    value |= (field & ((1 << width) - 1)) << start
                # row = 4 * g + r of its tile
                codes[:, column::128] = value.permute(0, 2, 3, 1).reshape(row_tiles * 32, -1)
    return codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_of_a_lane_belongs_to_one_code(bits):
    used, coded = set(), set()
    for pair in range(PAIRS):
        for word, position, start, width in pieces(bits, pair):
            assert word < bits
            assert position + width <= 16
            for bit in range(width):
                used.add((word, position + bit))
                coded.add((pair, start + bit))
    assert len(used) == len(coded) == 16 * bits


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 200), (64, 256), (100, 576)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_and_padding_is_zero(bits, rows, columns):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    weight = repack(pack(codes, bits), torch.ones(rows, 1), None, bits, -1, columns)
    assert weight.words.is_contiguous()
    assert weight.words.shape == (-(-rows // 32), -(-columns // 128), bits, 8, 4, 4)
    found = read(weight)
    assert torch.equal(found[:rows, :columns], codes.long())
    assert int(found.sum()) == int(codes.long().sum())


def test_large_matrices_are_repacked_in_blocks():
    codes = torch.arange(2100 * 2304, dtype=torch.int64).mul_(7).remainder_(8).to(torch.uint8)
    codes = codes.view(2100, 2304)
    weight = repack(pack(codes, 3), torch.ones(2100, 18), None, 3, 128, 2304)
    assert torch.equal(read(weight)[:2100], codes.long())


def test_scales_and_zeros_lie_by_group():
    scale = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)
    zero = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
    weight = repack(pack(torch.zeros(3, 64, dtype=torch.uint8), 4), scale, zero, 4, 32, 64)
    assert weight.scale.dtype == torch.float32
    assert weight.scale.shape == (4, 32)  # 128 padded columns are four groups, 3 rows are 32
    assert weight.scale[:2, :3].tolist() == scale.T.tolist()
    assert weight.zero[:2, :3].tolist() == zero.T.tolist()
    assert (float(weight.scale.sum()), int(weight.zero.sum())) == (21.0, 21)


@pytest.mark.parametrize(
    ("group", "columns", "fold"),
    [(32, 64, 32), (64, 64, 128), (64, 576, 64), (96, 288, 32), (192, 576, 64), (256, 512, 128),
     (288, 576, 32), (-1, 100, 128), (-1, 576, 128)],
)  # fmt: skip
def test_sums_are_scaled_where_groups_and_tiles_meet(group, columns, fold):
    words = pack(torch.zeros(1, columns, dtype=torch.uint8), 4)
    groups = 1 if group == -1 else columns // group
    weight = repack(words, torch.ones(1, groups), None, 4, group, columns)
    assert weight.fold == fold
    assert weight.group_size % fold == 0


@pytest.mark.parametrize("group", [48, 16, 96])
def test_groups_that_the_layout_lacks_are_refused(group):
    words = pack(torch.zeros(2, 192 + 48, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=f"groups of {group} in a row of 240: .*multiples of 32"):
        repack(words, torch.ones(2, 1), None, 4, group, 240)


def test_widths_that_the_layout_lacks_are_refused():
    with pytest.raises(ValueError, match="bits must be one of"):
        repack(torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 1), None, 9, -1, 14)
