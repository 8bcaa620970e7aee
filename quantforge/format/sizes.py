"""Sizes of a checkpoint, counted from its files: headers, config.json and the manifest's plan."""

from __future__ import annotations

import math
from pathlib import Path

from quantforge.errors import InputError
from quantforge.format import compressed
from quantforge.format.checkpoint import TensorReader, open_checkpoint, read_shape
from quantforge.results import SizeReport
from quantforge.types import KEPT_BITS


def size_report(folder: str | Path) -> SizeReport:
    """Count the sizes of a quantized checkpoint; of the tensors only `weight_shape` is loaded.

    The planned weights are those the plan in quantforge.json covers, layers it keeps included and
    fixed ones left out; without a manifest, the quantized ones. Their stored bits are the bits of
    the packed codes, the scales and the zero-points as they lie in the file, padding included. A
    tied head is not stored and not counted.

    Raises:
        InputError: see `open_checkpoint`, or no layer was planned.
    """
    checkpoint = open_checkpoint(folder)
    reader = TensorReader()
    planned = stored_bits = kept = 0
    code_bits = 0.0
    owned: set[str] = set()
    fixed = checkpoint.manifest.plan.fixed if checkpoint.manifest else ()
    for name, spec in checkpoint.specs().items():
        weights = math.prod(read_shape(checkpoint, name, spec, reader))
        entries = checkpoint.layer_entries(name)
        del entries[compressed.SHAPE]  # not counted
        if name in fixed:
            kept += weights
        else:
            planned += weights
            code_bits += weights * spec.code_bits
            stored_bits += 8 * sum(entry.size_bytes for entry in entries.values())
        owned |= {f"{name}.{compressed.SHAPE}", *(entry.name for entry in entries.values())}
    assignment = checkpoint.manifest.plan.assignment if checkpoint.manifest else {}
    for name, entry in checkpoint.entries.items():
        if name in owned:
            continue
        layer = name.removesuffix(".weight")
        if layer != name and layer in assignment:
            planned += entry.numel
            code_bits += entry.numel * KEPT_BITS
            stored_bits += 8 * entry.size_bytes
        else:
            kept += entry.numel
    if planned == 0:
        raise InputError(f"{folder} has no quantized layer")
    total_bytes = sum(file.stat().st_size for file in {e.file for e in checkpoint.entries.values()})
    return SizeReport(
        planned_weights=planned,
        code_bits=code_bits / planned,
        stored_bits=stored_bits / planned,
        kept_weights=kept,
        checkpoint_bytes=total_bytes,
        checkpoint_bits=8 * total_bytes / (planned + kept),
        reference_bytes=(planned + kept) * KEPT_BITS // 8,
    )
