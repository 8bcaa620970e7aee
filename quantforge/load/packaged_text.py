"""Calibration text on a machine without a network: Python's own manual, or the model itself.

"pydoc" is the text of `pydoc_data.topics`, 465,000 characters of technical English that come with
every CPython. "self" is sampled from the model: half of it after the opening of a user's turn of
its chat template, half after a single random token, as in data-free quantization (LLM-QAT, Liu et
al. 2023). Sampling is a batched decode with a key-value cache in bfloat16, in pieces of
`PIECE_LENGTH` tokens, because the cost of attention to the cache grows with the length; for one
query a row, plain matrix products are twice as fast on CPUs as the fused attention kernel. The
rounded weights and the cache are where the float network is: of a large one in scratch files, since
both grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantforge.capture import plain_attention
from quantforge.files import atomic_path, cache_root, fingerprint
from quantforge.foreign import encode
from quantforge.load.documents import through_template
from quantforge.machine import machine_traits
from quantforge.memory import release_freed
from quantforge.models import Model
from quantforge.models.cache import cache_arguments
from quantforge.numerics import draw_categorical
from quantforge.progress import Monitor

PIECE_LENGTH = 128
BATCH = 128
# Decoding steps between two returns of freed memory. Keys repeated for all heads grow at every
# step, so the gap that one leaves is too small for the next: up to 0.7 GB of gaps, by chance.
RELEASE_EVERY = 32
TEMPERATURE = 1.0
MARK = "\N{REPLACEMENT CHARACTER}"


def pydoc_text() -> str:
    """The topics of Python's manual, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def sampled_tokens(
    model: Model, count: int, *, seed: int, monitor: Monitor, temperature: float = TEMPERATURE
) -> Tensor:
    """[count] int64 tokens drawn from the model, pieces of both kinds in turn.

    Args:
        model: the float network; its weights and settings are as before afterwards.
        count: tokens wanted.
        seed: of the only generator used.
        monitor: told every decoding step; its cancel event stops the sampling.
        temperature: logits are divided by it.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = -(-count // PIECE_LENGTH)
    opening = _chat_opening(model.tokenizer)
    chat_pieces = pieces // 2 if opening else 0
    jobs: list[list[int]] = [[]] * (pieces - chat_pieces) + [opening] * chat_pieces
    with plain_attention(model.module):
        rows = _sample(model, jobs, generator, monitor, temperature)
    free, chat = rows[: pieces - chat_pieces], rows[pieces - chat_pieces :]
    if not chat_pieces:
        return free.reshape(-1)[:count]
    paired = torch.stack([free[:chat_pieces], chat], dim=1).reshape(-1)
    return torch.cat([paired, free[chat_pieces:].reshape(-1)])[:count]


def remembered_tokens(
    model: Model, count: int, *, seed: int, monitor: Monitor, fresh: bool = False
) -> Tensor:
    """`sampled_tokens`, kept in the cache: another budget does not wait for the same text again.

    With `fresh`, and where the cached text cannot be read, it is sampled again; a cache that cannot
    be written is done without.
    """
    key = fingerprint(
        model.source.fingerprint, count, seed, TEMPERATURE, PIECE_LENGTH, BATCH, torch.__version__,
        _chat_opening(model.tokenizer), machine_traits(),
    )  # fmt: skip
    path = cache_root() / "sampled" / f"{key[:32]}.safetensors"
    kept = None if fresh else _read_tokens(path)
    if kept is not None and kept.shape == (count,):
        return kept
    tokens = sampled_tokens(model, count, seed=seed, monitor=monitor)
    with suppress(OSError, SafetensorError), atomic_path(path) as temporary:
        save_file({"tokens": tokens.contiguous()}, temporary)
    return tokens


def _read_tokens(path: Path) -> Tensor | None:
    """Tokens of a file that `remembered_tokens` wrote; None where there is no such file."""
    try:
        return load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None


def _chat_opening(tokenizer: Any) -> list[int]:
    """Tokens that open a user's turn, after the system message if the template has one."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return []
    message = [{"role": "user", "content": MARK}]
    opening = through_template(message, tokenizer, "a user's turn").partition(MARK)[0]
    return encode(tokenizer, opening, add_special_tokens=False)


