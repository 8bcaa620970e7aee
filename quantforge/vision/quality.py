"""How a classifier compares with its float reference on pictures: agreement, KL, accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantforge.results import Metric

METRIC = Metric(
    name="KL", noun="KL divergence", axis="KL, nats per picture", unit=" nats",
    each=" nats a picture", digits=".4f",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionQuality:
    """How a network's predictions compare with those of its float reference.

    Attributes:
        pictures: which ones, in words.
        count: of them.
        kl: mean KL(reference ‖ network) over the classes, in nats a picture.
        kl_stderr: standard error over pictures.
        agreement: share of pictures whose likeliest class is the reference's.
        accuracy: share of pictures whose likeliest class is the label; None without labels.
        reference_accuracy: the same of the reference.
        picture_kl: of every picture, for paired comparisons.
        agrees: whether the likeliest class is the reference's, of every picture.
        right: whether it is the label's; empty without labels.
    """

    pictures: str
    count: int
    kl: float
    kl_stderr: float
    agreement: float
    accuracy: float | None
    reference_accuracy: float | None
    picture_kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    right: tuple[bool, ...] = ()

    metric: ClassVar[Metric] = METRIC

    @property
    def loss(self) -> float:
        """What a plan is chosen by."""
        return self.kl

    @property
    def loss_stderr(self) -> float:
        """Its standard error over pictures."""
        return self.kl_stderr

    @property
    def windows(self) -> int:
        """How many pictures were measured."""
        return self.count

    @property
    def scores(self) -> tuple[float, ...]:
        """Of every picture 1 where the label is met, or without labels the reference."""
        return tuple(map(float, self.right or self.agrees))

    @property
    def drop(self) -> float:
        """Share of pictures lost: of accuracy where there are labels, else of agreement."""
        if self.accuracy is None or self.reference_accuracy is None:
            return 1.0 - self.agreement
        return self.reference_accuracy - self.accuracy


Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def logits_of(network: Network, pictures: Tensor, *, batch: int = 32) -> Tensor:
    """[n, classes] float32 logits of [n, channels, height, width] pictures."""
    return torch.cat([network(part).float() for part in torch.split(pictures, batch)])


def compare(
    logits: Tensor, reference: Tensor, *, pictures: str, labels: Tensor | None = None
) -> VisionQuality:
    """Compare [n, classes] logits with the float network's.

    Args:
        logits: of the network.
        reference: of the float network, on the same pictures.
        pictures: which ones, in words.
        labels: [n] int64 classes, where they are known.
    """
    kl = divergences(logits, reference)
    best, expected = logits.argmax(-1), reference.argmax(-1)
    agrees = (best == expected).tolist()
    count = len(kl)
    right: list[bool] = [] if labels is None else (best == labels).tolist()
    return VisionQuality(
        pictures=pictures,
        count=count,
        kl=statistics.fmean(kl),
        kl_stderr=statistics.stdev(kl) / math.sqrt(count) if count > 1 else math.inf,
        agreement=sum(agrees) / count,
        accuracy=None if labels is None else sum(right) / count,
        reference_accuracy=(
            None if labels is None else float((expected == labels).double().mean())
        ),
        picture_kl=tuple(kl),
        agrees=tuple(agrees),
        right=tuple(right),
    )


def divergences(logits: Tensor, reference: Tensor) -> list[float]:
    """KL(reference ‖ network) of every picture, in nats, summed in float64."""
    theirs = reference.double().log_softmax(-1)
    ours = logits.double().log_softmax(-1)
    kl: list[float] = (theirs.exp() * (theirs - ours)).sum(-1).tolist()
    return kl
