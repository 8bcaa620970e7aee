"""What a user may spend and what has to be reached, parsed once.

A budget is one or several parts, joined by a comma or a plus, all of which must hold:

| part            | limits |
| --------------- | ------ |
| `3bit`, `3.25bpw` | average stored bits (codes, scales, zero-points) a planned weight |
| `120MB`, `1.2GiB` | bytes of all safetensors files: embeddings, norms, head and headers too |
| `0.4x`          | the same, as a share of the network's weights in bfloat16 |
| `vram:8GB@4096` | weights in memory and the keys and values of that many tokens, batch 1 |
| `latency:12ms`  | a decoding step's time in the planned weights; `@4` is a batch of four |
| `latency:-25%`  | the same, less than 16 bits take |
| `kl:0.05`       | KL to the float network in nats a token, measured on held-out tokens |
| `ppl:+2%`       | rise of the perplexity over the float network's, likewise |
| `cosine:0.99`   | an encoder's mean cosine to the float network's pooled output, likewise |
| `bops:5G`       | bit operations of a picture: MACs times the bits of both operands |
| `bops:-50%`     | the same, less than 8-bit weights and activations take |
| `acc:-0.5%`     | points of accuracy that a classifier may lose, on held-out pictures |

The last three are of convolutional networks (`quantforge.vision`). The first four are sizes, which
a plan meets by arithmetic, and so it does latency, by the times of a device (`search.latency`), and
bit operations. Bytes are a constant and the stored bits over eight, but for the headers, so they
become a limit in bits once the network's shapes are known (`quantforge.planning`). `kl`, `ppl`,
`cosine` and `acc` are found by measuring plans (`quantforge.targets`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from quantforge.errors import UsageError
from quantforge.types import KEPT_BITS

UNITS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
SECONDS = {"US": Fraction(1, 10**6), "MS": Fraction(1, 10**3), "S": Fraction(1)}
EXAMPLES = (
    "3bit, 3.25bpw, 120MB, 0.4x, vram:8GB@4096, latency:-25%, kl:0.05, ppl:+2%, cosine:0.99 or "
    "acc:-0.5%"
)

_NUMBER = r"(\d+(?:\.\d+)?)"
_SMALL = r"(\d+(?:\.\d+)?(?:e-?\d\d?)?)"  # 5e-2 too
_SIZE = rf"{_NUMBER}\s*([kmgt]i?b)"


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that may be taken of one kind of size.

    Attributes:
        kind: "bits" a planned weight; "bytes" of the checkpoint; "share" of the bfloat16 weights;
            "vram", bytes of memory; "latency" in seconds; "latency-share" of what 16 bits take;
            "operations" on bits a picture, and "operations-share" of what 8 × 8 bits take.
        amount: the limit, exact.
        context: of "vram", tokens whose keys and values are in memory; of latency, the batch.
    """

    kind: Literal[
        "bits",
        "bytes",
        "share",
        "vram",
        "latency",
        "latency-share",
        "operations",
        "operations-share",
    ]
    amount: Fraction
    context: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """How close the network must stay to the float one, on held-out tokens.

    Attributes:
        kind: "kl" or "ppl" of a decoder, "cosine" of an encoder, "kl" or "acc" of a classifier.
        nats: most KL a token; of "ppl" the most that the cross-entropy a token may rise, the
            logarithm of the perplexities' ratio; of "cosine" one minus what was asked for; of
            "acc" the share of pictures that may be lost.
        text: as the user wrote it.
    """

    kind: Literal["kl", "ppl", "cosine", "acc"]
    nats: float
    text: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits and targets that must all hold.

    Attributes:
        text: as the user wrote it.
        limits: of size.
        targets: of quality.
    """

    text: str
    limits: tuple[Limit, ...] = ()
    targets: tuple[Target, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse what the module describes.

        Raises:
            UsageError: a part has another form or an impossible value.
        """
        limits: list[Limit] = []
        targets: list[Target] = []
        tight = re.sub(r":\s+", ":", text.strip())
        # a plus behind a colon is a sign, not a joint: "ppl:+2%"
        for part in re.split(r"\s*,\s*|\s*(?<!:)\+\s*", tight):
            found = _part(part, text)
            if isinstance(found, Target):
                targets.append(found)
            else:
                limits.append(found)
        return cls(text.strip(), tuple(limits), tuple(targets))

    @property
    def bits(self) -> Fraction:
        """Most stored bits a planned weight; 16 where no limit is in bits."""
        found = [limit.amount for limit in self.limits if limit.kind == "bits"]
        return min(found, default=Fraction(KEPT_BITS))

    @property
    def sizes(self) -> tuple[Limit, ...]:
        """The limits in bytes, which need the network's shapes."""
        return tuple(one for one in self.limits if one.kind in ("bytes", "share", "vram"))

    @property
    def latency(self) -> tuple[Limit, ...]:
        """The limits in time, which need the times of a device."""
        return tuple(one for one in self.limits if one.kind in ("latency", "latency-share"))

    @property
    def operations(self) -> tuple[Limit, ...]:
        """The limits in bit operations, which need the pictures' size."""
        return tuple(one for one in self.limits if one.kind in ("operations", "operations-share"))

    def total_bits(self, weights: int) -> int:
        """Largest whole number of stored bits for `weights` weights."""
        return int(self.bits * weights)

    def in_bits(self, bits: Fraction) -> Budget:
        """The same text and limits in time, with one in bits in the place of all others."""
        return replace(self, limits=(Limit("bits", bits), *self.latency), targets=())


