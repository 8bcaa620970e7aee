"""A scratch store of candidates: per layer one safetensors file of codes, scales and zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from quantforge_kernels.layout import pack, unpack
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantforge.errors import InputError
from quantforge.files import atomic_path
from quantforge.types import QuantizedWeight, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Under which all candidates of a layer were made.

    Attributes:
        asked: damping of its inputs' gram that was asked for; NaN where that was not kept.
        damping: that was needed.
        dead: input features that were always zero.
        fallback: the gram was of no use, and weights were rounded to nearest.
        starved: tokens that reached an expert, where they were too few for a gram; None otherwise.
    """

    asked: float = math.nan
    damping: float = math.nan
    dead: int = 0
    fallback: bool = False
    starved: int | None = None


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

    def put(
        self,
        layer: str,
        weights: Mapping[QuantSpec, QuantizedWeight],
        circumstances: Circumstances = Circumstances(),
    ) -> None:
        """Write all candidates of one layer, atomically."""
        tensors: dict[str, Tensor] = {}
        for spec, weight in weights.items():
            tensors |= weight_tensors(weight, str(spec))
        columns = next(iter(weights.values())).codes.shape[1]
        self.put_tensors(layer, tensors, columns, circumstances)

    def put_tensors(
        self,
        layer: str,
        tensors: Mapping[str, Tensor],
        columns: int,
        circumstances: Circumstances = Circumstances(),
    ) -> None:
        """Write all candidates of one layer as `weight_tensors` by their specs; atomically.

        Args:
            layer: its name.
            tensors: of all candidates.
            columns: input features of the layer.
            circumstances: under which they were made.
        """
        with atomic_path(self._path(layer)) as temporary:
            made = {key: str(value) for key, value in asdict(circumstances).items()}
            save_file(dict(tensors), temporary, metadata={"columns": str(columns), **made})

    def circumstances(self, layer: str) -> Circumstances:
        """What was put beside the candidates of a layer.

        Raises:
            InputError: its file is missing or damaged.
        """
        path = self._path(layer)
        try:
            with safe_open(path, framework="pt") as file:
                kept = file.metadata()
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error
        return Circumstances(
            asked=float(kept.get("asked", "nan")),
            damping=float(kept.get("damping", "nan")),
            dead=int(kept.get("dead", "0")),
            fallback=kept.get("fallback") == "True",
            starved=None if (few := kept.get("starved", "None")) == "None" else int(few),
        )

    def get(self, layer: str, spec: QuantSpec) -> QuantizedWeight:
        """Read one candidate.

        Raises:
            InputError: its file is missing or damaged.
        """
        path = self._path(layer)
        try:
            with safe_open(path, framework="pt") as file:
                columns = int(file.metadata()["columns"])
                return weight_from(file.get_tensor, str(spec), spec, columns, self.device)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is missing or damaged ({error}); run again with --fresh")


def weight_tensors(weight: QuantizedWeight, name: str) -> dict[str, Tensor]:
    """A weight as named tensors, its codes packed."""
    tensors = {f"{name}.codes": pack(weight.codes, weight.spec.bits), f"{name}.scale": weight.scale}
    if weight.zero is not None:  # one byte each: rows of few groups would not pack
        tensors[f"{name}.zero"] = weight.zero
    return tensors


def weight_from(
    tensor: Callable[[str], Tensor],
    name: str,
    spec: QuantSpec,
    columns: int,
    device: torch.device | str,
) -> QuantizedWeight:
    """Inverse of `weight_tensors`.

    Args:
        tensor: gives a tensor by its name.
        name: as it was given.
        spec: of the weight.
        columns: its input features.
        device: where the result is to be.
    """
    codes = unpack(tensor(f"{name}.codes").to(device), spec.bits, columns)
    zero = None if spec.symmetric else tensor(f"{name}.zero").to(device)
    return QuantizedWeight(
        codes=codes, scale=tensor(f"{name}.scale").to(device), zero=zero, spec=spec
    )
