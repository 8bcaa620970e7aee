"""How a kernel is launched: a pure function of the problem and the device.

`choose_launch` needs no GPU and no Triton. Where a table measured on the device exists
(`tuned/<device>.json`, written by `scripts/tune_kernels.py`) its entries win; the rules below are
for every other problem, and they come from arithmetic, not from measurements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from quantforge_kernels.triton.repack import TILE_COLUMNS, TILE_ROWS

TUNED = Path(__file__).resolve().parent / "tuned"
GEMV_ROWS = 16  # rows of input up to which decoding's kernel is taken

_WARPS_IN_FLIGHT = 8  # a multiprocessor: 8 warps of 8 loads of 512 bytes are twice what HBM3 needs
_FEWEST_UNITS = 4  # column tiles that a split must be left with


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a launch depends on.

    Attributes:
        name: as the driver says, e.g. "NVIDIA H100 80GB HBM3".
        backend: "cuda" or "hip".
        processors: multiprocessors or compute units.
    """

    name: str
    backend: str
    processors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One way to run `x @ weight.T`.

    Attributes:
        kernel: "gemv" or "gemm".
        rows: rows of the input that a program takes.
        tiles: tiles of 32 rows of the weight that a program takes, a multiple of `warps`.
        warps: warps of a program.
        stages: depth of the pipeline through shared memory; 1 loads straight into registers.
        split: programs that share a row's columns; their sums are added by a second kernel.
        unroll: repetitions of the inner loop's body.
    """

    kernel: str
    rows: int
    tiles: int
    warps: int
    stages: int
    split: int
    unroll: int

    def __post_init__(self) -> None:
        """Refuse what the kernels do not have.

        Raises:
            ValueError: an impossible combination.
        """
        if self.kernel not in ("gemv", "gemm"):
            raise ValueError(f"no kernel {self.kernel!r}; known: gemv, gemm")
        if self.rows not in (8, 16, 32, 64, 128):
            raise ValueError(f"a program takes 8, 16, 32, 64 or 128 rows of input, not {self.rows}")
        if self.tiles < self.warps or self.tiles % self.warps:
            raise ValueError(f"{self.tiles} tiles are not shared evenly by {self.warps} warps")
        if min(self.warps, self.stages, self.split, self.unroll) < 1:
            raise ValueError("warps, stages, split and unroll are at least 1")


Problem = tuple[int, int, int, int, int]  # m (a power of two), n, k, bits, group
NO_TABLE: Mapping[Problem, Launch] = MappingProxyType({})


def choose_launch(
    m: int,
    n: int,
    k: int,
    bits: int,
    group: int,
    device: Device,
    *,
    integer: bool = False,
    table: Mapping[Problem, Launch] = NO_TABLE,
) -> Launch:
    """The launch for `x[m, k] @ weight[n, k].T`.

    Args:
        m: rows of the input.
        n: rows of the weight.
        k: columns.
        bits: width of a code.
        group: columns that share a scale.
        device: where it runs.
        integer: whether the input is rounded to int8.
        table: measured launches of this device, for 16-bit inputs.

    Returns:
        The table's entry for the problem (m rounded up to a power of two), or the rule's.

    Raises:
        ValueError: an empty problem.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"nothing to multiply: m={m}, n={n}, k={k}")
    known = None if integer else table.get(problem(m, n, k, bits, group))
    if known is not None:
        return known
    units = -(-k // TILE_COLUMNS)
    row_tiles = -(-n // TILE_ROWS)
    if m <= GEMV_ROWS and not integer:
        # 16 rows are also the narrowest matrix instruction of AMD that is not wasteful.
        rows = 8 if m <= 8 and device.backend == "cuda" else 16
        # Two tiles a warp halve what is not unpacking; one, where rows are too few for the device.
        # AMD's warps of 64 lanes need two tiles for loads of 128 bits, four to have enough of them.
        many = row_tiles >= 2 * device.processors or units < 2 * _FEWEST_UNITS
        tiles = 4 if device.backend == "hip" else 2 if many else 1
        # A stage ahead, by asynchronous copies, keeps a whole iteration's loads in flight.
        stages = 2 if device.backend == "cuda" else 1
        programs = -(-row_tiles // tiles)
        split = _split(programs, _WARPS_IN_FLIGHT * device.processors, units)
        return Launch(
            kernel="gemv", rows=rows, tiles=tiles, warps=1, stages=stages, split=split, unroll=1
        )
    rows = next((size for size in (16, 32) if m <= size), 32 if bits == 8 else 64)
    programs = -(-m // rows) * -(-row_tiles // 4)
    split = _split(programs, device.processors, units)
    return Launch(kernel="gemm", rows=rows, tiles=4, warps=4, stages=3, split=split, unroll=1)


def candidates(m: int, bits: int) -> tuple[Launch, ...]:
    """Launches worth measuring for m rows of input; all of them are correct."""
    splits = (1, 2, 4, 8)
    if m <= GEMV_ROWS:
        rows = 8 if m <= 8 else 16
        return tuple(
            Launch(
                kernel="gemv",
                rows=rows,
                tiles=tiles,
                warps=1,
                stages=stages,
                split=split,
                unroll=unroll,
            )
            for stages in (1, 2, 3)
            for tiles in (1, 2)
            for unroll in (1, 2)
            for split in splits
        )
    sizes = tuple(size for size in (16, 32, 64) if size < 2 * m and (bits < 8 or size < 64))
    return tuple(
        Launch(kernel="gemm", rows=rows, tiles=4, warps=4, stages=stages, split=split, unroll=1)
        for rows in sizes
        for stages in (2, 3, 4)
        for split in splits
    )


def problem(m: int, n: int, k: int, bits: int, group: int) -> Problem:
    """Key of a table: the input's rows count up to the next power of two."""
    return (1 << (m - 1).bit_length(), n, k, bits, group)


def table_path(name: str, folder: Path = TUNED) -> Path:
    """File of a device's table."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@cache
def read_table(name: str, folder: Path = TUNED) -> Mapping[Problem, Launch]:
    """Measured launches of a device; empty if it was never measured.

    Raises:
        ValueError: the file is not a table.
    """
    path = table_path(name, folder)
    if not path.is_file():
        return NO_TABLE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["launches"]
        return MappingProxyType(
            {
                (row["m"], row["n"], row["k"], row["bits"], row["group"]): Launch(**row["launch"])
                for row in rows
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of launches: {error}") from error


def write_table(
    name: str, launches: Mapping[Problem, Launch], about: Mapping[str, str], folder: Path = TUNED
) -> Path:
    """Write a device's table.

    Args:
        name: of the device.
        launches: the fastest launch of each problem.
        about: versions that the measurements hold for.
        folder: where tables are.

    Returns:
        The file written.
    """
    rows = [
        {**dict(zip(("m", "n", "k", "bits", "group"), key, strict=True)), "launch": asdict(launch)}
        for key, launch in sorted(launches.items())
    ]
    path = table_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"device": name, **about, "launches": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _split(programs: int, wanted: int, units: int) -> int:
    """Parts of K that bring `programs` near `wanted`, each of a few column tiles at least."""
    return max(1, min(wanted // programs, units // _FEWEST_UNITS))
