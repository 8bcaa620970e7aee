"""Llama and the architectures whose block is made of the same modules."""

from __future__ import annotations

from dataclasses import replace

from quantforge.models.architecture import ARCHITECTURES, Architecture

LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM",),
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    fused=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    rotary="model.rotary_emb",
    folds=(
        ("input_layernorm", 0),
        ("self_attn.v_proj", 1),
        ("post_attention_layernorm", 2),
        ("mlp.up_proj", 3),
    ),
)
# The same block: Mistral may look back over a window, Qwen 2 has biases.
MISTRAL = replace(LLAMA, name="mistral", classes=("MistralForCausalLM",))
QWEN2 = replace(LLAMA, name="qwen2", classes=("Qwen2ForCausalLM",))
# Norms over the queries and keys of every head.
QWEN3 = replace(LLAMA, name="qwen3", classes=("Qwen3ForCausalLM",), rotary="")
# Norms behind both halves too, and each norm multiplies by one more than its weight, so a weight
# cannot take up a factor; some blocks look back over a window, with other rotary frequencies.
GEMMA3 = replace(
    LLAMA,
    name="gemma3",
    classes=("Gemma3ForCausalLM",),
    rotary="",
    folds=(("self_attn.v_proj", 1), ("mlp.up_proj", 3)),
)
# One matrix for queries, keys and values, one for gate and up.
PHI3 = replace(
    LLAMA,
    name="phi3",
    classes=("Phi3ForCausalLM",),
    stages=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    fused=(),
    rotary="",
    folds=(("input_layernorm", 0), ("post_attention_layernorm", 2)),
)

for _one in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, PHI3):
    ARCHITECTURES.register(_one.name)(_one)
