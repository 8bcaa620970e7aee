"""A finished folder written as one GGUF file, for llama.cpp and what is built on it.

Every tensor takes the smallest type that holds its codes and scales as they are
(`quantforge.format.gguf_blocks`), so the file is the same network. A first pass over the tensors
finds the types, because they stand in front of the data, a second writes, and a third reads the
file with gguf's reader and compares every tensor with the checkpoint's; one tensor is in memory at
a time. What cannot be written is refused in the first pass, before there is a file.
"""

from __future__ import annotations

import errno
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from quantforge.errors import InputError, ResourceError
from quantforge.export import gguf_network as network
from quantforge.export.gguf_source import read_network
from quantforge.export.gguf_tokenizer import GgufTokenizer, read_tokenizer
from quantforge.export.writer import disk_errors
from quantforge.foreign import one_line
from quantforge.format import gguf_blocks
from quantforge.format.checkpoint import Checkpoint, TensorReader, read_layer
from quantforge.outcomes import ConvertReport, GgufType
from quantforge.progress import Monitor
from quantforge.types import QuantSpec
from quantforge.workspace import staging_file

SUFFIX = ".gguf"
KEPT = "kept"
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor of the checkpoint goes.

    Attributes:
        name: in GGUF.
        spec: None where it is kept.
        type: in GGUF.
        change: [rows] by how much the type changes a weight of each; None where it holds all.
        shape: of the array that is stored, bytes for blocks.
        dtype: of that array.
        size_bytes: of its data.
    """

    name: str
    spec: QuantSpec | None
    type: str
    change: NDArray[Any] | None
    shape: tuple[int, ...]
    dtype: Any
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is converted.

    Attributes:
        opened: the source.
        specs: its quantized layers.
        config: transformers' configuration of the network.
        architecture: llama.cpp's.
        tokenizer: of the source.
        names: weight or bias of the source → name in GGUF.
        monitor: progress and cancellation.
    """

    opened: Checkpoint
    specs: Mapping[str, QuantSpec]
    config: Any
    architecture: network.GgufArchitecture
    tokenizer: GgufTokenizer
    names: Mapping[str, str]
    monitor: Monitor

    def encoded(
        self, name: str, reader: TensorReader
    ) -> tuple[str, NDArray[Any], NDArray[Any] | None]:
        """Type, array and change of one weight or bias, as in a `_Place`, in GGUF's row order."""
        layer, change = name.rpartition(".")[0], None
        if name.endswith(".weight") and layer in self.specs:
            weight = read_layer(self.opened, layer, self.specs[layer], reader)
            if (packed := gguf_blocks.encode(weight)) is not None:
                kind, array = packed
            else:
                kind, array, change = gguf_blocks.encode_rounded(weight)
        else:
            kind, array = gguf_blocks.encode_float(reader.load(self.opened.entries[name]))
        order = network.row_order(self.architecture, self.config, layer, len(array))
        if order is None:
            return kind, array, change
        rows = order.numpy()
        return kind, array[rows], None if change is None else change[rows]

    def meant(self, name: str, reader: TensorReader) -> Tensor:
        """The same as float32, from the checkpoint alone."""
        layer = name.rpartition(".")[0]
        if name.endswith(".weight") and layer in self.specs:
            found = read_layer(self.opened, layer, self.specs[layer], reader).dequantize()
        else:
            found = reader.load(self.opened.entries[name]).float()
        order = network.row_order(self.architecture, self.config, layer, len(found))
        return found if order is None else found[order]


def convert_gguf(
    opened: Checkpoint, output: Path, *, source: str, force: bool, monitor: Monitor
) -> ConvertReport:
    """Write a quantized folder as a GGUF file.

    Args:
        opened: the folder, of an architecture that llama.cpp and this module know.
        output: file to write, with the suffix .gguf.
        source: the folder, as given.
        force: replace a file that exists.
        monitor: progress and cancellation.

    Raises:
        InputError: the folder is not a whole quantized checkpoint, or GGUF has no form for it.
        UsageError: the output may not be written.
        ResourceError: the disk is full.
    """
    with staging_file(output, force=force, suffix=SUFFIX) as path, disk_errors(path.parent):
        job = _job(opened, monitor)
        places = _places(job)
        _require_room(path.parent, places)
        _write(job, places, path)
        types = _verified(job, places, path)
        size = path.stat().st_size
    files = {entry.file for entry in opened.entries.values()}
    return ConvertReport(
        source=source,
        output=str(output),
        layout="gguf",
        spec=", ".join(sorted({str(spec) for spec in job.specs.values()})),
        layers=len(job.specs),
        size_bytes=size,
        source_bytes=sum(file.stat().st_size for file in files),
        types=types,
        warnings=(*job.tokenizer.warnings, *_window(job.config)),
    )


def _job(opened: Checkpoint, monitor: Monitor) -> _Job:
    """Everything that can be refused without reading a tensor."""
    specs, found = opened.specs(), read_network(opened)
    return _Job(
        opened=opened,
        specs=specs,
        config=found.config,
        architecture=found.architecture,
        tokenizer=read_tokenizer(opened.folder, found.config.vocab_size),
        names=found.names,
        monitor=monitor,
    )


