"""Weights out of files that `torch.save` wrote, without ever running what is in them.

Such a file is a pickle, a program for a stack machine that may call anything, beside the raw bytes
of the storages: since torch 1.6 a zip archive, before that five pickles and the storages in one
stream. Here the program is only read: `pickletools` splits it into operations, and the few that a
dictionary of tensors needs are followed on a stack of our own, on which names of functions are
inert marks. Anything else is refused: another operation, another name, a storage that is not
there, a tensor that reaches beyond its storage. No memory is taken beyond the file's own size.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.foreign import one_line

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
NEWEST_PROTOCOL = 2
MOST_DIMENSIONS = 16
LARGEST_NUMBER = 1 << 62  # of what torch counts in int64

_DTYPES: Mapping[str, torch.dtype] = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = {*_DTYPES, _DICT, _TENSOR, _PARAMETER}


# What the parsers of pickles and of archives raise for bytes they cannot read.
_DAMAGE = (
    ValueError, LookupError, TypeError, EOFError, NotImplementedError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


class _RefusedError(Exception):
    """What the file holds and may not."""


class _Pickled(Protocol):
    """What pickles are read from: a file, a memory map or bytes in memory."""

    def read(self, n: int = ..., /) -> bytes:
        """At most n bytes."""

    def readline(self) -> bytes:
        """One line."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A function or class the program names: a mark that nothing is ever called through."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor still to be made: where in a storage its numbers are."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds a state dictionary, by name, in the file's order.

    Tensors that shared memory when they were saved share it again.

    Raises:
        InputError: the file is missing, damaged, of another form, or holds more than tensors.
    """
    try:
        with path.open("rb") as stream:
            is_zip = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        named, storages = _read_zip(path) if is_zip else _read_legacy(path)
        return {name: _viewed(name, view, storages) for name, view in named.items()}
    except _RefusedError as error:
        raise InputError(
            f"{path} is not read, because it {error}: only dictionaries of tensors are read from "
            "such files; convert it to safetensors"
        ) from None
    except _DAMAGE as error:
        raise InputError(
            f"{path} is no whole file of torch.save ({one_line(error)}): get it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None


def _read_zip(path: Path) -> tuple[dict[str, _View], dict[str, Tensor]]:
    """Views and storages of the form since torch 1.6."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise _RefusedError("names a member of its archive twice")
        if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members.values()):
            raise _RefusedError("is compressed or encrypted, which torch.save does not do")
        programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise _RefusedError(f"holds {len(programs)} files called data.pkl")
        root = programs[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise _RefusedError("holds big-endian numbers")
        named = _named_views(_followed(_Bytes(archive.read(programs[0]))))
        storages = {}
        for storage in _storages_of(named):
            member = f"{root}data/{storage.key}"
            if member not in members:
                raise _RefusedError(f"lacks the storage {storage.key!r}")
            storages[storage.key] = _numbers(archive.read(member), storage)
    return named, storages


def _read_legacy(path: Path) -> tuple[dict[str, _View], dict[str, Tensor]]:
    """Views and storages of the form before torch 1.6."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        # The first operations alone tell whether this is such a file at all.
        if stream[:2] != b"\x80\x02" or _followed(stream) != LEGACY_MAGIC:
            raise _RefusedError("does not begin as a file of torch.save does")
        system = _followed(stream), _followed(stream)
        if system[0] != LEGACY_PROTOCOL or not isinstance(system[1], dict):
            raise _RefusedError("is of an unknown version of its form")
        if system[1].get("little_endian") is not True:
            raise _RefusedError("holds big-endian numbers")
        named = _named_views(_followed(stream))
        wanted = {storage.key: storage for storage in _storages_of(named)}
        keys = _followed(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise _RefusedError("has no list of storages")
        storages: dict[str, Tensor] = {}
        for key in keys:
            if key not in wanted or key in storages:
                raise _RefusedError(f"holds a storage {key!r} that no tensor needs")
            (count,) = struct.unpack("<q", stream.read(8))
            if count != wanted[key].count:
                raise _RefusedError(f"gives the storage {key!r} two sizes")
            storages[key] = _numbers(stream.read(_length(wanted[key])), wanted[key])
        if len(storages) != len(wanted):
            raise _RefusedError("lacks a storage")
    return named, storages


def _length(storage: _Storage) -> int:
    return storage.count * storage.dtype.itemsize


def _numbers(data: bytes, storage: _Storage) -> Tensor:
    """A storage's numbers as one flat tensor."""
    if len(data) != _length(storage):
        raise _RefusedError(f"has {len(data)} bytes where {_length(storage)} are announced")
    if not data:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


def _named_views(top: Any) -> dict[str, _View]:
    if not isinstance(top, dict) or not top:
        raise _RefusedError("holds no dictionary")
    for name, value in top.items():
        if not isinstance(value, _View):
            raise _RefusedError(f"holds something else than a tensor under {name!r}")
    return top


def _storages_of(named: Mapping[str, _View]) -> list[_Storage]:
    """Every storage once; two that differ under one key are refused."""
    by_key: dict[str, _Storage] = {}
    for view in named.values():
        if by_key.setdefault(view.storage.key, view.storage) != view.storage:
            raise _RefusedError(f"describes the storage {view.storage.key!r} in two ways")
    return list(by_key.values())


def _viewed(name: str, view: _View, storages: Mapping[str, Tensor]) -> Tensor:
    """The tensor, after checking that all of it lies inside its storage."""
    numbers = (view.offset, *view.size, *view.stride)
    extent = math.prod(size or 1 for size in view.size)
    if len(view.size) != len(view.stride) or len(view.size) > MOST_DIMENSIONS or min(numbers) < 0:
        raise _RefusedError(f"gives {name} no shape")
    if max(*numbers, extent) > LARGEST_NUMBER:
        raise _RefusedError(f"gives {name} a shape that no tensor has")
    count = math.prod(view.size)
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    if count and (count > view.storage.count or last >= view.storage.count):
        raise _RefusedError(f"lets {name} reach beyond its storage")
    if not count:
        return torch.empty(view.size, dtype=view.storage.dtype)
    return storages[view.storage.key].as_strided(view.size, view.stride, view.offset)


class _Bytes:
    """Bytes as a stream whose reads end where the bytes do."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self, n: int = -1, /) -> bytes:
        end = len(self._data) if n < 0 else min(self._at + n, len(self._data))
        piece, self._at = self._data[self._at : end], end
        return piece

    def readline(self) -> bytes:
        found = self._data.find(b"\n", self._at)
        return self.read(-1 if found < 0 else found + 1 - self._at)


def _followed(stream: _Pickled) -> Any:
    """What one pickle describes, its names and tensors as marks; the stream is left behind it."""
    machine = _Machine()
    for operation, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
        if operation.name == "STOP":
            return machine.result()
        machine.step(operation.name, argument)
    raise _RefusedError("ends in the middle")


_MARK = object()
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """The stack that the operations of one pickle work on."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._others: Mapping[str, Callable[[Any], None]] = {
            "PROTO": self._protocol,
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "TUPLE": lambda _: self._stack.append(tuple(self._marked())),
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._marked()),
            "SETITEM": lambda _: self._set_items([self._stack.pop() for _ in range(2)][::-1]),
            "SETITEMS": lambda _: self._set_items(self._marked()),
            "GLOBAL": self._name,
            "BINPERSID": lambda _: self._stack.append(_storage(self._stack.pop())),
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def step(self, operation: str, argument: Any) -> None:
        """One operation, or a refusal."""
        if operation in _CONSTANTS:
            self._stack.append(_CONSTANTS[operation]())
        elif operation in _LITERALS:
            self._stack.append(argument)
        elif operation in _TUPLES:
            size = _TUPLES[operation]
            if len(self._stack) < size:
                raise _RefusedError("takes more from its stack than is there")
            self._stack[-size:] = [tuple(self._stack[-size:])]
        elif operation in self._others:
            self._others[operation](argument)
        else:
            raise _RefusedError(f"uses the pickle operation {operation}")

    def result(self) -> Any:
        """What is left when the program stops."""
        if len(self._stack) != 1:
            raise _RefusedError("leaves more or less than one value")
        return self._stack[0]

    def _protocol(self, version: int) -> None:
        if version > NEWEST_PROTOCOL:
            raise _RefusedError(f"is written in version {version} of pickle")

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark, taken off together with it."""
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise _RefusedError("appends to what is no list")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if not isinstance(into, dict) or len(items) % 2:
            raise _RefusedError("sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise _RefusedError("has a key that is no text")
            into[key] = value

    def _name(self, name: str) -> None:
        if name not in _NAMES:
            raise _RefusedError(f"names {name.replace(' ', '.')!r}")
        self._stack.append(_Name(name))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_rebuilt(function, arguments))

    def _build(self, _: Any) -> None:
        """What an `OrderedDict` carries besides its items, module versions, is left out."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise _RefusedError("sets the attributes of an object")


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Name(name), str(key), str(), int(count), *rest) if (
            name in _DTYPES and count >= 0 and (not rest or rest == [None])
        ):
            return _Storage(key, _DTYPES[name], count)
    raise _RefusedError("names a storage in an unknown way")


def _rebuilt(function: Any, arguments: Any) -> Any:
    """What a call of one of the known functions would make; nothing is called."""
    match function, arguments:
        case _Name("collections OrderedDict"), ():
            return {}
        case (
            _Name("torch._utils _rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), dict(), *_),
        ) if all(type(n) is int for n in (*size, *stride)):
            return _View(storage, offset, size, stride)
        case _Name("torch._utils _rebuild_parameter"), (_View() as view, bool(), dict()):
            return view
    raise _RefusedError("calls a function in an unknown way")
