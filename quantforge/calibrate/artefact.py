"""What calibration leaves on disk: a readable table, and moments of gradients beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantforge.calibrate.evidence import Evidence
from quantforge.errors import InputError
from quantforge.files import atomic_path, write_json
from quantforge.results import AnyQuality, CurvePoint, PooledQuality, Quality
from quantforge.types import LayerInfo, QuantSpec, Sensitivity

FORMAT_VERSION = 2
# Tables of an `Evidence`.
_TABLES = (
    "squared", "output", "relative", "factored", "energies", "products", "squares", "traces",
)  # fmt: skip


def save_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Write `sensitivity` to `path`, atomically; infinities (does not fit) become null."""

    def rows(table: torch.Tensor) -> list[list[float | None]]:
        return [[v if v != torch.inf else None for v in row] for row in table.tolist()]

    document = {
        "format_version": FORMAT_VERSION,
        "fingerprint": sensitivity.fingerprint,
        "estimator": sensitivity.estimator,
        "specs": [str(spec) for spec in sensitivity.specs],
        "layers": [asdict(layer) for layer in sensitivity.layers],
        "loss_nats": rows(sensitivity.loss),
        "relative_output_error": rows(sensitivity.error),
        "loss_stderr_nats": None if sensitivity.stderr is None else rows(sensitivity.stderr),
    }
    write_json(path, document)


def load_sensitivity(path: Path) -> Sensitivity:
    """Read what `save_sensitivity` wrote.

    Raises:
        InputError: the file is not such a document or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            raise InputError(f"{path}: sensitivity format {document['format_version']} is unknown")

        def table(rows: list[list[float | None]]) -> torch.Tensor:
            full = [[torch.inf if v is None else v for v in row] for row in rows]
            return torch.tensor(full, dtype=torch.float64)

        return Sensitivity(
            layers=tuple(LayerInfo(**layer) for layer in document["layers"]),
            specs=tuple(QuantSpec.parse(text) for text in document["specs"]),
            loss=table(document["loss_nats"]),
            error=table(document["relative_output_error"]),
            estimator=document["estimator"],
            fingerprint=document["fingerprint"],
            stderr=None if (spread := document["loss_stderr_nats"]) is None else table(spread),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a sensitivity file ({error}); delete it") from error


def save_traces(channel_weights: Sequence[Tensor], final_hidden: Tensor, path: Path) -> None:
    """Write per-block channel weights and the float network's head inputs, atomically."""
    tensors = {f"channels.{index:05d}": weight for index, weight in enumerate(channel_weights)}
    with atomic_path(path) as temporary:
        save_file({**tensors, "final_hidden": final_hidden}, temporary)


def load_traces(path: Path) -> tuple[tuple[Tensor, ...], Tensor]:
    """Read what `save_traces` wrote: channel weights in order, and the head inputs.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
        final = tensors.pop("final_hidden")
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error
    return tuple(weight for _, weight in sorted(tensors.items())), final


def save_output_gram(folder: Path, layer: str, blocks: Sequence[Tensor]) -> None:
    """Write one layer's output gram, in bfloat16 and atomically; `folder` is made if need be.

    That is digits enough: whoever uses it adds a good part of its mean to the diagonal.

    Args:
        folder: holds one file a layer.
        layer: the layer's name.
        blocks: [rows, rows] diagonal blocks, in order.
    """
    tensors = {f"{index:04d}": block.bfloat16() for index, block in enumerate(blocks)}
    with atomic_path(_gram_path(folder, layer)) as temporary:
        save_file(tensors, temporary)


def load_output_gram(folder: Path, layer: str) -> list[Tensor]:
    """Blocks of one layer's output gram, [rows, rows] float32 each.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = _gram_path(folder, layer)
    try:
        return [block.float() for _, block in sorted(load_file(path).items())]
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _gram_path(folder: Path, layer: str) -> Path:
    return folder / f"{layer}.safetensors"


def save_token_squares(squares: Mapping[str, Tensor], path: Path) -> None:
    """Write layer name → [sequences, length] ‖g_t‖² of every token, atomically.

    In bfloat16, over the layer's mean: weights are made of it, and powers of weights.
    """
    tensors = {n: (one / one.mean().clamp_min(1e-30)).bfloat16() for n, one in squares.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_token_squares(path: Path, layer: str) -> Tensor:
    """[sequences, length] float32 of one layer, mean 1 but where all are 0.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            squares: Tensor = opened.get_tensor(layer).float()
            return squares
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def save_evidence(evidence: Evidence, path: Path) -> None:
    """Write the tables of all candidates, atomically."""
    tables = {name: getattr(evidence, name).contiguous() for name in _TABLES}
    about = {
        "layers": json.dumps([asdict(layer) for layer in evidence.layers]),
        "specs": json.dumps([str(spec) for spec in evidence.specs]),
        "length": str(evidence.length),
    }
    with atomic_path(path) as temporary:
        save_file(tables, temporary, metadata=about)


def load_evidence(path: Path) -> Evidence:
    """Read what `save_evidence` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            about = opened.metadata()
            return Evidence(
                layers=tuple(LayerInfo(**layer) for layer in json.loads(about["layers"])),
                specs=tuple(QuantSpec.parse(text) for text in json.loads(about["specs"])),
                length=int(about["length"]),
                **{name: opened.get_tensor(name) for name in _TABLES},
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def save_curve(points: Sequence[CurvePoint], path: Path) -> None:
    """Write measured networks as JSON, atomically."""
    write_json(path, [asdict(point) for point in points])


def load_curve(path: Path) -> tuple[CurvePoint, ...]:
    """Read what `save_curve` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return tuple(
            CurvePoint(**{**fields, "quality": quality_of(fields["quality"])})
            for fields in json.loads(path.read_text(encoding="utf-8"))
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def quality_of(fields: Mapping[str, Any]) -> AnyQuality:
    """A measured quality from what JSON made of it."""
    kind = PooledQuality if "cosine" in fields else Quality
    rows = {name: tuple(one) for name, one in fields.items() if isinstance(one, list)}
    return kind(**{**fields, **rows})


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is missing or damaged ({error}); run again with --fresh")
