"""Texts out of files: plain text, JSON lines, parquet, and data sets of a hub.

Rows become documents lazily, so that a large file is read only as far as tokens are needed. A row
holds its text in one column (`text`, `content`), in two (`context` + `continuation`,
`prompt`/`response`), or as a chat (`messages`, `conversations`) that goes through the tokenizer's
chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantforge.errors import InputError
from quantforge.files import parse_json
from quantforge.foreign import MALFORMED, malformed, one_line
from quantforge.load.source import HUB_ID, HUB_TIMEOUT_S
from quantforge.silence import quiet

ChatTemplate = Literal["auto", "always", "never"]
PLAIN_SUFFIXES = (".txt", ".text", ".md")
LINES_SUFFIXES = (".jsonl", ".ndjson")
CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "content")
JOINED_COLUMNS = ("context", "continuation")
TURN_COLUMNS = ("prompt", "response")
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text to be tokenised.

    Attributes:
        text: never empty.
        templated: it went through a chat template, which writes its own special tokens.
    """

    text: str
    templated: bool = False


@dataclass(frozen=True, slots=True)
class _Content:
    """A row as messages; a plain text is one user's message that is not a chat."""

    messages: list[dict[str, str]]
    chat: bool

    @property
    def plain(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


def documents(
    source: str,
    *,
    tokenizer: Any,
    column: str | None = None,
    chat_template: ChatTemplate = "auto",
    split: str = "train",
) -> Iterator[Document]:
    """The documents of a `.jsonl` or `.parquet` file or of a hub data set, in order.

    Args:
        source: path or hub id.
        tokenizer: its chat template is used for chats.
        column: the text column; None finds it.
        chat_template: "auto" templates rows with messages, if the tokenizer has a template;
            "always" also wraps plain texts as a user's message; "never" joins the messages.
        split: of a hub data set.

    Raises:
        InputError: no such file or data set, an unreadable row, no text column, no template.
    """
    if chat_template == "always" and not has_template(tokenizer):
        raise InputError(
            "the tokenizer has no chat template: set calibration.chat_template to auto or never"
        )
    for number, row in _rows(source, split):
        where = f"{source} row {number}"
        content = _content(row, where, column)
        chat = content.chat and has_template(tokenizer) and chat_template == "auto"
        templated = chat or chat_template == "always"
        text = through_template(content.messages, tokenizer, where) if templated else content.plain
        if text.strip():
            yield Document(text=text, templated=templated)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can format chats."""
    return bool(getattr(tokenizer, "chat_template", None))


def read_text(path: Path, limit: int | None = None) -> str:
    """A UTF-8 text file, or its first `limit` characters.

    Raises:
        InputError: missing, unreadable, not UTF-8 or blank.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read() if limit is None else stream.read(limit)
    except FileNotFoundError:
        raise InputError(f"no text file at {path}: check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not text.strip():
        raise InputError(f"{path} holds no text: give a file with text")
    return text


def _rows(source: str, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in LINES_SUFFIXES:
            return _lines(path)
        if path.suffix == ".parquet":
            return parquet_rows(path)
        raise InputError(
            f"{path} has an unknown format: give .txt, .jsonl or .parquet, or a hub data set"
        )
    known = (*PLAIN_SUFFIXES, *LINES_SUFFIXES, ".parquet")
    if HUB_ID.fullmatch(source) and path.suffix not in known:
        return hub_rows(source, split, instead="a .txt, .jsonl or .parquet file")
    raise InputError(f"no text at {source}: give a file, a hub data set, 'pydoc' or 'self'")


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path} row {number} is not a JSON object")
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)})") from None
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise InputError(f"{path} row {number} is not JSON ({reason}): correct it") from None


def parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a parquet file with their numbers, from 1, read as they are asked for.

    Raises:
        InputError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, *MALFORMED) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({one_line(error)}): get it again"
        ) from None


def hub_rows(name: str, split: str, *, instead: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a hub data set with their numbers, from 1, streamed.

    One request goes first, because `datasets` retries for long.

    Args:
        name: "organisation/name".
        split: part of the data set.
        instead: what else can be given, for the error's line.

    Raises:
        InputError: there is no such data set, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    unreachable = f"give {instead} instead"
    try:
        with quiet():
            snapshot_download(
                name,
                repo_type="dataset",
                allow_patterns=["README.md"],
                etag_timeout=HUB_TIMEOUT_S,
            )
    except (OSError, ValueError) as error:
        kind = type(error).__name__
        raise InputError(
            f"no file {name} here, and no such data set can be had from the hub ({kind}): "
            f"{unreachable}"
        ) from None
    import datasets

    try:
        with quiet():
            rows = datasets.load_dataset(name, split=split, streaming=True)
            yield from enumerate(rows, start=1)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"the data set {name} cannot be read ({one_line(error)}): {unreachable}"
        ) from None


def _content(row: Mapping[str, Any], where: str, column: str | None) -> _Content:
    """Find the text of a row: the named column, a chat, a text, or a pair of columns."""
    if column is not None:
        if column not in row:
            raise InputError(f"{where} has no column {column!r}; columns: {', '.join(row)}")
        value = row[column]
        return _text(value) if isinstance(value, str) else _chat(value, where, column)
    for name in CHAT_COLUMNS:
        if isinstance(row.get(name), list):
            return _chat(row[name], where, name)
    for name in TEXT_COLUMNS:
        if isinstance(row.get(name), str):
            return _text(row[name])
    if all(isinstance(row.get(name), str) for name in JOINED_COLUMNS):
        return _text(joined(row["context"], row["continuation"]))
    if all(isinstance(row.get(name), str) for name in TURN_COLUMNS):
        roles = ("user", "assistant")
        turns = zip(roles, TURN_COLUMNS, strict=True)
        return _Content([{"role": role, "content": row[name]} for role, name in turns], chat=False)
    raise InputError(
        f"{where} has no text column; columns: {', '.join(row)}: name one with calibration.column"
    )


def joined(context: str, continuation: str) -> str:
    """Context and continuation with exactly the one space between them that words need."""
    if not context or not continuation or context[-1].isspace() or continuation[0].isspace():
        return context + continuation
    return f"{context} {continuation}"


def _text(text: str) -> _Content:
    return _Content([{"role": "user", "content": text}], chat=False)


def _chat(value: Any, where: str, column: str) -> _Content:
    messages = []
    for turn in value if isinstance(value, list) else [None]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(
                f"{where}: column {column!r} holds neither text nor messages with role and content"
            )
        messages.append({"role": ROLES.get(role, role), "content": content})
    return _Content(messages, chat=True)


def through_template(messages: list[dict[str, str]], tokenizer: Any, where: str) -> str:
    """Messages as the tokenizer's chat template writes them.

    Raises:
        InputError: the template is malformed, or refuses them.
    """
    from jinja2 import TemplateError

    complaint = f"{where} does not fit the chat template"
    try:
        with malformed(complaint):
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise InputError(f"{complaint}: {one_line(error)}") from None
