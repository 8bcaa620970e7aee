"""The journal of a run: what it has finished, so that the same command goes on from there.

An entry is a named set of tensors and facts in one safetensors file, whole or absent, and carries
the digest of what it holds: one that a disk damaged is passed over, and what it was about is done
again. Entries never say whether they fit a command: a journal's folder is named by the fingerprint
of everything that decides the bytes of a run, so another command never meets it.

Stages get a `Journal` and neither know nor care whether it keeps anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantforge.claims import (
    claimed_names,
    new_claim,
    registry,
    release,
    remove_oldest,
    set_aside,
    written,
)
from quantforge.files import atomic_path, cache_root
from quantforge.parallel import ALONE, Share
from quantforge.progress import Monitor

KEPT_JOURNALS = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What was noted at one point.

    Attributes:
        tensors: by name, on the CPU.
        facts: JSON values by name.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """Entries in a folder; without one nothing is kept and nothing is found.

    Attributes:
        folder: one `<name>.safetensors` an entry; made with the first.
        share: of several processes the first one writes and reads, and tells the others.
    """

    folder: Path | None
    share: Share = ALONE

    def write(
        self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Note something, in place of what had the name before; atomic.

        Raises:
            ResourceError: the cache cannot be written.
        """
        if self.folder is None or not self.share.main:
            return
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        text = json.dumps(dict(facts or {}))
        about = {"facts": text, "digest": _digest(kept, text)}
        with written(everything=True), atomic_path(self._path(name)) as temporary:
            save_file(kept, temporary, metadata=about)

    def read(self, name: str) -> Entry | None:
        """What was noted; None where nothing was, or where the file is damaged, which is said."""
        if self.folder is None:
            return None
        if self.share.count == 1:
            return self._read(self._path(name))
        mine = self._read(self._path(name)) if self.share.main else None
        facts = {} if mine is None else {"facts": dict(mine.facts)}
        told = self.share.exchange({} if mine is None else mine.tensors, facts)[0]
        return Entry(tensors=told.tensors, facts=told.facts["facts"]) if told.facts else None

    def _read(self, path: Path) -> Entry | None:
        """What a file holds."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            whole = about["digest"] == _digest(tensors, about["facts"])
            facts = json.loads(about["facts"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            logger.warning("%s is damaged: it is passed over, and its work done again", path)
            return None
        return Entry(tensors=tensors, facts=facts)

    def first_missing(self, stem: str, count: int) -> int:
        """Of the entries `numbered(stem, 0)`, .. the first that is not there whole; or `count`."""
        first = count
        if self.folder is not None and self.share.main:
            paths = (self._path(numbered(stem, index)) for index in range(count))
            first = next((i for i, path in enumerate(paths) if self._read(path) is None), count)
        return 0 if self.folder is None else round(self.share.agree(first))

    def clear(self) -> None:
        """Forget everything."""
        if self.folder is not None and self.share.main and self.folder.is_dir():
            shutil.rmtree(set_aside(self.folder), ignore_errors=True)

    def _path(self, name: str) -> Path:
        return Path(self.folder or "") / f"{name}.safetensors"


NO_JOURNAL = Journal(None)


def numbered(stem: str, index: int) -> str:
    """Name of one of many entries."""
    return f"{stem}-{index:05d}"


@contextmanager
def open_journal(
    key: str, *, fresh: bool, monitor: Monitor, share: Share = ALONE
) -> Iterator[Journal]:
    """Yield the journal of a run, with what an interrupted run of the same command noted.

    It is removed when the body succeeds, and stays if it does not. Where a living run has it, the
    body gets one that keeps nothing: two runs of one command to different outputs do not meet.
    Older ones beyond a few are removed, except those in use.

    Args:
        key: fingerprint of everything that decides what the run makes.
        fresh: forget what is there.
        monitor: its cancel event ends waiting for the registry.
        share: of the run; the first process opens it for all.

    Raises:
        ResourceError: the cache cannot be written.
    """
    root = cache_root() / "journals"
    folder, claim = root / key[:32], None
    if not share.main:
        yield Journal(folder, share) if share.agree(0.0) else NO_JOURNAL
        return
    with written(everything=True), registry(monitor) as locks:
        if folder.name not in claimed_names(locks):
            claim = new_claim(folder, locks, empty=fresh)
    share.agree(float(claim is not None))
    if claim is None:
        logger.warning("another run of this command has its journal: this one cannot be resumed")
        yield NO_JOURNAL
        return
    try:
        with written(everything=True):
            remove_oldest(root, KEPT_JOURNALS, monitor)
        yield Journal(folder, share)
        Journal(folder).clear()
    finally:
        release(claim)


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Hex SHA-256 of everything an entry holds."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
