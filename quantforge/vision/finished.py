"""Looking at a finished convolutional network's folder: measure, list, check, write as ONNX.

The float reference is what the folder's `recipe.yaml` names, or another that the caller gives;
pictures are prepared as the folder says, for both networks alike.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import strict_yaml
from quantforge.errors import InputError, UsageError
from quantforge.files import parse_json
from quantforge.format.container import read_header
from quantforge.format.manifest import KEPT, MANIFEST_NAME, tool_versions
from quantforge.outcomes import ConvertReport
from quantforge.progress import Monitor
from quantforge.recipe import resolve_target
from quantforge.vision.checkpoint import (
    FORMAT_VERSION,
    GRAPH_NAME,
    KIND,
    TENSORS_NAME,
    load_network,
)
from quantforge.vision.entry import takes
from quantforge.vision.network import QuantizedNetwork
from quantforge.vision.onnx_export import onnx_model
from quantforge.vision.outcome import (
    StoredLayer,
    VisionCheck,
    VisionDifference,
    VisionEvaluation,
    VisionInspection,
)
from quantforge.vision.pictures import INSTEAD, Pictures, load_pictures
from quantforge.vision.quality import Network, VisionQuality, compare
from quantforge.vision.recipe import compose
from quantforge.vision.runtime import VisionRuntime
from quantforge.vision.sites import layer_grids
from quantforge.vision.sources import SYNTHETIC, Opened, open_memory, open_source
from quantforge.vision.synthesis import synthesise
from quantforge.workspace import staging_file

Reference = str | Path | nn.Module
RECIPE_NAME = "recipe.yaml"
SERVED = 512  # pictures that are measured where nobody says how many
MADE = 32  # of those that have to be made first
BATCH = 16
_FLOAT_BITS = 32
# Of the pictures made for a measurement: none that a calibration is likely to have.
_SEED = 0x5EED


def is_vision_folder(folder: str | Path) -> bool:
    """Whether a folder says that it holds one of these networks: its manifest's `kind`.

    Where there is no manifest that can be read, a graph beside it says so.
    """
    folder = Path(folder)
    try:
        found = parse_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return (folder / GRAPH_NAME).is_file()
    return isinstance(found, dict) and found.get("kind") == KIND


def evaluate_folder(
    folder: str | Path,
    *,
    reference: Reference | None = None,
    pictures: str | Path | None = None,
    match: str = "*",
    count: int | None = None,
    against: str | Path | None = None,
    monitor: Monitor | None = None,
) -> VisionEvaluation:
    """Compare a folder's packed network with its float reference on pictures.

    Args:
        folder: written by `quantize`.
        reference: recipe, folder or module of the float network; None takes the one that the
            folder's recipe names.
        pictures: what `vision.pictures` reads, or "synthetic", the default: made from the
            reference's BatchNorm statistics.
        match: pattern of file names, in a folder or an archive.
        count: most pictures; None takes up to 512 that are given, 32 that are made.
        against: a second folder, compared on the same pictures.
        monitor: progress and cancellation.

    Raises:
        InputError: a folder, reference or picture is missing, broken or does not fit.
        UsageError: the reference is no convolutional network, or nobody names one.
    """
    monitor = monitor or Monitor()
    folder = Path(folder)
    quantized = load_network(folder)
    opened = _reference(folder, quantized, reference, monitor)
    _require_alike(folder, quantized, opened)
    given = _pictures(quantized, opened, pictures, match, count, monitor)
    expected = _logits(opened.network.graph, given.inputs, "reference", monitor)
    given = given.of_classes(expected.shape[1])

    def measured(path: Path, network: QuantizedNetwork) -> VisionQuality:
        logits = _logits(VisionRuntime(network), given.inputs, f"evaluate {path}", monitor)
        if logits.shape != expected.shape:
            raise InputError(
                f"{path} has {logits.shape[-1]} classes, {opened.description} has "
                f"{expected.shape[-1]}: give the --reference it was made from"
            )
        return compare(logits, expected, pictures=given.description, labels=given.labels)

    quality, other = measured(folder, quantized), None
    if against is not None:
        second = load_network(against)
        if second.network.preprocessing != quantized.network.preprocessing:
            raise InputError(f"{against} prepares pictures otherwise than {folder}")
        other = measured(Path(against), second)
    return VisionEvaluation(
        model=str(folder),
        reference=opened.description,
        quality=quality,
        weight_bytes=(folder / TENSORS_NAME).stat().st_size,
        float_bytes=_float_bytes(quantized),
        against="" if against is None else str(against),
        against_quality=other,
        difference=None if other is None else _paired(quality, other),
        versions=tool_versions(),
        warnings=tuple(_warnings(folder, quantized, opened, pictures, len(given))),
    )


def inspect_folder(folder: str | Path) -> VisionInspection:
    """What a folder holds, from its files alone.

    Raises:
        InputError: the folder is not what it claims to be.
    """
    folder = Path(folder)
    quantized = load_network(folder)
    network = quantized.network
    sizes = {name: one.size_bytes for name, one in read_header(folder / TENSORS_NAME).items()}
    read = layer_grids(network)
    widths = {name: grid.bits for name, grid in quantized.grids.items()}
    rows, stored, code, planned = [], 0.0, 0.0, 0
    for info in network.layers:
        weight = quantized.weights.get(info.name)
        if weight is None:
            spec, bits, group, own = KEPT, _FLOAT_BITS, info.in_features, float(_FLOAT_BITS)
        else:
            spec, bits = str(weight.spec), weight.spec.bits
            group = info.in_features // weight.spec.groups(info.in_features)
            whole = weight.spec.stored_bits(info.out_features, info.in_features)
            own = float(whole) / info.numel
            stored, code = stored + float(whole), code + bits * info.numel
            planned += info.numel
        parts = (f"{info.name}.{part}" for part in ("codes", "scale", "zero", "weight", "bias"))
        rows.append(
            StoredLayer(
                name=info.name, kind=info.kind, spec=spec, bits=bits, group=group,
                activation_bits=widths.get(read[info.name]), weights=info.numel,
                stored_bits=own, size_bytes=sum(sizes.get(part, 0) for part in parts),
            )
        )  # fmt: skip
    manifest = _said(folder / MANIFEST_NAME)
    return VisionInspection(
        path=str(folder),
        model=network.name,
        format=f"quantforge vision {FORMAT_VERSION}",
        budget=str(_said(folder / "plan.json").get("budget", "")),
        input_size=(network.channels, *network.preprocessing.size),
        layers=tuple(rows),
        stored_bits=stored / max(planned, 1),
        code_bits=code / max(planned, 1),
        weight_bytes=(folder / TENSORS_NAME).stat().st_size,
        float_bytes=_float_bytes(quantized),
        rounded=sum(site.grid in quantized.grids for site in network.sites),
        versions={str(k): str(v) for k, v in dict(manifest.get("versions") or {}).items()},
    )


def check_folder(folder: str | Path) -> VisionCheck:
    """Whether a folder is whole, from its files alone; no server is asked."""
    covers = (
        "every tensor's presence, shape, type and hash, the graph and the grids; no server's rules"
    )
    try:
        quantized, problems = load_network(folder), ()
        tensors = len(read_header(Path(folder) / TENSORS_NAME))
    except InputError as error:
        return VisionCheck(
            path=str(folder), covers=covers, loads=False, problems=(str(error),), quantized=0,
            kept=0, tensors=0,
        )  # fmt: skip
    return VisionCheck(
        path=str(folder),
        covers=covers,
        loads=True,
        problems=problems,
        quantized=len(quantized.weights),
        kept=len(quantized.network.layers) - len(quantized.weights),
        tensors=tensors,
    )


def convert_folder(
    folder: str | Path, *, output: str | Path, force: bool = False, monitor: Monitor | None = None
) -> ConvertReport:
    """Write a folder's network as an .onnx file.

    Raises:
        InputError: the folder is not what it claims to be.
        UsageError: the output may not be written, or an operator has no ONNX counterpart here.
        ResourceError: the package `onnx` is not installed.
    """
    monitor = monitor or Monitor()
    with staging_file(Path(output), force=force, suffix=".onnx") as temporary:
        quantized = load_network(folder)
        monitor.step("convert", 0, 2)
        model = onnx_model(quantized)
        monitor.step("convert", 1, 2)
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        size = temporary.stat().st_size
        monitor.step("convert", 2, 2)
    specs = sorted({str(one.spec) for one in quantized.weights.values()})
    return ConvertReport(
        source=str(folder),
        output=str(output),
        layout="onnx",
        spec=", ".join(specs) or KEPT,
        layers=len(quantized.weights),
        size_bytes=size,
        source_bytes=(Path(folder) / TENSORS_NAME).stat().st_size,
    )


def _reference(
    folder: Path, quantized: QuantizedNetwork, reference: Reference | None, monitor: Monitor
) -> Opened:
    """The float network of a folder, or the one that is given."""
    if isinstance(reference, nn.Module):
        network = quantized.network
        example = torch.zeros(1, network.channels, *network.preprocessing.size)
        return open_memory(reference, example, operands=False)
    if reference is None:
        path = folder / RECIPE_NAME
        if not path.is_file():
            raise InputError(f"{folder} does not say which model it came from; give --reference")
        if strict_yaml.read_mapping(path).get("model") is None:
            raise InputError(f"{folder} was made from a network in memory; give --reference")
        target = resolve_target(path)
    else:
        if not takes(reference):
            raise UsageError(
                f"--reference {reference} is no convolutional network, {folder} is one: give the "
                "recipe or the folder it was made from"
            )
        target = resolve_target(reference)
    return open_source(compose(target), target, monitor=monitor)


def _require_alike(folder: Path, quantized: QuantizedNetwork, opened: Opened) -> None:
    ours, theirs = quantized.network, opened.network
    if ours.channels != theirs.channels:
        raise InputError(
            f"{folder} reads pictures of {ours.channels} channels, {opened.description} of "
            f"{theirs.channels}: give the --reference it was made from"
        )


def _pictures(
    quantized: QuantizedNetwork, opened: Opened, source: str | Path | None, match: str,
    count: int | None, monitor: Monitor,
) -> Pictures:  # fmt: skip
    """What is measured on."""
    network = quantized.network
    if source is None or str(source) == SYNTHETIC:
        made = synthesise(opened.network, count or MADE, seed=_SEED, monitor=monitor)
        words = f"{made.description} (give --pictures {INSTEAD} for real ones)"
        return Pictures(inputs=made.inputs, labels=made.labels, description=words)
    found = load_pictures(
        source, network.preprocessing, channels=network.channels, count=count or SERVED,
        match=match,
    )  # fmt: skip
    return Pictures(
        inputs=found.inputs,
        labels=found.labels,
        description=f"{len(found)} pictures of {found.description}",
    )


@torch.no_grad()
def _logits(network: Network, pictures: Tensor, stage: str, monitor: Monitor) -> Tensor:
    """[n, classes], batch by batch."""
    made = []
    for part in torch.split(pictures, BATCH):
        made.append(network(part).float())
        monitor.step(stage, sum(map(len, made)), len(pictures))
    return torch.cat(made)


def _paired(first: VisionQuality, second: VisionQuality) -> VisionDifference:
    gaps = [a - b for a, b in zip(first.picture_kl, second.picture_kl, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    return VisionDifference(
        kl=statistics.fmean(gaps),
        kl_stderr=error,
        agreement=first.agreement - second.agreement,
    )


def _float_bytes(quantized: QuantizedNetwork) -> int:
    """Of weights and biases in float32."""
    return sum(4 * (one.numel + one.out_features) for one in quantized.network.layers)


def _warnings(
    folder: Path, quantized: QuantizedNetwork, opened: Opened, pictures: Any, count: int
) -> list[str]:
    said = []
    if quantized.network.fingerprint != opened.network.fingerprint:
        said.append(f"{opened.description} is not the network that {folder} was made from")
    path = folder / RECIPE_NAME
    calibration = strict_yaml.read_mapping(path).get("calibration") if path.is_file() else None
    source = calibration.get("source") if isinstance(calibration, dict) else None
    if pictures is not None and source not in (None, SYNTHETIC) and str(pictures) == source:
        said.append(f"{folder} was calibrated on {source}: other pictures say more")
    if count < MADE // 2:
        said.append(f"only {count} pictures: figures are uncertain")
    return said


def _said(path: Path) -> dict[str, Any]:
    """A JSON object of the folder that nothing depends on; empty where it cannot be read."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
