"""Whether a configuration describes a network that its files can hold.

A network is built before its weights are read, with as many blocks and as wide as the configuration
says. A damaged one says ten billion, and building that ends in no memory, or never.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quantforge.errors import InputError

_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTHS = ("hidden_size", "n_embd")
_EXTENTS = ("vocab_size", "intermediate_size", "head_dim", "num_attention_heads",
            "num_key_value_heads", "n_inner", "n_head", "num_experts",
            "num_local_experts", "moe_intermediate_size",
            "shared_expert_intermediate_size")  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions")
_MOST_POSITIONS = 1 << 31


def require_plausible(
    config: Mapping[str, Any], *, tensors: int, stored_bytes: int, where: str
) -> None:
    """Refuse sizes that are none, or that the files cannot hold, before a network is built.

    Every block has a tensor, and every extent is one side of a matrix whose other side is the
    hidden size; no weight takes less than a bit.

    Args:
        config: of the network, as in its config.json.
        tensors: that the files hold.
        stored_bytes: of the files.
        where: the folder or file, for the message.

    Raises:
        InputError: a size is not a positive integer, or too large.
    """
    hidden = next((config[name] for name in _WIDTHS if name in config), 1)
    bounds = dict.fromkeys(_BLOCKS, tensors)
    bounds |= dict.fromkeys(_WIDTHS, 8 * stored_bytes)
    bounds |= dict.fromkeys(_POSITIONS, _MOST_POSITIONS)
    if type(hidden) is int and hidden > 0:
        bounds |= dict.fromkeys(_EXTENTS, 8 * stored_bytes // hidden)
    for name, most in bounds.items():
        value = config.get(name)
        if value is None or isinstance(value, list):  # some have one for every block
            continue
        if type(value) is not int or value < 1:
            text = repr(value)[:60]
            raise InputError(f"{where}: {name} must be a positive integer, got {text}")
        if value > most:
            raise InputError(
                f"{where}: {name} is {_short(value)}, but {tensors} tensors of {stored_bytes} "
                f"bytes hold at most {most}: the configuration is damaged"
            )


def _short(value: int) -> str:
    """Digits of a number, or how many there are."""
    text = str(value)
    return text if len(text) <= 20 else f"a number of {len(text)} digits"


def context_length(module: nn.Module) -> int | None:
    """Most tokens of a sequence that a network has positions for; None where it does not say.

    RoBERTa and its like count positions from behind the padding token's number.
    """
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tables = (m for name, m in module.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return limit if padding is None else limit - padding - 1
