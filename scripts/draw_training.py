"""Held-out KL over the tokens of training, of the variants that bench_training.py measured.

    python scripts/draw_training.py training.json docs/training.svg --title "Ternary SmolLM2-135M"

Lines are networks as they would be stored; dashed ones, of the same colour, the same networks with
the weights between float and integer that are trained. A ring is the state that is kept. The file
is SVG or PNG by its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ("#b9480e", "#1d5fa8", "#55606e", "#2c7a4b", "#8a3f94", "#a07c00")
INCHES, DOTS = (8.2, 4.1), 150
LEAST = 1e-4  # nats a token; below, nothing is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One variant.

    Attributes:
        name: of the variant.
        tokens: trained on, at every measurement.
        stored: held-out KL in nats a token of the network as it would be stored.
        trained: of the network that is trained.
        best: index of the state that is kept.
    """

    name: str
    tokens: tuple[float, ...]
    stored: tuple[float, ...]
    trained: tuple[float, ...]
    best: int


def curves(found: Mapping[str, Any]) -> list[Curve]:
    """The variants that were trained, from what bench_training.py wrote."""
    made = []
    for name, row in found["variants"].items():
        training = row["training"]
        if training is None or not training["steps"]:
            continue
        points, a_step = training["points"], training["tokens"] / training["steps"]
        made.append(
            Curve(
                name=name,
                tokens=tuple(point["step"] * a_step for point in points),
                stored=tuple(point["kl"] for point in points),
                trained=tuple(point["soft_kl"] for point in points),
                best=training["best"],
            )
        )
    return made


def drawing(lines: list[Curve], title: str) -> Any:
    """The figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(line.tokens, line.stored, ".-", color=colour, label=line.name)
        soft = [
            (tokens, kl)
            for tokens, kl, stored in zip(line.tokens, line.trained, line.stored, strict=True)
            if kl >= LEAST and line.trained != line.stored
        ]
        if soft:
            axes.plot(*zip(*soft, strict=True), "--", color=colour, lw=1)
        axes.plot(
            line.tokens[line.best], line.stored[line.best], "o", mfc="none", ms=9, color=colour
        )
    axes.set_yscale("log")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("held-out KL, nats per token")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(visible=True, which="both", color="#dfe3e8")
    axes.legend(frameon=False, fontsize=8)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write it; the same figure gives the same bytes."""
    import matplotlib as mpl

    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "quantforge", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=DOTS, metadata=metadata)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", type=Path, help="what bench_training.py --json wrote")
    parser.add_argument("output", type=Path, help="file.svg or file.png")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    if options.output.suffix not in (".svg", ".png"):
        raise SystemExit(f"{options.output} is neither .svg nor .png")
    lines = curves(json.loads(options.numbers.read_text(encoding="utf-8")))
    if not lines:
        raise SystemExit(f"{options.numbers} has no trained variant: give --tokens")
    save(drawing(lines, options.title), options.output)


if __name__ == "__main__":
    main()
