"""Rows of the benchmark: how they are asked for, what is measured, and the Markdown tables."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge.evaluate.quality import paired
from quantforge.results import PairedDifference, Quality
from quantforge.types import QuantSpec

PROGRAMS = Path(__file__).resolve().parent
ROW = re.compile(
    r"(?:(?P<label>[\w.-]+)=)?(?P<who>\w+):(?P<method>[\w-]+)@(?P<spec>[\w-]+)"
    r"(?:\+(?P<settings>\{.*\}))?"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant as asked for on the command line.

    Attributes:
        name: label, or the text without its settings.
        who: which program.
        method: what that program calls it.
        spec: the grid.
        settings: further options of the program.
    """

    name: str
    who: str
    method: str
    spec: QuantSpec
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, text: str) -> Row:
        """From `[LABEL=]WHO:METHOD@SPEC[+JSON]`."""
        found = ROW.fullmatch(text)
        if found is None:
            raise SystemExit(f"not a row: {text!r}; expected e.g. gptqmodel:gptq@3b-g128-asym")
        if not (PROGRAMS / f"run_{found['who']}.py").is_file():
            raise SystemExit(f"no program run_{found['who']}.py in {PROGRAMS.name}/")
        return cls(
            name=found["label"] or text.partition("+")[0],
            who=found["who"],
            method=found["method"],
            spec=QuantSpec.parse(found["spec"]),
            settings=json.loads(found["settings"] or "{}"),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One quantization.

    Attributes:
        cpu_seconds: of all threads and child processes.
        wall_seconds: of the same.
        peak_bytes: largest resident memory of the process.
        load: load average over a minute, before the run.
        sha256: of the written weights.
        weight_error: ‖Ŵ − W‖² / ‖W‖² over all linears.
        notes: what the program had to say.
        versions: library → version.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    load: float
    sha256: str
    weight_error: float
    notes: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds of a row.

    Attributes:
        row: which.
        stored_bits: average stored bits a weight.
        runs: one a round.
        qualities: text → measurement of the last round's weights.
    """

    row: Row
    stored_bits: float
    runs: tuple[Run, ...]
    qualities: Mapping[str, Quality]

    def median(self, name: str) -> float:
        """Of an attribute of the runs."""
        return statistics.median(getattr(run, name) for run in self.runs)


def table(results: Sequence[Result], texts: Sequence[str]) -> str:
    """Markdown: medians of all rounds with their range, and quality per text."""
    head = ["row", "stored bits", "CPU s", "wall s", "peak GB", "load", "weight error"]
    for text in texts:
        head += [f"KL on {Path(text).name}", "perplexity", "top-1"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for result in results:
        cells = [
            result.row.name,
            f"{result.stored_bits:.3f}",
            spread(result, "cpu_seconds"),
            spread(result, "wall_seconds"),
            f"{result.median('peak_bytes') / 1e9:.2f}",
            f"{result.median('load'):.1f}",
            f"{result.median('weight_error'):.4f}",
        ]
        for text in texts:
            q = result.qualities[text]
            cells += [f"{q.kl:.4f} ± {q.kl_stderr:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.3f}"]
        lines.append(cells)
    return markdown(lines)


def spread(result: Result, name: str) -> str:
    """Median (smallest to largest) of an attribute of the runs."""
    values = [getattr(run, name) for run in result.runs]
    return f"{result.median(name):.1f} ({min(values):.1f} to {max(values):.1f})"


def ratio_table(
    results: Sequence[Result], ratios: Sequence[tuple[str, str, float | None]], texts: Sequence[str]
) -> str:
    """Markdown: ratios of medians, the limit on CPU seconds, paired differences of KL."""
    by_name = {result.row.name: result for result in results}
    head = ["ratio of medians", "CPU", "limit", "wall", "peak memory"]
    head += [f"KL difference on {Path(text).name}" for text in texts]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for first_name, second_name, limit in ratios:
        first, second = by_name[first_name], by_name[second_name]
        cpu, wall, peak = (
            first.median(name) / second.median(name)
            for name in ("cpu_seconds", "wall_seconds", "peak_bytes")
        )
        verdict = "" if limit is None else f"{limit:g}: {'kept' if cpu <= limit else 'broken'}"
        cells = [f"{first_name} / {second_name}", f"{cpu:.2f}", verdict, f"{wall:.2f}"]
        cells.append(f"{peak:.2f}")
        cells += [difference(paired(first.qualities[t], second.qualities[t])) for t in texts]
        lines.append(cells)
    return markdown(lines)


def difference(found: PairedDifference) -> str:
    """First minus second, and whether that is below zero by two standard errors."""
    return f"{found.kl:+.4f} ± {found.kl_stderr:.4f}" + (" (lower)" if found.lower else "")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def remarks(results: Sequence[Result]) -> str:
    """Versions, what the programs said, and whose weights differ between rounds."""
    lines = []
    for result in results:
        last = result.runs[-1]
        parts = [" ".join(pair) for pair in last.versions.items()] + list(last.notes)
        if len({run.sha256 for run in result.runs}) > 1:
            parts.append("its weights differ between rounds")
        lines.append(f"- {result.row.name}: {'; '.join(parts)}")
    return "\n".join(lines)
