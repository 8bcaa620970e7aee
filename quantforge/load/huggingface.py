"""Load a float model strictly: every weight from the file, none invented, all of them finite.

transformers initialises what a checkpoint lacks at random and carries on; here a missing, extra or
misshapen weight is an error that names it, as are NaN and infinite values.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.files import fingerprint
from quantforge.foreign import encode, malformed
from quantforge.load.gguf_file import converted_folder
from quantforge.load.source import hub_folder
from quantforge.load.streaming import build, float_bytes, read_tensors, stored_tensors
from quantforge.load.weights import read_config, stored, weight_files
from quantforge.load.wording import some
from quantforge.models import (
    ARCHITECTURES,
    Architecture,
    Model,
    ModelSource,
    block_list_path,
    encoder_classes,
    shape_of,
)
from quantforge.models.linears import give_linears
from quantforge.models.sizes import require_plausible
from quantforge.scratch import IN_MEMORY, ONLY_RUN, Claims, Scratch, scratch_for
from quantforge.silence import quiet

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def local_folder(source: ModelSource) -> Path:
    """The Hugging Face folder behind a source; a GGUF is converted into the cache first.

    Raises:
        InputError: the source is in memory, unreachable or malformed.
        ResourceError: the cache cannot be written.
    """
    if source.kind == "folder":
        return source.path
    if source.kind == "gguf":
        return converted_folder(source.path, source.fingerprint)
    if source.kind == "hub":
        return hub_folder(source.location)
    raise InputError(f"{source.name} is in memory and has no files")


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    claims: Claims = ONLY_RUN,
) -> Model:
    """Load the network and its tokenizer; in float32 on the CPU into scratch files, unless small.

    Encoders are loaded as such, decoders with their heads.

    Args:
        source: from `resolve_source`.
        dtype: dtype of the weights in memory.
        device: where the network goes.
        trust_remote_code: let transformers run Python code that the folder contains.
        claims: on disk and memory, of what is done with the network.

    Raises:
        InputError: unknown architecture, quantized, missing, unexpected, misshapen, truncated or
            non-finite weights, malformed configuration or tokenizer.
        ResourceError: the cache cannot be written (GGUF), or there is no room for the network.
    """
    folder = local_folder(source)
    config = read_config(folder)
    require_plausible(config, **stored(weight_files(folder)), where=f"{folder / 'config.json'}")
    _check_class(folder, config, trust_remote_code)
    streams = dtype == torch.float32 and torch.device(device).type == "cpu"
    auto = _auto_class(config)
    module, loading, scratch = _built(
        folder, auto, dtype, trust_remote_code, claims if streams else None
    )
    _check_loading(folder, module, loading)
    check_finite(module, str(source.location))
    give_linears(module, scratch=scratch)
    module.train(False).to(device)
    architecture = shape_of(module)
    return Model(
        module=module,
        architecture=architecture,
        layers=architecture.layers(module),
        source=source,
        tokenizer=load_tokenizer(folder, trust_remote_code=trust_remote_code),
        scratch=scratch,
    )


def _built(
    folder: Path, auto: Any, dtype: torch.dtype, trust_remote_code: bool, claims: Claims | None
) -> tuple[nn.Module, dict[str, Any], Scratch]:
    """The network, what transformers says of its weights, and where they are.

    Without `claims` it is in memory.
    """
    places, scratch = None, IN_MEMORY
    # A folder's own code may read its weights in its own way.
    if claims is not None and not trust_remote_code:
        places = stored_tensors(weight_files(folder))
    if claims is not None and places is not None:
        scratch = scratch_for(float_bytes(places), claims)
    with malformed(f"{folder} cannot be loaded"), quiet():
        if places is not None and scratch.on_disk:
            return *build(folder, auto, read_tensors(places, scratch)), scratch
        module, loading = auto.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    return module, loading, IN_MEMORY


def from_module(module: nn.Module, *, name: str = "in-memory", tokenizer: Any = None) -> Model:
    """Wrap a network that is already in memory; it is put into evaluation mode and not copied.

    It gets linears where its class has none (`models.linears`).

    Raises:
        InputError: unknown architecture, quantized, on the meta device or non-finite weights.
    """
    config: Any = getattr(module, "config", None)
    method = getattr(config, "quantization_config", None)
    if method is not None or getattr(module, "hf_quantizer", None) is not None:
        raise InputError(f"{name} is already quantized: pass the float network")
    for key, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise InputError(f"{name}: {key} has no data (meta device): load the weights first")
    check_finite(module, name)
    give_linears(module)
    module.train(False)
    architecture = shape_of(module)
    layers = architecture.layers(module)
    _check_ties(module, architecture, name)
    source = ModelSource(
        kind="memory",
        location="",
        name=name,
        fingerprint=module_fingerprint(module),
        description=f"{type(module).__name__} in memory",
    )
    return Model(
        module=module,
        architecture=architecture,
        layers=layers,
        source=source,
        tokenizer=tokenizer,
    )


def _auto_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that loads the network a configuration describes."""
    from transformers import AutoModel, AutoModelForCausalLM

    names = config.get("architectures")
    encodes = isinstance(names, list) and bool(names) and names[0] in encoder_classes()
    return AutoModel if encodes else AutoModelForCausalLM


