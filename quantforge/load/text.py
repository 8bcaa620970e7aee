"""Calibration and evaluation tokens: read, tokenise, join into one stream, cut, split.

The stream is the tokenised documents one after another, with only those special tokens that the
tokenizer adds by itself (the BOS rule of the descriptions). It is cut into disjoint sequences, and
every eighth of them is held out before anything looks at them: methods are fitted on the others and
chosen on these.

An encoder reads sentences, each between special tokens of its own. Its stream has none; it is cut
into shorter sequences, each of which gets those before and behind it. All are of one length, so
that there is no padding.
"""

from __future__ import annotations

import platform
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from quantforge.config import Config
from quantforge.errors import InputError
from quantforge.foreign import encode
from quantforge.load.batches import cut, from_batches, make_set, split_rows
from quantforge.load.documents import (
    PLAIN_SUFFIXES,
    ChatTemplate,
    Document,
    documents,
    has_template,
    read_text,
)
from quantforge.load.frame import Frame, frame_of
from quantforge.load.packaged_text import TEMPERATURE, pydoc_text, remembered_tokens
from quantforge.models import Model
from quantforge.models.sizes import context_length
from quantforge.progress import Monitor
from quantforge.types import CalibrationSet

__all__ = [
    "DEFAULT_EVALUATION",
    "DEFAULT_TEXT",
    "ENCODER_LENGTH",
    "CalibrationConfig",
    "bos_rule",
    "calibration_set",
    "check_vocabulary",
    "describe_windows",
    "evaluation_windows",
    "from_batches",
]

# The model's own samples serve other text far better: SmolLM2-135M-Instruct at 3 bits in groups of
# 64, 28 fitting sequences, untuned: KL on WikiText-2 valid 0.427 against 0.598 with the manual
# (paired -0.171 +- 0.016), on LAMBADA passages 0.382 against 0.721 (-0.339 +- 0.006).
DEFAULT_TEXT = "self"
DEFAULT_EVALUATION = "pydoc"
DEFAULT_SEQUENCES = 128
DEFAULT_LENGTH = 512
# An encoder has one output a sequence, so more of them tell more, and it is used on short texts.
ENCODER_TEXT, ENCODER_LENGTH, ENCODER_SEQUENCES = "pydoc", 128, 512
SAMPLED_SEQUENCES = 80  # sampling takes as long as several forward passes
CHARACTERS_A_TOKEN = 32
FIRST_READ = 1 << 22
MARGIN_TOKENS = 256
DOCUMENTS_A_BATCH = 64


class CalibrationConfig(Config):
    """Which text the compiler calibrates on.

    Attributes:
        source: path of a .txt, .jsonl or .parquet file, a hub data set, "pydoc" (Python's manual),
            "self" (sampled from the model), "mix" (half of each) or "default" ("self"; "pydoc" for
            an encoder, which cannot be sampled from).
        sequences: number of sequences, held-out ones included; None takes 128 of a text, 80 where
            they are sampled from the model, and 512 for an encoder.
        sequence_length: tokens a sequence; None takes 512, and 128 for an encoder or as many as it
            has positions for.
        fewer: take as many sequences as the text has where that is less, instead of an error.
        held_out_share: share of the sequences that only choices are made on.
        chat_template: "auto" formats rows with messages, "always" all rows, "never" none.
        column: text column of a .jsonl, .parquet or hub source; found by itself if None.
        split: of a hub data set.
    """

    source: str = "default"
    sequences: int | None = Field(default=None, ge=2)
    sequence_length: int | None = Field(default=None, ge=2)
    fewer: bool = False
    held_out_share: float = Field(default=0.125, gt=0.0, le=0.5)
    chat_template: ChatTemplate = "auto"
    column: str | None = None
    split: str = "train"


def calibration_set(
    config: CalibrationConfig,
    model: Model,
    *,
    seed: int,
    monitor: Monitor | None = None,
    fresh: bool = False,
) -> CalibrationSet:
    """Tokens to calibrate `model` on.

    Args:
        config: source, size and split.
        model: its tokenizer is used; the sources "self" and "mix" also sample from its network.
        seed: of the sampling; texts do not depend on it.
        monitor: told the steps of the sampling.
        fresh: sample anew, even if the same text is in the cache.

    Raises:
        InputError: no tokenizer, no such text, an unreadable or empty one, too few tokens, tokens
            outside the vocabulary or sequences longer than the model's context.
        CancelledError: the monitor was cancelled.
    """
    source, count, length = _extent(config, model)
    share, monitor = config.held_out_share, monitor or Monitor()
    frame = frame_of(_tokenizer(model)) if model.architecture.encodes else None
    if source == "mix":
        half = count // 2
        if count < 4:
            raise InputError("the calibration source 'mix' needs at least 4 sequences")
        manual, what = _pydoc(count - half, length, model, fewer=config.fewer)
        sampled, how = _self(half, length, model, seed, monitor, fresh=fresh)
        parts = [split_rows(rows, share) for rows in (manual, sampled)]
        fitting, held_out = (torch.cat(pair) for pair in zip(*parts, strict=True))
        text = f"{what}; {how}"
    else:
        if source == "pydoc":
            rows, text = _pydoc(count, length, model, fewer=config.fewer, frame=frame)
        elif source == "self":
            rows, text = _self(count, length, model, seed, monitor, fresh=fresh)
        else:
            rows, text = _external(config, count, length, source, _tokenizer(model), frame)
        fitting, held_out = split_rows(rows, share)
    check_vocabulary(torch.cat([fitting, held_out]), model, source)
    counts = f"{len(fitting)} fitting and {len(held_out)} held-out sequences of {length} tokens"
    return make_set(fitting, held_out, f"{text}: {counts}")


