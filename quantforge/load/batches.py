"""Token rows: cut from a stream, taken from a caller's batches, split into fitting and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.types import CalibrationSet

INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def from_batches(
    batches: Iterable[Any],
    *,
    held_out_share: float = 0.125,
    vocabulary: int | None = None,
    sequence_length: int | None = None,
    sequences: int | None = None,
) -> CalibrationSet:
    """Calibration tokens from batches that are already tokenised, such as a data loader's.

    Rows of one length are kept as they are. Where lengths differ or rows are padded, the padding is
    removed and the remaining tokens are joined and cut into disjoint sequences.

    Args:
        batches: integer tensors [B, T] or [T], or mappings with `input_ids` and, if rows are
            padded, `attention_mask` of the same shape.
        held_out_share: share of the rows that only choices are made on.
        vocabulary: ids must be below it; None checks only that they are not negative.
        sequence_length: of packed sequences; None takes the longest row. Rows of one length that
            differs from it are packed too.
        sequences: stop reading after this many rows; None reads all batches.

    Raises:
        InputError: nothing to iterate over, no batches, another type, dtype or shape, ids outside
            the vocabulary, or fewer than two sequences.
    """
    rows: list[Tensor] = []
    padded = False
    if isinstance(batches, Mapping | Tensor):
        batches = [batches]
    for number, batch in enumerate(_iterate(batches)):
        for row, whole in _rows_of(batch, f"calibration batch {number}"):
            _check_ids(row, vocabulary, f"calibration batch {number}")
            padded = padded or not whole
            rows.append(row)
        if sequences is not None and len(rows) >= sequences:
            rows = rows[:sequences]
            break
    if not rows:
        raise InputError("the calibration batches are empty: pass at least two sequences of tokens")
    length = sequence_length or max(len(row) for row in rows)
    if not padded and all(len(row) == length for row in rows):
        tokens, how = torch.stack(rows), "rows as given"
    else:
        stream = torch.cat(rows)
        tokens = cut(stream, len(stream) // length, length, what="sequences", where="the batches")
        how = "padding removed and packed"
    fitting, held_out = split_rows(tokens, held_out_share)
    counts = f"{len(fitting)} fitting and {len(held_out)} held-out sequences of {length} tokens"
    return make_set(fitting, held_out, f"the caller's batches, {how}: {counts}")


def make_set(fitting: Tensor, held_out: Tensor, description: str) -> CalibrationSet:
    """A `CalibrationSet` with its fingerprint, from two [sequences, length] int64 tensors."""
    return CalibrationSet(
        fitting=fitting,
        held_out=held_out,
        description=description,
        fingerprint=token_digest(fitting, held_out),
    )


def token_digest(*parts: Tensor) -> str:
    """SHA-256 of shapes and values of int64 tensors."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(repr(tuple(rows.shape)).encode())
        digest.update(rows.contiguous().numpy().tobytes())
    return digest.hexdigest()


def cut(
    stream: Tensor, count: int, length: int, *, what: str, where: str, fewer: bool = False
) -> Tensor:
    """[count, length]: the first `count` disjoint pieces of a [tokens] stream.

    Args:
        stream: [tokens].
        count: pieces wanted.
        length: tokens a piece.
        what: the pieces' name, for the error.
        where: the text's name, for the error.
        fewer: take what there is, if that is two pieces or more.

    Raises:
        InputError: the stream is empty or too short.
    """
    have = len(stream)
    if fewer and have >= 2 * length:
        count = min(count, have // length)
    if have < count * length or count == 0:
        raise InputError(
            f"{where} holds {have:,} tokens, {max(count, 1)} {what} of {length} need "
            f"{max(count, 1) * length:,}: give more text, or "
            + (f"ask for at most {have // length} {what}" if have >= length else "shorter ones")
        )
    return stream[: count * length].view(count, length)


def split_rows(rows: Tensor, held_out_share: float) -> tuple[Tensor, Tensor]:
    """(fitting, held-out) rows of [sequences, length]: held-out ones are spread evenly.

    With a share of 1/8 every eighth row is held out; at least one is, and at least one is not.

    Raises:
        InputError: there are fewer than two rows, or the share is not between 0 and 1.
    """
    count = len(rows)
    if count < 2:
        raise InputError(
            f"{count} calibration sequence cannot be split into fitting and held-out ones: "
            "give at least 2"
        )
    if not 0.0 < held_out_share < 1.0:
        raise InputError(f"held_out_share must lie between 0 and 1, got {held_out_share}")
    # Row i is held out where (i + 1)·share passes a whole number; the nudge absorbs rounding.
    steps = ((torch.arange(count + 1, dtype=torch.float64) * held_out_share) + 1e-9).floor()
    chosen = steps[1:] > steps[:-1]
    if not chosen.any():
        chosen[-1] = True
    if chosen.all():
        chosen[0] = False
    return rows[~chosen].contiguous(), rows[chosen].contiguous()


def _iterate(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, str | bytes):
        raise InputError("calibration batches must hold token ids, got text: tokenise it first")
    try:
        return iter(batches)
    except TypeError:
        kind = type(batches).__name__
        raise InputError(f"calibration batches must be iterable, got a {kind}") from None


def _rows_of(batch: Any, where: str) -> Iterator[tuple[Tensor, bool]]:
    """Rows of one batch without padding, and whether nothing was removed from each."""
    mask: Any = None
    ids = batch
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise InputError(f"{where} has no input_ids; keys: {', '.join(map(str, batch))}")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(ids, Tensor):
        kind = type(ids).__name__
        raise InputError(f"{where} holds a {kind}: pass int64 tensors or dicts with input_ids")
    if ids.dtype not in INTEGER_TYPES:
        raise InputError(f"{where} has the dtype {ids.dtype}: token ids must be int64")
    if ids.ndim not in (1, 2) or ids.numel() == 0:
        raise InputError(f"{where} has the shape {tuple(ids.shape)}: expected [batch, tokens]")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise InputError(f"{where}: attention_mask must be a tensor of the shape of input_ids")
    rows = ids.detach().cpu().to(torch.int64).reshape(-1, ids.shape[-1])
    if mask is None:
        yield from ((row, True) for row in rows)
        return
    kept = mask.detach().cpu().reshape(rows.shape) != 0
    for row, keep in zip(rows, kept, strict=True):
        if keep.any():
            yield row[keep], bool(keep.all())


def _check_ids(row: Tensor, vocabulary: int | None, where: str) -> None:
    low, high = int(row.min()), int(row.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        limit = "0 or above" if vocabulary is None else f"between 0 and {vocabulary - 1}"
        raise InputError(
            f"{where} holds the token id {low if low < 0 else high}, ids must be {limit}: "
            "use this model's tokenizer"
        )
