"""Re-opens a written checkpoint with the strict reader and compares every tensor with intent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.format.checkpoint import Checkpoint, TensorReader, open_checkpoint, read_layer
from quantforge.format.container import DTYPE_NAMES, tensor_digest
from quantforge.types import QuantizedWeight


def verify_checkpoint(
    folder: str | Path,
    expected: Mapping[str, QuantizedWeight],
    *,
    kept: Mapping[str, Tensor] | None = None,
) -> int:
    """Decode every tensor of a checkpoint and compare it, bit for bit, with what was meant.

    Args:
        folder: the checkpoint.
        expected: every quantized layer. Looked up once a layer, so a mapping that loads them one at
            a time needs the memory of one.
        kept: kept tensors that must be stored exactly, in the dtype they are given; None compares
            kept tensors with the hashes of quantforge.json alone.

    Returns:
        Number of tensors verified.

    Raises:
        InputError: the checkpoint cannot be read, or differs anywhere; it names the first place.
    """
    checkpoint = open_checkpoint(folder)
    specs = checkpoint.specs()
    for name in sorted(set(specs) ^ set(expected)):
        where = "stored but was not expected" if name in specs else "expected but was not stored"
        raise InputError(f"{checkpoint.folder}: {name} is {where}")
    reader = TensorReader()
    _verify_hashes(checkpoint, reader)
    for name, spec in specs.items():
        wanted = expected[name]
        if spec != wanted.spec:
            raise InputError(f"{checkpoint.folder}: {name} is {spec}, expected {wanted.spec}")
        stored = read_layer(checkpoint, name, spec, reader)
        _compare(checkpoint, f"{name} codes", stored.codes, wanted.codes)
        _compare(checkpoint, f"{name} scales", stored.scale, wanted.scale)
        if stored.zero is not None and wanted.zero is not None:
            _compare(checkpoint, f"{name} zero-points", stored.zero, wanted.zero)
    for name, tensor in (kept or {}).items():
        if name not in checkpoint.entries:
            raise InputError(f"{checkpoint.folder}: kept tensor {name} is not stored")
        _compare(checkpoint, name, reader.load(checkpoint.entries[name]), tensor)
    return len(checkpoint.entries)


def _verify_hashes(checkpoint: Checkpoint, reader: TensorReader) -> None:
    """Every tensor has the dtype, the shape and the bytes that the manifest recorded."""
    if checkpoint.manifest is None:
        raise InputError(f"{checkpoint.folder} has no quantforge.json to verify against")
    recorded = checkpoint.manifest.tensors
    for name in sorted(set(recorded) ^ set(checkpoint.entries)):
        where = "not recorded in" if name in checkpoint.entries else "missing, recorded in"
        raise InputError(f"{checkpoint.folder}: tensor {name} is {where} quantforge.json")
    for name, entry in checkpoint.entries.items():
        stored = recorded[name]
        if (DTYPE_NAMES[entry.dtype], entry.shape) != (stored.dtype, stored.shape):
            raise InputError(
                f"{checkpoint.folder}: {name} is {DTYPE_NAMES[entry.dtype]} {entry.shape}, "
                f"quantforge.json says {stored.dtype} {stored.shape}"
            )
        if tensor_digest(reader.load(entry)) != stored.sha256:
            raise InputError(
                f"{checkpoint.folder}: {name} has other bytes than quantforge.json recorded"
            )


def _compare(checkpoint: Checkpoint, what: str, stored: Tensor, wanted: Tensor) -> None:
    """Equality of bits: NaNs and signed zeros count."""
    if stored.dtype != wanted.dtype or stored.shape != wanted.shape:
        raise InputError(
            f"{checkpoint.folder}: {what} are {stored.dtype} {tuple(stored.shape)}, "
            f"expected {wanted.dtype} {tuple(wanted.shape)}"
        )
    same = stored.reshape(-1).view(torch.uint8) == (
        wanted.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    )
    if not bool(same.all()):
        count = int((~same).sum())
        raise InputError(f"{checkpoint.folder}: {what} differ from what was meant in {count} bytes")
