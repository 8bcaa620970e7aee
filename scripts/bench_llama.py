"""Decoding speed of a Llama of random weights beside llama.cpp on the same shapes.

    python scripts/bench_llama.py --bits 3 2 --types Q3_K_S Q2_K

Speed depends on shapes and widths, not on what the weights are, so no network is downloaded or
compiled: our checkpoint holds random codes, the .gguf random floats that llama.cpp's own quantizer
brings into each type (`pure`: every matrix in it, the tied head too; ours has the head, and the
embedding that it is, in 8 bits). `quantforge.bench` then runs them in turns. Needs
llama-cpp-python; the default shape, some 0.8 billion weights, takes 5 GB of disk and memory.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

import quantforge
from quantforge.testing import write_quantized
from quantforge.types import QuantSpec

GROUP = 128
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def network(options: argparse.Namespace) -> Any:
    """A Llama of random weights in bfloat16."""
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks, num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 256, vocab_size=options.vocabulary,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    module.train(False)
    return module


def write_gguf(path: Path, module: Any) -> None:
    """The same network in float16, without a vocabulary."""
    config = module.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        target = gguf_name(name.removesuffix(".weight"))
        writer.add_tensor(
            f"{target}.weight", values if values.ndim == 1 else values.astype(np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What llama.cpp calls a module of the network."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}"


def convert(source: Path, target: Path, kind: str) -> None:
    """Let llama.cpp bring every matrix of a .gguf into one type."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.pure = True
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama.cpp could not make {kind}: status {status}")


def main() -> None:
    """Make the files and print a table a width."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--types", nargs="+", default=["Q3_K_S", "Q2_K"], help="one a width")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if len(options.bits) != len(options.types) or options.hidden < 256:
        parser.error("give one of --types for each of --bits, and a --hidden of 256 or more")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        module = network(options)
        print(f"{sum(p.numel() for p in module.parameters()) / 1e9:.3f} billion weights")
        write_gguf(folder / "f16.gguf", module)
        for bits, kind in zip(options.bits, options.types, strict=True):
            convert(folder / "f16.gguf", folder / f"{kind}.gguf", kind)
            linears = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
            plan = {n: QuantSpec(bits, GROUP) for n in linears if n != "lm_head"}
            plan["model.embed_tokens"] = QuantSpec(8, GROUP)
            write_quantized(folder / f"{bits}b", module, plan, stock_readable=False)
            report = quantforge.bench(
                folder / f"{bits}b", gguf=folder / f"{kind}.gguf", threads=options.threads,
                prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens,
                rounds=options.rounds,
            )  # fmt: skip
            print(
                f"\n{bits} bits in groups of {GROUP}; {report.instructions}, {report.threads} "
                f"threads, memory reads {report.read_bandwidth / 1e9:.1f} GB/s"
            )
            for row in report.rows:
                print(
                    f"  {row.name:28}{row.prefill_tokens_a_second:9.1f} prefill "
                    f"{row.decode_tokens_a_second:8.1f} decoded tokens a second, "
                    f"{(row.bytes_a_token or 0) / 1e6:7.0f} MB a token",
                    flush=True,
                )


if __name__ == "__main__":
    main()
