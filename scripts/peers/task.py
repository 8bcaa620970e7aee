"""What every contestant of `bench_peers.py` is given and what it answers.

A contestant is a program of this folder, run in a process of its own by the interpreter that has
its library. It reads a Hugging Face folder and a file of tokens, quantizes, writes the dequantized
weights of all linears it quantized, and prints one line of JSON. This module needs torch and
safetensors only, so that any peer's environment can import it.

Timed is the quantization alone: imports, loading the model and the tokens, and writing the weights
are outside. CPU seconds are user and system time of all threads and of all processes started below.
The peak of resident memory is the process's own since it was started, read before the weights are
collected for writing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = "tokens"  # name of the tensor in the token file


@dataclass(frozen=True, kw_only=True)
class Task:
    """One quantization.

    Attributes:
        model: Hugging Face folder.
        tokens: safetensors file with [sequences, length] int64 tokens.
        output: safetensors file for the dequantized weights.
        method: what the contestant calls its method.
        bits: width of a code.
        group_size: weights of a row that share a scale; -1 for the whole row.
        symmetric: no zero-points.
        batch: sequences a forward pass.
        dtype: in which a peer loads the model; "auto" is its own choice.
        threads: of matrix products.
        settings: further options, by the contestant's own names.
    """

    model: str
    tokens: str
    output: str
    method: str
    bits: int
    group_size: int
    symmetric: bool
    batch: int
    dtype: str
    threads: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The command line that `parse` reads back."""
        return [
            *("--model", self.model, "--tokens", self.tokens, "--output", self.output),
            *("--method", self.method, "--bits", str(self.bits)),
            *(f"--group-size={self.group_size}", "--batch", str(self.batch)),
            *(["--symmetric"] if self.symmetric else []),
            *("--dtype", self.dtype, "--threads", str(self.threads)),
            *("--settings", json.dumps(dict(self.settings))),
        ]


def parse(argv: list[str] | None = None) -> Task:
    """A contestant's command line."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--tokens", "--output", "--method"):
        parser.add_argument(name, required=True)
    for name in ("--bits", "--group-size", "--batch", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--settings", type=json.loads, default={})
    return Task(**vars(parser.parse_args(argv)))


@dataclass(kw_only=True)
class Answer:
    """What a contestant found; becomes the line of JSON.

    Attributes:
        cpu_seconds: of the quantization, all threads and all processes below.
        wall_seconds: of the same.
        peak_bytes: largest resident memory of the process, loading included.
        versions: library → version.
        notes: what a reader of the numbers must know.
    """

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measures its body."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.cpu_seconds = _cpu_seconds() - cpu
        self.wall_seconds = time.perf_counter() - wall
        self.peak_bytes = peak_memory()

    def send(self, reply: int, weights: Mapping[str, Any], output: str) -> None:
        """Write the weights and print the line.

        Args:
            reply: descriptor from `keep_stdout`.
            weights: layer name → dequantized [out, in] weight.
            output: safetensors file.
        """
        import torch  # here, so that a contestant sets the threads before torch starts
        from safetensors.torch import save_file

        tensors = {}
        for name, weight in weights.items():
            tensors[name] = weight.detach().to("cpu", torch.float32).contiguous().clone()
        save_file(tensors, output)
        digest = hashlib.sha256(Path(output).read_bytes()).hexdigest()
        line = json.dumps({**vars(self), "layers": len(tensors), "sha256": digest})
        os.write(reply, (line + "\n").encode())


def keep_stdout() -> int:
    """Standard output for the answer alone: whatever is printed from now on goes to stderr."""
    sys.stdout.flush()
    reply = os.dup(1)
    os.dup2(2, 1)
    return reply


def read_tokens(path: str) -> Any:
    """[sequences, length] int64 tokens of a token file."""
    from safetensors.torch import load_file

    return load_file(path)[TOKENS]


def named_dtype(name: str) -> Any:
    """Dtype of torch by its name; "auto" stays what it is."""
    import torch

    return name if name == "auto" else getattr(torch, name)


def peak_memory() -> int:
    """Largest resident memory of this process and of its finished children, in bytes.

    Linux's own count of this program: `ru_maxrss` would start from the memory of the process that
    launched it.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    status = Path("/proc/self/status")
    if not status.exists():
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return max(children, int(line.split()[1]) * 1024)
    raise RuntimeError("the kernel does not tell the peak of resident memory")


def _cpu_seconds() -> float:
    """User and system time of this process, its finished children and its living descendants."""
    spent = os.times()
    own = spent.user + spent.system + spent.children_user + spent.children_system
    return own + _descendants_seconds()


def _descendants_seconds() -> float:
    """The same of processes that still run (a compiler's workers, say); 0 without /proc."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        process = int(file.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(map(int, fields[11:15]))  # user, system, the same of ended children
    total = 0
    for process, spent in ticks.items():
        above = parents.get(process)
        while above is not None and above != os.getpid():
            above = parents.get(above)
        total += 0 if above is None else spent
    return total / os.sysconf("SC_CLK_TCK")
