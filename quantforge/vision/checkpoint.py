"""A quantized convolutional network as a folder, and back.

`graph.json` is the canonical graph with layers, specs, sites, grids and preprocessing
(`graph_file`), `model.safetensors` the numbers: of a quantized layer `P` the codes packed at their
bits `P.codes`, `P.scale`, where it is asymmetric `P.zero`, and `P.bias`; of a kept one `P.weight`
and `P.bias`; and constants by their names. `quantforge.json` has the hash of every tensor and of
the graph. The folder appears as a whole or not at all, and the same network gives the same bytes.
Reading checks everything before it is used, and runs nothing that a file names but the operators
allowed.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quantforge_kernels.layout import LAYOUT_VERSION, packed_words
from torch import Tensor, nn

from quantforge.errors import InputError, UsageError
from quantforge.files import parse_json, sha256_file, write_json
from quantforge.format.container import (
    DTYPE_NAMES,
    ContainerWriter,
    TensorEntry,
    read_header,
    read_tensor,
    tensor_digest,
)
from quantforge.format.manifest import MANIFEST_NAME, tool_versions
from quantforge.format.store import weight_from, weight_tensors
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec
from quantforge.vision.classifier_folder import FILTERS
from quantforge.vision.graph_file import (
    graph_from_json,
    layer_from_json,
    layer_to_json,
    node_to_json,
    root_of,
    shapes_of,
)
from quantforge.vision.network import (
    ActivationGrid,
    Block,
    Preprocessing,
    QuantizedNetwork,
    Site,
    VisionNetwork,
    weight_matrix,
)
from quantforge.vision.runtime import VisionRuntime

FORMAT_VERSION = 1
KIND = "vision"
GRAPH_NAME = "graph.json"
TENSORS_NAME = "model.safetensors"
_LONGEST_GRAPH = 64_000_000  # bytes
_LARGEST_SIDE = 8192
_SCALES = (torch.bfloat16, torch.float16)
_CONSTANTS = (
    torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
)  # fmt: skip
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


def save_vision(quantized: QuantizedNetwork, folder: Path) -> int:
    """Write a network; `folder` appears when all of it is there.

    Returns:
        Bytes of the file of weights.

    Raises:
        UsageError: the folder exists, or the network has something that cannot be saved.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists; give the name of a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        size = write_vision(quantized, staging)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return size


def write_vision(quantized: QuantizedNetwork, folder: Path) -> int:
    """Write a network into a folder that is there and nobody reads yet, and read it back.

    Returns:
        Bytes of the file of weights.

    Raises:
        UsageError: the network has something that cannot be saved, or that is not read again.
    """
    text, tensors = _described(quantized), _tensors(quantized)
    write_json(folder / GRAPH_NAME, text)
    stored = {}
    with ContainerWriter(folder / TENSORS_NAME) as writer:
        for name, tensor in tensors.items():
            digest = writer.add(name, tensor)
            shape, dtype = list(tensor.shape), DTYPE_NAMES[tensor.dtype]
            stored[name] = {"dtype": dtype, "shape": shape, "sha256": digest}
    manifest = {
        "format_version": FORMAT_VERSION,
        "layout_version": LAYOUT_VERSION,
        "kind": KIND,
        "versions": tool_versions(),
        "files": {GRAPH_NAME: sha256_file(folder / GRAPH_NAME)},
        "tensors": stored,
    }
    write_json(folder / MANIFEST_NAME, manifest)
    try:
        load_network(folder)
    except InputError as error:
        reason = str(error).replace(f"{folder}/", "")
        raise UsageError(
            f"{quantized.network.name} cannot be saved, what was written does not read back: "
            f"{reason}"
        ) from error
    return (folder / TENSORS_NAME).stat().st_size


def _described(quantized: QuantizedNetwork) -> dict[str, Any]:
    """The contents of graph.json."""
    network = quantized.network
    graph = network.graph
    return {
        "format_version": FORMAT_VERSION,
        "name": network.name,
        "fingerprint": network.fingerprint,
        "channels": network.channels,
        "preprocessing": asdict(network.preprocessing),
        "nodes": [node_to_json(node) for node in graph.graph.nodes],
        "layers": [
            {
                "name": info.name,
                **layer_to_json(network.layer(info.name)),
                "spec": str(quantized.weights[info.name].spec)
                if info.name in quantized.weights
                else None,
                "block": info.block, "stage": info.stage, "fused_group": info.fused_group,
                "reads": network.reads[info.name],
            }
            for info in network.layers
        ],
        "blocks": [asdict(block) for block in network.blocks],
        "sites": [asdict(site) for site in network.sites],
        "grids": {name: asdict(grid) for name, grid in quantized.grids.items()},
    }  # fmt: skip


