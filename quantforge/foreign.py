"""What other libraries raise for a malformed file, turned into one line of our own.

Their parsers end in whatever their code runs into: a missing key, an addition of text and number,
recursion without an end. So what counts as "this file is malformed" is a list of exceptions, kept
here once, for the calls that hand a user's file to another library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from quantforge.errors import InputError, ResourceError

LONGEST_DETAIL = 300
MALFORMED = (
    OSError,
    ValueError,
    RuntimeError,  # recursion without an end too
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
    SafetensorError,
)

# What torch and Python say, as plain errors, where the system has no more memory to give.
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")


@contextmanager
def malformed(complaint: str) -> Iterator[None]:
    """Turn what a library raises for a malformed file into "complaint: reason".

    Args:
        complaint: what cannot be done, with the file's name.

    Raises:
        InputError: the library found the file malformed.
        ResourceError: there was not enough memory.
    """
    try:
        yield
    except MemoryError as error:
        raise ResourceError(f"{complaint}: out of memory ({one_line(error)})") from None
    except MALFORMED as error:
        kind = ResourceError if any(sign in str(error) for sign in OUT_OF_MEMORY) else InputError
        raise kind(f"{complaint}: {one_line(error)}") from None
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises the base class itself
            raise
        raise InputError(f"{complaint}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Type and message of an error without line breaks, cut where it is long."""
    text = " ".join(str(error).split())
    detail = text if len(text) <= LONGEST_DETAIL else f"{text[:LONGEST_DETAIL]}…"
    return f"{type(error).__name__}: {detail}" if detail else type(error).__name__


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: of transformers.
        text: to encode.
        options: of the tokenizer's call.

    Raises:
        InputError: the tokenizer is malformed in a way that shows only now.
    """
    with malformed("the tokenizer cannot encode text"):
        return [int(token) for token in tokenizer(text, **options)["input_ids"]]
