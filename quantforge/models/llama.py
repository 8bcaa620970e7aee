"""Llama and the architectures that share its block."""

from quantforge.models.architecture import ARCHITECTURES, Architecture

LLAMA = ARCHITECTURES.register("llama")(
    Architecture(
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
)
