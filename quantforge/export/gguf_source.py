"""Whether a checkpoint is the network that its configuration describes, before it becomes a GGUF.

GGUF stores hyperparameters beside the tensors and llama.cpp believes both, so a folder whose parts
disagree would become a file that no program loads, or that computes something else. The network is
therefore built from the configuration without memory for its weights (on torch's meta device), and
what is stored has to have its names and shapes, all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantforge.errors import InputError
from quantforge.export.gguf_network import (
    GGUF_ARCHITECTURES,
    GgufArchitecture,
    gguf_architecture,
    require_numbers,
    tensor_names,
)
from quantforge.export.gguf_tokenizer import read_tokenizer
from quantforge.foreign import malformed
from quantforge.format.checkpoint import CONFIG_NAME, Checkpoint, TensorReader, read_shape
from quantforge.models.sizes import require_plausible
from quantforge.silence import quiet

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufNetwork:
    """A checkpoint's network as GGUF knows it.

    Attributes:
        config: transformers' configuration.
        architecture: llama.cpp's.
        names: weight or bias of the checkpoint → name in GGUF.
    """

    config: Any
    architecture: GgufArchitecture
    names: Mapping[str, str]


def read_network(opened: Checkpoint) -> GgufNetwork:
    """The network of a checkpoint; of its tensors only the shapes of packed ones are loaded.

    Raises:
        InputError: GGUF has no form for it, or the tensors are not those of its configuration.
    """
    require_plausible(
        opened.config,
        tensors=len(opened.entries),
        stored_bytes=sum(entry.size_bytes for entry in opened.entries.values()),
        where=f"{opened.folder / CONFIG_NAME}",
    )
    config, architecture = _described(opened.config, f"{opened.folder / CONFIG_NAME}")
    stored = _stored_shapes(opened)
    _require_same(opened.folder, stored, _expected_shapes(opened, config))
    names = tensor_names(architecture, config, stored)
    return GgufNetwork(config=config, architecture=architecture, names=names)


def checkpoint_problems(opened: Checkpoint) -> list[str]:
    """Why a finished folder is not written as GGUF, at most one line."""
    try:
        network = read_network(opened)
        read_tokenizer(opened.folder, network.config.vocab_size)
    except InputError as error:
        return [str(error)]
    return []


def described_problems(described: Mapping[str, Any], folder: Path | None) -> list[str]:
    """Why no plan of a float network is written as GGUF, at most one line.

    Args:
        described: its configuration, as in its config.json, of a network that was built.
        folder: with its tokenizer; None where there is none.
    """
    try:
        config, _ = _described(described, "the network")
        if folder is not None:
            read_tokenizer(folder, config.vocab_size)
    except InputError as error:
        return [str(error)]
    return []


def _described(described: Mapping[str, Any], where: str) -> tuple[Any, GgufArchitecture]:
    """Transformers' configuration and llama.cpp's architecture."""
    classes = described.get("architectures")
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
        raise InputError(f"{where}: architectures must be a list of model classes")
    if classes[0] not in GGUF_ARCHITECTURES:  # whose configuration may be unknown too
        known = ", ".join(GGUF_ARCHITECTURES)
        raise InputError(f"{classes[0]} is not written as GGUF; known model classes: {known}")
    config = _network_config(described, where)
    architecture = gguf_architecture(config)
    require_numbers(config, where)
    return config, architecture


def _network_config(described: Mapping[str, Any], where: str) -> Any:
    """The float network's configuration in transformers."""
    from transformers import AutoConfig

    fields = {key: value for key, value in described.items() if key != "quantization_config"}
    kind = fields.pop("model_type", None)
    auto: Any = AutoConfig
    with malformed(f"{where} describes no network that is known"), quiet():
        return auto.for_model(kind, **fields)


def _stored_shapes(opened: Checkpoint) -> dict[str, Shape]:
    """Shape of every weight and bias in the order of the files; a packed one has the weight's."""
    specs, reader = opened.specs(), TensorReader()
    parts = {entry.name: name for name in specs for entry in opened.layer_entries(name).values()}
    found: dict[str, Shape] = {}
    for stored, entry in opened.entries.items():
        layer = parts.get(stored)
        name = stored if layer is None else f"{layer}.weight"
        if layer is None and stored.removesuffix(".weight") in specs:
            raise InputError(f"{opened.folder} holds {stored} beside its packed form")
        if name not in found:
            found[name] = (
                tuple(entry.shape)
                if layer is None
                else read_shape(opened, layer, specs[layer], reader)
            )
    return found


def _expected_shapes(opened: Checkpoint, config: Any) -> dict[str, Shape]:
    """Shape of every weight and bias of the network that the configuration makes."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    where = opened.folder / CONFIG_NAME
    with malformed(f"{where} makes no network"), quiet(), torch.device("meta"):
        network = auto.from_config(config)
    made = type(network).__name__
    if made != config.architectures[0]:
        raise InputError(f"{where} says {config.architectures[0]}, and makes a {made}")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _require_same(folder: Path, stored: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Refuse the first tensor that is missing, too many or of another shape."""
    for name, wanted in expected.items():
        if name not in stored:
            raise InputError(f"{folder} lacks {name}, by its configuration {_sides(wanted)}")
        if stored[name] != wanted:
            raise InputError(
                f"{folder}: {name} is {_sides(stored[name])}, by its configuration {_sides(wanted)}"
            )
    for name, shape in stored.items():
        if name not in expected:
            raise InputError(
                f"{folder} holds {name}, {_sides(shape)}, which its configuration has not"
            )


def _sides(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a number"
