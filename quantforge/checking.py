"""Whether a server loads a finished folder, read from its files alone; the server is not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from quantforge.errors import UsageError
from quantforge.export.gguf_source import checkpoint_problems
from quantforge.export.servers import (
    EMBEDDINGS,
    SERVERS,
    fused_group,
    network_problems,
    violations,
)
from quantforge.format.checkpoint import TensorReader, open_checkpoint, read_shape
from quantforge.outcomes import CheckReport
from quantforge.types import LayerInfo, QuantSpec

# Number of a block in a name.
_BLOCK = re.compile(r"\.(\d+)\.")


def check(checkpoint: str | Path, *, server: str = "vllm", tensor_parallel: int = 1) -> CheckReport:
    """Hold a quantized folder against the rules of a server.

    Args:
        checkpoint: folder in compressed-tensors' `pack-quantized` form.
        server: "transformers", "vllm" or "llama.cpp".
        tensor_parallel: devices that share every layer.

    Raises:
        InputError: the folder is not a whole quantized checkpoint.
        UsageError: an unknown server, or one that shares no layers.
    """
    if server not in SERVERS:
        raise UsageError(f"unknown server {server!r}; known: {', '.join(SERVERS)}")
    rule = SERVERS[server]
    if tensor_parallel < 1 or (tensor_parallel > 1 and not rule.slices):
        raise UsageError(f"{server} with {tensor_parallel} parts: give --tp to vllm, 1 or more")
    opened = open_checkpoint(checkpoint)
    reader = TensorReader()
    tied = bool(opened.config.get("tie_word_embeddings", False))
    layers: list[LayerInfo] = []
    assignment: dict[str, QuantSpec | None] = {}
    for name, spec in opened.specs().items():
        assignment[name] = spec
        layers.append(_layer(name, *read_shape(opened, name, spec, reader), tied=tied))
    for name, entry in opened.entries.items():
        layer = name.removesuffix(".weight")
        if layer != name and len(entry.shape) == 2:
            assignment[layer] = None
            layers.append(_layer(layer, *entry.shape, tied=tied))
    problems = violations(rule, layers, assignment, tensor_parallel)
    if rule.gguf:
        problems += checkpoint_problems(opened)
    else:
        problems += network_problems(rule, opened.config, tensor_parallel)
    return CheckReport(
        path=str(checkpoint),
        server=rule.name,
        tensor_parallel=tensor_parallel,
        loads=not problems,
        problems=tuple(problems),
        quantized=sum(spec is not None for spec in assignment.values()),
        kept=sum(spec is None for spec in assignment.values()),
    )


def _layer(name: str, outputs: int, inputs: int, *, tied: bool) -> LayerInfo:
    """A matrix of a folder; `tied`: its embedding is the head too."""
    kind: Literal["linear", "embedding", "tied"] = "linear"
    if name.rpartition(".")[2] in EMBEDDINGS:
        kind = "tied" if tied else "embedding"
    block = _BLOCK.search(name)
    return LayerInfo(
        name=name,
        kind=kind,
        out_features=int(outputs),
        in_features=int(inputs),
        block=int(block[1]) if block else -1,
        stage=0,
        fused_group=fused_group(name),
    )
