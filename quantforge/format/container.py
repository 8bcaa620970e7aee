"""The safetensors container: headers read strictly, files written a tensor at a time.

A file is an 8-byte little-endian header length, a JSON header `name -> {dtype, shape,
data_offsets}`, and the data. Readers check everything the header claims before a byte of data is
used: lengths, dtypes, offsets without gaps or overlaps, and that the data ends where the file does.

The writer spools each tensor to disk as it arrives and puts the header in front when the file is
closed, so it holds one tensor at a time. Wider dtypes come first, which keeps every tensor aligned
without padding (the format allows none).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.files import parse_json

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # bytes; the limit the safetensors library uses
_ITEM_SIZES = (8, 4, 2, 1)
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as a header describes it.

    Attributes:
        name: its name.
        dtype: its torch dtype.
        shape: its shape.
        file: the file that holds it.
        size_bytes: bytes of its data.
        start: place of their first one in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    size_bytes: int
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order of their data, after checking all of it.

    Raises:
        InputError: the file is missing or truncated, or its header is not what it should be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES:
                _refuse(path, f"is truncated: {size} bytes cannot hold a safetensors header")
            if length > min(_LONGEST_HEADER, size - _LENGTH_BYTES):
                _refuse(path, f"is truncated or damaged: header of {length} bytes in {size} bytes")
            text = stream.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    header = _parse(path, text)
    return _check(path, header, _LENGTH_BYTES + length, size)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            _refuse(path, f"is damaged: its header names {repeated!r} twice")
        return dict(pairs)

    try:
        header = parse_json(text, object_pairs_hook=unique)
    except ValueError as error:  # bad UTF-8, bad JSON, absurd numbers
        raise InputError(f"{path} is damaged: its header is not JSON; fetch it again") from error
    if not isinstance(header, dict):
        _refuse(path, "is damaged: its header is not a JSON object")
    header.pop(_METADATA, None)
    return header


def _check(path: Path, header: dict[str, Any], first: int, size: int) -> dict[str, TensorEntry]:
    """The tensors of a file of `size` bytes, whose data begins at `first`."""
    spans, data_bytes = [], size - first
    for name, fields in header.items():
        entry = _entry(path, name, fields, first)
        begin = entry.start - first
        spans.append((begin, begin + entry.size_bytes, entry))
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, entry in spans:
        if begin != position:
            kind = "overlaps the one before it" if begin < position else "leaves a gap before it"
            _refuse(path, f"is damaged: tensor {entry.name!r} {kind}")
        position = end
    if position > data_bytes:
        _refuse(path, f"is truncated: tensors need {position} bytes, {data_bytes} are there")
    if position < data_bytes:
        _refuse(path, f"is damaged: {data_bytes - position} bytes belong to no tensor")
    return {entry.name: entry for _, _, entry in spans}


def _entry(path: Path, name: str, fields: object, first: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"is damaged: tensor {name!r} lacks dtype, shape or data_offsets")
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(path, f"has tensor {name!r} of unsupported dtype {dtype!r}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        _refuse(path, f"is damaged: tensor {name!r} has shape {shape!r}, offsets {offsets!r}")
    size = DTYPES[dtype].itemsize * math.prod(shape)  # Python integers: nothing overflows
    if offsets[1] - offsets[0] != size:
        _refuse(path, f"is damaged: tensor {name!r} {shape} {dtype} does not fit its offsets")
    return TensorEntry(
        name=name,
        dtype=DTYPES[dtype],
        shape=tuple(shape),
        file=path,
        size_bytes=size,
        start=first + offsets[0],
    )


def _counts(value: object) -> bool:
    """Whether `value` is a list of counts: integers in [0, 2**63); booleans are not."""
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 1 << 63 for i in value)


def _refuse(path: Path, complaint: str) -> NoReturn:
    raise InputError(f"{path} {complaint}; fetch or write it again")


def read_pieces(entry: TensorEntry, piece_bytes: int) -> Iterator[Tensor]:
    """The elements of a tensor in order, flat, a piece at a time; each takes the last one's place.

    Files are read, not mapped: torch's maps count as memory of the process, whole shards at once.

    Args:
        entry: which tensor.
        piece_bytes: of a piece, at most.

    Raises:
        InputError: the file cannot be read any more.
    """
    size = entry.dtype.itemsize
    piece_bytes = min(max(piece_bytes // size * size, size), entry.size_bytes)
    piece = torch.empty(piece_bytes, dtype=torch.uint8)
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            for first in range(0, entry.size_bytes, piece_bytes or 1):
                part = piece[: entry.size_bytes - first]
                _fill(stream, part.numpy().data)
                yield part.view(entry.dtype)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot read {entry.name} from {entry.file}: {reason}") from error


def _fill(stream: RawIOBase, space: memoryview) -> None:
    """Read exactly as many bytes as there is space for."""
    while space:
        count = stream.readinto(space)
        if not count:
            raise OSError("it ends before its header says")
        space = space[count:]


def read_tensor(entry: TensorEntry) -> Tensor:
    """A tensor as it is stored, on the CPU.

    Raises:
        InputError: the file cannot be read any more.
    """
    for whole in read_pieces(entry, entry.size_bytes):
        return whole.view(entry.shape)
    return torch.empty(entry.shape, dtype=entry.dtype)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, as safetensors stores them."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """Hex SHA-256 of `tensor_bytes`."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


