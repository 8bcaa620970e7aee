"""`quantforge.json`: what made a checkpoint, and the hash of every tensor in it.

It holds no time, no host and no path, so that the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quantforge_kernels.layout import LAYOUT_VERSION

from quantforge.errors import InputError
from quantforge.files import parse_json, write_json
from quantforge.types import BitPlan, QuantSpec

FORMAT_VERSION = 1
MANIFEST_NAME = "quantforge.json"

KEPT = "kept"

_TOOLS = ("quantforge-compiler", "torch", "safetensors", "compressed-tensors", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of the checkpoint.

    Attributes:
        dtype: as safetensors writes it, e.g. "BF16".
        shape: its shape.
        sha256: hex SHA-256 of its little-endian bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `quantforge.json`.

    Attributes:
        plan: which layer was stored how.
        seed: of the run.
        versions: tool → version.
        stock_readable: whether transformers with compressed-tensors reads the checkpoint.
        tensors: every tensor of the safetensors files, by name.
        format_version: version of this file.
        layout_version: version of the bit layout.
    """

    plan: BitPlan
    seed: int
    versions: Mapping[str, str]
    stock_readable: bool
    tensors: Mapping[str, StoredTensor]
    format_version: int = FORMAT_VERSION
    layout_version: int = LAYOUT_VERSION


def plan_to_dict(plan: BitPlan) -> dict[str, Any]:
    """A plan as JSON: specs as text ("3b-g64"), "kept" for a layer left in 16 bits.

    Fixed layers are only mentioned where there are some.
    """
    fields = asdict(plan)
    fixed = list(fields.pop("fixed"))
    if fixed:
        fields["fixed"] = fixed
    fields["assignment"] = {
        name: KEPT if spec is None else str(spec) for name, spec in plan.assignment.items()
    }
    return fields


def plan_from_dict(fields: Mapping[str, Any]) -> BitPlan:
    """Inverse of `plan_to_dict`.

    Raises:
        InputError: a field is missing, unknown or of another form.
    """
    try:
        assignment = {
            name: None if text == KEPT else QuantSpec.parse(text)
            for name, text in fields["assignment"].items()
        }
        fixed = tuple(fields.get("fixed", ()))
        return BitPlan(**{**fields, "assignment": assignment, "fixed": fixed})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the plan is not readable: {error}") from error


def tool_versions() -> dict[str, str]:
    """Versions of the installed tools that can change a checkpoint's bytes."""
    found = {}
    for tool in _TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `quantforge.json` into `folder`, atomically."""
    fields = {
        "format_version": manifest.format_version,
        "layout_version": manifest.layout_version,
        "plan": plan_to_dict(manifest.plan),
        "seed": manifest.seed,
        "stock_readable": manifest.stock_readable,
        "tensors": {name: asdict(tensor) for name, tensor in manifest.tensors.items()},
        "versions": dict(manifest.versions),
    }
    write_json(folder / MANIFEST_NAME, fields)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint; None where there is none.

    Raises:
        InputError: it is damaged or of a version this release does not read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
        versions = (fields["format_version"], fields["layout_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: it is not a manifest; write it again") from error
    if versions != (FORMAT_VERSION, LAYOUT_VERSION):
        raise InputError(
            f"{path} has format {versions[0]} and layout {versions[1]}; this release reads "
            f"format {FORMAT_VERSION} and layout {LAYOUT_VERSION}"
        )
    try:
        tensors = {
            name: StoredTensor(
                dtype=stored["dtype"], shape=tuple(stored["shape"]), sha256=stored["sha256"]
            )
            for name, stored in fields["tensors"].items()
        }
        return Manifest(
            plan=plan_from_dict(fields["plan"]),
            seed=int(fields["seed"]),
            versions=dict(fields["versions"]),
            stock_readable=bool(fields["stock_readable"]),
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}; write it again") from error
