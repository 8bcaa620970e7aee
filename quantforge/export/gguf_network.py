"""What llama.cpp calls a network's tensors and hyperparameters, and the order of its rows.

Architectures are data, as elsewhere: the name in GGUF, and whether rows of queries and keys are
interleaved there. gguf's own tables say what a tensor is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.foreign import malformed


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """How llama.cpp knows a network.

    Attributes:
        name: in GGUF.
        interleaved: a head's rotary pairs lie side by side in the rows of queries and keys, where
            transformers has all first halves and then all second ones.
        biased: layers that may have a bias; llama.cpp refuses a file with tensors it does not know.
        ropes: ways to scale the rotary frequencies.
        square: the channels of all heads have to be as many as the hidden size.
    """

    name: str
    interleaved: bool = False
    biased: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    ropes: tuple[str, ...] = ("default", "linear")
    square: bool = False


_LLAMA = GgufArchitecture(
    name="llama",
    interleaved=True,
    biased=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ropes=("default", "linear", "llama3"),
)
# By model class.
GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": GgufArchitecture(name="qwen2", square=True),
    "Qwen3ForCausalLM": GgufArchitecture(name="qwen3"),
}
_COUNTS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
# What ways to scale the rotary frequencies need.
_SCALINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    ),
}  # fmt: skip
_LARGEST = float(torch.finfo(torch.float32).max)


def gguf_architecture(config: Any) -> GgufArchitecture:
    """The architecture of a network.

    Args:
        config: its transformers configuration, of a class in `GGUF_ARCHITECTURES`.

    Raises:
        InputError: it scales its rotary frequencies, activates, or has biases or heads in a way
            that is not written.
    """
    found = config.architectures[0]
    architecture, kind = GGUF_ARCHITECTURES[found], _rope(config)["rope_type"]
    if kind not in architecture.ropes:
        raise InputError(
            f"rotary frequencies of type {kind!r} are not written as GGUF for a {found}; known: "
            f"{', '.join(architecture.ropes)}"
        )
    if _rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("rotary frequencies that turn a part of a head are not written as GGUF")
    if config.hidden_act != "silu":
        raise InputError(
            f"the activation {config.hidden_act!r} is not written as GGUF; llama.cpp has silu there"
        )
    if getattr(config, "attention_bias", False) and "o_proj" not in architecture.biased:
        raise InputError(f"GGUF has no name for o_proj.bias of a {architecture.name} network")
    inner = head_size(config) * config.num_attention_heads
    if architecture.square and inner != config.hidden_size:
        raise InputError(
            f"heads of {inner} channels together and a hidden size of {config.hidden_size}: "
            f"llama.cpp takes them to be equal in a {architecture.name} network"
        )
    return architecture


def require_numbers(config: Any, where: str) -> None:
    """Refuse hyperparameters that GGUF's fields, uint32 and float32, do not hold.

    Args:
        config: a network's transformers configuration.
        where: its file, for the message.

    Raises:
        InputError: one is none, or heads do not fit each other.
    """
    rope = _rope(config)
    counts = {name: getattr(config, name) for name in _COUNTS} | {"head_dim": head_size(config)}
    if getattr(config, "sliding_window", None) is not None:
        counts["sliding_window"] = config.sliding_window
    reals = {"rms_norm_eps": config.rms_norm_eps, "rope_theta": rope.get("rope_theta")}
    reals |= {name: rope.get(name) for name in _SCALINGS.get(rope["rope_type"], ())}
    for name, value in counts.items():
        if type(value) is not int or not 0 < value < 1 << 31:
            raise InputError(f"{where}: {name} must be a positive integer, got {value!r:.60}")
    for name, value in reals.items():
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            raise InputError(f"{where}: {name} must be a positive number, got {value!r:.60}")
    if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise InputError(f"{where}: low_freq_factor must be below high_freq_factor")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % shared or counts["head_dim"] % 2:
        raise InputError(
            f"{where}: {heads} heads of {counts['head_dim']} channels do not share {shared} of "
            "keys and values in pairs of channels"
        )
    rope_factors(config)


def tensor_names(
    architecture: GgufArchitecture, config: Any, stored: Iterable[str]
) -> dict[str, str]:
    """Name in the checkpoint → name in GGUF, in the order given.

    Args:
        architecture: of the network.
        config: its transformers configuration.
        stored: names of its weights and biases; a head that the configuration ties is left out.

    Raises:
        InputError: GGUF has no name for one.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    mapping = get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for name in stored:
        layer, _, part = name.rpartition(".")
        if layer == "lm_head" and config.tie_word_embeddings:
            continue
        found = mapping.get_name(layer)
        known = part == "weight" or (
            part == "bias" and layer.rpartition(".")[2] in architecture.biased
        )
        if found is None or not known:
            raise InputError(f"GGUF has no name for {name} of a {architecture.name} network")
        names[name] = f"{found}.{part}"
    return names


def row_order(architecture: GgufArchitecture, config: Any, layer: str, rows: int) -> Tensor | None:
    """[rows] which row of a layer is stored at each place; None where they keep their order.

    Args:
        architecture: of the network.
        config: its transformers configuration.
        layer: its name in the checkpoint.
        rows: of its weight or bias.
    """
    last = layer.rpartition(".")[2]
    if not architecture.interleaved or last not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
    halves = torch.arange(rows).view(heads, 2, rows // heads // 2)
    return halves.transpose(1, 2).reshape(rows)


def head_size(config: Any) -> int:
    """Channels a head."""
    size: int | None = getattr(config, "head_dim", None)
    return size or int(config.hidden_size // config.num_attention_heads)


def usable_context(config: Any) -> int:
    """Tokens for which llama.cpp computes the same: no more than a window that blocks look back.

    It knows no such windows for these architectures and attends to all; inside one both agree.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    used = "sliding_attention" in kinds if kinds else bool(window)
    longest = int(config.max_position_embeddings)
    return min(longest, int(window)) if used and window else longest


def add_hyperparameters(writer: Any, config: Any) -> None:
    """Hand a network's hyperparameters to a `gguf.GGUFWriter`."""
    from gguf import RopeScalingType

    rope, size = _rope(config), head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(usable_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(config: Any) -> Tensor | None:
    """[head size / 2] what every rotary frequency is divided by; None where they are not scaled.

    llama.cpp has Llama 3's scaling as a tensor of these.

    Raises:
        InputError: float32 does not hold one.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    with malformed("rope_parameters give no frequencies"):
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: Tensor = plain / scaled
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise InputError("rope_parameters scale a frequency to 0 or beyond all numbers")
    return factors


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters: `rope_type`, `rope_theta` and what the type needs."""
    found = getattr(config, "rope_parameters", None)
    found = dict(found) if isinstance(found, dict) else {}
    found.setdefault("rope_type", "default")
    return found