def _part(text: str, whole: str) -> Limit | Target:
    for pattern, read in _FORMS:
        match = re.fullmatch(pattern, text, re.IGNORECASE)
        if match is not None:
            return read(match, text)
    inside = "" if text == whole.strip() else f" of {whole!r}"
    raise UsageError(f"budget {text!r}{inside} is not understood; write e.g. {EXAMPLES}")


def _bits(match: re.Match[str], text: str) -> Limit:
    bits = Fraction(match[1])
    if not 0 < bits <= KEPT_BITS:
        raise UsageError(
            f"budget {text!r} is out of range; give more than 0 and at most 16 bits a weight"
        )
    return Limit("bits", bits)


def _bytes(number: str, unit: str, text: str) -> Fraction:
    amount = Fraction(number) * UNITS[unit.upper()]
    if amount <= 0:
        raise UsageError(f"budget {text!r} leaves no room; give a positive size, e.g. 120MB")
    return amount


def _checkpoint(match: re.Match[str], text: str) -> Limit:
    return Limit("bytes", _bytes(match[1], match[2], text))


def _share(match: re.Match[str], text: str) -> Limit:
    share = Fraction(match[1])
    if not 0 < share <= 1:
        raise UsageError(f"budget {text!r} is out of range; give a share above 0x and up to 1x")
    return Limit("share", share)


def _memory(match: re.Match[str], text: str) -> Limit:
    context = int(match[3]) * (1024 if match[4] else 1)
    if context < 1:
        raise UsageError(f"budget {text!r} has no context; give a number of tokens, e.g. @4096")
    return Limit("vram", _bytes(match[1], match[2], text), context)


def _latency(match: re.Match[str], text: str) -> Limit:
    amount = Fraction(match[1]) * SECONDS[match[2].upper()]
    if amount <= 0:
        raise UsageError(f"budget {text!r} leaves no time; give e.g. latency:12ms")
    return Limit("latency", amount, _batch(match[3], text))


def _faster(match: re.Match[str], text: str) -> Limit:
    less = Fraction(match[1]) / 100
    if not 0 < less < 1:
        raise UsageError(f"budget {text!r} is out of range; give latency:-1% to latency:-99%")
    return Limit("latency-share", 1 - less, _batch(match[2], text))


def _batch(digits: str | None, text: str) -> int:
    batch = 1 if digits is None else int(digits)
    if batch < 1:
        raise UsageError(f"budget {text!r} has no batch; give a number of sequences, e.g. @1")
    return batch


def _kl(match: re.Match[str], text: str) -> Target:
    return Target("kl", _positive(float(match[1]), text), text)


def _perplexity(match: re.Match[str], text: str) -> Target:
    return Target("ppl", _positive(math.log1p(float(match[1]) / 100), text), text)


def _cosine(match: re.Match[str], text: str) -> Target:
    least = float(match[1])
    if not 0 < least < 1:
        raise UsageError(f"budget {text!r} is out of range; give a cosine between 0 and 1")
    return Target("cosine", float(1 - Fraction(match[1])), text)


def _operations(match: re.Match[str], text: str) -> Limit:
    amount = Fraction(match[1]) * 1000 ** ("kmgt".index(match[2].lower()) + 1)
    if amount <= 0:
        raise UsageError(f"budget {text!r} leaves no operations; give e.g. bops:5G")
    return Limit("operations", amount)


def _fewer(match: re.Match[str], text: str) -> Limit:
    less = Fraction(match[1]) / 100
    if not 0 < less < 1:
        raise UsageError(f"budget {text!r} is out of range; give bops:-1% to bops:-99%")
    return Limit("operations-share", 1 - less)


def _accuracy(match: re.Match[str], text: str) -> Target:
    return Target("acc", _positive(float(Fraction(match[1]) / 100), text), text)


def _positive(nats: float, text: str) -> float:
    if nats <= 0:
        raise UsageError(f"budget {text!r} allows no loss at all; give a number above 0")
    return nats


_FORMS: tuple[tuple[str, Callable[[re.Match[str], str], Limit | Target]], ...] = (
    (rf"{_NUMBER}\s*(?:bits?|bpw)", _bits),
    (_SIZE, _checkpoint),
    (rf"{_NUMBER}\s*x", _share),
    (rf"vram:\s*{_SIZE}\s*@\s*(\d+)(k?)", _memory),
    (rf"latency:\s*{_NUMBER}\s*(us|ms|s)(?:\s*@\s*(\d+))?", _latency),
    (rf"latency:\s*-\s*{_NUMBER}\s*%(?:\s*@\s*(\d+))?", _faster),
    (rf"kl:\s*{_SMALL}", _kl),
    (rf"ppl:\s*\+?\s*{_NUMBER}\s*%", _perplexity),
    (rf"cosine:\s*{_NUMBER}", _cosine),
    (rf"bops:\s*{_NUMBER}\s*([kmgt])", _operations),
    (rf"bops:\s*-\s*{_NUMBER}\s*%", _fewer),
    (rf"acc:\s*-\s*{_NUMBER}\s*%", _accuracy),
)
