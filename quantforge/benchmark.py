"""How fast a checkpoint runs here, beside what else could run it.

The contenders take turns, so that a neighbour's load hits all of them: the packed network decoded
in one call a token, with exact inputs and with inputs rounded to 8 bits; transformers' own loop
over the packed layers, and over the dequantized network in float32; llama.cpp on a file of the
caller's, where its Python package is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError, UsageError
from quantforge.evaluate.generate import module_continuation
from quantforge.format.manifest import tool_versions
from quantforge.outcomes import BenchReport, SpeedRow
from quantforge.progress import Monitor, ProgressEvent
from quantforge.runtime import speed
from quantforge.runtime.decode import Decoder, obstacle
from quantforge.runtime.load import load

Progress = Callable[[ProgressEvent], None]
Continuation = Callable[[list[int]], Tensor]

_LONGEST_PROMPT = 1 << 14


@dataclass(frozen=True, slots=True)
class _Contender:
    """Something that continues a sequence.

    Attributes:
        name: of the row.
        start: a fresh sequence.
        resident_bytes: memory of its weights; None if unknown.
        bytes_a_token: weights read a token; None if unknown.
    """

    name: str
    start: Callable[[], Continuation]
    resident_bytes: int | None
    bytes_a_token: int | None


def bench(
    checkpoint: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 3,
    head_bits: int | None = None,
    gguf: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> BenchReport:
    """Measure prefill and decoding on this machine's CPU.

    Args:
        checkpoint: folder written by `quantize`.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded after it.
        rounds: turns of every contender; medians are reported.
        head_bits: 8 runs a head kept in 16 bits through an 8-bit copy.
        gguf: file to run in llama.cpp beside it.
        threads: torch's threads meanwhile; None leaves them.
        progress: called after every step.
        cancel: once set, stops with `CancelledError`.

    Raises:
        InputError: the folder is not a whole quantized checkpoint, its network cannot be decoded
            in one call, its context is shorter than what is asked for, or `gguf` is no file.
        UsageError: a count is out of range, or llama.cpp is asked for and not installed.
    """
    if not 1 <= prompt_tokens <= _LONGEST_PROMPT or min(new_tokens, rounds) < 1:
        raise UsageError(
            f"prompt tokens must be 1 to {_LONGEST_PROMPT}, new tokens and rounds at least 1"
        )
    if gguf is not None:
        _check_llama_cpp(Path(gguf))  # before the minutes that the others take
    monitor = Monitor(progress=progress, cancel=cancel)
    with _threads(threads):
        capacity = prompt_tokens + new_tokens
        contenders = list(_contenders(checkpoint, capacity, head_bits, gguf))
        prompt = [5 + 7 * index % 89 for index in range(prompt_tokens)]
        measured: list[list[tuple[float, list[float]]]] = [[] for _ in contenders]
        bandwidths: list[float] = []
        total = rounds * len(contenders)
        for index in range(total):
            contender = contenders[index % len(contenders)]
            monitor.step("bench", index, total, contender.name)
            timed = speed.time_tokens(contender.start(), prompt, new_tokens)
            measured[index % len(contenders)].append(timed)
            if index % len(contenders) == 0:
                bandwidths.append(speed.read_bandwidth())
        monitor.step("bench", total, total, "")
        bandwidth = statistics.median(bandwidths)
        return BenchReport(
            model=str(checkpoint),
            rows=tuple(
                _row(contender, timed, prompt_tokens, bandwidth)
                for contender, timed in zip(contenders, measured, strict=True)
            ),
            read_bandwidth=bandwidth,
            threads=torch.get_num_threads(),
            instructions=speed.instruction_set(),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            versions=tool_versions(),
        )


def _contenders(
    checkpoint: str | Path, capacity: int, head_bits: int | None, gguf: str | Path | None
) -> Iterator[_Contender]:
    for mode in ("exact", "a8"):
        module = load(checkpoint, mode=mode, head_bits=head_bits)
        reason = obstacle(module)
        if reason:
            raise InputError(f"{checkpoint} cannot be decoded in one call a token: {reason}")
        limit = getattr(module.config, "max_position_embeddings", None)
        if isinstance(limit, int) and capacity > limit:
            raise InputError(
                f"prompt and new tokens are {capacity}, the context of {checkpoint} is {limit}: "
                "lower --prompt-tokens or --new-tokens"
            )
        memory, reads = speed.resident_bytes(module), speed.bytes_a_token(module)
        decoder = Decoder(module, capacity)
        start = _restarted(decoder)
        spared = decoder.spared_bytes  # a copy in half the bytes is held, and read instead
        yield _Contender(f"packed, {mode}", start, memory + spared, reads - spared)
        if mode == "exact":
            eager = _eager(module)
            yield _Contender("packed, transformers' loop", eager, memory, reads)
    dense = speed.dequantize_linears(load(checkpoint))
    memory, reads = speed.resident_bytes(dense), speed.bytes_a_token(dense)
    yield _Contender("float32, transformers' loop", _eager(dense), memory, reads)
    if gguf is not None:
        yield _llama_cpp(Path(gguf), capacity)


def _restarted(decoder: Decoder) -> Callable[[], Continuation]:
    def start() -> Continuation:
        decoder.length = 0
        return decoder.logits

    return start


def _eager(module: Any) -> Callable[[], Continuation]:
    return lambda: module_continuation(module)


def _check_llama_cpp(path: Path) -> None:
    """Say what is missing for llama.cpp to run a file."""
    if not path.is_file():
        raise InputError(f"{path} is no file")
    if importlib.util.find_spec("llama_cpp") is None:
        raise UsageError("llama.cpp is not installed; pip install llama-cpp-python")


def _llama_cpp(path: Path, capacity: int) -> _Contender:
    """llama.cpp through its Python package, with as many threads as torch."""
    import llama_cpp

    threads = torch.get_num_threads()
    network = llama_cpp.Llama(
        str(path), n_ctx=capacity + 8, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def logits(tokens: list[int]) -> Tensor:
        network.eval(tokens)
        return torch.as_tensor(network.scores[network.n_tokens - 1])

    def start() -> Continuation:
        network.reset()
        return logits

    size = path.stat().st_size
    return _Contender(f"llama.cpp, {path.name}", start, size, size)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise UsageError(f"threads must be at least 1, got {count}")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(
    contender: _Contender,
    timed: list[tuple[float, list[float]]],
    prompt_tokens: int,
    bandwidth: float,
) -> SpeedRow:
    prefill = statistics.median(seconds for seconds, _ in timed)
    token = statistics.median(seconds for _, times in timed for seconds in times)
    reads = contender.bytes_a_token
    return SpeedRow(
        name=contender.name,
        prefill_tokens_a_second=prompt_tokens / prefill,
        decode_tokens_a_second=1 / token,
        resident_bytes=contender.resident_bytes,
        bytes_a_token=reads,
        share_of_bandwidth=None if reads is None else reads / token / bandwidth,
    )
