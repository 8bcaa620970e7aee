"""Files that are either whole or absent: atomic writes, canonical JSON, hashes, the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "QUANTFORGE_CACHE"
LONGEST_NAME = 255  # bytes, of a file on all common systems


def cache_root() -> Path:
    """Where downloads and reusable artefacts live: $QUANTFORGE_CACHE or ~/.cache/quantforge."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "quantforge"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; rename it to `path` only if the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_plain_name(text: Any) -> bool:
    """Whether `text` names a file in a folder and nowhere else: no path, and not too long."""
    if not isinstance(text, str) or text in ("", ".", "..") or "\0" in text or "\\" in text:
        return False
    return Path(text).name == text and len(os.fsencode(text)) <= LONGEST_NAME


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8 where it is bytes.
        options: of `json.loads`.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or has a number without end.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, two-space indent, newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(canonical_json(value), encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """Hex SHA-256 of JSON-serialisable parts: the key of an artefact."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