def _tensors(quantized: QuantizedNetwork) -> dict[str, Tensor]:
    network, tensors = quantized.network, dict[str, Tensor]()
    for info in network.layers:
        weight = quantized.weights.get(info.name)
        if weight is None:
            layer = network.layer(info.name)
            tensors[f"{info.name}.weight"] = layer.weight.detach()
            tensors[f"{info.name}.bias"] = layer.bias.detach()
            continue
        if weight.spec.grid != "uniform":
            raise UsageError(f"{info.name} is {weight.spec}, which is not saved for vision")
        tensors |= weight_tensors(weight, info.name)
        tensors[f"{info.name}.bias"] = quantized.biases[info.name].detach().float()
    for node in network.graph.graph.nodes:
        if node.op == "get_attr":
            held: Any = network.graph
            for part in str(node.target).split("."):
                held = getattr(held, part)
            tensors[str(node.target)] = held.detach()
    return tensors


def load_vision(
    folder: str | Path, *, dyadic: bool = False, native_code: bool = True
) -> VisionRuntime:
    """The network of a folder, ready to run; see `VisionRuntime` for the options.

    Raises:
        InputError: the folder is not what it claims to be.
    """
    return VisionRuntime(load_network(folder), dyadic=dyadic, native_code=native_code)


def load_network(folder: str | Path) -> QuantizedNetwork:
    """The network of a folder; layers that are quantized have no float weight.

    Raises:
        InputError: the folder is not what it claims to be.
    """
    folder = Path(folder)
    manifest = _read_json(folder / MANIFEST_NAME)
    path = folder / GRAPH_NAME
    try:
        if (manifest["format_version"], manifest["kind"]) != (FORMAT_VERSION, KIND):
            raise ValueError(f"it is no vision network of format {FORMAT_VERSION}")
        if manifest["layout_version"] != LAYOUT_VERSION:
            raise ValueError(f"its codes are not in layout {LAYOUT_VERSION}")
        promised, digest = dict(manifest["tensors"]), manifest["files"][GRAPH_NAME]
    except _DAMAGE as error:
        raise _damaged(folder / MANIFEST_NAME, error) from error
    text = _read_json(path)
    if sha256_file(path) != digest:
        raise InputError(f"{path} is not what {MANIFEST_NAME} says; fetch or write it again")
    entries = read_header(folder / TENSORS_NAME)
    try:
        return _network(text, _Tensors(entries, promised))
    except _DAMAGE as error:
        raise _damaged(path, error) from error


class _Tensors:
    """The tensors of a folder, each read once, of the shape that is asked for and no other."""

    def __init__(self, entries: Mapping[str, TensorEntry], promised: Mapping[str, Any]) -> None:
        if set(entries) != set(promised):
            name = sorted(set(entries) ^ set(promised))[0]
            raise ValueError(f"the tensor {name!r} is in one of {TENSORS_NAME} and {MANIFEST_NAME}")
        self._entries, self._promised = dict(entries), promised

    def take(
        self, name: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
    ) -> Tensor:
        """A tensor; none is taken twice."""
        entry = self._entries.pop(name, None)
        if entry is None:
            raise ValueError(f"the tensor {name!r} is missing")
        if entry.dtype not in dtypes or (shape is not None and entry.shape != shape):
            raise ValueError(f"{name!r} is {entry.dtype} {entry.shape}, not {dtypes[0]} {shape}")
        tensor = read_tensor(entry)
        if tensor_digest(tensor) != self._promised[name]["sha256"]:
            raise ValueError(f"the tensor {name!r} does not have its hash")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the tensor {name!r} has numbers that are not finite")
        return tensor

    @property
    def left(self) -> list[str]:
        """Names of those nobody took."""
        return sorted(self._entries)


def _network(text: Mapping[str, Any], tensors: _Tensors) -> QuantizedNetwork:
    fields = {
        "format_version", "name", "fingerprint", "channels", "preprocessing", "nodes", "layers",
        "blocks", "sites", "grids",
    }  # fmt: skip
    if set(text) != fields or text["format_version"] != FORMAT_VERSION:
        raise ValueError(f"it does not have the fields {sorted(fields)}")
    layers, weights, biases = (
        dict[str, nn.Module](),
        dict[str, QuantizedWeight](),
        dict[str, Tensor](),
    )
    infos, reads = [], {}
    for row in text["layers"]:
        info, read, weight, bias, layer = _layer(dict(row), tensors)
        name = info.name
        infos.append(info)
        reads[name], layers[name] = read, layer
        if weight is not None:
            weights[name], biases[name] = weight, bias
    wanted = [row["target"] for row in text["nodes"] if row["op"] == "get_attr"]
    constants = {name: tensors.take(name, None, _CONSTANTS) for name in dict.fromkeys(wanted)}
    if tensors.left:
        raise ValueError(f"the tensor {tensors.left[0]!r} belongs to nothing")
    graph = graph_from_json(text["nodes"], root_of(layers, constants))
    known = {node.name for node in graph.graph.nodes}
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    if called != set(layers):
        raise ValueError("its graph does not call every layer")
    preprocessing = _preprocessing(text["preprocessing"])
    channels = _whole(text["channels"], 1, 1 << 12)
    shapes_of(graph, channels, preprocessing.size)
    sites = tuple(
        Site(node=_name(row["node"], known), grid=_text(row["grid"])) for row in text["sites"]
    )
    grids = {_text(name): _grid(row) for name, row in text["grids"].items()}
    if not set(grids) <= {site.grid for site in sites} or set(reads.values()) - known:
        raise ValueError("a grid belongs to no site, or a layer reads no node")
    blocks = tuple(
        Block(
            name=_text(row["name"]), source=_name(row["source"], known),
            result=_name(row["result"], known),
            layers=tuple(_name(one, layers) for one in row["layers"]),
        )
        for row in text["blocks"]
    )  # fmt: skip
    network = VisionNetwork(
        graph=graph, name=_text(text["name"]), layers=tuple(infos), reads=reads, sites=sites,
        blocks=blocks, channels=channels, preprocessing=preprocessing,
        fingerprint=_text(text["fingerprint"]),
    )  # fmt: skip
    return QuantizedNetwork(network=network, weights=weights, biases=biases, grids=grids)


