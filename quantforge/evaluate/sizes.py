"""Sizes of a checkpoint, counted from its files alone: safetensors headers and config.json.

Nothing here trusts what the compiler meant to write. A safetensors file starts with the length of
a JSON header (8 bytes, little endian) that gives every tensor's dtype, shape and byte range; the
`quantization_config` of config.json gives the width of every quantized module by its exact name
(compressed-tensors, `pack-quantized`). The only tensor that is read is `weight_shape`, 16 bytes a
module: rows of codes are padded to whole words, so the header does not tell their length.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge.errors import InputError
from quantforge.results import SizeReport

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as a safetensors header describes it.

    Attributes:
        dtype: name in the header, e.g. "BF16".
        shape: its shape.
        file: file it lies in.
        offset: first byte in that file.
        nbytes: bytes it takes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def size_report(folder: Path | str, *, planned: Collection[str] | None = None) -> SizeReport:
    """Count a checkpoint's sizes from its files.

    Args:
        folder: a checkpoint folder.
        planned: names of the modules the plan covers. Without it these are the quantized modules
            and every ignored one inside a numbered block ("model.layers.3.mlp.up_proj"), which is
            right where all linears of the blocks were planned.

    Returns:
        Sizes; with no planned weight at all both averages are 0.

    Raises:
        InputError: the folder has no safetensors file or no config.json, a file is cut off or has
            an impossible header, or the tensors do not fit the configuration.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no .safetensors file; is it a checkpoint folder?")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise InputError(f"{name} is stored twice: in {tensors[name].file} and {file}")
            tensors[name] = tensor
    config = _quantization_config(folder)
    quantized = sorted(n.removesuffix(".weight_packed") for n in tensors if _is_packed(n))
    if planned is None:
        ignored = config.get("ignore") or [] if config else []
        planned = [n for n in ignored if any(part.isdigit() for part in n.split("."))]
    kept = [n for n in planned if n not in set(quantized) and f"{n}.weight" in tensors]

    widths = _widths(config)
    codes = stored = weights = 0
    for module in quantized:
        count, code, total = _count_module(module, tensors, widths)
        weights, codes, stored = weights + count, codes + code, stored + total
    for module in kept:
        tensor = tensors[f"{module}.weight"]
        bits = tensor.numel * DTYPE_BITS[tensor.dtype]
        weights, codes, stored = weights + tensor.numel, codes + bits, stored + bits
    others = _count_others(tensors, quantized, kept)
    size = sum(file.stat().st_size for file in files)
    return SizeReport(
        planned_weights=weights,
        code_bits=codes / weights if weights else 0.0,
        stored_bits=stored / weights if weights else 0.0,
        kept_weights=others,
        checkpoint_bytes=size,
        checkpoint_bits=8 * size / (weights + others) if weights + others else 0.0,
        reference_bytes=2 * (weights + others),
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file, without reading them.

    Raises:
        InputError: the file is cut off, its header is not JSON, or a tensor's bytes do not fit its
            dtype and shape.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise InputError(f"{file} is cut off or is not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            tensors = {name: _tensor(file, start, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file} has a broken safetensors header: {error}") from error
    end = max((t.offset + t.nbytes for t in tensors.values()), default=start)
    if end != size:
        raise InputError(f"{file} has {size} bytes, its header describes {end}; write it anew")
    return tensors


def _tensor(file: Path, start: int, entry: Mapping[str, Any]) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if last - first != math.prod(shape) * DTYPE_BITS[entry["dtype"]] // 8:
        raise ValueError(f"{last - first} bytes for {entry['dtype']} {list(shape)}")
    return StoredTensor(
        dtype=entry["dtype"], shape=shape, file=file, offset=start + first, nbytes=last - first
    )


def _is_packed(name: str) -> bool:
    return name.endswith(".weight_packed")


def _quantization_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of config.json, empty for a float checkpoint."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no config.json; is it a checkpoint folder?") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _widths(config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Module name → (bits, symmetric) from exact-name targets."""
    widths = {}
    for group in (config.get("config_groups") or {}).values():
        weights = group["weights"]
        for target in group["targets"]:
            widths[target] = (int(weights["num_bits"]), bool(weights.get("symmetric", True)))
    return widths


def _count_module(
    module: str, tensors: Mapping[str, StoredTensor], widths: Mapping[str, tuple[int, bool]]
) -> tuple[int, int, int]:
    """(weights, code bits, stored bits) of one quantized module."""
    if module not in widths:
        raise InputError(
            f"{module} is packed, but no group of quantization_config names it as a target"
        )
    missing = [p for p in ("weight_scale", "weight_shape") if f"{module}.{p}" not in tensors]
    if missing:
        raise InputError(f"{module} is packed, but {', '.join(missing)} is not stored")
    bits, symmetric = widths[module]
    packed, scale = (tensors[f"{module}.{p}"] for p in ("weight_packed", "weight_scale"))
    rows, columns = _weight_shape(tensors[f"{module}.weight_shape"])
    expected = (rows, -(-columns * bits // 32))
    if packed.shape != expected or scale.shape[:1] != (rows,):
        raise InputError(
            f"{module}: {bits}-bit codes of a {rows}x{columns} weight take {list(expected)} words "
            f"and {rows} rows of scales, the file has {list(packed.shape)} and {list(scale.shape)}"
        )
    if symmetric == (f"{module}.weight_zero_point" in tensors):
        state = "symmetric but stores" if symmetric else "asymmetric but lacks"
        raise InputError(f"{module} is {state} zero-points")
    count = rows * columns
    zeros = 0 if symmetric else scale.numel * bits
    return count, count * bits, count * bits + scale.numel * DTYPE_BITS[scale.dtype] + zeros


def _weight_shape(tensor: StoredTensor) -> tuple[int, int]:
    if tensor.shape != (2,) or tensor.dtype not in ("I64", "I32"):
        raise InputError(f"a weight_shape in {tensor.file} is not two integers")
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        rows, columns = struct.unpack(
            "<2q" if tensor.dtype == "I64" else "<2i", stream.read(tensor.nbytes)
        )
    return rows, columns


def _count_others(
    tensors: Mapping[str, StoredTensor], quantized: list[str], kept: list[str]
) -> int:
    """Weights outside the plan: embeddings, head, norms and biases."""
    planned = {f"{module}.{part}" for module in quantized for part in _PARTS}
    planned |= {f"{module}.weight" for module in kept}
    return sum(tensor.numel for name, tensor in tensors.items() if name not in planned)
