"""Files of torch.save are read without being run: equal to torch, and nothing else gets in."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from quantforge.errors import InputError
from quantforge.load.torch_file import read_torch_file

LEGACY = [False, True]


def saved(path: Path, value, *, legacy: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.fixture(params=LEGACY, ids=["zip", "legacy"])
def legacy(request) -> bool:
    return request.param


def refused(path: Path, part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_a_state_dictionary_is_what_torch_reads(tmp_path, legacy):
    state = network().state_dict()
    read = read_torch_file(saved(tmp_path / "net.pth", state, legacy=legacy))
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_every_type_shape_and_view_comes_back(tmp_path, legacy):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    kinds += [torch.int16, torch.int8, torch.uint8, torch.bool]
    value = {str(kind): torch.tensor([[0, 1, 2], [3, 100, 0]]).to(kind) for kind in kinds}
    base = torch.arange(24.0)
    value |= {"slice": base[3:9], "turned": base.view(4, 6).t(), "steps": base[1::5]}
    value |= {"number": torch.tensor(2.5), "empty": torch.empty(0, 3), "whole": base}
    value["parameter"] = nn.Parameter(torch.ones(2))
    read = read_torch_file(saved(tmp_path / "all.pt", value, legacy=legacy))
    for name, tensor in value.items():
        assert torch.equal(read[name], tensor), name
    # One storage in the file is one in memory, so a small file cannot become a large network.
    assert read["slice"].untyped_storage().data_ptr() == read["whole"].untyped_storage().data_ptr()


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


class Named:
    """A harmless class: still none that is known here."""


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (Attack(), "names '"),
        ({"a": Attack()}, "names '"),
        (OrderedDict(a=torch.ones(2), b=Attack()), "names '"),
        ({"a": Named()}, "names '"),
        (nn.Linear(2, 2), "names 'torch.nn.modules.linear.Linear'"),
        ([torch.ones(2)], "no dictionary"),
        ({}, "no dictionary"),
        ({"a": 1}, "something else than a tensor under 'a'"),
        ({"state_dict": {"a": torch.ones(2)}}, "something else than a tensor"),
        ({1: torch.ones(2)}, "key that is no text"),
        ({"a": torch.ones(2).to_sparse()}, "names"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "names"),
        ({"a": {1, 2}}, "names|operation"),
    ],
)
def test_nothing_but_a_dictionary_of_tensors_is_read(tmp_path, monkeypatch, value, part, legacy):
    monkeypatch.chdir(tmp_path)
    refused(saved(tmp_path / "bad.pth", value, legacy=legacy), part)
    assert not (tmp_path / "ran").exists()


# Programs by hand: what a pickle may do that torch.save never writes.
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor_program(offset=b"K\x00", size=b"K\x04\x85", stride=b"K\x01\x85") -> bytes:
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + size + stride
    return made + b"\x89ccollections\nOrderedDict\n)RtR"


def archive(path: Path, program: bytes, **changes) -> Path:
    members = {"x/data.pkl": program, "x/byteorder": b"little", "x/data/0": bytes(16)}
    members |= changes.get("members", {})
    with zipfile.ZipFile(path, "w", changes.get("compression", zipfile.ZIP_STORED)) as made:
        for name, data in members.items():
            if data is not None:
                made.writestr(name, data)
    return path


def dictionary(inside: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + inside + b"s."


def test_the_program_by_hand_is_a_good_one(tmp_path):
    path = archive(tmp_path / "x.pth", dictionary(tensor_program()))
    assert torch.equal(read_torch_file(path)["a"], torch.zeros(4))


@pytest.mark.parametrize(
    ("program", "part"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "names 'os.system'"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "names 'builtins.eval'"),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", "operation INST"),
        (b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.", "names 'os.system'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "operation NEWOBJ"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "version 4"),
        (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", "operation SHORT_BINUNICODE"),
        (b"\x80\x02\x82\x01.", "operation EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "calls a function"),
        (b"\x80\x02K\x01)R.", "calls a function"),
        (b"\x80\x02K\x01}b.", "attributes of an object"),
        (b"\x80\x02K\x01Q.", "storage in an unknown way"),
        (b"\x80\x02K\x01K\x02.", "more or less than one value"),
        (b"\x80\x02}K\x01K\x02s.", "no text"),
        (b"\x80\x02K\x01K\x02a.", "no list"),
        (b"\x80\x02h\x05.", "no whole file"),
        (b"\x80\x02K\x01\x86.", "more from its stack"),
        (b"\x80\x02t.", "no whole file"),
        (b"\x80\x02}", "no whole file"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "no whole file"),
        (b"\x80\x02}}X\x01\x00\x00\x00ah\x00s.", "no whole file"),
        (b"", "no whole file"),
        (b"\xff\xfe", "no whole file"),
        (dictionary(tensor_program(size=b"K\x05\x85")), "beyond its storage"),
        (dictionary(tensor_program(offset=b"K\x01")), "beyond its storage"),
        (dictionary(tensor_program(offset=b"J\xff\xff\xff\xff")), "no shape"),
        (dictionary(tensor_program(stride=b"K\x02\x85")), "beyond its storage"),
        (dictionary(tensor_program(stride=b"J\xff\xff\xff\xff\x85")), "no shape"),
        (dictionary(tensor_program(size=b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85")), "beyond"),
        (dictionary(tensor_program(size=b"K\x02K\x02\x86")), "no shape"),
        (dictionary(tensor_program(size=b"\x88\x85")), "calls a function"),
        (
            dictionary(tensor_program(size=b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85")),
            "that no tensor",
        ),
        (dictionary(tensor_program(stride=b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85")), "no tensor"),
        (dictionary(tensor_program().replace(b"cpuK\x04", b"cpuK\x05")), "bytes where"),
        (dictionary(tensor_program().replace(b"storage", b"module_")), "unknown way"),
        (dictionary(tensor_program().replace(b"\x00\x00\x000X", b"\x00\x00\x001X")), "lacks the"),
    ],
)
def test_malicious_and_malformed_programs_are_refused(tmp_path, program, part):
    refused(archive(tmp_path / "bad.pth", program), part)


@pytest.mark.parametrize(
    ("members", "part"),
    [
        ({"x/byteorder": b"big"}, "big-endian"),
        ({"x/data/0": b"123"}, "3 bytes where 16"),
        ({"x/data/0": None}, "lacks the storage '0'"),
        ({"x/data.pkl": None}, "0 files called data.pkl"),
        ({"y/data.pkl": b"."}, "2 files called data.pkl"),
    ],
)
def test_archives_that_torch_does_not_write_are_refused(tmp_path, members, part):
    refused(archive(tmp_path / "b.pth", dictionary(tensor_program()), members=members), part)


def test_compressed_archives_are_refused_before_anything_is_unpacked(tmp_path):
    program = dictionary(tensor_program())
    path = archive(tmp_path / "bomb.pth", program, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed")


def test_an_archive_of_an_unknown_version_is_refused(tmp_path):
    path = archive(tmp_path / "new.pth", dictionary(tensor_program()))
    entry = path.read_bytes().rfind(b"PK\x01\x02")
    data = bytearray(path.read_bytes())
    data[entry + 6] = 200
    path.write_bytes(data)
    refused(path, "no whole file")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path, legacy, share):
    path = saved(tmp_path / "cut.pth", network().state_dict(), legacy=legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "cut.pth")


def test_a_changed_byte_never_ends_in_anything_but_a_result_or_a_line(tmp_path, legacy):
    path = saved(tmp_path / "noise.pth", {"a": torch.ones(3), "b": torch.ones(2)}, legacy=legacy)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        place, value = (int(torch.randint(n, (), generator=generator)) for n in (len(data), 256))
        path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            read = read_torch_file(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())


def test_other_files_are_refused(tmp_path):
    for number, data in enumerate([b"GGUF" + bytes(50), b"\x80\x02K\x01.", pickle.dumps({"a": 1})]):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(data)
        refused(path, "does not begin|is written in version")
    refused(tmp_path / "absent.pth", "cannot be read")
    big = io.BytesIO()
    torch.save({"a": torch.ones(2)}, big, _use_new_zipfile_serialization=False)
    (tmp_path / "big.pth").write_bytes(
        big.getvalue().replace(b"endianq\x02\x88", b"endianq\x02\x89")
    )
    refused(tmp_path / "big.pth", "big-endian")
