"""What running a packed network costs: bytes it reads a token, and what the memory can deliver."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from quantforge_kernels import qembedding_prepared
from quantforge_kernels.cpu_library import instructions, library, stream
from torch import Tensor, nn

from quantforge.errors import UsageError
from quantforge.runtime.linear import QuantLinear

_STREAM_BYTES = 1 << 28  # beyond the last-level caches of today
_STREAM_ROUNDS = 5

Continuation = Callable[[list[int]], Tensor]


def read_bandwidth() -> float:
    """Bytes a second that torch's threads sum from memory, the median of a few reads of 256 MiB."""
    words = torch.ones(_STREAM_BYTES // 8, dtype=torch.int64)
    stream(words)
    times = []
    for _ in range(_STREAM_ROUNDS):
        began = time.perf_counter()
        stream(words)
        times.append(time.perf_counter() - began)
    return _STREAM_BYTES / statistics.median(times)


def instruction_set() -> str:
    """What the kernels were compiled for."""
    return instructions(library())


def resident_bytes(module: nn.Module) -> int:
    """Memory of all parameters and buffers, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def bytes_a_token(module: Any) -> int:
    """Bytes of weights that one token reads: all but the embedding, of which it reads one row.

    A head is counted, also where it is the embedding's weight.
    """
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    spared = {id(t) for t in (*embedding.parameters(), *embedding.buffers())}
    spared -= {id(t) for t in (*head.parameters(), *head.buffers())}
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in spared)


def dequantize_linears(module: nn.Module) -> nn.Module:
    """Put a float32 linear in place of every packed one; returns the module.

    Raises:
        UsageError: a layer is not in the order of a backend.
    """
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, QuantLinear):
            continue
        prepared = layer.prepared
        if prepared is None:
            raise UsageError(f"{name} runs on no kernels here, so there is nothing to measure")
        weight = qembedding_prepared(torch.arange(layer.out_features), prepared, torch.float32)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
        module.set_submodule(name, linear)
    return module


def time_tokens(
    continuation: Continuation, prompt: list[int], tokens: int
) -> tuple[float, list[float]]:
    """Seconds for the prompt, and for each of `tokens` further tokens, chosen greedily."""
    began = time.perf_counter()
    token = int(continuation(prompt).argmax())
    prefill = time.perf_counter() - began
    times = []
    for _ in range(tokens):
        began = time.perf_counter()
        token = int(continuation([token]).argmax())
        times.append(time.perf_counter() - began)
    return prefill, times
