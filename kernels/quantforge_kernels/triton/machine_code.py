"""Reads compiled kernels: registers, spills, loops, loads and matrix instructions.

NVIDIA's code is disassembled by the `nvdisasm` and `cuobjdump` of the triton package; AMD's is the
text that the compiler wrote. The inner loop is found by its backward branch: among the loops of a
kernel, the longest that holds no other. An instruction is one issue slot of a warp, so that
instructions of the loop / (weights of an iteration / threads) is what a weight costs a thread.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+):")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_REGISTER = re.compile(r"\bR(\d+)\b")
_COPY_WAIT = re.compile(r"DEPBAR\.LE SB0, (\w+)")
_AMD_LOAD = re.compile(r"(global|buffer|flat)_load_")
_AMD_WAIT = re.compile(r"vmcnt\((\d+)\)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_LINE = re.compile(r"^\s+([a-z]\w+)(\s.*)?$")

LOADS = r"LDG\S*\.128|LDGSTS\S*\.128|(global|buffer)_load_dwordx4"  # of 128 bits, any target

# What a multiprocessor or compute unit has: registers (32 bit), warps, shared memory, blocks.
REGISTERS = 65536
MOST_BLOCKS = 32
MOST_WARPS = 64
SHARED = {"sm_80": 167936, "sm_90": 233472}
BLOCK_RESERVE = 1024  # bytes of shared memory that the system takes of each block


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Facts of one compiled kernel.

    Attributes:
        registers: of a thread.
        spills: bytes of local memory of a thread (NVIDIA), or spilled registers (AMD).
        shared: bytes of shared memory of a program.
        loop: the inner loop's instructions, operands included.
        body: all instructions.
    """

    registers: int
    spills: int
    shared: int
    loop: tuple[str, ...]
    body: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions of the inner loop that match a regular expression from their start."""
        return sum(bool(re.match(pattern, line)) for line in self.loop)

    def histogram(self) -> Counter[str]:
        """Instructions of the inner loop by name, without suffixes."""
        return Counter(re.split(r"[.\s]", line, maxsplit=1)[0] for line in self.loop)

    def loads_in_flight(self, pattern: str = LOADS) -> int:
        """The most loads that wait together in the inner loop, running round and round.

        A load into registers waits from its issue to the first instruction that reads or writes
        them or, on AMD, to an `s_waitcnt vmcnt(n)` that leaves fewer. A copy to shared memory
        (LDGSTS) waits for a `DEPBAR.LE SB0, n`, which leaves n groups; LDGDEPBAR ends a group.

        Args:
            pattern: regular expression, matched from their start, of the loads that are counted.
        """
        flight = _Flight(pattern)
        for line in self.loop * 2:  # the second time with what the first left under way
            flight.step(line)
        return flight.most


class _Flight:
    """Loads under way, oldest first, as instructions are issued."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)
        self.waiting: list[tuple[bool, frozenset[str]]] = []  # is it counted, its registers
        self.copies: list[int] = [0]  # counted copies of each group, the open one last
        self.most = 0

    def step(self, line: str) -> None:
        """Issue one instruction."""
        wait = _COPY_WAIT.match(line)
        if wait:
            ended = len(self.copies) - 1
            self.copies = self.copies[max(0, ended - int(wait[1], 0)) :]
        elif line.startswith("LDGDEPBAR"):
            self.copies.append(0)
        elif re.match(r"LDGSTS", line):
            self.copies[-1] += bool(self.pattern.match(line))
        elif _AMD_LOAD.match(line):
            self.waiting.append((bool(self.pattern.match(line)), frozenset()))
        elif line.startswith("s_waitcnt"):
            left_loads = _AMD_WAIT.search(line)
            if left_loads:
                count = int(left_loads[1])
                self.waiting = self.waiting[-count:] if count else []
        else:
            used = set(_REGISTER.findall(line))
            self.waiting = [load for load in self.waiting if not load[1] & used]
            if self.pattern.match(line):
                first = int(_REGISTER.findall(line)[0])
                self.waiting.append((True, frozenset(str(first + i) for i in range(4))))
        under_way = sum(counted for counted, _ in self.waiting) + sum(self.copies)
        self.most = max(self.most, under_way)


def read_code(compiled: Any, target: str) -> Code:
    """Facts of a kernel from `ahead.compile_build`.

    Args:
        compiled: Triton's compiled kernel.
        target: what it was compiled for, e.g. "sm_90" or "gfx942".
    """
    shared = int(compiled.metadata.shared)
    if "cubin" not in compiled.asm:
        return _read_amd(compiled.asm["amdgcn"], shared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        text = _tool("nvdisasm", "-c", str(path))
        usage = _tool("cuobjdump", "-res-usage", str(path))
    registers, stack, local = (
        int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")
    )
    body: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            labels[label[1]] = len(body)
            continue
        found = _SASS.search(line)
        if found:
            body.append(_PREDICATE.sub("", found[1]))
    jumps = []
    for index, line in enumerate(body):
        aim = re.match(r"BRA.*`\((\.L\w+)\)", line)
        if aim and labels.get(aim[1], index + 1) < index:
            jumps.append((labels[aim[1]], index))
    return Code(
        registers=registers,
        spills=stack + local,
        shared=shared,
        loop=_inner(body, jumps),
        body=tuple(body),
    )


def warps_resident(code: Code, target: str, warps: int) -> int:
    """Warps of this kernel that fit a multiprocessor at once, by registers, memory and blocks."""
    per_warp = -(-code.registers // 8) * 8 * 32  # registers are given out in eights
    by_registers = REGISTERS // (per_warp * warps)
    by_memory = SHARED[target] // (code.shared + BLOCK_RESERVE)
    return min(by_registers, by_memory, MOST_BLOCKS, MOST_WARPS // warps) * warps


def _read_amd(text: str, shared: int) -> Code:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    body: list[str] = []
    labels: dict[str, int] = {}
    for line in text.partition(".rodata")[0].splitlines():
        label, found = _AMD_LABEL.match(line), _AMD_LINE.match(line.partition(";")[0])
        if label:
            labels[label[1]] = len(body)
        elif found:
            body.append(line.partition(";")[0].strip())
    jumps = []
    for index, line in enumerate(body):
        aim = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if aim and labels.get(aim[1], index + 1) < index:
            jumps.append((labels[aim[1]], index))
    return Code(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared=shared,
        loop=_inner(body, jumps),
        body=tuple(body),
    )


def _inner(body: list[str], jumps: list[tuple[int, int]]) -> tuple[str, ...]:
    """The longest loop without another inside; empty if there is none.

    Several branches back to the same place, as those of AMD's masked loads, are one loop: it ends
    with the last of them.
    """
    ends: dict[int, int] = {}
    for start, end in jumps:
        ends[start] = max(end, ends.get(start, end))
    loops = list(ends.items())
    inner = [
        (start, end)
        for start, end in loops
        if not any(
            (start, end) != other and start <= other[0] and other[1] <= end for other in loops
        )
    ]
    if not inner:
        return ()
    start, end = max(inner, key=lambda span: span[1] - span[0])
    return tuple(body[start : end + 1])


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the tools in the triton package."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
