"""Loads a checkpoint into a transformers model whose quantized layers stay packed.

The model class is built with parameters on the meta device (buffers are computed for real: a
rotary embedding's frequencies are in no checkpoint), its planned linears are swapped for
`QuantLinear`, and every tensor of the checkpoint is put where its name says. Nothing missing and
nothing left over is accepted. Memory is that of the packed tensors; no code of the checkpoint runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from quantforge_kernels import BackendError, Request, choose_backend
from torch import nn

from quantforge.errors import InputError, ResourceError, UsageError
from quantforge.foreign import malformed
from quantforge.format import compressed
from quantforge.format.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    TensorReader,
    open_checkpoint,
)
from quantforge.format.levels import as_uniform, uniform_spec
from quantforge.methods.rtn import minmax_scale, round_to_nearest
from quantforge.models.linears import give_linears
from quantforge.models.sizes import require_plausible
from quantforge.runtime.linear import PackedWeight, QuantEmbedding, QuantLinear
from quantforge.types import QuantSpec

GENERATION_CONFIG_NAME = "generation_config.json"


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    backend: str = "auto",
    mode: str = "exact",
    head_bits: int | None = None,
) -> nn.Module:
    """Load a quantized checkpoint for inference, weights packed.

    Args:
        path: folder of the checkpoint.
        device: where the model runs.
        dtype: of activations, kept weights and the decoded weights; None takes config.json's.
        backend: kernel backend, or "auto".
        mode: how inputs enter the packed products: "exact" as they are, "a8" rounded to int8 by
            group, which is faster.
        head_bits: 8 runs a head that the checkpoint keeps in 16 bits through a copy rounded to 8,
            in groups of at most 128; None runs it as it is.

    Returns:
        The transformers model in evaluation mode, with `generate`. No parameter requires a
        gradient; gradients still flow through the layers to their inputs.

    Raises:
        InputError: the checkpoint is incomplete, damaged, or of a model class transformers lacks.
        UsageError: the device or backend is unknown, or the backend cannot run these layers.
        ResourceError: the device is not there.
    """
    if head_bits not in (None, 8):
        raise UsageError(f"head_bits must be 8 or None, got {head_bits}")
    checkpoint = open_checkpoint(path)
    specs = checkpoint.specs()
    runs = {name: uniform_spec(spec) for name, spec in specs.items()}
    target = checked_device(device)
    chosen = _config_dtype(checkpoint) if dtype is None else dtype
    require_backend(backend, mode, runs.values(), chosen, target)
    model = _build(checkpoint, chosen)
    _swap(model, runs, chosen, backend, checkpoint.folder)
    _fill(model, checkpoint, specs, target, chosen)
    if head_bits is not None:
        _round_head(model, head_bits, backend)
    _prepare(model, chosen, backend, mode)
    _tie(model, backend, mode)
    _check_complete(model, checkpoint.folder)
    model.to(target)  # what is in no checkpoint, e.g. rotary frequencies
    _set_generation_config(model, checkpoint.folder)
    model.requires_grad_(False)
    model.train(False)
    return model


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: torch knows no such device.
        ResourceError: it is not there.
    """
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; use e.g. cpu or cuda:0") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"device {device} asked for, but this torch sees no GPU; use cpu")
    return target


def _config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"{checkpoint.folder}: config.json has no floating dtype, but {name!r}")
    return dtype


