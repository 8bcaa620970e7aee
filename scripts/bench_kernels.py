"""Speed of the packed CPU kernels beside torch, ggml and what the memory can stream.

    python scripts/bench_kernels.py --json kernels.json
    python scripts/bench_kernels.py --ggml FOLDER_WITH_LIBGGML --threads 1

Every contender works through copies of its weight that together are at least twice the last-level
cache, so that each product reads memory; the streaming read sums the same bytes with the same
threads. Contenders take turns, and a ratio is the median over rounds of the ratio within a round,
so that a neighbour's load hits both sides of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantforge_kernels import Geometry, cpu_backend, cpu_library, pack
from quantforge_kernels.cpu_library import Weight
from quantforge_kernels.native import pointer
from torch import Tensor

SHAPES = ((4096, 4096), (11008, 4096))
GROUP = 128
# ggml's type of the nearest bits a weight: its number, its name, bits a weight
GGML_TYPES = {2: (10, "Q2_K", 2.625), 3: (11, "Q3_K", 3.4375), 4: (2, "Q4_0", 4.5)}

Call = Callable[[int], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to multiply.

    Attributes:
        calls: one for each copy of its weight.
        nbytes: of one copy.
    """

    calls: list[Call]
    nbytes: int

    def seconds(self) -> float:
        """For one product, the median over the copies: a time slice lost to a neighbour is one."""
        times = []
        for index, call in enumerate(self.calls):
            began = time.perf_counter()
            call(index)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(p.read_text().strip().removesuffix("K")) * 1024 for p in sizes]
    return max(found, default=32 << 20)


