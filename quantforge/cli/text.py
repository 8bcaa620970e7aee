"""Numbers and foreign text as they are shown to people."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB")


def one_line(text: str) -> str:
    """`text` on one line without control characters; names in files may hold anything."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else "\ufffd" for c in joined)


def size(count: float) -> str:
    """Bytes in decimal units: 67_890_000 → "67.9 MB"."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds as "0:07", "12:05" or "1:02:03"."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where it would be silly."""
    return f"{value:.4g}"


def estimate(value: float | None) -> str:
    """A number that may not have been estimated."""
    return "not estimated" if value is None else number(value)


def with_error(value: float, error: float) -> str:
    """A measurement and its standard error, both to the error's second digit."""
    if not error > 0:
        return number(value)
    from math import floor, isfinite, log10

    if not (isfinite(error) and isfinite(value)):
        return f"{value} ± {error}"
    digits = min(max(1 - floor(log10(error)), 0), 8)
    return f"{value:.{digits}f} ± {error:.{digits}f}"
