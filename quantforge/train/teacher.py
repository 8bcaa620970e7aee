"""What the network is trained towards: the float network's distribution, stored in one of two ways.

Where the states that enter the float network's head are at hand, and the head with them, every
distribution is a product away, whole, for two bytes a feature (`HiddenTeacher`). Where they are
not, as with logits that another program gave, or where that product is to be saved, the k likeliest
tokens of every position and their probabilities are kept; what is left of the probability is one
more outcome (`StoredTeacher`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantforge.errors import InputError
from quantforge.files import atomic_path
from quantforge.methods.head_loss import FullTeacher, Target, TopTeacher
from quantforge.models.head import Head


class Teacher(Protocol):
    """Gives the targets of the sequences that are trained on."""

    def target(self, sequences: Sequence[int], device: torch.device) -> Target:
        """Of all tokens of some sequences, one sequence after another."""
        ...

    def states(self, sequences: Sequence[int], device: torch.device) -> Tensor | None:
        """[tokens, hidden] what enters the float network's head; None where it is not known."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTeacher:
    """A float network by the states that enter its head.

    Attributes:
        hidden: [sequences, length, hidden], any float dtype and device.
        head: the float network's; None for an encoder, whose states are the target.
    """

    hidden: Tensor
    head: Head | None

    def target(self, sequences: Sequence[int], device: torch.device) -> Target:
        """See `Teacher`."""
        if self.head is None:
            raise ValueError("an encoder has no distribution over tokens")
        return FullTeacher(hidden=self.states(sequences, device), head=self.head)

    def states(self, sequences: Sequence[int], device: torch.device) -> Tensor:
        """See `Teacher`."""
        return self.hidden[list(sequences)].flatten(0, 1).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTeacher:
    """A float network by the k likeliest tokens of every position.

    Attributes:
        tokens: [sequences, length, k] int32.
        chances: [sequences, length, k] float32.
    """

    tokens: Tensor
    chances: Tensor

    def target(self, sequences: Sequence[int], device: torch.device) -> Target:
        """See `Teacher`."""
        chosen = list(sequences)
        return TopTeacher(
            tokens=self.tokens[chosen].flatten(0, 1).to(device, torch.int64),
            chances=self.chances[chosen].flatten(0, 1).to(device),
        )

    def states(self, _sequences: Sequence[int], _device: torch.device) -> None:
        """See `Teacher`: not known."""
        return


def top_teacher(teacher: HiddenTeacher, k: int, path: Path | None, key: str) -> StoredTeacher:
    """The likeliest tokens of a teacher that is known whole.

    Args:
        teacher: the float network.
        k: tokens kept of a position.
        path: file that keeps them, or has them already; None keeps them in memory alone.
        key: fingerprint of network and tokens.

    Raises:
        InputError: the file is damaged or was made for something else.
        ValueError: it is an encoder.
    """
    head = teacher.head
    if head is None:
        raise ValueError("an encoder has no distribution over tokens")

    def logits() -> Iterator[Tensor]:
        for index in range(len(teacher.hidden)):
            yield head.logits(teacher.states([index], head.weight.device))

    if path is None:
        return _likeliest(k, logits())
    return stored_teacher(path, f"{key} {k}", k, logits)


def _likeliest(k: int, logits: Iterable[Tensor]) -> StoredTeacher:
    """The k likeliest tokens of [length, vocabulary] logits, sequence by sequence."""
    tokens, chances = [], []
    for one in logits:
        top = torch.softmax(one.float(), -1).topk(min(k, one.shape[-1]))
        tokens.append(top.indices.to("cpu", torch.int32))
        chances.append(top.values.cpu())
    return StoredTeacher(tokens=torch.stack(tokens), chances=torch.stack(chances))


def stored_teacher(
    path: Path, key: str, k: int, logits: Callable[[], Iterable[Tensor]]
) -> StoredTeacher:
    """The teacher in a file, which is written first where it is not there.

    Args:
        path: of the file.
        key: fingerprint of network, tokens and k: another file than asked for is refused.
        k: tokens kept of a position; the whole vocabulary where that is smaller.
        logits: gives [length, vocabulary] logits, sequence by sequence; called only to write.

    Raises:
        InputError: the file is damaged or was made for something else.
    """
    if not path.is_file():
        made = _likeliest(k, logits())
        with atomic_path(path) as temporary:
            save_file(
                {"tokens": made.tokens, "chances": made.chances}, temporary, metadata={"key": key}
            )
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("key")
            made = StoredTeacher(
                tokens=file.get_tensor("tokens"), chances=file.get_tensor("chances")
            )
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"the teacher {path} is damaged ({error}): delete it") from error
    if found != key:
        raise InputError(f"the teacher {path} is of another network or text: delete it")
    return made
