"""How a kernel is launched: a pure function of the problem and the device.

`choose_launch` needs no GPU and no Triton. Where a table measured on the device exists
(`tuned/<device>.json`, written by `scripts/tune_kernels.py`) its entries win; the rules below are
for every other problem, and they come from arithmetic, not from measurements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from math import gcd
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantforge_kernels.triton.repack import GROUP_STEP, TILE_COLUMNS, TILE_ROWS

TUNED = Path(__file__).resolve().parent / "tuned"
GEMV_ROWS = 16  # rows of input up to which decoding's kernel is taken

_WARPS_IN_FLIGHT = 8  # a multiprocessor: 8 warps of 8 loads of 512 bytes are twice what HBM3 needs
_WARP_GROUPS = 90  # compute capability from which matrix operands are read from shared memory
_FEWEST_UNITS = 4  # column tiles that a split must be left with


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a launch depends on.

    Attributes:
        name: as the driver says, e.g. "NVIDIA H100 80GB HBM3".
        backend: "cuda" or "hip".
        processors: multiprocessors or compute units.
        capability: NVIDIA's compute capability times ten, e.g. 90; 0 elsewhere.
    """

    name: str
    backend: str
    processors: int
    capability: int = 0


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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Problem:
    """Key of a table: everything about `x[m, k] @ weight[n, k].T` that decides its time.

    Attributes:
        m: rows of the input, counted up to a power of two (`problem` does it).
        n: rows of the weight.
        k: columns.
        bits: width of a code.
        group: columns that share a scale.
        dtype: "bf16" or "fp16", of inputs and outputs.
        asymmetric: whether there are zero-points.
    """

    m: int
    n: int
    k: int
    bits: int
    group: int
    dtype: str
    asymmetric: bool


NO_TABLE: Mapping[Problem, Launch] = MappingProxyType({})


def choose_launch(
    m: int,
    n: int,
    k: int,
    bits: int,
    group: int,
    device: Device,
    *,
    dtype: str = "bf16",
    asymmetric: bool = False,
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
        dtype: "bf16" or "fp16", of inputs and outputs.
        asymmetric: whether there are zero-points.
        integer: whether the input is rounded to int8.
        table: measured launches of this device, for 16-bit inputs.

    Returns:
        The table's entry for the problem (m rounded up to a power of two), or the rule's.

    Raises:
        ValueError: an empty problem.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"nothing to multiply: m={m}, n={n}, k={k}")
    key = problem(m, n, k, bits, group, dtype=dtype, asymmetric=asymmetric)
    known = None if integer else table.get(key)
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
        # Seven words a lane, four scales and four zeros a tile: two tiles' do not fit registers.
        heavy = bits >= 7 and asymmetric and gcd(group, TILE_COLUMNS) == GROUP_STEP
        tiles = 4 if device.backend == "hip" else 2 if many and not heavy else 1
        # Asynchronous copies put a whole iteration's loads in flight without a register for each.
        # Three stages would have them arrive during the iteration before, at 1.52 instructions a
        # weight (4 bits, sm_90) instead of 1.47: `candidates` has both.
        stages = 2 if device.backend == "cuda" else 1
        programs = -(-row_tiles // tiles)
        split = _split(programs, _WARPS_IN_FLIGHT * device.processors, units)
        return Launch(
            kernel="gemv", rows=rows, tiles=tiles, warps=1, stages=stages, split=split, unroll=1
        )
    fold = gcd(group, TILE_COLUMNS)
    most = _most_rows(bits, fold, device, asymmetric=asymmetric, integer=integer)
    rows = next((size for size in (16, 32) if m <= size), most)
    programs = -(-m // rows) * -(-row_tiles // 4)
    split = _split(programs, device.processors, units)
    # A third stage's addresses are what does not fit the registers of these.
    crowded = _reads_registers(device) and integer and bits >= 6 and fold < TILE_COLUMNS
    stages = 2 if crowded else 3
    return Launch(kernel="gemm", rows=rows, tiles=4, warps=4, stages=stages, split=split, unroll=1)


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


def problem(
    m: int, n: int, k: int, bits: int, group: int, *, dtype: str = "bf16", asymmetric: bool = False
) -> Problem:
    """Key of a table: the input's rows count up to the next power of two."""
    rows = 1 << (m - 1).bit_length()
    return Problem(m=rows, n=n, k=k, bits=bits, group=group, dtype=dtype, asymmetric=asymmetric)


def table_path(name: str, folder: Path = TUNED) -> Path:
    """File of a device's table."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@cache
def read_table(name: str, folder: Path = TUNED) -> Mapping[Problem, Launch]:
    """Measured launches of a device; empty if it was never measured.

    Raises:
        ValueError: the file is not a table.
    """
    return MappingProxyType(
        {key: Launch(**row["launch"]) for key, row in _rows(table_path(name, folder)).items()}
    )


def write_table(
    name: str, launches: Mapping[Problem, Launch], about: Mapping[str, str], folder: Path = TUNED
) -> Path:
    """Add measured launches to a device's table; problems it has are replaced, others stay.

    Args:
        name: of the device.
        launches: the fastest launch of each problem.
        about: versions that these measurements hold for, kept with each of them.
        folder: where tables are.

    Returns:
        The file written.

    Raises:
        ValueError: what is there is not a table.
    """
    path = table_path(name, folder)
    rows = _rows(path)
    for key, launch in launches.items():
        rows[key] = {**asdict(key), "launch": asdict(launch), "measured": dict(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"device": name, "launches": [rows[key] for key in sorted(rows)]}, indent=1)
    whole = path.with_suffix(".json.part")  # an interrupted run must not cost the table
    whole.write_text(text + "\n", encoding="utf-8")
    whole.replace(path)
    read_table.cache_clear()
    return path


def _rows(path: Path) -> dict[Problem, dict[str, Any]]:
    """A table's rows as they are in the file, checked; none if there is no file."""
    if not path.is_file():
        return {}
    names = [field.name for field in fields(Problem)]
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["launches"]
        found = {Problem(**{name: row[name] for name in names}): row for row in rows}
        for row in rows:
            Launch(**row["launch"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of launches: {error}") from error
    return found


def _most_rows(bits: int, fold: int, device: Device, *, asymmetric: bool, integer: bool) -> int:
    """Rows of input of a program of "gemm" whose sums leave registers for everything else.

    A thread holds the result and a group's sum. With 64 rows these are 128 of its 255 registers:
    too many at 8 bits, where two operands are alive, where a tile of columns has four groups, and
    where it has two and either zero-points or six words a lane; four words, where the matrix
    instruction takes 16-bit operands from registers, as NVIDIA's does before Hopper. Such kernels
    spill with 64 rows on sm_80 or sm_90, and with 32 they do not.
    """
    wide = 4 if _reads_registers(device) and not integer else 6
    parted = fold < TILE_COLUMNS and (asymmetric or bits >= wide)
    crowded = bits == 8 or fold == GROUP_STEP or parted
    return 32 if crowded else 64


def _reads_registers(device: Device) -> bool:
    """Whether matrix instructions take all operands from registers: NVIDIA's before Hopper."""
    return device.backend == "cuda" and device.capability < _WARP_GROUPS


def _split(programs: int, wanted: int, units: int) -> int:
    """Parts of K that bring `programs` near `wanted`, each of a few column tiles at least."""
    return max(1, min(wanted // programs, units // _FEWEST_UNITS))