def _check_ties(module: nn.Module, architecture: Architecture, name: str) -> None:
    """Refuse a network whose configuration says that head and embedding are one, if they are two.

    A checkpoint would hold only one of them.

    Raises:
        InputError: it does.
    """
    if not architecture.tied(module):
        return
    head, embedding = (
        module.get_submodule(path).weight for path in (architecture.head, architecture.embedding)
    )
    if head is not embedding:
        raise InputError(
            f"{name}: config.tie_word_embeddings is set, but {architecture.head} has a weight of "
            "its own: clear the flag, or tie the weights"
        )


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse NaN and infinite weights, by name.

    Raises:
        InputError: a floating-point parameter or buffer holds a value that is not finite.
    """
    for name, tensor in module.state_dict(keep_vars=False).items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor)  # NaN propagates into both
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{where}: {name} holds {count} NaN or infinite values: the checkpoint is damaged"
            )


def model_config(module: nn.Module) -> dict[str, Any]:
    """The network's `config.json` as a dict, without quantization and without local paths."""
    import json

    config: Any = module.config
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    values.pop("quantization_config", None)
    values["architectures"] = [type(module).__name__]
    return values


def described(module: nn.Module) -> dict[str, Any]:
    """The network's whole configuration, with values that are its class's defaults."""
    config: Any = module.config
    values: dict[str, Any] = config.to_dict()
    return {**values, "architectures": [type(module).__name__]}


def generation_config(module: nn.Module) -> dict[str, Any] | None:
    """The network's `generation_config.json` as a dict, or None where it has none."""
    import json

    config: Any = getattr(module, "generation_config", None)
    if config is None:
        return None
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in values.items() if not key.startswith("_")}


def save_tokenizer(source: ModelSource, folder: Path, *, tokenizer: Any = None) -> None:
    """Write the tokenizer files of `source` into `folder`, byte for byte where it has files.

    Args:
        source: folder and hub sources are copied; a GGUF's files were written from its metadata.
        folder: existing or new folder.
        tokenizer: saved instead where the source is in memory; None writes nothing then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "memory":
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    origin = local_folder(source)
    for name in TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    templates = origin / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)


def _check_class(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse an unknown architecture without a list of blocks, before its weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = [name for entry in ARCHITECTURES.values() for name in entry.classes]
    names = config.get("architectures")
    if not isinstance(names, list) or not names or names[0] in known:
        return
    stems = [f"{name.removesuffix('Model')}For" for name in encoder_classes()]
    if any(str(names[0]).startswith(stem) for stem in stems):
        raise InputError(
            f"{folder} is a {names[0]}, an encoder with a head: give the encoder alone, which "
            "transformers' AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER) writes"
        )
    auto: Any = AutoModelForCausalLM
    what = (
        f"{folder} is a {names[0]}, which is not a known architecture, and looking for its blocks"
    )
    with malformed(f"{what} failed"), quiet(), torch.device("meta"):
        shape = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        network = auto.from_config(shape, trust_remote_code=trust_remote_code)
        made = type(network).__name__
    try:
        block_list_path(network)
    except InputError as error:
        raise InputError(
            f"{what} failed: {error}; known model classes: {', '.join(known)}"
        ) from None
    if made != names[0]:
        raise InputError(
            f"{folder} says that it is a {names[0]}, its configuration makes a {made}; known "
            f"model classes: {', '.join(known)}"
        )


def _check_loading(folder: Path, module: nn.Module, loading: dict[str, Any]) -> None:
    missing = set(loading.get("missing_keys") or ())
    if missing:
        raise InputError(f"{folder} lacks the weights {some(missing)}: get the checkpoint again")
    unexpected = set(loading.get("unexpected_keys") or ())
    if unexpected:
        raise InputError(
            f"{folder} holds weights that a {type(module).__name__} has no place for: "
            f"{some(unexpected)}"
        )
    misshapen = loading.get("mismatched_keys") or ()
    if misshapen:
        names = {str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in misshapen}
        raise InputError(f"{folder}: the shapes of {some(names)} disagree with config.json")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; None where it has no tokenizer files."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    with malformed(f"the tokenizer in {folder} cannot be read"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    encode(tokenizer, "a")  # what is wrong with its settings shows here, not after a long run
    return tokenizer


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a network's tensors, names and configuration."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw_bytes(tensor))
    form = model_config(module) if hasattr(module, "config") else type(module).__name__
    return fingerprint(form, digest.hexdigest())


def _raw_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
