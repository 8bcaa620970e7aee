"""The bit layout: published vectors, an independent packer, round trips, bounded temporaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantforge_kernels.layout import WIDTHS, pack, packed_words, unpack
from torch.utils._python_dispatch import TorchDispatchMode

# Codes i mod 2**bits for i = 0..31, as compressed-tensors packs them.
VECTORS = {
    2: "e4e4e4e4 e4e4e4e4",
    3: "88fac688 c688fac6 fac688fa",
    4: "76543210 fedcba98 76543210 fedcba98",
    5: "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb",
    6: "440c2040 a2481c61 3ce34c2c 544d2450 a6585d65 7de75c6d",
    8: "03020100 07060504 0b0a0908 0f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c",
}


def words_as_hex(words: torch.Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.tolist())


def pack_with_integers(codes: list[int], bits: int) -> list[int]:
    """The definition: one big integer, cut into signed 32-bit words."""
    stream = sum(code << (index * bits) for index, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", VECTORS)
def test_published_vectors(bits: int) -> None:
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8)
    words = pack(codes, bits)
    assert words_as_hex(words) == VECTORS[bits]
    assert torch.equal(unpack(words, bits, 32), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 9, 11, 31, 32, 33, 63, 64, 65, 100, 127, 576])
def test_equals_the_definition_at_any_length(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    codes = torch.randint(1 << bits, (3, count), generator=generator).to(torch.uint8)
    codes[1] = (1 << bits) - 1  # every bit set: sign bits of every word are used
    words = pack(codes, bits)
    assert words.shape == (3, packed_words(count, bits))
    assert words.tolist() == [pack_with_integers(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_pair_of_neighbours_survives(bits: int) -> None:
    top = 1 << bits
    pairs = torch.cartesian_prod(torch.arange(top), torch.arange(top)).to(torch.uint8)
    stream = pairs.reshape(-1)  # each pair in turn at every offset of a lane
    assert torch.equal(unpack(pack(stream, bits), bits, stream.numel()), stream)
    shifted = stream[1:-7]  # a view that starts between two 64-bit integers
    assert torch.equal(unpack(pack(shifted, bits), bits, shifted.numel()), shifted)


@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(bits)
    for count in (32, 61, 200):
        codes = torch.randint(1 << bits, (5, count), generator=generator).to(torch.uint8)
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", [3, 7])
def test_shapes_strides_and_blocks(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (2, 3, 70, 999), generator=generator).to(torch.uint8)
    words = pack(codes, bits)  # 420 rows of 999: several blocks, the last one partial
    assert words.shape == (2, 3, 70, packed_words(999, bits))
    assert torch.equal(words[1, 2], pack(codes[1, 2], bits))
    assert torch.equal(unpack(words, bits, 999), codes)
    turned = codes[0, 0].t()  # not contiguous
    assert torch.equal(pack(turned, bits), pack(turned.contiguous(), bits))
    assert unpack(pack(codes[:0], bits), bits, 999).shape == (0, 3, 70, 999)
    assert pack(torch.empty(4, 0, dtype=torch.uint8), bits).shape == (4, 0)
    assert unpack(torch.empty(4, 0, dtype=torch.int32), bits, 0).shape == (4, 0)


class Storages(TorchDispatchMode):
    """Collects the sizes of all storages made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(result)  # so that no address is used twice
        return result


@pytest.mark.parametrize("bits", [3, 4])
def test_temporaries_are_bounded(bits: int) -> None:
    codes = torch.zeros(4096, 1024, dtype=torch.uint8)
    with Storages() as packing:
        words = pack(codes, bits)
    with Storages() as unpacking:
        unpack(words, bits, 1024)
    own = {codes.data_ptr(), words.data_ptr()}
    made = [size for place, size in packing.sizes.items() if place not in own]
    assert max(made) <= 1 << 17
    made = sorted(size for place, size in unpacking.sizes.items() if place not in own)
    assert made[-1] == codes.nbytes
    assert made[-2] <= 1 << 17


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(4, dtype=torch.int32), 4, "codes must be uint8"),
        (torch.zeros(4, dtype=torch.uint8), 9, "bits must be one of"),
        (torch.zeros(4, dtype=torch.uint8), 1, "bits must be one of"),
        (torch.tensor([0, 8], dtype=torch.uint8), 3, "code 8 does not fit 3 bits"),
        (torch.tensor(1, dtype=torch.uint8), 3, "at least one dimension"),
    ],
)
def test_pack_refuses(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


def test_unpack_refuses() -> None:
    words = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="33 codes of 3 bits are 4 words a row"):
        unpack(words, 3, 33)
    with pytest.raises(ValueError, match="must be int32"):
        unpack(words.long(), 3, 32)
