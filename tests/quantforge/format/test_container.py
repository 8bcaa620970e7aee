"""The safetensors container: what the library reads, and every way a header can lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantforge.errors import InputError
from quantforge.format.container import ContainerWriter, read_header

TENSORS = {
    "odd": torch.arange(3, dtype=torch.int16).to(torch.bfloat16),
    "words": torch.tensor([[-1, 2], [3, 1 << 30]], dtype=torch.int32),
    "shape": torch.tensor([7, 9]),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4, dtype=torch.float16),
}


def write(path: Path) -> dict[str, str]:
    with ContainerWriter(path) as container:
        return {name: container.add(name, tensor) for name, tensor in TENSORS.items()}


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if length is None else length
    path.write_bytes(count.to_bytes(8, "little") + text + data)
    return path


def tensor(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> Any:
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    digests = write(tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert set(stored) == set(TENSORS)
    for name, wanted in TENSORS.items():
        assert stored[name].dtype == wanted.dtype
        assert torch.equal(stored[name], wanted)
    assert digests["words"] == hashlib.sha256(TENSORS["words"].numpy().tobytes()).hexdigest()
    header = read_header(tmp_path / "a.safetensors")
    assert {name: (entry.shape, entry.dtype) for name, entry in header.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()
    }
    assert sum(entry.size_bytes for entry in header.values()) == 6 + 16 + 16 + 3 + 4
    assert list(header) == ["shape", "words", "scalar", "odd", "empty", "bytes"]  # aligned order
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "b.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "b.safetensors")
    assert {name: entry.shape for name, entry in header.items()} == {
        name: tuple(t.shape) for name, t in TENSORS.items()
    }


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'x' was already written"),
        ContainerWriter(tmp_path / "a") as container,
    ):
        container.add("x", torch.zeros(3))
        container.add("x", torch.zeros(3))
    with pytest.raises(ValueError, match="complex64 cannot be stored"):
        ContainerWriter(tmp_path / "a").add("x", torch.zeros(3, dtype=torch.complex64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.safetensors is truncated"):
        read_header(path)


BAD_HEADERS: list[tuple[Any, bytes, str]] = [
    (b"{nonsense", b"", "header is not JSON"),
    (b"\xff\xfe", b"", "header is not JSON"),
    ([1], b"", "not a JSON object"),
    (b"[" * 100_000, b"", "header is not JSON"),
    (b'{"a":' + b"9" * 5000 + b"}", b"", "header is not JSON"),
    ({"a": tensor(0, 0, shape=[0, 2**70])}, b"", "has shape"),
    ({"a": 3}, b"", "'a' lacks dtype"),
    ({"a": {**tensor(0, 1), "more": 1}}, b"1", "'a' lacks dtype"),
    ({"a": tensor(0, 4, dtype="F4", shape=[8])}, b"1234", "unsupported dtype 'F4'"),
    ({"a": tensor(0, 4, dtype="F32", shape=[2])}, b"1234", "does not fit its offsets"),
    ({"a": tensor(0, 4, shape=[-4])}, b"1234", "has shape"),
    ({"a": tensor(0, 1, shape=[True])}, b"1", "has shape"),
    ({"a": tensor(0, 4, shape=[2**40, 2**40])}, b"1234", "does not fit its offsets"),
    ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, b"1234", "does not fit"),
    ({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456", "'b' overlaps"),
    ({"a": tensor(0, 2), "b": tensor(3, 6)}, b"123456", "'b' leaves a gap"),
    ({"a": tensor(0, 9)}, b"123456", "truncated: tensors need 9 bytes, 6 are there"),
    ({"a": tensor(0, 4)}, b"123456", "2 bytes belong to no tensor"),
    (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "names 'a' twice"),
]


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [1 << 63, 10_000, 100_000_001])
def test_an_absurd_header_length_is_refused(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "bad.safetensors", {}, b"x" * 50, length=length)
    with pytest.raises(InputError, match=f"header of {length} bytes in 60 bytes"):
        read_header(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent: No such file"):
        read_header(tmp_path / "absent")
