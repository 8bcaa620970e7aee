"""The fused causal attention of `quantforge_kernels` inside networks of transformers.

Such a network asks a registry for the attention that its configuration names, at every call. While
`fused_attention` is active the configuration of every part that names torch's own ("sdpa") names an
entry of ours instead. It runs the kernel where that computes the same up to the order of sums:
causal, without a mask, dropout or other terms, on CPU, with operands that autocast would round to
bfloat16. Anything else it hands on to torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from quantforge_kernels.attention import available, causal_attention, supported
from torch import Tensor, nn

STOCK = "sdpa"
FUSED = "quantforge_causal"
# What other attentions than softmax(scale q kᵀ) v are told by, and where "no" is None.
OTHER_TERMS = ("position_bias", "softcap", "s_aux")


@contextmanager
def fused_attention(module: nn.Module) -> Iterator[None]:
    """Fused attention inside wherever `module` uses torch's own; as it was before after it.

    Nothing changes in networks that are not of transformers, in those told to use another attention
    (as `capture.plain_attention` does), and where the kernel cannot run.
    """
    configs = {id(one): one for one in _configurations(module)} if available() else {}
    if configs:
        _register()
    for config in configs.values():
        # Not the public name, which sets the configurations of parts as well.
        config._attn_implementation_internal = FUSED
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = STOCK


def _configurations(module: nn.Module) -> Iterator[Any]:
    """Configurations in `module` that name torch's own attention."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == STOCK:
            yield config


@cache
def _register() -> None:
    """Enter ours in the registries of transformers; masks are made as for torch's own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(FUSED, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FUSED, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls it: of [batch, heads, length, size] to [batch, length, heads, size]."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = attention_mask is None and dropout == 0.0 and not _other_terms(query, kwargs)
    if causal and plain and _in_bfloat16(query, key, value) and supported(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scale).transpose(1, 2), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[STOCK](
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
    )  # fmt: skip
    return result


def _other_terms(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether something is asked for that the kernel does not compute."""
    window = kwargs.get("sliding_window")
    narrow = window is not None and window < query.shape[2]
    return narrow or any(kwargs.get(name) is not None for name in OTHER_TERMS)


def _in_bfloat16(*operands: Tensor) -> bool:
    """Whether torch's own attention would round these to bfloat16."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return True
    return all(one.dtype == torch.bfloat16 for one in operands)