def _sample(
    model: Model,
    prompts: list[list[int]],
    generator: torch.Generator,
    monitor: Monitor,
    temperature: float,
) -> Tensor:
    """[prompts, PIECE_LENGTH]: what follows each prompt; equal prompts are batched."""
    step = _step_function(model)
    rows: list[Tensor] = []
    starts = _ordinary_tokens(model)
    batches = _batches(prompts)
    for index, (prompt, size) in enumerate(batches):
        if prompt:
            given = torch.tensor(prompt).expand(size, -1)
            pieces = []
        else:
            chosen = torch.randint(len(starts), (size, 1), generator=generator)
            given = starts[chosen]
            pieces = [given]
        cache = _new_cache(model, len(prompt) + PIECE_LENGTH)
        while sum(piece.shape[1] for piece in pieces) < PIECE_LENGTH:
            monitor.step(
                "sample text", index * PIECE_LENGTH + len(pieces), len(batches) * PIECE_LENGTH
            )
            shares = torch.softmax(step(given, cache) / temperature, dim=-1)
            given = draw_categorical(shares, generator)
            pieces.append(given)
            if len(pieces) % RELEASE_EVERY == 0:
                release_freed()
        rows.append(torch.cat(pieces, dim=1))
        del cache  # before the next batch has one
        release_freed()
    return torch.cat(rows)


def _batches(prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """Runs of equal prompts as (prompt, size), at most `BATCH` long."""
    batches: list[tuple[list[int], int]] = []
    for prompt in prompts:
        if batches and batches[-1][0] == prompt and batches[-1][1] < BATCH:
            batches[-1] = (prompt, batches[-1][1] + 1)
        else:
            batches.append((prompt, 1))
    return batches


def _ordinary_tokens(model: Model) -> Tensor:
    """[tokens] ids a text may begin with: the vocabulary without special tokens."""
    embedding: Any = model.module.get_submodule(model.architecture.embedding)
    special = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    size = int(embedding.num_embeddings)
    if model.tokenizer is not None:
        size = min(size, len(model.tokenizer))
    return torch.tensor([token for token in range(size) if token not in special])


def _new_cache(model: Model, capacity: int) -> Any:
    from quantforge.load.key_value_cache import reserved_cache

    network: Any = model.module
    return reserved_cache(network.config, capacity, model.scratch)


def _step_function(model: Model) -> Callable[[Tensor, Any], Tensor]:
    """A function (tokens [B, T], cache) → float32 logits [B, vocabulary] of the last position.

    All tokens but the last go through the body alone: for one position of many, torch multiplies by
    the head as a batch and copies it for every row, which is gigabytes.
    """
    parameters = dict(model.module.named_parameters())
    device = next(iter(parameters.values())).device
    dtype = torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    scratch = model.scratch
    weights = {
        name: tensor.detach()
        if tensor.dtype == dtype
        else scratch.empty(tensor.shape, dtype).copy_(tensor.detach())
        if scratch.on_disk
        else tensor.detach().to(dtype)
        for name, tensor in parameters.items()
    }
    path = model.architecture.blocks.rpartition(".")[0]
    body: Any = model.module.get_submodule(path)
    inside = {n.removeprefix(f"{path}."): w for n, w in weights.items() if n.startswith(f"{path}.")}

    def step(tokens: Tensor, cache: Any) -> Tensor:
        before, last = tokens[:, :-1].to(device), tokens[:, -1:].to(device)
        with torch.inference_mode():
            if before.shape[1]:
                given = {"input_ids": before, **cache_arguments(body, cache)}
                torch.func.functional_call(body, inside, kwargs=given)
            given = {"input_ids": last, **cache_arguments(model.module, cache)}
            output: Any = torch.func.functional_call(model.module, weights, kwargs=given)
            logits: Tensor = output.logits[:, -1]
            return logits.float().cpu()

    return step


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are native; emulated ones are slower than float32."""
    if device.type != "cpu":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