def _extent(config: CalibrationConfig, model: Model) -> tuple[str, int, int]:
    """Source, sequences and their length, where the configuration leaves them open too.

    Raises:
        InputError: sequences are longer than the model's context, or were to be sampled from an
            encoder.
    """
    encodes, context = model.architecture.encodes, context_length(model.module)
    source, count, length = config.source, config.sequences, config.sequence_length
    if source == "default":
        source = ENCODER_TEXT if encodes else DEFAULT_TEXT
    if encodes and source in ("self", "mix"):
        raise InputError(
            f"no text can be sampled from {model.source.name}, an encoder: give a calibration text "
            "or 'pydoc'"
        )
    if length is None:
        length = min(ENCODER_LENGTH, context or ENCODER_LENGTH) if encodes else DEFAULT_LENGTH
    if context is not None and length > context:
        raise InputError(
            f"calibration sequences of {length} tokens exceed the model's context of {context}: "
            "lower calibration.sequence_length"
        )
    if count is None and encodes:
        count = ENCODER_SEQUENCES
    elif count is None:
        count = SAMPLED_SEQUENCES if source == "self" else DEFAULT_SEQUENCES
    return source, count, length


def evaluation_windows(
    source: str, tokenizer: Any, *, windows: int, length: int, framed: bool = False
) -> Tensor:
    """[windows, length] int64: the first disjoint windows of a text.

    Args:
        source: a text file, tokenised as one piece, or a .jsonl or .parquet file or hub data set,
            whose rows are joined (context + continuation where they have these columns). "pydoc"
            takes the last windows of Python's manual, because calibration reads its beginning.
        tokenizer: of the model under test.
        windows: how many.
        length: tokens a window.
        framed: every window is between the tokenizer's special tokens, as for an encoder.

    Raises:
        InputError: no such text, an unreadable or empty one, or too few tokens.
    """
    if windows < 1 or length < 2:
        raise InputError(f"{windows} windows of {length} tokens: at least 1 of 2 are needed")
    if tokenizer is None:
        raise InputError("the model has no tokenizer, which evaluation text needs: pass one")
    frame = frame_of(tokenizer) if framed else None
    needed = windows * (length - (0 if frame is None else frame.size))
    if source == DEFAULT_EVALUATION:
        stream = _tokenise([Document(text=pydoc_text())], tokenizer, frame)[-needed:]
    else:
        stream, _ = _stream(
            source, tokenizer, needed, frame, column=None, chat_template="auto", split="test"
        )
    return _rows(stream, windows, length, frame, what="windows", where=source)


def describe_windows(source: str, tokenizer: Any, windows: Tensor, *, framed: bool = False) -> str:
    """One line for reports: the text, the tokens and the BOS rule."""
    count, length = windows.shape
    if source == DEFAULT_EVALUATION:
        what = f"the manual of Python {platform.python_version()} (pydoc_data.topics), last"
    else:
        what = f"{Path(source).name}, first"
    rule = frame_of(tokenizer).rule if framed else bos_rule(tokenizer)
    return f"{what} {count} windows of {length} tokens, {rule}"


def _rows(
    stream: Tensor,
    count: int,
    length: int,
    frame: Frame | None,
    *,
    what: str,
    where: str,
    fewer: bool = False,
) -> Tensor:
    """[count, length] sequences of a stream, in their frames; see `cut`."""
    if frame is None:
        return cut(stream, count, length, what=what, where=where, fewer=fewer)
    if length <= frame.size:
        raise InputError(
            f"{what} of {length} tokens leave no room beside {frame.size} special ones: give "
            "longer ones"
        )
    bare = cut(stream, count, length - frame.size, what=what, where=where, fewer=fewer)
    return frame.around(bare)


