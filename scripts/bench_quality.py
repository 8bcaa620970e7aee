"""Measures uniform networks and plans on evaluation texts, under the protocol of the peers' table.

    python scripts/bench_quality.py llama --calibration wiki2_valid.txt --text wiki2_test.txt \
        --text lambada.jsonl --rows rtn:3b-pc gptq:3b-pc gptq+outputs+tuned:3b-g64 plan:3bit \
        --seeds 0 1 2 --json rows.json

Linears only: embeddings, norms and the head stay float on both sides. A text is a file, or
`held-out` for the calibration's own held-out tokens, on which defaults are chosen. A row is

    METHOD[+OPTION...]:SPEC   a plan that is not searched: one grid, one method, nothing else of the
                              recipe; METHOD is rtn or a member of the family (gptq, gptaq, foem,
                              foem-gptaq, qep, qronos), an OPTION a grid (minmax, mse, positive,
                              diagonal, conditional; rtn alone has minmax), refit, magr (with the
                              paper's strength), awq, clip (with minmax), an order of columns
                              (groups, natural), stagewise (a layer sees the quantized layers
                              before it in its block), choose (coefficients chosen for each layer on
                              held-out tokens), outputs (rows answer for each other through output
                              grams), weighted (tokens count in the grams by what the loss feels of
                              them), learned (rounding learned for 50 steps a block) or tuned
                              (scales and norms tuned for as many steps as the recipe has)
    tuned:SPEC, plan:BUDGET   all that the recipe does; an asymmetric SPEC ("3b-g64-asym") adds
                              asymmetric candidates to all rows that choose among them; BUDGET may
                              be a target ("plan:kl:0.1", "plan:ppl:+5%")
    fast:BUDGET               one-pass integers, without tuning
    weights:SPEC@FILE         dequantized linears that another program made on that grid, which only
                              gives the stored bits; `bench_peers.py --keep` writes such files. In
                              place of SPEC a number, the stored bits of a format without such a
                              grid ("weights:2.625@FILE", see `peers/ggml_weights.py`)

A row's columns: stored bits; CPU seconds to make it; peak memory meanwhile in GB; per text KL with
its standard error over windows, perplexity and agreement in the first token; per text the paired
difference in KL to the first row; after the table, that of every `--pair`. The gradients that
outputs, weighted and learned read, and the float network's hidden states that tuned reads, are
shared by all rows of a seed: their CPU seconds are printed apart from the rows'. CPU seconds are
process time of all threads.

With several `--seeds` every row is made once a seed, on 7/8 of the fitting sequences in an order of
that seed, which also draws the gradients' labels and the batches of what is trained. The table at
the end has means over seeds, and errors that are standard errors over seeds, not over windows: on a
small network the last bits of the arithmetic alone move the KL at 3 bits by several per cent.

Matrix products of networks and reference run in `--precision`. The load average is printed because
the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import (
    add_common_arguments,
    cpu_timer,
    on_texts,
    opened,
    parameters_restored,
    references,
)
from peers.verify import check_weights, stored_bits
from safetensors.torch import load_file

from quantforge.calibration import Needs
from quantforge.compilation import Job, Measurement
from quantforge.evaluate.quality import ReferenceOutputs, paired
from quantforge.load.batches import make_set
from quantforge.memory import peak_bytes, reset_peak
from quantforge.quantize.config import CROSS_METHODS, QuantizeConfig, TuningConfig
from quantforge.quantize.sequential import put_weight
from quantforge.recipe import Recipe
from quantforge.results import Quality
from quantforge.search.allocate import uniform_plans
from quantforge.search.budget import Budget
from quantforge.types import PER_CHANNEL, CalibrationSet, QuantSpec

# Rows that need sensitivities and candidates.
SEARCHED = ("plan:", "fast:", "tuned:")
# Rows whose weights are in a file.
GIVEN = "weights:"
CHOICES: dict[str, object] = {"mismatch": (0.0, 0.25, 0.5, 0.75, 1.0), "pull": (0.0, 0.1)}
# What MagR's paper takes.
MAGR_PER_CHANNEL, MAGR_GROUPS = 1e-3, 1e-4
LEARNED_STEPS = 50
WEIGHTING = 0.5
# Options of a row that set one key.
SWITCHES: dict[str, tuple[str, object]] = {
    "stagewise": ("true_sequential", True),
    "outputs": ("output_feedback", True),
    "groups": ("order", "groups"),
    "natural": ("order", "natural"),
    **{name: (name, True) for name in ("awq", "clip", "refit")},
}
# Of the fitting sequences, what a seed's rows are made on where there are several seeds.
SUBSET = 7 / 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured network.

    Attributes:
        name: as given on the command line.
        seed: it was made with.
        stored_bits: average stored bits a weight.
        cpu_seconds: to make it, process time of all threads, without what rows share.
        peak_bytes: largest resident memory while it was made; of the process so far where the
            system cannot tell.
        qualities: text → measurement.
    """

    name: str
    seed: int
    stored_bits: float
    cpu_seconds: float
    peak_bytes: int
    qualities: dict[str, Quality]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print a table; `--json` also writes every number."""
    options = parse(argv)
    settings = candidates(options.rows) | {"evaluate.prompts": []} | json.loads(options.settings)
    with cpu_timer() as shared:
        job = opened(options, settings)
    texts = references(job, options)
    print(f"load and text {shared[0]:.0f} CPU s")
    whole, rows = job.calibration, []
    for seed in options.seeds:
        job.seed = seed
        if len(options.seeds) > 1:
            job.calibration = subset(whole, seed)
            print(f"seed {seed}: {len(job.calibration.fitting)} fitting sequences")
        rows += measure_rows(job, texts, options, rows)
    made = len(options.rows)
    if len(options.seeds) == 1:
        print(table(rows, options.text, rows[0]))
    else:
        print(f"means over {len(options.seeds)} seeds ± their standard errors")
        print(summary([rows[i::made] for i in range(made)], options.text))
    for first, second in options.pair:
        print(pair_line(rows, options.text, first, second))
    print(f"load average {os.getloadavg()[0]:.1f}")


def measure_rows(
    job: Job,
    texts: Mapping[str, ReferenceOutputs],
    options: argparse.Namespace,
    before: Sequence[Row],
) -> list[Row]:
    """Make every network of one seed and measure it on every text; prints as it goes."""
    recipe, rows = job.recipe, []
    with ExitStack() as held:
        searched, shared = measurements(job, options, held)
        for name in options.rows:
            with parameters_restored(job):
                with cpu_timer() as spent:
                    known = reset_peak()
                    stored_bits = make(job, name, searched, shared)
                    peak = peak_bytes() or 0
                job.recipe = recipe
                qualities = on_texts(job, texts, options)
            rows.append(
                Row(
                    name=name, seed=job.seed, stored_bits=stored_bits, cpu_seconds=spent[0],
                    peak_bytes=peak, qualities=qualities,
                )
            )  # fmt: skip
            print(table(rows[-1:], options.text, rows[0]), flush=True)
            notes = [*job.notes, *([] if known else ["the peak is that of the whole process"])]
            print("".join(f"  {note}\n" for note in notes), end="")
            job.notes.clear()
            if options.json:
                everything = [asdict(row) for row in (*before, *rows)]
                Path(options.json).write_text(json.dumps(everything, indent=1))
    return rows


def measurements(
    job: Job, options: argparse.Namespace, held: ExitStack
) -> tuple[Measurement | None, Measurement | None]:
    """What rows with a search share, and what those without share; prints their CPU seconds."""
    recipe, searched, shared = job.recipe, None, None
    if any(name.startswith(SEARCHED) for name in options.rows):
        with cpu_timer() as spent:
            searched = held.enter_context(job.measure(fresh=options.fresh))
        print(f"calibration {spent[0]:.0f} CPU s")
    own = [name for name in options.rows if not name.startswith((*SEARCHED, GIVEN))]
    plain = [settled(recipe, name) for name in own]
    if plain:
        job.recipe = together(plain)
        known = job.timings.get("calibrate")
        with cpu_timer() as spent:
            shared = held.enter_context(job.measure(fresh=options.fresh))
        if Needs.of(job.recipe).anything:
            origin = " (from the cache)" if known == job.timings.get("calibrate") else ""
            print(
                f"gradients and hidden states for rows that read them {spent[0]:.0f} CPU s{origin}"
            )
        job.recipe = recipe
    return searched, shared


def candidates(rows: Sequence[str]) -> dict[str, Any]:
    """Settings without which a row finds no integers in the store."""
    asymmetric = any(row.startswith(SEARCHED) and row.endswith("-asym") for row in rows)
    return {"search.asymmetric": True} if asymmetric else {}


def subset(calibration: CalibrationSet, seed: int) -> CalibrationSet:
    """Part of the fitting sequences in an order of the seed's; held-out ones stay."""
    count = len(calibration.fitting)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = calibration.fitting[order[: max(1, round(SUBSET * count))]]
    return make_set(chosen, calibration.held_out, f"{calibration.description}, subset {seed}")


