"""A checkpoint's distribution in transformers beside that of its .gguf in llama.cpp.

    quantforge convert out --layout gguf -o out.gguf
    python scripts/compare_llama_cpp.py out out.gguf wiki2_test.txt

The weights are the same, so what differs is arithmetic: llama.cpp rounds the inputs of every
product to 8 bits. Prints how many tokens of the text are the same, the mean KL of llama.cpp's
distribution from transformers', and how often the likeliest token is the same. Needs
llama-cpp-python.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Run both on the beginning of a text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("gguf")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    import llama_cpp

    text = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    tokens = AutoTokenizer.from_pretrained(options.folder)(text)["input_ids"][: options.tokens]
    runtime = llama_cpp.Llama(options.gguf, n_ctx=len(tokens), logits_all=True, verbose=False)
    their_tokens = runtime.tokenize(text.encode(), add_bos=False)[: options.tokens]
    same = sum(a == b for a, b in zip(tokens, their_tokens, strict=True))
    runtime.eval(tokens)
    theirs = torch.from_numpy(np.array(runtime.scores[: len(tokens)])).log_softmax(-1)
    module = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    with torch.no_grad():
        ours = module(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    likeliest = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(
        f"{same} of {len(tokens)} tokens the same, KL {kl:.5f}, "
        f"likeliest token equal {likeliest:.4f}"
    )


if __name__ == "__main__":
    main()
