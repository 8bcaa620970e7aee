"""Continue a prompt with any causal language model, token by token.

Written out rather than left to `transformers.generate`, so that the same few lines serve packed and
float networks, randomness comes from one explicit seed, and text is available as it appears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.errors import InputError, UsageError
from quantforge.foreign import encode
from quantforge.models.cache import cache_arguments, cache_of

_UNFINISHED = "�"

# Takes token ids that continue a sequence, gives the logits [vocabulary] of the token that follows.
Continuation = Callable[[list[int]], Tensor]


def greedy(module: nn.Module, tokenizer: Any, prompt: str, *, tokens: int = 32) -> str:
    """The most likely continuation, one token after another; without the prompt.

    Raises:
        InputError: the prompt has no tokens or does not fit the model.
        UsageError: `tokens` is negative.
    """
    return "".join(stream(module, tokenizer, prompt, tokens=tokens))


def stream(
    module: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    continuation: Callable[[int], Continuation] | None = None,
) -> Iterator[str]:
    """Yield the continuation in pieces of text as they become certain.

    A token may end inside a character; its text is held back until the character is whole. Ends at
    the model's end token, after `tokens` tokens, or where the model's positions end.

    Args:
        module: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        tokens: most tokens to add.
        temperature: 0 takes the most likely token; 1 samples from the model's distribution.
        top_p: sample among the most likely tokens that hold this share of the probability.
        seed: of the sampling.
        continuation: makes what runs the network, given the longest sequence; None runs the module
            itself with its own cache.

    Raises:
        InputError: the prompt has no tokens or does not fit the model.
        UsageError: an option is out of range.
    """
    _check_options(tokens, temperature, top_p)
    prefix = _encode(module, tokenizer, prompt)
    sampler = _Sampler(temperature, top_p, seed)
    make = continuation or (lambda _: module_continuation(module))
    return _stream(module, tokenizer, prefix, tokens, sampler, make)


def module_continuation(module: nn.Module) -> Continuation:
    """Runs a transformers module with a key-value cache of its own."""
    device, cache = next(module.parameters()).device, None

    def logits(tokens: list[int]) -> Tensor:
        nonlocal cache
        with torch.no_grad():
            output = module(
                input_ids=torch.tensor([tokens], device=device), **cache_arguments(module, cache)
            )
        cache = cache_of(output)
        last: Tensor = output.logits[0, -1]
        return last

    return logits


def _stream(
    module: nn.Module,
    tokenizer: Any,
    prefix: list[int],
    tokens: int,
    sampler: _Sampler,
    make: Callable[[int], Continuation],
) -> Iterator[str]:
    ends = _end_tokens(module, tokenizer)
    positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    room = tokens if positions is None else min(tokens, positions - len(prefix))
    made: list[int] = []
    shown, following = "", prefix
    if room <= 0:
        return
    logits = make(len(prefix) + room)
    for _ in range(room):
        token = sampler.choose(logits(following))
        if token in ends:
            break
        made.append(token)
        following = [token]
        text = tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith(_UNFINISHED) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(made, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest


class _Sampler:
    """Chooses a token from logits; the generator lives on the CPU on any device."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """Index of the chosen token from logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.float().argmax())
        scores = logits.float().cpu()
        share, order = torch.softmax(scores / self.temperature, -1).sort(descending=True)
        # keep a token if those before it hold less than top_p; the first one always stays
        share = share.where(share.cumsum(0) - share < self.top_p, 0.0)
        share[0] = share[0].clamp_min(torch.finfo(share.dtype).tiny)
        return int(order[torch.multinomial(share, 1, generator=self.generator)])


def _check_options(tokens: int, temperature: float, top_p: float) -> None:
    if tokens < 0:
        raise UsageError(f"tokens must not be negative, got {tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be 0 or a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}")


def _encode(module: nn.Module, tokenizer: Any, prompt: str) -> list[int]:
    prefix = encode(tokenizer, prompt)
    if not prefix:
        start = getattr(tokenizer, "bos_token_id", None)
        if start is None:
            raise InputError("the prompt has no tokens and the tokenizer no start token; give text")
        prefix = [int(start)]
    size = getattr(getattr(module, "config", None), "vocab_size", None)
    if size is not None and max(prefix) >= size:
        raise InputError(
            f"the prompt has the token id {max(prefix)}, the model's vocabulary has {size}: the "
            "tokenizer does not belong to this model"
        )
    positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if positions is not None and len(prefix) > positions:
        raise InputError(
            f"the prompt has {len(prefix)} tokens, the model holds {positions}; shorten it"
        )
    return prefix


def _end_tokens(module: nn.Module, tokenizer: Any) -> set[int]:
    found = {getattr(tokenizer, "eos_token_id", None)}
    for name in ("generation_config", "config"):
        value = getattr(getattr(module, name, None), "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value}
    return {int(token) for token in found if token is not None}
