"""Times the solvers of `quantforge.search` on tables like those of real networks, and on hard ones.

    python scripts/bench_search.py --sizes 120x12 210x30 10000x12 --json rows.json

Tables:

    layers    shapes of a Llama block over and over, grids of 2 to 8 bits in several groupings;
              losses that fall by 4 a bit, with a scale and noise of each layer's own
    random    independent losses and costs without a common divisor
    equal     all layers alike: every plan has very many equals
    sum       losses that fall exactly as costs rise: a subset-sum problem, the hardest kind

A row is a solver on a table at a share of the way from the cheapest plan to the dearest: seconds,
loss, gap to the solver's own lower bound relative to the loss, and whether it is proved optimal.
Solvers that grow faster than the table leave out the larger sizes and say so.
The rows of `local-search` are of an objective with interactions: a Gram form over `--samples`
samples, in which layers share half of their errors' effect; its gap is to the convex bound.
`fitted` is the found plan's objective relative to that of the plan of the least sum of single
losses, `fresh` the same on as many other samples: with fewer samples than choices the search finds
errors that cancel on the samples it sees and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantforge.search.choice import Choice
from quantforge.search.frontier import sweep
from quantforge.search.knapsack import solve
from quantforge.search.objective import GramObjective
from quantforge.search.pairwise import local_search
from quantforge.search.solvers import SOLVERS

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (64, 192, 96, 32, 288)
SHARES = (0.2, 0.35, 0.6)
# Items times candidates above which a solver is left out: minutes.
LARGEST = {"integer-program": 50_000, "local-search": 10_000}
SHARED = 0.5


def layer_table(items: int, candidates: int, generator: Any) -> tuple[Any, Any]:
    """Losses and stored bits of a network of Llama blocks."""
    grids = [(bits, group) for group in GROUPS for bits in WIDTHS][:candidates]
    if len(grids) < candidates:
        raise SystemExit(f"at most {len(WIDTHS) * len(GROUPS)} candidates, not {candidates}")
    rows, columns = np.array(SHAPES)[np.arange(items) % len(SHAPES)].T
    bits, group = np.array(grids).T
    cost = rows[:, None] * (columns[:, None] * bits + 16 * -(-columns[:, None] // group))
    scale = np.exp(generator.normal(size=(items, 1))) * (rows * columns)[:, None] * 1e-6
    noise = np.exp(0.1 * generator.normal(size=cost.shape))
    return scale * 4.0**-bits * (1 + 0.3 * np.log2(group / 32)) * noise, cost


def table(kind: str, items: int, candidates: int, seed: int) -> tuple[Any, Any]:
    """[items, candidates] losses and costs of one kind of the header."""
    generator = np.random.default_rng(seed)
    if kind == "layers":
        return layer_table(items, candidates, generator)
    if kind == "random":
        loss = generator.random((items, candidates))
        return loss, generator.integers(1, 10**6, loss.shape)
    if kind == "equal":
        loss = np.sort(generator.random(candidates))[::-1]
        cost = np.sort(generator.integers(1, 1_000, candidates))
        return np.tile(loss, (items, 1)), np.tile(cost, (items, 1))
    cost = generator.integers(1, 10**6, (items, candidates))
    return 1e6 - cost, cost


def budget_at(cost: Any, share: float) -> int:
    """Budget that far between the cheapest and the dearest plan."""
    return int((1 - share) * cost.min(axis=1).sum() + share * cost.max(axis=1).sum())


def row_of(solver: str, kind: str, share: float, seconds: float, choice: Choice) -> dict[str, Any]:
    return {
        "solver": solver,
        "table": kind,
        "items": len(choice.picks),
        "share": share,
        "seconds": seconds,
        "loss": choice.loss,
        "relative_gap": choice.gap / abs(choice.loss) if choice.loss else 0.0,
        "exact": choice.exact,
    }


def additive_rows(
    kind: str, items: int, candidates: int, solvers: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """A row a solver and share, and one for the sweep of the whole frontier."""
    loss, cost = table(kind, items, candidates, seed)
    began = time.perf_counter()
    frontier = sweep(loss, cost)
    seconds = time.perf_counter() - began
    if frontier is not None:
        yield {
            "solver": "frontier",
            "table": kind,
            "items": items,
            "seconds": seconds,
            "corners": len(frontier.cost),
        }
    for solver in solvers:
        if items * candidates > LARGEST.get(solver, items * candidates):
            yield {"solver": solver, "table": kind, "items": items, "left_out": "too large"}
            continue
        for share in SHARES:
            began = time.perf_counter()
            choice = SOLVERS[solver](loss, cost[None], [budget_at(cost, share)])
            if choice is not None:
                yield row_of(solver, kind, share, time.perf_counter() - began, choice)


def interaction_rows(
    items: int, candidates: int, samples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Local search on a Gram objective over the table of layers."""
    if items * candidates > LARGEST["local-search"]:
        yield {"solver": "local-search", "table": "gram", "items": items, "left_out": "too large"}
        return
    loss, cost = table("layers", items, candidates, seed)
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(2 * samples, 1, 1))
    own = generator.normal(size=(2 * samples, items, candidates))
    effect = (SHARED**0.5 * common + (1 - SHARED) ** 0.5 * own) * np.sqrt(loss)
    objective, fresh = (
        GramObjective(loss=np.zeros_like(loss), projections=half, weight=1 / (2 * samples))
        for half in np.split(effect, 2)
    )
    for share in SHARES:
        budget = budget_at(cost, share)
        began = time.perf_counter()
        choice = local_search(objective, cost[None], [budget])
        seconds = time.perf_counter() - began
        start = solve(objective.alone, cost, budget)
        if choice is not None and start is not None:
            relative = {
                name: form.value(np.array(choice.picks)) / form.value(np.array(start.picks))
                for name, form in (("fitted", objective), ("fresh", fresh))
            }
            yield row_of("local-search", "gram", share, seconds, choice) | relative


def text_of(row: dict[str, Any]) -> str:
    head = f"{row['solver']:<16} {row['table']:<7} {row['items']:>6}"
    if "left_out" in row:
        return f"{head}        left out: {row['left_out']}"
    if "corners" in row:
        return f"{head}        {row['seconds']:8.3f} s  {row['corners']} corners"
    proof = "optimal" if row["exact"] else f"gap {row['relative_gap']:.1e}"
    extra = f"  fitted {row['fitted']:.3f}, fresh {row['fresh']:.3f}" if "fresh" in row else ""
    return (
        f"{head} {row['share']:5.2f}  {row['seconds']:8.3f} s  {row['loss']:12.6g}  {proof}{extra}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["120x12", "210x30", "10000x12"])
    parser.add_argument("--tables", nargs="+", default=["layers", "random", "equal", "sum"],
                        choices=["layers", "random", "equal", "sum"])  # fmt: skip
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument(
        "--samples", type=int, default=128, help="of the Gram form; 0 leaves it out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    rows = []
    for size in options.sizes:
        items, candidates = (int(part) for part in size.split("x"))
        print(f"{items} items x {candidates} candidates", flush=True)
        for kind in options.tables:
            for row in additive_rows(kind, items, candidates, options.solvers, options.seed):
                rows.append(row | {"candidates": candidates})
                print(text_of(row), flush=True)
        if options.samples:
            for row in interaction_rows(items, candidates, options.samples, options.seed):
                rows.append(row | {"candidates": candidates})
                print(text_of(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
