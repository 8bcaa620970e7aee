"""Where times of layers come from: built-in devices, or a table that `quantforge profile` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge import strict_yaml
from quantforge.errors import InputError, UsageError
from quantforge.files import parse_json, write_json
from quantforge.format.manifest import KEPT
from quantforge.search.budget import Budget
from quantforge.search.latency import LatencyModel, MeasuredTable, Roofline
from quantforge.types import QuantSpec

TABLE_VERSION = 1
_DEVICES = Path(__file__).resolve().parent / "devices.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayer:
    """Times of one shape and candidate, in seconds.

    Attributes:
        out_features: rows of the weight.
        in_features: columns.
        spec: as text, "kept" for plain weights.
        median: over the rounds.
        p20: 20th percentile.
        p80: 80th percentile.
    """

    out_features: int
    in_features: int
    spec: str
    median: float
    p20: float
    p80: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """The outcome of `profile`: times of this machine.

    Attributes:
        model: whose shapes.
        output: the file that was written.
        machine: processor and instruction sets.
        backend: kernels that were asked for.
        dtype: of inputs and plain weights.
        batch: rows of the input.
        threads: of the processor.
        repeats: rounds.
        rows: shapes and candidates.
    """

    model: str
    output: str
    machine: tuple[str, ...]
    backend: str
    dtype: str
    batch: int
    threads: int
    repeats: int
    rows: tuple[TimedLayer, ...]


def built_in_devices() -> dict[str, Roofline]:
    """Every built-in device, by name."""
    found = {}
    for name, fields in strict_yaml.read_mapping(_DEVICES).items():
        found[name] = Roofline(
            name=name,
            description=fields["description"],
            bandwidth=1e9 * fields["bandwidth_gb"],
            operations=1e12 * fields["operations_tera"],
            overhead=1e-6 * fields["overhead_us"],
        )
    return found


def latency_model(device: str | None, budget: Budget | None) -> LatencyModel | None:
    """The times that a recipe's `device` stands for.

    Args:
        device: a built-in device or the path of a table; None where there is none.
        budget: says whether one is needed.

    Raises:
        InputError: the table is missing or damaged.
        UsageError: there is no such device, or none though the budget limits latency.
    """
    known = built_in_devices()
    if device is None:
        if budget is not None and budget.latency:
            raise UsageError(
                f"budget {budget.text} limits latency but no device is given: say "
                f"--latency-device {', '.join(known)}, or a table of quantforge profile"
            )
        return None
    if device in known:
        return known[device]
    if Path(device).suffix == ".json":
        return read_table(Path(device))
    raise UsageError(
        f"unknown device {device!r}; known: {', '.join(known)}, or a .json of quantforge profile"
    )


def write_table(report: ProfileReport, path: Path) -> None:
    """Write measured times, atomically."""
    rows = [
        {
            "out_features": row.out_features,
            "in_features": row.in_features,
            "spec": row.spec,
            "median_s": row.median,
            "p20_s": row.p20,
            "p80_s": row.p80,
        }
        for row in report.rows
    ]
    document: dict[str, Any] = {
        "format_version": TABLE_VERSION,
        "machine": report.machine,
        "backend": report.backend,
        "dtype": report.dtype,
        "batch": report.batch,
        "repeats": report.repeats,
        "threads": report.threads,
        "rows": rows,
    }
    write_json(path, document)


def read_table(path: Path) -> MeasuredTable:
    """Read what `write_table` wrote.

    Raises:
        InputError: the file is missing, damaged or of another version.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
        if document["format_version"] != TABLE_VERSION:
            raise InputError(f"{path}: format {document['format_version']} of a profile is unknown")
        batch = int(document["batch"])
        times = {}
        for row in document["rows"]:
            spec = None if row["spec"] == KEPT else QuantSpec.parse(row["spec"])
            key = (int(row["out_features"]), int(row["in_features"]), spec, batch)
            times[key] = float(row["median_s"])
    except OSError as error:
        raise InputError(f"cannot read the profile {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is no table of quantforge profile ({error!r})") from error
    return MeasuredTable(name=path.name, times=times)
