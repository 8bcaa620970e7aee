"""A GGUF file becomes a float32 Hugging Face folder in the cache, once per file content.

transformers reads the metadata (configuration, tokenizer); the tensors are dequantized here with
gguf's own decoders, one at a time, so that only one tensor is in memory besides the shard being
filled. Files of the `llama` architecture store the rows of the query and key projections
interleaved for rotary pairs; `unpermute` puts them back in the order of transformers. Every tensor
of the file must be used and every weight of the network must be found, otherwise the file is
refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantforge.errors import InputError, ResourceError
from quantforge.files import cache_root, write_json
from quantforge.foreign import malformed
from quantforge.load.weights import INDEX_FILE, SINGLE_FILE, weight_files
from quantforge.load.wording import some
from quantforge.models import ARCHITECTURES
from quantforge.models.sizes import require_plausible
from quantforge.silence import quiet

CONVERSION = "gguf-float32-1"
SHARD_BYTES = 2 << 30
GGUF_ARCHITECTURES = ("llama",)
# Longer arrays of metadata are none: the largest vocabularies have 300,000 tokens.
LONGEST_ARRAY = 1 << 20


def converted_folder(path: Path, fingerprint: str) -> Path:
    """The float32 folder of a GGUF file, made on first use and kept in the cache.

    Args:
        path: the GGUF file.
        fingerprint: of its content; the key in the cache.

    Raises:
        InputError: the file is truncated or malformed, of an unsupported architecture or tensor
            type, or its tensors are not exactly those of the network.
        ResourceError: the cache cannot be written.
    """
    folder = cache_root() / "converted" / f"{CONVERSION}-{fingerprint[:32]}"
    if folder.is_dir():
        try:
            weight_files(folder)
        except InputError:  # a damaged copy is made again
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    try:
        with _staging(folder) as staging:
            _convert(path, staging)
    except OSError as error:
        raise ResourceError(
            f"the float copy of {path.name} cannot be written to {folder.parent} ({error}): free "
            "the disk or set QUANTFORGE_CACHE to another folder"
        ) from None
    return folder


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """[heads·d, in] rows from interleaved rotary pairs (GGUF llama) to halves (transformers)."""
    rows = weight.shape[0]
    pairs = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the final name if the body succeeds and nobody was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        if not folder.is_dir():
            try:
                os.rename(staging, folder)  # noqa: PTH104 - never replaces a folder that has files
            except OSError:
                if not folder.is_dir():
                    raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    """Write config, tokenizer and weights of the GGUF at `path` into `folder`."""
    reader = _open(path)
    architecture = _field(path, reader, "general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise InputError(f"{path} has the GGUF architecture {architecture!r}; supported: {known}")
    _refuse_rope_scaling(path, reader)
    network = _empty_network(path, reader)
    names = _tensor_names(path, reader, network)
    _write_weights(path, reader, names, network, folder)
    network.config.save_pretrained(folder)
    if network.generation_config is not None:
        network.generation_config.save_pretrained(folder)
    if _field(path, reader, "tokenizer.ggml.model") not in (None, "none"):
        _write_tokenizer(path, folder)


def _open(path: Path) -> Any:
    """A strict reader: gguf's own takes what lies beyond the file's end as empty, and goes on.

    With a count of 2**40 it goes on until the memory is full.
    """
    from gguf import GGUFReader, GGUFValueType

    class StrictReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *rest, **named)
            if len(found) != int(count):
                raise ValueError(f"{count} values at byte {offset} are beyond the end of the file")
            return found

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY:
                kind = self._get(orig_offs, "uint32")[0]
                count = self._get(orig_offs + 4, "uint64")[0]
                if kind == GGUFValueType.ARRAY or count > LONGEST_ARRAY:
                    raise ValueError(f"an array of {count} values of kind {kind}")
            return super()._get_field_parts(orig_offs, raw_type)

    with malformed(f"{path} is truncated or not a GGUF file; get the file again"):
        return StrictReader(path)


def _field(path: Path, reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    with malformed(f"{path}: {name} cannot be read"):
        return None if field is None else field.contents()


def _refuse_rope_scaling(path: Path, reader: Any) -> None:
    """Scaled rotary frequencies of a GGUF are lost in transformers: another network would load."""
    scaling = _field(path, reader, "llama.rope.scaling.type")
    scaled = scaling not in (None, "none")
    if scaled or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise InputError(
            f"{path} uses scaled rotary frequencies, which are not read from GGUF: give the "
            "Hugging Face folder of this model"
        )


def _empty_network(path: Path, reader: Any) -> Any:
    """The network on the meta device, from the file's metadata."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM

    complaint = f"the metadata of {path} describe no known network"
    with malformed(complaint), quiet():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        sizes = config.to_dict()
    size = path.stat().st_size
    require_plausible(sizes, tensors=len(reader.tensors), stored_bytes=size, where=str(path))
    with malformed(complaint), quiet(), torch.device("meta"):
        network = auto.from_config(config, dtype=torch.float32)
    name = type(network).__name__
    if not any(name in entry.classes for entry in ARCHITECTURES.values()):
        raise InputError(f"{path} is a {name}, which is not a known architecture")
    network.config.architectures = [name]
    network.config.dtype = "float32"
    return network


