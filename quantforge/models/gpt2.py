"""GPT-2: learned positions, layer norms with biases, linears stored transposed."""

from __future__ import annotations

from quantforge.models.architecture import ARCHITECTURES, Architecture

GPT2 = Architecture(
    name="gpt2",
    classes=("GPT2LMHeadModel",),
    blocks="transformer.h",
    # One matrix makes queries, keys and values.
    stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    fused=(),
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    head="lm_head",
    folds=(("ln_1", 0), ("ln_2", 2)),
)

ARCHITECTURES.register(GPT2.name)(GPT2)