def require_backend(
    backend: str,
    mode: str,
    specs: Iterable[QuantSpec],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fail before loading, not in the first forward.

    Raises:
        UsageError: the backend is unknown or cannot run one of these.
    """
    for spec in sorted(set(specs)):
        request = Request(
            bits=spec.bits,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            dtype=dtype,
            device=device.type,
            mode=mode,
        )
        try:
            choose_backend(backend, request)
        except BackendError as error:
            raise UsageError(f"{spec}: {error}") from error


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The model class of config.json: parameters on meta, buffers real, linears everywhere."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = copy.deepcopy(dict(checkpoint.config))
    fields.pop("quantization_config", None)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(f"{checkpoint.folder}: transformers has no model_type {model_type!r}")
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise InputError(f"{checkpoint.folder}: transformers has no model class {name!r}")
    require_plausible(
        fields,
        tensors=len(checkpoint.entries),
        stored_bytes=sum(entry.size_bytes for entry in checkpoint.entries.values()),
        where=f"{checkpoint.folder / CONFIG_NAME}",
    )
    make: Any = model_class._from_config
    with malformed(f"{checkpoint.folder}: config.json makes no {name}"):
        config = CONFIG_MAPPING[model_type].from_dict(fields)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = make(config, dtype=dtype)
    give_linears(model, whole=False)
    return model


def _swap(
    model: nn.Module,
    specs: Mapping[str, QuantSpec],
    dtype: torch.dtype,
    backend: str,
    folder: Path,
) -> None:
    """Put a packed module in place of every quantized one."""
    for name, spec in specs.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"{folder}: config.json names {name}, which is no module") from error
        packed: PackedWeight
        if isinstance(module, nn.Linear):
            rows, columns = module.out_features, module.in_features
            if not spec.divides(columns):
                raise InputError(f"{folder}: {name} has {columns} columns, which {spec} splits not")
            bias = module.bias is not None
            packed = QuantLinear(rows, columns, spec, bias=bias, backend=backend)
        elif isinstance(module, nn.Embedding):
            rows, columns = module.num_embeddings, module.embedding_dim
            if not spec.divides(columns):
                raise InputError(f"{folder}: {name} has {columns} columns, which {spec} splits not")
            packed = QuantEmbedding(rows, columns, spec, dtype=dtype)
        else:
            kind = type(module).__name__
            raise InputError(f"{folder}: {name} is a {kind}; only Linear and Embedding are packed")
        model.set_submodule(name, packed)


def _fill(
    model: Any,
    checkpoint: Checkpoint,
    specs: Mapping[str, QuantSpec],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put every tensor of the checkpoint in its place."""
    reader = TensorReader()
    owned: set[str] = set()
    for name, spec in specs.items():
        entries = checkpoint.layer_entries(name)
        owned |= {entry.name for entry in entries.values()}
        tensors = {suffix: reader.load(entry) for suffix, entry in entries.items()}
        shape = compressed.check_tensors(name, tensors, spec)
        module = model.get_submodule(name)
        if shape != (module.out_features, module.in_features):
            wanted = (module.out_features, module.in_features)
            raise InputError(f"{checkpoint.folder}: {name} is stored as {shape}, expected {wanted}")
        if spec.grid != "uniform":  # the kernels run the same weight on a uniform grid
            weight = as_uniform(compressed.from_tensors(name, tensors, spec))
            tensors = compressed.to_tensors(weight)
        zero = compressed.unpack_zero(tensors, spec, shape[0])
        module.fill(
            tensors[compressed.PACKED].to(device),
            tensors[compressed.SCALE].to(device),
            None if zero is None else zero.to(device),
        )
    tied = set(model.all_tied_weights_keys)
    for name, entry in checkpoint.entries.items():
        if name in owned:
            continue
        if name in tied:
            raise InputError(f"{checkpoint.folder} stores {name}, which config.json ties")
        tensor = reader.load(entry)
        placed = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        _place(model, name, placed, checkpoint.folder)


def _prepare(model: nn.Module, dtype: torch.dtype, backend: str, mode: str) -> None:
    """Put every packed weight into the order of its backend, one after another."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.mode = mode
        if isinstance(module, PackedWeight):
            module.prepare(dtype, backend=backend, mode=mode)


def _round_head(model: Any, bits: int, backend: str) -> None:
    """Replace a float head, tied or not, by a packed copy; an embedding it is tied to stays."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return
    tied = bool(model.all_tied_weights_keys)
    weight = (model.get_input_embeddings() if tied else head).weight
    if not isinstance(weight, torch.Tensor):  # a packed embedding: the head shares it
        return
    columns = weight.shape[1]
    group = max(width for width in range(1, 129) if columns % width == 0)
    spec = QuantSpec(bits, group) if group < columns else QuantSpec(bits)
    packed = round_to_nearest(weight, minmax_scale(weight, spec), spec)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, QuantLinear.from_weight(packed, head.bias, backend=backend))
    model.config.tie_word_embeddings = False


def _place(model: nn.Module, name: str, tensor: torch.Tensor, folder: Path) -> None:
    """Set a parameter or persistent buffer by its path."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    persistent = leaf in module._buffers and leaf not in module._non_persistent_buffers_set
    current = module._buffers[leaf] if persistent else module._parameters.get(leaf)
    if current is None:
        raise InputError(f"{folder} holds {name}, which the model does not have")
    if current.shape != tensor.shape:
        raise InputError(
            f"{folder}: {name} has shape {tuple(tensor.shape)}, expected {tuple(current.shape)}"
        )
    if persistent:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tie(model: Any, backend: str, mode: str) -> None:
    """Let a tied head use the embedding's weight, packed or not."""
    embedding = model.get_input_embeddings()
    if isinstance(model.get_output_embeddings(), QuantLinear):
        return  # stored packed beside the embedding, or rounded
    if not isinstance(embedding, PackedWeight):
        model.tie_weights()
        return
    head = model.get_output_embeddings()
    if head is None or not model.all_tied_weights_keys:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    shared = QuantLinear(
        embedding.out_features,
        embedding.in_features,
        embedding.spec,
        bias=head.bias is not None,
        backend=backend,
        mode=mode,
    )
    shared.share(embedding)
    shared.bias = head.bias
    model.set_submodule(name, shared)


def _check_complete(model: nn.Module, folder: Path) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} tensors of the model, first {missing[0]}; "
            "the checkpoint is incomplete"
        )


def _set_generation_config(model: Any, folder: Path) -> None:
    if (folder / GENERATION_CONFIG_NAME).is_file():
        from transformers import GenerationConfig

        with malformed(f"{folder / GENERATION_CONFIG_NAME} is damaged"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
