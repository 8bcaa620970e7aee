"""What each part of the search is worth: sensitivities, interactions, refinement, budget by budget.

    python scripts/ablate_search.py llama --calibration wiki2_valid.txt --text wiki2_test.txt \
        --text lambada.jsonl --budgets 2.5 3.0 3.5 --full --probes 60 --json ablation.json

Every method plans from the same candidates, with the same one-pass compensation, and is corrected
by the same measured uniform networks. A method is

    ESTIMATOR[+sparse | +full][+refined | +SOLVER]    a value of --sensitivity; pairs of near or
                                            of all layers; `--rounds` rounds of refinement; a value
                                            of search.solver

Rows of the first table: budget in stored bits, method, stage, stored bits, predicted KL; then for
the held-out tokens and for every text KL ± its standard error over windows; then for each of them
the paired difference in KL to the uniform hull. The stage is "one-pass" for the integers that the
search chose among, and with `--full` also "full", after all that the recipe does. The hull is the
lower hull of the uniform networks' held-out KL, straight in its logarithm, read at the budget: on
every text from the same two networks, compensated as the row's stage says; window by window it is
linearised around its mean, which gives it windows to pair.

The second table says how the predicted losses of single layers agree with measured ones: `--probes`
layers, evenly spread over the network, each quantized by itself to each of `--probe-specs`,
measured on all held-out tokens. Spearman's and Kendall's rank correlations over all probes, and
Spearman's over the layers at one spec, averaged over the specs; ± is the standard deviation over
bootstrap samples of layers.

What is chosen is chosen on held-out tokens; texts are only shown. Everything is printed as it comes
and written to `--json` after every network, so that an interrupted run keeps its rows. `--settings`
gives recipe keys, e.g. '{"search.bits": [2, 3, 4]}'.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import (
    HELD_OUT,
    add_common_arguments,
    cpu_timer,
    on_texts,
    opened,
    parameters_restored,
    references,
)
from scipy.stats import kendalltau, spearmanr

from quantforge.assembling import StoredWeights, changed_weights
from quantforge.compilation import Job, Measurement
from quantforge.evaluate.quality import ReferenceOutputs, paired
from quantforge.hull import lower_hull
from quantforge.planning import priced
from quantforge.recipe import Recipe
from quantforge.results import CurvePoint, Quality
from quantforge.search.allocate import uniform_plans
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.search.solvers import SOLVERS
from quantforge.types import BitPlan, QuantSpec, Sensitivity

METHODS = (
    "hawq", "hawq-v2", "fisher-factored", "fisher-exact", "fisher", "fisher+sparse", "fisher+full",
    "fisher+refined",
)  # fmt: skip
HULL = "uniform hull"
ONE_PASS, FULL = "one-pass", "full"
RESAMPLES = 1000
# Probes measured between two writes.
CHUNK = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured network, or the hull read at a budget.

    Attributes:
        budget: stored bits a weight.
        method: as on the command line, or "uniform hull".
        stage: "one-pass" or "full".
        stored_bits: average stored bits a weight.
        predicted: KL in nats that the method predicted; None for the hull.
        cpu_seconds: to find and make it, process time of all threads, shared measurements aside.
        qualities: held-out or text → measurement.
    """

    budget: float
    method: str
    stage: str
    stored_bits: float
    predicted: float | None
    cpu_seconds: float
    qualities: dict[str, Quality]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A network in which one layer is quantized.

    Attributes:
        layer: its name.
        spec: what it is quantized to.
        kl: measured on all held-out tokens.
        kl_stderr: its standard error over windows.
    """

    layer: str
    spec: str
    kl: float
    kl_stderr: float


@dataclass(kw_only=True)
class Results:
    """All that was measured, written again with every change.

    Attributes:
        path: of the JSON; None writes nothing.
        rows: of the first table.
        probes: of the second.
        correlations: estimator → name → value and standard deviation.
    """

    path: Path | None
    rows: list[Row] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    correlations: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def hulls(self) -> dict[tuple[float, str], Row]:
        """(budget, stage) → the hull's row."""
        return {(row.budget, row.stage): row for row in self.rows if row.method == HULL}

    def add(self, row: Row) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        print(line(row, self.hulls.get((row.budget, row.stage))), flush=True)
        self.write()

    def write(self) -> None:
        """Write everything so far."""
        if self.path is not None:
            document = {
                "rows": [asdict(row) for row in self.rows],
                "probes": [asdict(probe) for probe in self.probes],
                "correlations": self.correlations,
            }
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
            temporary.replace(self.path)


