"""A checkpoint folder, opened strictly and read tensor by tensor.

Opening reads config.json, the shard index and every safetensors header, and checks them against
each other; no tensor is loaded, no code is run, and a name in an index can never leave the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantforge.errors import InputError
from quantforge.files import is_plain_name, parse_json
from quantforge.format import compressed
from quantforge.format.container import TensorEntry, read_header, read_tensor
from quantforge.format.manifest import Manifest, read_manifest
from quantforge.types import QuantizedWeight, QuantSpec

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: where it lies.
        config: config.json.
        entries: every tensor, by name, in the order of the files.
        manifest: quantforge.json, or None where another tool wrote the checkpoint.
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    manifest: Manifest | None

    def specs(self) -> dict[str, QuantSpec]:
        """The spec of every quantized layer, checked against the tensors that are there.

        Raises:
            InputError: the quantization config is missing or not supported, or it and the tensors
                disagree about which layers are quantized.
        """
        if "quantization_config" not in self.config:
            raise InputError(
                f"{self.folder} holds a float network, no quantized checkpoint; `quantforge "
                "quantize` makes one of it"
            )
        specs = compressed.specs_from_config(self.config)
        endings = tuple(f".{suffix}" for suffix in (compressed.PACKED, compressed.LEVELS))
        packed = {name.rpartition(".")[0] for name in self.entries if name.endswith(endings)}
        for name in sorted(packed ^ set(specs)):
            problem = "has no group in config.json" if name in packed else "has no packed weight"
            raise InputError(f"{self.folder}: {name} {problem}; the checkpoint is incomplete")
        return specs

    def layer_entries(self, name: str) -> dict[str, TensorEntry]:
        """The entries `<name>.weight_*` of one quantized layer, by suffix."""
        suffixes = (
            compressed.PACKED, compressed.LEVELS, compressed.SCALE, compressed.SHAPE,
            compressed.ZERO_POINT,
        )  # fmt: skip
        found = {suffix: self.entries.get(f"{name}.{suffix}") for suffix in suffixes}
        return {suffix: entry for suffix, entry in found.items() if entry is not None}


class TensorReader:
    """Loads tensors of a checkpoint one at a time.

    Every tensor is a copy with memory of its own: it stays valid when the file changes.
    """

    def load(self, entry: TensorEntry) -> Tensor:
        """The tensor of `entry`, on the CPU, as stored.

        Raises:
            InputError: the file cannot be read any more.
        """
        return read_tensor(entry)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder and check all of its headers.

    Raises:
        InputError: something is missing, truncated, damaged or contradictory.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give the folder of a checkpoint")
    config = read_json(path / CONFIG_NAME)
    return Checkpoint(
        folder=path, config=config, entries=read_entries(path), manifest=read_manifest(path)
    )


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the safetensors files of `folder`, from their headers.

    Raises:
        InputError: see `open_checkpoint`.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file() and index.is_file():
        raise InputError(f"{folder} has both {SINGLE_NAME} and {INDEX_NAME}; delete the stale one")
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise InputError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")
    return _read_shards(folder, _weight_map(index))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise InputError(f"{index} places {name} in {file!r}, not a file of the folder")
    return weight_map


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise InputError(f"{folder} lacks the shard {file} that {INDEX_NAME} names")
        for name, entry in read_header(folder / file).items():
            if weight_map.get(name) != file:
                place = weight_map.get(name, "no file")
                raise InputError(f"{folder}: {file} holds {name}, {INDEX_NAME} says {place}")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise InputError(f"{folder}: {INDEX_NAME} names {name}, which {file} does not hold")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # bad UTF-8, bad JSON, absurd numbers
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def read_shape(
    checkpoint: Checkpoint, name: str, spec: QuantSpec, reader: TensorReader
) -> tuple[int, int]:
    """(out, in) of one quantized layer; of its tensors only `weight_shape` is loaded.

    Raises:
        InputError: it is not stored, does not fit the spec, or the codes are of another shape.
    """
    entries = checkpoint.layer_entries(name)
    codes = compressed.codes_suffix(spec)
    for suffix in (compressed.SHAPE, codes):
        if suffix not in entries:
            raise InputError(f"{checkpoint.folder}: {name} has no {suffix}")
    shape = compressed.layer_shape(name, reader.load(entries[compressed.SHAPE]), spec)
    stored = entries[codes].shape
    wanted = compressed.stored_shapes(*shape, spec)[codes][1]
    if stored != wanted:
        raise InputError(f"{checkpoint.folder}: {name} has codes of {stored}, expected {wanted}")
    return shape


def read_layer(
    checkpoint: Checkpoint, name: str, spec: QuantSpec, reader: TensorReader
) -> QuantizedWeight:
    """Decode one quantized layer.

    Raises:
        InputError: its tensors do not fit its spec.
    """
    found = checkpoint.layer_entries(name).items()
    tensors = {suffix: reader.load(entry) for suffix, entry in found}
    return compressed.from_tensors(name, tensors, spec)


def read_quantized(folder: str | Path) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every quantized layer of a checkpoint, decoded one at a time, in the order of the config.

    Raises:
        InputError: see `open_checkpoint`, or a layer's tensors do not fit its spec.
    """
    checkpoint = open_checkpoint(folder)
    reader = TensorReader()
    for name, spec in checkpoint.specs().items():
        yield name, read_layer(checkpoint, name, spec, reader)