def _layer(
    row: dict[str, Any], tensors: _Tensors
) -> tuple[LayerInfo, str, QuantizedWeight | None, Tensor, nn.Module]:
    name = _text(row.pop("name"))
    spec_text, block, stage = row.pop("spec"), row.pop("block"), row.pop("stage")
    fused, read = _text(row.pop("fused_group")), _text(row.pop("reads"))
    layer: Any = layer_from_json(name, row)
    out, columns = weight_matrix(layer).shape
    info = LayerInfo(
        name=name, kind="linear" if row["kind"] == "Linear" else "convolution", out_features=out,
        in_features=columns, block=_whole(block, -1, 1 << 20), stage=_whole(stage, 0, 1 << 20),
        fused_group=fused,
    )  # fmt: skip
    bias = tensors.take(f"{name}.bias", (out,), (torch.float32,))
    if spec_text is None:
        kept = tensors.take(f"{name}.weight", tuple(layer.weight.shape), (torch.float32,))
        layer.weight, layer.bias = (nn.Parameter(one, False) for one in (kept, bias))
        return info, read, None, bias, layer
    spec = QuantSpec.parse(_text(spec_text))
    if spec.grid != "uniform":
        raise ValueError(f"{name} is {spec}, which is none of a vision network")
    groups = spec.groups(columns)
    own = {
        f"{name}.codes": ((out, packed_words(columns, spec.bits)), (torch.int32,)),
        f"{name}.scale": ((out, groups), _SCALES),
        f"{name}.zero": ((out, groups), (torch.uint8,)),
    }
    weight = weight_from(lambda one: tensors.take(one, *own[one]), name, spec, columns, "cpu")
    if weight.zero is not None and int(weight.zero.max()) > spec.top:
        raise ValueError(f"{name} has a zero-point that is none of its codes")
    return info, read, weight, bias, layer


def _grid(row: Mapping[str, Any]) -> ActivationGrid:
    if set(row) != {"bits", "scale", "zero"}:
        raise ValueError("a grid does not have the fields bits, scale, zero")
    scale = row["scale"]
    if not isinstance(scale, float) or not 1e-30 < scale < 1e30:
        raise ValueError(f"a grid has the scale {str(scale)[:40]}")
    return ActivationGrid(
        bits=_whole(row["bits"], 2, 8), scale=scale, zero=_whole(row["zero"], 0, 255)
    )


def _preprocessing(row: Mapping[str, Any]) -> Preprocessing:
    names = {"size", "mean", "deviation", "crop", "interpolation"}
    if set(row) != names or row["interpolation"] not in FILTERS.values():
        raise ValueError("its preprocessing is none")
    height, width = (_whole(one, 1, _LARGEST_SIDE) for one in row["size"])
    mean, deviation, crop = (
        tuple(float(one) for one in ones) for ones in (row["mean"], row["deviation"], [row["crop"]])
    )
    if not all(map(math.isfinite, (*mean, *deviation, *crop))) or len(mean) != len(deviation):
        raise ValueError("its preprocessing has numbers that are not finite")
    return Preprocessing(
        size=(height, width), mean=mean, deviation=deviation, crop=crop[0],
        interpolation=row["interpolation"],
    )  # fmt: skip


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]!r} is no whole number in {least}..{most}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value


def _name(value: Any, known: Any) -> str:
    if _text(value) not in known:
        raise ValueError(f"{value!r} is not in its graph")
    return str(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LONGEST_GRAPH:
            raise InputError(f"{path} is longer than {_LONGEST_GRAPH} bytes; it is no network")
        found = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it is no JSON object; fetch or write it again")
    return found


def _damaged(path: Path, error: Exception) -> InputError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return InputError(f"{path} is damaged: {reason}; fetch or write it again")
