"""Llama and the architectures whose block is made of the same modules."""

from __future__ import annotations

from dataclasses import replace

from quantforge.models.architecture import ARCHITECTURES, Architecture
from quantforge.models.head import NO_ENTRIES, LogitEntries

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
# Experts in the place of the feed-forward half; what they read, the router reads too.
QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    classes=("Qwen3MoeForCausalLM",),
    stages=(
        *LLAMA.stages[:2],
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.experts.*.down_proj",),
    ),
    fused=LLAMA.fused[:1],
    folds=LLAMA.folds[:2],
    experts="mlp.experts",
)
MIXTRAL = replace(QWEN3_MOE, name="mixtral", classes=("MixtralForCausalLM",))
# Beside the experts one that all tokens share, which runs before them.
QWEN2_MOE = replace(
    QWEN3_MOE,
    name="qwen2_moe",
    classes=("Qwen2MoeForCausalLM",),
    stages=(
        *LLAMA.stages[:2],
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_expert.down_proj",),
        *QWEN3_MOE.stages[2:],
    ),
    fused=(*QWEN3_MOE.fused, ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    folds=(*QWEN3_MOE.folds, ("mlp.shared_expert.up_proj", 3)),
)
# Norms behind both halves too, and each norm multiplies by one more than its weight, so a weight
# cannot take up a factor; some blocks look back over a window (Gemma 3's with other rotary
# frequencies).
GEMMA3 = replace(
    LLAMA,
    name="gemma3",
    classes=("Gemma3ForCausalLM",),
    rotary="",
    folds=(("self_attn.v_proj", 1), ("mlp.up_proj", 3)),
    logits=LogitEntries(cap="final_logit_softcapping"),
)
GEMMA2 = replace(GEMMA3, name="gemma2", classes=("Gemma2ForCausalLM",))
# Multiplies embeddings, attention scores and both halves' outputs by constants of its own.
GRANITE = replace(
    LLAMA,
    name="granite",
    classes=("GraniteForCausalLM",),
    rotary="",
    logits=LogitEntries(divisor="logits_scaling"),
)
# Both halves read the same norm, side by side.
COHERE = replace(
    LLAMA,
    name="cohere",
    classes=("CohereForCausalLM", "Cohere2ForCausalLM"),
    stages=(
        (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ),
        ("self_attn.o_proj",),
        ("mlp.down_proj",),
    ),
    rotary="",
    folds=(("input_layernorm", 0), ("self_attn.v_proj", 1), ("mlp.up_proj", 2)),
    logits=LogitEntries(multiplier="logit_scale"),
)
# Phi 1 and 2: side by side too, without gates, biases everywhere, the head included.
PHI = replace(
    COHERE,
    name="phi",
    classes=("PhiForCausalLM",),
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
        ("self_attn.dense",),
        ("mlp.fc2",),
    ),
    fused=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
    final_norm="model.final_layernorm",
    folds=(("input_layernorm", 0), ("self_attn.v_proj", 1)),
    logits=NO_ENTRIES,
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

for _one in (
    LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, QWEN2_MOE, GEMMA2, GEMMA3, GRANITE, COHERE,
    PHI, PHI3,
):  # fmt: skip
    ARCHITECTURES.register(_one.name)(_one)