_Entry = tuple[str, str, list[int], int]
"""Name, dtype, shape and bytes of a tensor."""


def container_bytes(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> int:
    """Bytes of the file that `ContainerWriter` makes of tensors, from their shapes alone.

    Args:
        tensors: (name, dtype, shape) in the order in which they would be added.
    """
    entries: dict[int, list[_Entry]] = {size: [] for size in _ITEM_SIZES}
    for name, dtype, shape in tensors:
        size = dtype.itemsize
        entries[size].append((name, DTYPE_NAMES[dtype], list(shape), size * math.prod(shape)))
    data = sum(count for rows in entries.values() for *_, count in rows)
    return len(_header(entries)) + data


def _header(entries: Mapping[int, Sequence[_Entry]]) -> bytes:
    """The header with its length in front, for tensors by the size of their items."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    for size in _ITEM_SIZES:
        for name, dtype, shape, count in entries[size]:
            offsets = [position, position + count]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            position += count
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the data starts aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


class ContainerWriter:
    """Writes one safetensors file in bounded memory: `add` tensors, then leave the `with` block.

    The bytes depend on the tensors and their order alone. Leaving by an exception removes
    everything that was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._entries: dict[int, list[_Entry]] = {size: [] for size in _ITEM_SIZES}
        self._names: set[str] = set()
        self._spools: dict[int, BinaryIO] = {}

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._assemble()
        finally:
            for size, spool in self._spools.items():
                with suppress(OSError):  # a full disk: said already, and the others close too
                    spool.close()
                self._spool_path(size).unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> str:
        """Append a tensor; return the hex SHA-256 of its bytes.

        Raises:
            ValueError: the name is taken, or the dtype cannot be stored.
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} was already written")
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: {tensor.dtype} cannot be stored")
        self._names.add(name)
        size = tensor.dtype.itemsize
        if size not in self._spools:
            self._spools[size] = self._spool_path(size).open("w+b")
        data = tensor_bytes(tensor)
        self._spools[size].write(data)
        shape = list(tensor.shape)
        self._entries[size].append((name, DTYPE_NAMES[tensor.dtype], shape, data.nbytes))
        self.size_bytes += data.nbytes
        return hashlib.sha256(data).hexdigest()

    def _assemble(self) -> None:
        with self.path.open("wb") as stream:
            stream.write(_header(self._entries))
            for size in _ITEM_SIZES:
                if size in self._spools:
                    self._spools[size].seek(0)
                    shutil.copyfileobj(self._spools[size], stream, 1 << 24)

    def _spool_path(self, size: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{size}.partial")