def bos_rule(tokenizer: Any) -> str:
    """Which special tokens the tokenizer adds to a text by itself."""
    added = encode(tokenizer, "")
    if not added:
        return "no BOS (the tokenizer adds none)"
    names = " ".join(str(token) for token in tokenizer.convert_ids_to_tokens(added))
    return f"special tokens as the tokenizer adds them to every document ({names})"


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise InputError(
            f"{model.source.name} has no tokenizer, which calibration text needs: "
            + (
                "pass one, or pass batches of token ids"
                if model.source.kind == "memory"
                else "add its tokenizer files to the folder"
            )
        )
    return model.tokenizer


def check_vocabulary(rows: Tensor, model: Model, source: str) -> None:
    """Refuse tokens that the model does not know.

    Raises:
        InputError: an id is not below the size of its vocabulary.
    """
    embedding: Any = model.module.get_submodule(model.architecture.embedding)
    size, highest = int(embedding.num_embeddings), int(rows.max())
    if highest >= size:
        raise InputError(
            f"tokenising {source} gave the id {highest}, the model's vocabulary has {size}: the "
            "tokenizer does not belong to this model"
        )


def _pydoc(
    count: int, length: int, model: Model, *, fewer: bool, frame: Frame | None = None
) -> tuple[Tensor, str]:
    tokenizer = _tokenizer(model)
    stream = _tokenise([Document(text=pydoc_text())], tokenizer, frame)
    rows = _rows(stream, count, length, frame, what="sequences", where="pydoc", fewer=fewer)
    python, rule = platform.python_version(), frame.rule if frame else bos_rule(tokenizer)
    return rows, f"the manual of Python {python} (pydoc_data.topics), {rule}"


def _self(
    count: int, length: int, model: Model, seed: int, monitor: Monitor, *, fresh: bool
) -> tuple[Tensor, str]:
    rows = remembered_tokens(model, count * length, seed=seed, monitor=monitor, fresh=fresh)
    rows = rows.view(count, length)
    kind = "half of it as chats" if has_template(model.tokenizer) else "no chat template"
    return rows, f"text sampled from the model at temperature {TEMPERATURE} ({kind}), seed {seed}"


def _external(
    config: CalibrationConfig,
    count: int,
    length: int,
    source: str,
    tokenizer: Any,
    frame: Frame | None,
) -> tuple[Tensor, str]:
    stream, how = _stream(
        source,
        tokenizer,
        count * length,
        frame,
        column=config.column,
        chat_template=config.chat_template,
        split=config.split,
    )
    rows = _rows(
        stream,
        count,
        length,
        frame,
        what="sequences",
        where=source,
        fewer=config.fewer,
    )
    return rows, f"{Path(source).name if Path(source).exists() else source}, {how}"


def _stream(
    source: str,
    tokenizer: Any,
    needed: int,
    frame: Frame | None,
    *,
    column: str | None,
    chat_template: ChatTemplate,
    split: str,
) -> tuple[Tensor, str]:
    """At least `needed` tokens from the beginning of a source, if it has so many, and how."""
    path = Path(source).expanduser()
    rule = frame.rule if frame else bos_rule(tokenizer)
    if path.suffix in PLAIN_SUFFIXES:
        return _plain_stream(path, tokenizer, needed, frame), f"one text, {rule}"
    found = documents(
        source, tokenizer=tokenizer, column=column, chat_template=chat_template, split=split
    )
    pieces: list[Tensor] = []
    total = count = templated = 0
    while total < needed and (some := list(islice(found, DOCUMENTS_A_BATCH))):
        pieces.append(_tokenise(some, tokenizer, frame))
        total += len(pieces[-1])
        count += len(some)
        templated += sum(document.templated for document in some)
    if not pieces:
        raise InputError(f"{source} holds no text: give a file with text")
    if templated:
        rule += f", {templated} of the documents through the chat template"
    return torch.cat(pieces), f"the first {count} documents joined, {rule}"


def _plain_stream(path: Path, tokenizer: Any, needed: int, frame: Frame | None = None) -> Tensor:
    """The file tokenised as one piece; a long one only as far as it is needed."""
    limit = max(FIRST_READ, needed * CHARACTERS_A_TOKEN)
    while True:
        text = read_text(path, limit)
        stream = _tokenise([Document(text=text)], tokenizer, frame)
        # Where reading stopped, a word was cut: only tokens well before that place are final.
        if len(text) < limit or len(stream) >= needed + MARGIN_TOKENS:
            return stream
        limit *= 2


def _tokenise(texts: list[Document], tokenizer: Any, frame: Frame | None = None) -> Tensor:
    """[tokens] of all documents, one after another; templated ones bring their special tokens.

    So does a frame, which comes around sequences instead of documents.
    """
    ids: list[int] = []
    for document in texts:
        special = not document.templated and frame is None
        ids += encode(tokenizer, document.text, add_special_tokens=special, verbose=False)
    return torch.tensor(ids, dtype=torch.int64)