def _tensor_names(path: Path, reader: Any, network: nn.Module) -> dict[str, str]:
    """GGUF tensor name → state-dict name, after checking that the two sets are equal."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config: Any = network.config
    mapping = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in network.state_dict():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        stem, _, suffix = name.rpartition(".")
        found = mapping.get_name(stem)
        if found is None:
            raise InputError(f"{path}: GGUF has no name for the weight {name}")
        names[f"{found}.{suffix}"] = name
    stored = {tensor.name for tensor in reader.tensors}
    if missing := names.keys() - stored:
        raise InputError(f"{path} lacks the tensors {some(missing)}: get the file again")
    if extra := stored - names.keys():
        raise InputError(
            f"{path} holds tensors that a {type(network).__name__} has no place for: {some(extra)}"
        )
    return names


def _write_weights(
    path: Path, reader: Any, names: Mapping[str, str], network: nn.Module, folder: Path
) -> None:
    """Dequantize tensor by tensor into shards of at most `SHARD_BYTES` (or one tensor)."""
    from safetensors.torch import save_file

    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    shards: list[list[Any]] = [[]]
    size = 0
    for tensor in sorted(reader.tensors, key=lambda entry: names[entry.name]):
        tensor_bytes = 4 * int(tensor.n_elements)
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor_bytes
    where: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else _shard_name(index, len(shards))
        content: dict[str, Tensor] = {}
        for tensor in shard:
            name = names[tensor.name]
            content[name] = _dequantize(path, tensor, name, network.config)
            if content[name].shape != expected[name]:
                raise InputError(
                    f"{path}: {tensor.name} is {tuple(content[name].shape)}, the metadata say "
                    f"{tuple(expected[name])}"
                )
            where[name] = file
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(4 * int(tensor.n_elements) for tensor in reader.tensors)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def _shard_name(index: int, count: int) -> str:
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def _dequantize(path: Path, tensor: Any, name: str, config: Any) -> Tensor:
    """One tensor as float32 in the row order of transformers."""
    from gguf import dequantize

    # numpy warns of values that are not finite; they are refused once the network is loaded
    complaint = f"{path}: {tensor.name} cannot be dequantized"
    with malformed(complaint), np.errstate(all="ignore"):
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(values.astype("float32", copy=True))
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            return unpermute(weight, config.num_attention_heads).contiguous()
        if name.endswith(("k_proj.weight", "k_proj.bias")):
            return unpermute(weight, config.num_key_value_heads).contiguous()
        return weight


def _write_tokenizer(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    with malformed(f"the tokenizer in {path} cannot be read"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer.save_pretrained(folder)
