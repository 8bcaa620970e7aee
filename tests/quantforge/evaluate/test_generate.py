"""Continuations against the definition: no cache, whole sequence at each step."""

from __future__ import annotations

import collections
import types

import pytest
import torch

from quantforge.errors import InputError, UsageError
from quantforge.evaluate.generate import greedy, stream
from quantforge.testing import tiny_llama


class Bytes:
    """A byte tokenizer: token = byte."""

    eos_token_id = None
    bos_token_id = None

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode(errors="replace")


class Letters(Bytes):
    """Tokens 0..95 are one character each, so that any token can be shown."""

    def __call__(self, text):
        return {"input_ids": [ord(c) - 32 for c in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(t + 32) for t in tokens)


class Script:
    """A "model" that says given bytes, or draws from given logits."""

    config = types.SimpleNamespace(max_position_embeddings=64, eos_token_id=None)

    def __init__(self, said=(), logits=None):
        self.said, self.logits, self.step = said, logits, 0

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, **kwargs):
        return self.forward(**kwargs)

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        logits = self.logits
        if logits is None:
            logits = torch.nn.functional.one_hot(torch.tensor(self.said[self.step]), 256).float()
        self.step += 1
        return types.SimpleNamespace(logits=logits.view(1, 1, -1), past_key_values=None)


def test_greedy_equals_argmax_without_a_cache():
    module, tokenizer = tiny_llama(seed=5), Letters()
    tokens = tokenizer("Hello")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    assert greedy(module, tokenizer, "Hello", tokens=12) == tokenizer.decode(tokens[5:])
    assert greedy(module, tokenizer, "Hello", tokens=0) == ""


def test_sampling_repeats_with_its_seed_only():
    module, tokenizer = tiny_llama(seed=5), Letters()
    texts = ["".join(stream(module, tokenizer, "A", temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    narrow = "".join(stream(module, tokenizer, "A", temperature=1.0, top_p=1e-9, seed=3))
    assert narrow == greedy(module, tokenizer, "A")


def test_sampling_follows_the_truncated_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    module, tokenizer = Script(logits=logits), Letters()
    module.config = types.SimpleNamespace(max_position_embeddings=10**6, eos_token_id=None)
    text = "".join(stream(module, tokenizer, "A", tokens=4000, temperature=1.0, top_p=0.75))
    share = {c: n / 4000 for c, n in collections.Counter(text).items()}
    assert set(share) == {" ", "!"}  # 0.5 + 0.3 reach 0.75, the rest is cut
    assert share[" "] == pytest.approx(0.5 / 0.8, abs=4 * (0.625 * 0.375 / 4000) ** 0.5)


def test_a_character_is_shown_whole():
    said = list("a€b".encode())
    assert list(stream(Script(said), Bytes(), "x", tokens=5)) == ["a", "€", "b"]
    assert list(stream(Script(said), Bytes(), "x", tokens=2)) == ["a", "�"]


def test_stops_at_an_end_token_and_at_the_last_position():
    module, tokenizer = Script(list(b"one two")), Bytes()
    module.generation_config = types.SimpleNamespace(eos_token_id=[ord(" "), 255])
    assert greedy(module, tokenizer, "x", tokens=7) == "one"
    module = Script(list(b"abcdefgh"))
    module.config = types.SimpleNamespace(max_position_embeddings=5, eos_token_id=None)
    assert greedy(module, tokenizer, "xy", tokens=8) == "abc"
    with pytest.raises(InputError, match="6 tokens, the model holds 5"):
        greedy(module, tokenizer, "xxxxxx")


def test_options_out_of_range_fail_at_the_call():
    module, tokenizer = Script(), Bytes()
    for options in ({"tokens": -1}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UsageError, match=next(iter(options))):
            stream(module, tokenizer, "x", **options)
    with pytest.raises(InputError, match="no tokens"):
        greedy(module, tokenizer, "")