def make(job: Job, name: str, searched: Measurement | None, shared: Measurement | None) -> float:
    """Put the named network's weights into the job's model; return its average stored bits.

    Leaves the recipe it was made with in the job.
    """
    kind, _, what = name.partition(":")
    if name.startswith(GIVEN):
        return put_given(job, what)
    measured = searched if name.startswith(SEARCHED) else shared
    if measured is None:
        raise ValueError(f"nothing was measured for {name}")
    if not name.startswith(SEARCHED):
        job.recipe = settled(job.recipe, name)
        plan = job.plans.find(None, None)
    elif kind == "tuned":
        wanted = f"uniform {QuantSpec.parse(what)}"
        sensitivity, _ = measured.needed_for_search()
        plan = next(p for p in uniform_plans(sensitivity) if p.budget == wanted)
    else:
        plan = job.plans.decide(measured, Budget.parse(what)).plan
    if kind == "fast":
        update = {"tuning": TuningConfig(steps=0), "sequential": False}
        changed = job.recipe.quantize.model_copy(update=update)
        job.recipe = job.recipe.model_copy(update={"quantize": changed})
    for _ in job.quantize(plan, measured):
        pass
    return plan.stored_bits


def put_given(job: Job, what: str) -> float:
    """Put another program's weights, `SPEC@FILE`, into the job's model; return their stored bits.

    In place of the SPEC may be those bits themselves.

    Raises:
        SystemExit: the file's layers are not those that a plan covers, or not of that grid.
    """
    grid, _, path = what.partition("@")
    bits = float(grid) if re.fullmatch(r"\d+(\.\d+)?", grid) else None
    spec, weights = None if bits is not None else QuantSpec.parse(grid), load_file(path)
    floats = {
        layer.name: job.model.module.get_submodule(layer.name).weight for layer in job.model.layers
    }
    check_weights(Path(path).name, weights, floats, spec)
    for name, weight in weights.items():
        put_weight(job.model, name, weight)
    if spec is None:
        return bits or 0.0
    return stored_bits([tuple(weight.shape) for weight in floats.values()], spec)


