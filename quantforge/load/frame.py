"""Special tokens around every sequence that an encoder reads, as its tokenizer puts them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.foreign import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Special tokens around every sequence of an encoder.

    Attributes:
        before: their ids.
        after: likewise.
        rule: the same in words.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    rule: str

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.before) + len(self.after)

    def around(self, rows: Tensor) -> Tensor:
        """[count, length] → [count, length + size] int64."""
        sides = (torch.tensor(ids, dtype=torch.int64) for ids in (self.before, self.after))
        before, after = (side.expand(len(rows), -1) for side in sides)
        return torch.cat([before, rows, after], 1)


def frame_of(tokenizer: Any) -> Frame:
    """What the tokenizer puts around a text.

    Raises:
        InputError: it does not keep the text's own tokens together.
    """
    own = encode(tokenizer, "a", add_special_tokens=False)
    whole = encode(tokenizer, "a")
    places = [i for i in range(len(whole)) if own and whole[i : i + len(own)] == own]
    if not places:
        raise InputError("the tokenizer adds special tokens inside a text, not around it")
    before, after = whole[: places[0]], whole[places[0] + len(own) :]
    names = " .. ".join(
        " ".join(str(token) for token in tokenizer.convert_ids_to_tokens(list(ids)))
        for ids in (before, after)
    )
    rule = f"every sequence between special tokens ({names})" if before or after else "none added"
    return Frame(before=tuple(before), after=tuple(after), rule=rule)
