"""Large float networks, read from safetensors into scratch files piece by piece.

transformers maps shards so that the system counts each as memory of the process, and makes a second
tensor of each weight in another dtype. Here a weight is read in pieces into its place in float32,
and transformers gets these tensors to build the network on: what it would read, in the same places.

Mixtures of experts that are stacked in one tensor are put together by transformers in memory, and
are in scratch files only from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.format.container import TensorEntry, read_header, read_pieces
from quantforge.scratch import Scratch, aligned

PIECE_BYTES = 1 << 24


def stored_tensors(files: Iterable[Path]) -> dict[str, TensorEntry] | None:
    """All tensors of some files; None where one is not as it should be, or of a strange dtype."""
    try:
        return {name: one for path in files for name, one in read_header(path).items()}
    except InputError:
        return None


def float_bytes(tensors: Mapping[str, TensorEntry]) -> int:
    """Bytes of the tensors in scratch files."""
    return sum(aligned(one.numel * _loaded(one.dtype).itemsize) for one in tensors.values())


def read_tensors(tensors: Mapping[str, TensorEntry], scratch: Scratch) -> dict[str, Tensor]:
    """The tensors in scratch files, floating ones in float32.

    Raises:
        InputError: a file is shorter than its header says, or cannot be read.
        ResourceError: the scratch files have no room.
    """
    made = {}
    for name, entry in tensors.items():
        made[name] = scratch.empty(entry.shape, _loaded(entry.dtype))
        flat, first = made[name].view(-1), 0
        for piece in read_pieces(entry, PIECE_BYTES):
            flat[first : first + len(piece)] = piece
            first += len(piece)
    return made


def _loaded(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def build(folder: Path, auto: Any, tensors: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The float network of a folder on tensors that were read, and what transformers says of it.

    Args:
        folder: has the configuration.
        auto: the class of transformers that builds such networks, `AutoModel` for an encoder.
        tensors: name → tensor, of all its shards.

    Raises:
        Exception: whatever transformers raises for a malformed folder.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        kind: Any = type(auto.from_config(config))
    module, loading = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    module.config.name_or_path = str(folder)
    if module.can_generate():
        options: dict[str, Any] = {"local_files_only": True}
        if not (folder / "generation_config.json").is_file():
            options |= {"config_file_name": "config.json", "_from_model_config": True}
        module.generation_config = GenerationConfig.from_pretrained(folder, **options)
    return module, loading
