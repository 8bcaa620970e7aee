"""A scratch store of candidates: per layer one safetensors file of codes, scales and zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from quantforge_kernels.layout import pack, unpack
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantforge.errors import InputError
from quantforge.files import atomic_path
from quantforge.types import QuantizedWeight, QuantSpec


@dataclass(frozen=True, slots=True)
class CandidateStore:
    """Keeps the integers of every candidate of every layer on disk.

    Attributes:
        folder: one `<layer>.safetensors` a layer; made on first `put`.
        device: where `get` puts what it reads.
        elsewhere: layer name → folder, of layers that another store holds.
    """

    folder: Path
    device: torch.device | str = "cpu"
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    def _path(self, layer: str) -> Path:
        return self.elsewhere.get(layer, self.folder) / f"{layer}.safetensors"

    def put(self, layer: str, weights: Mapping[QuantSpec, QuantizedWeight]) -> None:
        """Write all candidates of one layer, atomically."""
        tensors = {}
        for spec, weight in weights.items():
            tensors[f"{spec}.codes"] = pack(weight.codes, spec.bits)
            tensors[f"{spec}.scale"] = weight.scale
            if weight.zero is not None:  # one byte each: rows of few groups would not pack
                tensors[f"{spec}.zero"] = weight.zero
        columns = next(iter(weights.values())).codes.shape[1]
        with atomic_path(self._path(layer)) as temporary:
            save_file(tensors, temporary, metadata={"columns": str(columns)})

    def get(self, layer: str, spec: QuantSpec) -> QuantizedWeight:
        """Read one candidate.

        Raises:
            InputError: its file is missing or damaged.
        """
        path = self._path(layer)
        try:
            with safe_open(path, framework="pt") as file:
                words = file.get_tensor(f"{spec}.codes").to(self.device)
                scale = file.get_tensor(f"{spec}.scale").to(self.device)
                zero = None if spec.symmetric else file.get_tensor(f"{spec}.zero").to(self.device)
                columns = int(file.metadata()["columns"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is missing or damaged ({error}); run again with --fresh"
            ) from error
        codes = unpack(words, spec.bits, columns)
        return QuantizedWeight(codes=codes, scale=scale, zero=zero, spec=spec)