def settled(recipe: Recipe, name: str) -> Recipe:
    """The recipe of a row that is not searched: its grid and method, and only what it asks for."""
    method, *extras = name.partition(":")[0].split("+")
    spec = QuantSpec.parse(name.partition(":")[2])
    base = recipe.quantize
    update: dict[str, Any] = {
        "method": method, "sequential": True, "output_feedback": False, "token_weighting": 0.0,
    }  # fmt: skip
    rounding, tuning = {"steps": 0}, {"steps": 0}
    if method == "rtn":
        update["grid"] = "minmax"
    for extra in extras:
        if extra in ("outputs", "weighted") and method == "rtn":
            raise ValueError(f"{extra} does nothing with rtn")
        if extra in SWITCHES:
            update |= [SWITCHES[extra]]
        elif extra == "choose":
            update |= CHOICES if method in CROSS_METHODS else {"pull": CHOICES["pull"]}
        elif extra == "magr":
            update["magr"] = MAGR_PER_CHANNEL if spec.group_size == PER_CHANNEL else MAGR_GROUPS
        elif extra == "weighted":
            update["token_weighting"] = base.token_weighting or WEIGHTING
        elif extra == "learned":
            rounding["steps"] = base.rounding.steps or LEARNED_STEPS
        elif extra == "tuned":
            tuning["steps"] = base.tuning.steps
        else:
            update["grid"] = extra
    for key, part in (("rounding", rounding), ("tuning", tuning)):  # nothing of what is off
        update[key] = (getattr(base, key).model_dump() if part["steps"] else {}) | part
    one = {
        "solver": "uniform",
        "bits": (spec.bits,),
        "group_sizes": (spec.group_size,),
        "asymmetric": False if spec.symmetric else "only",
    }
    return recipe.model_copy(
        update={
            "quantize": QuantizeConfig.model_validate(base.model_dump() | update),
            "search": recipe.search.model_copy(update=one),
        }
    )


