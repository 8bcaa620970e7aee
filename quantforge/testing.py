"""Tiny networks and data for tests and scripts; the library itself never imports this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def tiny_llama(
    *,
    seed: int = 0,
    hidden: int = 64,
    intermediate: int = 128,
    blocks: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = 96,
    tied: bool = True,
) -> Any:
    """A randomly initialised float32 LlamaForCausalLM in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).train(False)


def markov_tokens(sequences: int, length: int, *, vocabulary: int = 96, seed: int = 0) -> Tensor:
    """[sequences, length] int64 tokens of a sparse first-order Markov chain: learnable text."""
    table = torch.Generator().manual_seed(1234)
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=table)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(sequences, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocabulary, (sequences,), generator=generator)
    for step in range(1, length):
        choice = torch.multinomial(
            torch.tensor([0.55, 0.25, 0.15, 0.05]).expand(sequences, 4), 1, generator=generator
        )
        tokens[:, step] = successors[tokens[:, step - 1]].gather(1, choice).squeeze(1)
    return tokens


def train(module: nn.Module, *, steps: int = 150, seed: int = 0, vocabulary: int = 96) -> nn.Module:
    """Train a tiny causal model on `markov_tokens` so that its layers matter; returns it."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(steps):
        batch = markov_tokens(16, 48, vocabulary=vocabulary, seed=seed * 100_003 + step)
        loss = module(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def save_tiny_checkpoint(folder: Path, *, shards: int = 1, seed: int = 0, **shape: Any) -> Path:
    """Write a trained tiny Llama with a byte-level tokenizer as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    module = train(tiny_llama(seed=seed, vocabulary=256, **shape), vocabulary=256, seed=seed)
    size = sum(p.numel() * 4 for p in module.parameters())
    module.save_pretrained(folder, max_shard_size=size // shards + 4096)  # type: ignore[operator]
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