def copies_of(nbytes: int) -> int:
    """How many copies are twice the last-level cache."""
    return max(2, -(-2 * cache_bytes() // nbytes))


def packed(shape: tuple[int, int], bits: int) -> list[Weight]:
    """Copies of a random packed weight."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, shape, generator=generator).to(torch.uint8)
    scale = torch.randn(shape[0], shape[1] // GROUP, generator=generator).bfloat16() * 0.02
    geometry = Geometry(out_features=shape[0], in_features=shape[1], bits=bits, group_size=GROUP)
    first = cpu_library.prepare(cpu_library.library(), pack(codes, bits), scale, None, geometry)
    count = copies_of(first.codes.nbytes)
    return [
        first,
        *(Weight(first.codes.clone(), first.scale, None, geometry) for _ in range(count - 1)),
    ]


def packed_contenders(shape: tuple[int, int], bits: int, rows: int) -> dict[str, Contender]:
    """The streaming read and our modes."""
    weights = packed(shape, bits)
    nbytes = weights[0].codes.nbytes + weights[0].scale.nbytes
    library = cpu_library.library()
    x = torch.randn(rows, shape[1])
    half = x.bfloat16()

    def stream(weight: Weight) -> Call:
        count, threads = weight.codes.nbytes // 8, torch.get_num_threads()
        return lambda _: library.qf_stream(
            pointer(weight.codes), ctypes.c_int64(count), ctypes.c_int(threads)
        )

    def product(weight: Weight, states: Tensor, mode: str) -> Call:
        tensors = (weight.codes, weight.scale, weight.zero)
        return lambda _: cpu_backend.linear(states, *tensors, weight.geometry, None, mode)

    modes = {"a8": (x, "a8"), "exact float32": (x, "exact"), "exact bfloat16": (half, "exact")}
    made = {"stream": Contender(calls=[stream(w) for w in weights], nbytes=nbytes)}
    for name, (states, mode) in modes.items():
        made[name] = Contender(calls=[product(w, states, mode) for w in weights], nbytes=nbytes)
    return made


def torch_contenders(shape: tuple[int, int], rows: int) -> dict[str, Contender]:
    """Torch's bfloat16 product and its 4-bit one."""
    x = torch.randn(rows, shape[1]).bfloat16()
    dense = [torch.randn(shape).bfloat16() for _ in range(copies_of(2 * shape[0] * shape[1]))]
    made = {
        "torch bfloat16": Contender(
            calls=[lambda _, w=w: torch.nn.functional.linear(x, w) for w in dense],
            nbytes=dense[0].nbytes,
        )
    }
    codes = torch.randint(16, shape, dtype=torch.int32)
    four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.randn(shape[1] // GROUP, shape[0], 2).bfloat16()
    fours = [four.clone() for _ in range(copies_of(four.nbytes))]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    made["torch int4pack"] = Contender(
        calls=[lambda _, w=w: product(x, w, GROUP, scales) for w in fours],
        nbytes=four.nbytes + scales.nbytes,
    )
    return made


class Ggml:
    """`ggml_mul_mat` through ctypes, as llama.cpp's graph runs it without repacked buffers.

    Args:
        folder: holds libggml-base and libggml-cpu.
    """

    class _Parameters(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_size_t),
            ("buffer", ctypes.c_void_p),
            ("no_alloc", ctypes.c_bool),
        )

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for name in ("init", "new_tensor_2d", "mul_mat", "new_graph", "get_data"):
            getattr(self.base, f"ggml_{name}").restype = ctypes.c_void_p
        self.base.ggml_quantize_chunk.restype = ctypes.c_size_t

    def contender(self, shape: tuple[int, int], bits: int, rows: int) -> Contender:
        """Copies of a random weight of the type nearest to `bits`."""
        number, _, a_weight = GGML_TYPES[bits]
        out_features, in_features = shape
        nbytes = int(out_features * in_features * a_weight / 8)
        count = copies_of(nbytes)
        # Every product takes a new work buffer from the context, which gives none back.
        size = count * (nbytes + (1 << 20)) + (2 << 30)
        context = ctypes.c_void_p(self.base.ggml_init(self._Parameters(size, None, False)))
        width, height = ctypes.c_int64(in_features), ctypes.c_int64(out_features)
        source = torch.randn(shape) * 0.02
        x = self.base.ggml_new_tensor_2d(context, 0, width, ctypes.c_int64(rows))
        states = torch.randn(rows, in_features)
        address = self.base.ggml_get_data(ctypes.c_void_p(x))
        ctypes.memmove(address, states.data_ptr(), states.nbytes)
        calls: list[Call] = []
        for _ in range(count):
            weight = self.base.ggml_new_tensor_2d(context, number, width, height)
            data = ctypes.c_void_p(self.base.ggml_get_data(ctypes.c_void_p(weight)))
            if not calls:
                first = data
                self.base.ggml_quantize_chunk(
                    number, pointer(source), data, ctypes.c_int64(0), height, width, None
                )
            else:
                ctypes.memmove(data, first, nbytes)
            product = self.base.ggml_mul_mat(context, ctypes.c_void_p(weight), ctypes.c_void_p(x))
            graph = self.base.ggml_new_graph(context)
            self.base.ggml_build_forward_expand(ctypes.c_void_p(graph), ctypes.c_void_p(product))
            calls.append(self._run(context, graph))
        return Contender(calls=calls, nbytes=nbytes)

    def _run(self, context: ctypes.c_void_p, graph: int) -> Call:
        threads = torch.get_num_threads()
        return lambda _: self.cpu.ggml_graph_compute_with_ctx(
            context, ctypes.c_void_p(graph), threads
        )


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds a product, round by round, in turns."""
    for contender in contenders.values():
        contender.seconds()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(contender.seconds())
    return times


def ratio(over: list[float], under: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def rows_of(
    shape: tuple[int, int], bits: int, rows: int, *, rounds: int, ggml: Ggml | None
) -> list[dict[str, Any]]:
    """Table rows of one weight and one number of rows of x."""
    contenders = packed_contenders(shape, bits, rows) | torch_contenders(shape, rows)
    if ggml is not None:
        contenders[f"ggml {GGML_TYPES[bits][1]}"] = ggml.contender(shape, bits, rows)
    times = measure(contenders, rounds)
    ours = ("a8", "exact float32", "exact bfloat16")
    others = [name for name in contenders if name not in (*ours, "stream")]
    made = []
    for name, contender in contenders.items():
        median = statistics.median(times[name])
        row: dict[str, Any] = {
            "shape": list(shape), "bits": bits, "rows": rows, "kernel": name,
            "microseconds": 1e6 * median, "gigabytes_a_second": contender.nbytes / median / 1e9,
        }  # fmt: skip
        if name in ours:
            row["share_of_stream"] = ratio(times["stream"], times[name])
            row["times_faster_than"] = {o: ratio(times[o], times[name]) for o in others}
        made.append(row)
    return made


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--ggml", type=Path, help="folder with libggml-base.so, libggml-cpu.so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ggml = None if options.ggml is None else Ggml(options.ggml)
    machine = {
        "instructions": cpu_library.instructions(cpu_library.library()),
        "threads": options.threads,
        "last_level_cache": cache_bytes(),
        "torch": torch.__version__,
    }
    print(machine)
    results = []
    for shape in SHAPES[: options.shapes]:
        for bits in options.bits:
            for rows in options.rows:
                made = rows_of(shape, bits, rows, rounds=options.rounds, ggml=ggml)
                results += made
                print(f"\n{shape[0]} x {shape[1]}, {bits} bits, group {GROUP}, {rows} rows of x")
                for row in made:
                    line = f"  {row['kernel']:16}{row['microseconds']:10.0f} us"
                    line += f"{row['gigabytes_a_second']:8.1f} GB/s"
                    if "share_of_stream" in row:
                        line += f"  {row['share_of_stream']:5.2f} of the stream"
                        faster = row["times_faster_than"].items()
                        line += "".join(f", {value:.2f}x {name}" for name, value in faster)
                    print(line)
    if options.json is not None:
        report = {"machine": machine, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