class Maker:
    """Makes and measures networks; a plan that was measured before is not measured again."""

    def __init__(self, job: Job, options: argparse.Namespace) -> None:
        self.job, self.options = job, options
        self.texts: Mapping[str, ReferenceOutputs] = references(job, options)
        self._known: dict[tuple[Any, ...], tuple[dict[str, Quality], float]] = {}

    def measured(
        self, plan: BitPlan, measurement: Measurement, stage: str
    ) -> tuple[dict[str, Quality], float]:
        """Qualities of a plan's network, and the CPU seconds it took to make."""
        key = (stage, *plan.assignment.values())
        if key not in self._known:
            make = self._one_pass if stage == ONE_PASS else self._full
            self._known[key] = make(plan, measurement)
        return self._known[key]

    def _one_pass(
        self, plan: BitPlan, measurement: Measurement
    ) -> tuple[dict[str, Quality], float]:
        _, store = measurement.needed_for_search()
        with changed_weights(self.job.model) as loan:
            with cpu_timer() as spent:
                loan.put(StoredWeights(plan, store))
            return self._qualities(), spent[0]

    def _full(self, plan: BitPlan, measurement: Measurement) -> tuple[dict[str, Quality], float]:
        with parameters_restored(self.job):
            with cpu_timer() as spent:
                for _ in self.job.quantize(plan, measurement):
                    pass
            print("".join(f"  {note}\n" for note in self.job.notes), end="")
            self.job.notes.clear()
            return self._qualities(), spent[0]

    def _qualities(self) -> dict[str, Quality]:
        held_out = self.job.measure_held_out(text=HELD_OUT)
        return {HELD_OUT: held_out, **on_texts(self.job, self.texts, self.options)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print both tables; `--json` also writes every number."""
    options = parse(argv)
    asked = {"evaluate.prompts": [], "evaluate.precision": options.precision}
    job = opened(options, asked | json.loads(options.settings))
    results = Results(path=Path(options.json) if options.json else None)
    maker, base = Maker(job, options), job.recipe
    print(head(maker.texts))
    tables: dict[str, Sensitivity] = {}
    for method in options.methods:
        job.recipe = recipe_of(base, method, options.rounds)
        with cpu_timer() as spent, job.measure(fresh=options.fresh and not tables) as measurement:
            if not tables:
                for budget in options.budgets:
                    add_hull(results, maker, measurement, budget, options)
            tables.setdefault(method.partition("+")[0], measurement.needed_for_search()[0])
            for budget in options.budgets:
                add_plan(results, maker, measurement, method, budget, options)
            if options.probes and not results.probes:
                measure_probes(results, job, measurement, options)
        print(f"  {method}: {spent[0]:.0f} CPU s in all", flush=True)
        if results.probes:
            correlations = {name: agreement(results.probes, tables[name]) for name in tables}
            results.correlations = correlations
            results.write()
    job.recipe = base
    if results.probes:
        print(correlation_table(results.correlations))
    print(f"load average {os.getloadavg()[0]:.1f}")


def recipe_of(base: Recipe, method: str, rounds: int) -> Recipe:
    """The recipe of a method.

    Raises:
        ValueError: it asks for something unknown.
    """
    estimator, *extras = method.split("+")
    search: dict[str, Any] = {"interactions": "none", "refine": 0}
    for extra in extras:
        if extra in ("sparse", "full"):
            search["interactions"] = extra
        elif extra == "refined":
            search["refine"] = rounds
        elif extra in SOLVERS:
            search["solver"] = extra
        else:
            raise ValueError(f"{method}: {extra} is neither sparse, full, refined nor a solver")
    return base.model_copy(
        update={
            "calibrate": base.calibrate.model_copy(update={"estimator": estimator}),
            "search": SearchConfig.model_validate(base.search.model_dump() | search),
        }
    )


def add_plan(
    results: Results,
    maker: Maker,
    measurement: Measurement,
    method: str,
    budget: float,
    options: argparse.Namespace,
) -> None:
    """Rows of one method at one budget."""
    with cpu_timer() as spent:
        plan = maker.job.plans.decide(measurement, Budget.parse(f"{budget:g}bit")).plan
    for stage in stages(options):
        qualities, seconds = maker.measured(plan, measurement, stage)
        results.add(
            Row(
                budget=budget, method=method, stage=stage, stored_bits=plan.stored_bits,
                predicted=plan.predicted_loss, cpu_seconds=spent[0] + seconds, qualities=qualities,
            )
        )  # fmt: skip


def add_hull(
    results: Results,
    maker: Maker,
    measurement: Measurement,
    budget: float,
    options: argparse.Namespace,
) -> None:
    """Rows of the uniform hull at one budget; none where no uniform network is on one side."""
    ends = hull_ends(measurement.uniform, budget)
    if ends is None:
        print(f"no uniform networks around {budget:g} bits were measured: no hull to compare with")
        return
    sensitivity, _ = measurement.needed_for_search()
    plans = {plan.budget: plan for plan in uniform_plans(sensitivity)}
    pair = [plans[one.name] for one in ends]
    for stage in stages(options):
        found = [maker.measured(plan, measurement, stage) for plan in pair]
        share = (budget - pair[0].stored_bits) / (pair[1].stored_bits - pair[0].stored_bits)
        results.add(
            Row(
                budget=budget, method=HULL, stage=stage, stored_bits=budget, predicted=None,
                cpu_seconds=sum(seconds for _, seconds in found),
                qualities={
                    text: between(found[0][0][text], found[1][0][text], share)
                    for text in found[0][0]
                },
            )
        )  # fmt: skip


def hull_ends(points: Sequence[CurvePoint], bits: float) -> tuple[CurvePoint, CurvePoint] | None:
    """The two measured networks between which the lower hull is read."""
    at = {(point.stored_bits, point.quality.kl): point for point in points}
    hull = lower_hull(list(at))
    for left, right in itertools.pairwise(hull):
        if left[0] <= bits <= right[0]:
            return at[left], at[right]
    return None


def between(left: Quality, right: Quality, share: float) -> Quality:
    """A network between two, straight in the logarithm of the KL.

    Its windows are those of the value linearised around the means, so they average to it and pair
    with other networks' windows; cross-entropies and agreements lie between linearly.
    """
    kl = math.exp((1 - share) * math.log(left.kl) + share * math.log(right.kl))
    parts = ((1 - share) * kl / left.kl, share * kl / right.kl)

    def mixed(first: Sequence[float], second: Sequence[float], a: float, b: float) -> list[float]:
        return [a * x + b * y for x, y in zip(first, second, strict=True)]

    windows = mixed(left.window_kl, right.window_kl, *parts)
    nll = mixed(left.window_nll, right.window_nll, 1 - share, share)
    count = len(windows)
    return replace(
        left,
        kl=kl,
        kl_stderr=float(np.std(windows, ddof=1)) / count**0.5 if count > 1 else math.inf,
        window_kl=tuple(windows),
        window_nll=tuple(nll),
        perplexity=math.exp(sum(nll) / count),
        top1=(1 - share) * left.top1 + share * right.top1,
    )


def stages(options: argparse.Namespace) -> tuple[str, ...]:
    """Stages that are measured."""
    return (ONE_PASS, FULL) if options.full else (ONE_PASS,)


def measure_probes(
    results: Results, job: Job, measurement: Measurement, options: argparse.Namespace
) -> None:
    """Measure networks in which one layer is quantized."""
    sensitivity, store = measurement.needed_for_search()
    wanted = [QuantSpec.parse(text) for text in options.probe_specs]
    missing = [str(spec) for spec in wanted if spec not in sensitivity.specs]
    if missing:
        raise ValueError(f"--probe-specs {missing[0]} is no candidate; give some of search.bits")
    layers = sensitivity.layers
    count = min(options.probes, len(layers))
    rows = sorted({round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)})
    pairs = [(layers[r], s) for r in rows for s in wanted if s.divides(layers[r].in_features)]
    kept = dict.fromkeys(layer.name for layer in layers)
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        plans = [priced(layers, {**kept, layer.name: spec}, None) for layer, spec in chunk]
        found = job.measure_plans(plans, store, "probes", all_windows=True)
        results.probes += [
            Probe(layer=layer.name, spec=str(spec), kl=one.kl, kl_stderr=one.kl_stderr)
            for (layer, spec), one in zip(chunk, found, strict=True)
        ]
        results.write()


def agreement(probes: Sequence[Probe], sensitivity: Sensitivity) -> dict[str, tuple[float, float]]:
    """Rank correlations of predicted with measured losses, and their bootstrap deviations."""
    row = {layer.name: index for index, layer in enumerate(sensitivity.layers)}
    column = {str(spec): index for index, spec in enumerate(sensitivity.specs)}
    predicted = np.array([float(sensitivity.loss[row[p.layer], column[p.spec]]) for p in probes])
    measured = np.array([probe.kl for probe in probes])
    specs = np.array([probe.spec for probe in probes])
    names = np.array([probe.layer for probe in probes])
    layers = sorted(set(names.tolist()))
    places = {name: np.flatnonzero(names == name) for name in layers}
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        taken = generator.integers(len(layers), size=len(layers))
        if len(set(taken.tolist())) < 2:
            continue  # one layer has no rank among others
        index = np.concatenate([places[layers[one]] for one in taken])
        draws.append(_correlations(predicted[index], measured[index], specs[index]))
    whole = _correlations(predicted, measured, specs)
    return {
        name: (value, float(np.nanstd([draw[name] for draw in draws])))
        for name, value in whole.items()
    }


def _correlations(
    predicted: np.ndarray, measured: np.ndarray, specs: np.ndarray
) -> dict[str, float]:
    one = [
        spearmanr(predicted[specs == spec], measured[specs == spec]).statistic
        for spec in sorted(set(specs.tolist()))
    ]
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "kendall": float(kendalltau(predicted, measured).statistic),
        "spearman of layers": float(np.mean(one)),
    }


def head(texts: Mapping[str, ReferenceOutputs]) -> str:
    """First lines of the first table."""
    names = [HELD_OUT, *(Path(text).name for text in texts)]
    cells = ["budget", "method", "stage", "stored bits", "predicted", *(f"KL {n}" for n in names)]
    cells += [f"to hull, {name}" for name in names]
    return "| " + " | ".join(cells) + " |\n|" + "---|" * len(cells)


def line(row: Row, hull: Row | None) -> str:
    """One line of the first table."""
    cells = [f"{row.budget:g}", row.method, row.stage, f"{row.stored_bits:.3f}"]
    cells.append("" if row.predicted is None else f"{row.predicted:.4f}")
    cells += [f"{q.kl:.4f} ± {q.kl_stderr:.4f}" for q in row.qualities.values()]
    for text, quality in row.qualities.items():
        if hull is None or hull is row:
            cells.append("")
            continue
        gap = paired(quality, hull.qualities[text])
        cells.append(f"{gap.kl:+.4f} ± {gap.kl_stderr:.4f}")
    return "| " + " | ".join(cells) + " |"


def correlation_table(correlations: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """The second table."""
    names = list(next(iter(correlations.values())))
    lines = ["| estimator | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for estimator, found in correlations.items():
        cells = [f"{found[name][0]:.3f} ± {found[name][1]:.3f}" for name in names]
        lines.append(f"| {estimator} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=1, help="of refinement")
    parser.add_argument("--full", action="store_true", help="also after the full method")
    parser.add_argument("--probes", type=int, default=0, help="layers quantized by themselves")
    parser.add_argument("--probe-specs", nargs="+", default=["2b-g64", "3b-g64"])
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
