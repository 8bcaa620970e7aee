"""A finished folder written again in the layout of another program; codes and scales stay.

What a layout cannot hold is refused before anything is written, and every layer that was written is
read back and compared.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantforge.converting_gguf import convert_gguf
from quantforge.errors import InputError, UsageError
from quantforge.export.servers import EMBEDDINGS
from quantforge.export.writer import disk_errors
from quantforge.files import write_json
from quantforge.format import gptq
from quantforge.format.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    TensorReader,
    open_checkpoint,
    read_entries,
    read_layer,
)
from quantforge.format.container import ContainerWriter
from quantforge.format.manifest import tool_versions
from quantforge.load.weights import PICKLED
from quantforge.models import encoder_classes
from quantforge.models.linears import WITHOUT_LINEARS
from quantforge.outcomes import ConvertReport
from quantforge.progress import Monitor, ProgressEvent
from quantforge.types import QuantSpec
from quantforge.workspace import staging

FORMATS = ("gptq", "gguf")
# By which a folder of this layout is known; some readers take it instead of config.json's block.
QUANTIZE_CONFIG = "quantize_config.json"
# What belongs to the checkpoint as it was made, or is written anew; all other files are copied.
_LEFT = frozenset(
    {
        CONFIG_NAME, INDEX_NAME, "plan.json", "quantforge.json", "recipe.yaml", "report.html",
        "run.json", "README.md", "sensitivity.json",
    }
)  # fmt: skip
_IN_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conversion:
    """What is converted.

    Attributes:
        opened: the source.
        specs: its quantized layers.
        version: of the layout.
        monitor: progress and cancellation.
    """

    opened: Checkpoint
    specs: dict[str, QuantSpec]
    version: str
    monitor: Monitor


def convert(
    checkpoint: str | Path,
    *,
    output: str | Path,
    layout: str = "gptq",
    force: bool = False,
    progress: Callable[[ProgressEvent], None] | None = None,
    cancel: threading.Event | None = None,
) -> ConvertReport:
    """Write a quantized folder in another layout.

    Args:
        checkpoint: folder written by `quantize`; for "gptq" with one spec of 4 or 8 bits for all
            linears of its blocks.
        output: folder to write, for "gguf" a .gguf file.
        layout: "gptq", or "gguf" for llama.cpp.
        force: replace an output that an earlier call wrote.
        progress: called after every layer.
        cancel: once set, stops with `CancelledError` and writes nothing.

    Raises:
        InputError: the folder is not a whole quantized checkpoint, or the layout cannot hold it.
        UsageError: an unknown layout, or an output that may not be written.
    """
    if layout not in FORMATS:
        raise UsageError(f"unknown layout {layout!r}; known: {', '.join(FORMATS)}")
    opened, monitor = open_checkpoint(checkpoint), Monitor(progress=progress, cancel=cancel)
    _refuse_levels(opened)
    if layout == "gguf":
        return convert_gguf(
            opened, Path(output), source=str(checkpoint), force=force, monitor=monitor
        )
    _refuse_without_linears(opened)
    specs = opened.specs()
    spec = gptq.only_spec(specs)
    _refuse_other_parts(opened, specs)
    reader = TensorReader()
    version = gptq.layout_for(spec, (read_layer(opened, name, spec, reader) for name in specs))
    job = _Conversion(opened=opened, specs=specs, version=version, monitor=monitor)
    with staging(Path(output), force=force, mark=QUANTIZE_CONFIG) as folder, disk_errors(folder):
        _write_tensors(job, folder)
        block = gptq.quantization_config(spec, version, tool_versions()["quantforge-compiler"])
        write_json(folder / CONFIG_NAME, {**opened.config, "quantization_config": block})
        write_json(folder / QUANTIZE_CONFIG, block)
        for file in sorted(opened.folder.iterdir()):
            if file.is_file() and _belongs(file):
                shutil.copyfile(file, folder / file.name)
        _verify(job, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return ConvertReport(
        source=str(checkpoint),
        output=str(output),
        layout=version,
        spec=str(spec),
        layers=len(specs),
        size_bytes=size,
    )


def _belongs(file: Path) -> bool:
    """Whether a file of the source goes into the output as it is; pickled weights do not."""
    weights = file.suffix == ".safetensors" or any(file.match(pattern) for pattern in PICKLED)
    return file.name not in _LEFT and not weights


def _refuse_levels(opened: Checkpoint) -> None:
    """Other layouts have uniform grids."""
    for name, spec in opened.specs().items():
        if spec.grid != "uniform":
            raise InputError(f"{name} is {spec}: no other layout is written of {spec.grid} weights")


def _refuse_without_linears(opened: Checkpoint) -> None:
    """No reader of the layout was tried where the class has no linears, nor for encoders."""
    classes = opened.config.get("architectures") or [""]
    if classes[0] in WITHOUT_LINEARS:
        raise InputError(
            f"{classes[0]}: {WITHOUT_LINEARS[classes[0]]}, which the GPTQ layout is not written for"
        )
    if classes[0] in encoder_classes():
        raise InputError(f"{classes[0]} is an encoder, which the GPTQ layout is not written for")


def _refuse_other_parts(opened: Checkpoint, specs: dict[str, QuantSpec]) -> None:
    """The layout means every linear of a block and nothing else."""
    for name in specs:
        if name.rpartition(".")[2] in EMBEDDINGS or not _IN_A_BLOCK.search(name):
            raise InputError(f"{name} is quantized, which the GPTQ layout has for blocks alone")
    block: dict[str, Any] = opened.config["quantization_config"]
    ignored = block.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise InputError(f"{opened.folder}: config.json's ignore is no list of layer names")
    for name in ignored:
        if _IN_A_BLOCK.search(name):
            raise InputError(f"{name} is kept in 16 bits; the GPTQ layout takes all linears")


def _write_tensors(job: _Conversion, folder: Path) -> None:
    """Every file of the source becomes one of the same name; then the index, if there are many."""
    opened, specs = job.opened, job.specs
    reader, weight_map, done = TensorReader(), {}, 0
    files = sorted({entry.file for entry in opened.entries.values()})
    for file in files:
        with ContainerWriter(folder / file.name) as container:
            for name in (n for n, entry in opened.entries.items() if entry.file == file):
                layer, _, part = name.rpartition(".")
                if layer not in specs:
                    stored = {name: reader.load(opened.entries[name])}
                elif part == "weight_packed":
                    weight = read_layer(opened, layer, specs[layer], reader)
                    made = gptq.to_tensors(layer, weight, job.version)
                    stored = {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}
                    done += 1
                    job.monitor.step("convert", done, len(specs))
                else:
                    continue
                for key, tensor in stored.items():
                    container.add(key, tensor)
                    weight_map[key] = (file.name, tensor.nbytes)
    if len(files) > 1:
        total = sum(size for _, size in weight_map.values())
        places = {name: file for name, (file, _) in weight_map.items()}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})


def _verify(job: _Conversion, folder: Path) -> None:
    """Read every layer back, as a reader of the layout would, and compare it with the source's."""
    entries, reader, source = read_entries(folder), TensorReader(), TensorReader()
    for index, (name, spec) in enumerate(job.specs.items()):
        suffixes = (gptq.CODES, gptq.SCALES, gptq.ZEROS, gptq.GROUPS)
        stored = {suffix: reader.load(entries[f"{name}.{suffix}"]) for suffix in suffixes}
        found = gptq.from_tensors(stored, spec, job.version)
        meant = read_layer(job.opened, name, spec, source).dequantize()
        if not torch.allclose(found, meant, rtol=2**-8, atol=0):
            raise InputError(f"{name} reads back otherwise than it was written to {folder}")
        job.monitor.step("verify", index + 1, len(job.specs))
