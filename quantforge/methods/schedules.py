"""What changes in the course of training, as pure functions of progress from 0 to 1.

Hestia (see `hestia`) raises its pressure in the first fifth of training and cools in the last four
fifths; the learning rate warms up, stays, and decays. None of them counts steps or holds state, so
that a resumed run, or one planned by tokens, follows the same curves.

Three things are other than in Hestia's code. A layer's multiplier of the temperature holds in every
style and at all times: there the style "cosine" applies it while the temperature is constant and
forgets it when cooling starts, and "linear" likewise, so that only "hessian" (a cosine) does what
its authors describe. The temperature is 0 at the end and not one step before it. Progress outside
0..1 is an error instead of a temperature that rises again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Cooling = Literal["cosine", "linear"]


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be 0..1, got {progress}")


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be a share of training, 0..1, got {share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureSchedule:
    """Share of the softly quantized weight in the one used: up to 1 linearly, then 1.

    Attributes:
        ramp: share of training until it is 1; Hestia's "compress ratio". 0: 1 from the start.
    """

    ramp: float = 0.2

    def __post_init__(self) -> None:
        _check_share("ramp", self.ramp)

    def at(self, progress: float) -> float:
        """Pressure, 0..1.

        Raises:
            ValueError: progress is outside 0..1.
        """
        _check_progress(progress)
        return progress / self.ramp if progress < self.ramp else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureSchedule:
    """Temperature of the soft weights: constant, then down to exactly 0 at the end.

    Attributes:
        initial: at the start, in squared steps of the grid (`temperature.optimal_temperature`).
        cooling: share of training, at its end, in which it falls; Hestia's "anneal ratio".
        style: how it falls.
        coldest: temperatures below are 0: rounding, with the gradient passed straight through. Over
            evenly spread weights the root mean square of the soft slope is 1/√(3T), carried by
            ever fewer of them, so that clipped gradients end up as those of a few weights. As
            published, 0.
    """

    initial: float
    cooling: float = 0.8
    style: Cooling = "cosine"
    coldest: float = 0.0

    def __post_init__(self) -> None:
        _check_share("cooling", self.cooling)
        if not (self.initial >= 0.0 and self.coldest >= 0.0):
            raise ValueError(f"no temperature is negative: {self.initial}, {self.coldest}")
        if self.style not in ("cosine", "linear"):
            raise ValueError(f"style must be 'cosine' or 'linear', got {self.style!r}")

    def at(self, progress: float, multiplier: float = 1.0) -> float:
        """Temperature of a layer.

        Args:
            progress: 0..1.
            multiplier: the layer's own (`temperature.temperature_multipliers`).

        Raises:
            ValueError: progress is outside 0..1.
        """
        _check_progress(progress)
        if progress == 1.0:
            return 0.0
        hottest = self.initial * multiplier
        left = min((1.0 - progress) / self.cooling, 1.0) if self.cooling else 1.0
        share = left if self.style == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        return hottest * share if hottest * share >= self.coldest else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSchedule:
    """Warm-up, stable, decay: linearly from 0, then constant, then half a cosine to the floor.

    Attributes:
        warmup: share of training that warms up.
        decay: share of training, at its end, that decays.
        floor: of the rate at the end, relative to the stable one.
    """

    warmup: float = 0.05
    decay: float = 0.1
    floor: float = 0.1

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "floor"):
            _check_share(name, getattr(self, name))
        if self.warmup + self.decay > 1.0:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than training")

    def at(self, progress: float) -> float:
        """Learning rate relative to the stable one.

        Raises:
            ValueError: progress is outside 0..1.
        """
        _check_progress(progress)
        if progress < self.warmup:
            return progress / self.warmup
        left = (1.0 - progress) / self.decay if self.decay else math.inf
        if left >= 1.0:
            return 1.0
        return self.floor + (1.0 - self.floor) * (0.5 - 0.5 * math.cos(math.pi * left))