def _window(config: Any) -> tuple[str, ...]:
    """What is lost where blocks look back over a window."""
    usable = network.usable_context(config)
    if usable == config.max_position_embeddings:
        return ()
    return (
        f"the network's blocks look back {usable} tokens, which llama.cpp has for no network of "
        "this kind: the file gives that as its context",
    )


def _places(job: _Job) -> dict[str, _Place]:
    """Where every tensor goes, by its name in the checkpoint."""
    reader, places = TensorReader(), {}
    for index, (name, stored) in enumerate(job.names.items()):
        kind, array, change = job.encoded(name, reader)
        layer = name.rpartition(".")[0]
        places[name] = _Place(
            name=stored,
            spec=job.specs.get(layer) if name.endswith(".weight") else None,
            type=kind,
            change=change,
            shape=array.shape,
            dtype=array.dtype,
            size_bytes=array.nbytes,
        )
        job.monitor.step("find types", index + 1, len(job.names))
    return places


def _require_room(folder: Path, places: Mapping[str, _Place]) -> None:
    size, free = sum(p.size_bytes for p in places.values()), shutil.disk_usage(folder).free
    if size > free:
        raise ResourceError(
            f"the file takes {size / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB "
            "left: free some or give another --output"
        )


def _write(job: _Job, places: Mapping[str, _Place], path: Path) -> None:
    """Header, metadata and all tensors."""
    from gguf import GGUFWriter

    factors = network.rope_factors(job.config)
    with closing(GGUFWriter(path, job.architecture.name)) as writer:
        with _unheld(job.opened.folder):
            _add_metadata(writer, job, places)
        if factors is not None:
            _add_info(writer, _ROPE_FACTORS, tuple(factors.shape), factors.numpy(), "F32")
        for place in places.values():
            _add_info(writer, place.name, place.shape, place, place.type)
        writer.write_header_to_file()
        with _unheld(job.opened.folder):
            writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with _full_disks():
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            reader = TensorReader()
            for index, name in enumerate(places):
                writer.write_tensor_data(job.encoded(name, reader)[1])
                job.monitor.step("convert", index + 1, len(places))


def _add_info(writer: Any, name: str, shape: tuple[int, ...], data: Any, kind: str) -> None:
    """Announce a tensor; `data` is the array, or a place with what is asked of it."""
    from gguf import GGMLQuantizationType

    size = data.size_bytes if isinstance(data, _Place) else data.nbytes
    writer.add_tensor_info(name, shape, data.dtype, size, raw_dtype=GGMLQuantizationType[kind])


def _add_metadata(writer: Any, job: _Job, places: Mapping[str, _Place]) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    writer.add_type(GGUFType.MODEL)
    writer.add_name(job.opened.folder.resolve().name)
    network.add_hyperparameters(writer, job.config)
    bytes_of: dict[str, int] = {}
    for place in places.values():
        if place.spec is not None:
            bytes_of[place.type] = bytes_of.get(place.type, 0) + place.size_bytes
    most = max(bytes_of, key=lambda kind: bytes_of[kind], default="F32")
    # Mixed files have no name of their own: that of the type of most quantized bytes.
    named = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M"}.get(most, f"MOSTLY_{most}")
    writer.add_file_type(LlamaFileType[named])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    job.tokenizer.add_to(writer)


@contextmanager
def _unheld(folder: Path) -> Iterator[None]:
    """Turn what gguf raises for metadata that it cannot encode into one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
        raise InputError(
            f"GGUF holds no such metadata as {folder} has: {one_line(error)}"
        ) from None


@contextmanager
def _full_disks() -> Iterator[None]:
    """Give numpy's errors of a full disk, which have no number, that of the system."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _verified(job: _Job, places: Mapping[str, _Place], path: Path) -> tuple[GgufType, ...]:
    """Read every tensor back with gguf's own decoders and compare it with the checkpoint's.

    Raises:
        InputError: a row differs by more than its type changes it.
    """
    from gguf import GGUFReader, dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    reader = TensorReader()
    found: dict[tuple[str, str], GgufType] = {}
    for index, (name, place) in enumerate(places.items()):
        tensor = stored[place.name]
        meant = job.meant(name, reader)
        back = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        difference = _difference(back, meant, place.change)
        if difference is None:
            raise InputError(
                f"{name} reads back otherwise than it was written to {path.parent}: give another "
                "--output, or report it"
            )
        held = KEPT if place.spec is None else str(place.spec)
        before = found.get((place.type, held))
        found[place.type, held] = GgufType(
            name=place.type,
            held=held,
            tensors=1 + (before.tensors if before else 0),
            size_bytes=place.size_bytes + (before.size_bytes if before else 0),
            difference=max(difference, before.difference if before else 0.0),
        )
        job.monitor.step("verify", index + 1, len(places))
    return tuple(sorted(found.values(), key=lambda one: (-one.size_bytes, one.name)))


def _difference(back: Tensor, meant: Tensor, change: NDArray[Any] | None) -> float | None:
    """The largest difference; None where that of a row is larger than its change, or none."""
    if back.shape != meant.shape:
        return None
    rows = (back - meant).abs().reshape(len(meant), -1).amax(dim=1)
    allowed = torch.zeros_like(rows) if change is None else torch.from_numpy(change)
    return float(rows.max()) if bool((rows <= allowed).all()) else None
