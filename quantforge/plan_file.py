"""Plans that a user gives: read from a file or a value, and checked against the network.

`plan.json` is meant to be edited. Only its assignment is read back, one spec a layer; what the plan
costs is computed anew. Whatever does not fit the network is refused with the line it stands in, so
that a plan never becomes another one without a word.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantforge.errors import InputError
from quantforge.files import parse_json
from quantforge.format.manifest import KEPT
from quantforge.search.config import SearchConfig
from quantforge.types import PER_TENSOR, BitPlan, LayerInfo, QuantSpec

_FIELDS = (
    "assignment", "budget", "stored_bits", "code_bits", "predicted_loss", "solver", "fixed", "gap",
)  # fmt: skip

GivenPlan = str | Path | BitPlan | Mapping[str, Any]


def read_assignment(
    plan: GivenPlan,
    layers: Sequence[LayerInfo],
    *,
    independent: bool,
) -> dict[str, QuantSpec | None]:
    """The assignment of a plan that a user gives, checked against the network.

    Args:
        plan: a `plan.json`, the document of `quantforge plan --json`, their contents, a plan, or
            layer name → spec ("3b-g64", "kept").
        layers: of the network, in forward order; what is outside the blocks may be left out.
        independent: let layers that servers fuse have different specs.

    Returns:
        Every layer's spec, in forward order; None where it is kept. Of what is outside the blocks,
        what the plan names.

    Raises:
        InputError: the file cannot be read, a layer is unknown or missing, a spec is unknown or
            does not divide the layer's rows, or fused layers differ. Names the first line at fault.
    """
    if isinstance(plan, BitPlan):
        place, written = _Place("the plan"), dict(plan.assignment)
    elif isinstance(plan, Mapping):
        place = _Place("the plan")
        written = _assignment(plan, place.file)
    else:
        text, document = _read(Path(plan))
        place = _Place(str(plan), text)
        written = _assignment(document, place.file)
    fault = next(_faults(written, layers, place, independent), None)
    if fault is not None:
        raise InputError(fault)
    return {one.name: _spec(written[one.name]) for one in layers if one.name in written}


def require_grids(
    given: Mapping[str, QuantSpec | None], layers: Sequence[LayerInfo], config: SearchConfig
) -> None:
    """Blocks have the kind of grid that the recipe, whose other options fit it, is about.

    Args:
        given: the assignment.
        layers: of the network.
        config: says which.

    Raises:
        InputError: a layer has another, or one scale in all where rows are fitted one by one.
    """
    for layer in layers:
        spec = given.get(layer.name)
        if spec is None or layer.outside:
            continue
        if spec.grid != config.grid:
            raise InputError(
                f"{layer.name} is {spec}, but search.grid is {config.grid}: the quantized layers "
                f"of the blocks have one kind of grid; set search.grid={spec.grid}"
            )
        if spec.group_size == PER_TENSOR and PER_TENSOR not in config.group_sizes:
            raise InputError(
                f"{layer.name} is {spec}: one scale a matrix needs search.group_sizes=[0]"
            )


def read_fixed(plan: GivenPlan) -> tuple[str, ...]:
    """Layers whose spec a plan says was given beforehand, see `BitPlan.fixed`.

    Raises:
        InputError: the file cannot be read, or names no list of layers.
    """
    if isinstance(plan, BitPlan):
        return plan.fixed
    document = plan if isinstance(plan, Mapping) else _read(Path(plan))[1]
    if isinstance(document.get("plan"), Mapping):
        document = document["plan"]
    fixed = document.get("fixed", ()) if "assignment" in document else ()
    if not isinstance(fixed, list | tuple) or not all(isinstance(name, str) for name in fixed):
        raise InputError("the plan's 'fixed' must be a list of layer names")
    return tuple(fixed)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text and the JSON object in it; no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path} has {key!r} twice; leave one")
            found[key] = value
        return found

    try:
        text = path.read_text(encoding="utf-8")
        document = parse_json(text, object_pairs_hook=unique)
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {error.strerror}") from error
    except ValueError as error:  # bad UTF-8, bad JSON
        raise InputError(f"the plan {path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no plan: it is no JSON object")
    return text, document


class _Place:
    """Where a layer stands in a file, for messages."""

    def __init__(self, file: str, text: str = "") -> None:
        self.file, self._lines = file, text.splitlines()

    def of(self, name: str) -> str:
        """The file and, where it can be found, the line that names the layer."""
        quoted = json.dumps(name, ensure_ascii=False)
        found = (n for n, line in enumerate(self._lines, start=1) if f"{quoted}:" in line)
        line = next(found, None)
        return self.file if line is None else f"{self.file}, line {line}"


def _assignment(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Layer name → spec as written, from any of the documents that hold a plan."""
    if isinstance(document.get("plan"), Mapping):  # what `plan --json` prints
        document = document["plan"]
    if "assignment" not in document:
        if document and all(isinstance(v, str | QuantSpec | None) for v in document.values()):
            return dict(document)
        raise InputError(f"{where} holds no plan: it has no assignment of specs to layers")
    unknown = [key for key in document if key not in _FIELDS]
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    assignment = document["assignment"]
    if not isinstance(assignment, Mapping):
        raise InputError(f"{where}: assignment must map layer names to specs")
    return dict(assignment)


def _faults(
    written: Mapping[str, Any], layers: Sequence[LayerInfo], place: _Place, independent: bool
) -> Iterator[str]:
    """What is wrong with a plan, line by line."""
    known = {layer.name: layer for layer in layers}
    groups: dict[str, tuple[str, QuantSpec | None]] = {}
    for name, text in written.items():
        layer = known.get(name)
        if layer is None:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"its first is {layers[0].name}"
            yield f"{place.of(name)}: the model has no layer {name!r}; {hint}"
            continue
        try:
            spec = _spec(text)
        except ValueError as error:
            yield f"{place.of(name)}: {name}: {error}, or 'kept' for 16 bits"
            continue
        if spec is not None and not spec.divides(layer.in_features):
            yield (
                f"{place.of(name)}: {name}: {spec} does not divide rows of {layer.in_features}; "
                f"give another group size, or {spec.bits}b-pc"
            )
        first, other = groups.setdefault(layer.fused_group, (name, spec))
        if other != spec and not independent:
            yield (
                f"{place.of(name)}: {name} is {spec or KEPT}, but {first} is {other or KEPT}: "
                "servers fuse them, give both one spec or set search.independent=true"
            )
    for layer in layers:
        if layer.name not in written and not layer.outside:
            yield f"{place.file}: says nothing about {layer.name}; write 'kept' for 16 bits"


def _spec(text: Any) -> QuantSpec | None:
    if text is None or text == KEPT:
        return None
    return text if isinstance(text, QuantSpec) else QuantSpec.parse(str(text))