def together(recipes: Sequence[Recipe]) -> Recipe:
    """A recipe of settled plans that reads what any of these reads."""
    needs = [Needs.of(recipe) for recipe in recipes]
    base = recipes[0].quantize
    changed = base.model_copy(
        update={
            "method": "gptq",
            "output_feedback": any(need.output_grams for need in needs),
            "token_weighting": float(any(need.token_squares for need in needs)),
            "rounding": base.rounding.model_copy(
                update={"steps": int(any(need.channel_weights for need in needs))}
            ),
            "tuning": base.tuning.model_copy(
                update={"steps": int(any(need.final_hidden for need in needs))}
            ),
        }
    )
    return recipes[0].model_copy(update={"quantize": changed})


def table(rows: Sequence[Row], texts: Sequence[str], first: Row) -> str:
    """Markdown rows, with the columns of the module's header; errors are over windows."""
    lines = []
    for row in rows:
        cells = [row.name, f"{row.stored_bits:.3f}", f"{row.cpu_seconds:.0f}"]
        cells.append(f"{row.peak_bytes / 1e9:.2f}")
        for text in texts:
            q = row.qualities[text]
            cells += [f"{q.kl:.4f} ± {q.kl_stderr:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.3f}"]
        for text in texts if row is not first else ():
            found = paired(row.qualities[text], first.qualities[text])
            cells.append(f"{found.kl:+.4f} ± {found.kl_stderr:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pair_line(rows: Sequence[Row], texts: Sequence[str], first: str, second: str) -> str:
    """KL of one row less that of another, paired window by window, of the first seed."""
    one, other = (next(row for row in rows if row.name == name) for name in (first, second))
    found = [paired(one.qualities[text], other.qualities[text]) for text in texts]
    return " | ".join([f"{first} - {second}", *(f"{x.kl:+.4f} ± {x.kl_stderr:.4f}" for x in found)])


def summary(rows: Sequence[Sequence[Row]], texts: Sequence[str]) -> str:
    """The same columns as means over seeds; errors are over seeds, the peak is the largest.

    Args:
        rows: every network's rows, in the order of the seeds; the first one is compared with.
        texts: names of the texts.
    """
    lines = []
    for made in rows:
        cells = [made[0].name, f"{made[0].stored_bits:.3f}"]
        cells.append(f"{statistics.fmean(row.cpu_seconds for row in made):.0f}")
        cells.append(f"{max(row.peak_bytes for row in made) / 1e9:.2f}")
        for text in texts:
            found = [row.qualities[text] for row in made]
            cells.append("{:.4f} ± {:.4f}".format(*over_seeds([q.kl for q in found])))
            cells.append(f"{statistics.fmean(q.perplexity for q in found):.2f}")
            cells.append(f"{statistics.fmean(q.top1 for q in found):.3f}")
        for text in texts if made is not rows[0] else ():
            pairs = zip(made, rows[0], strict=True)
            gaps = [one.qualities[text].kl - other.qualities[text].kl for one, other in pairs]
            cells.append("{:+.4f} ± {:.4f}".format(*over_seeds(gaps)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("ROW", "ROW"))
    options = parser.parse_args(argv)
    for name in {name for pair in options.pair for name in pair} - set(options.rows):
        parser.error(f"--pair names {name!r}, which is no row")
    return options


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
