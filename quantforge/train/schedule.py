"""How soft, how warm and how fast, at a progress from 0 to 1: one run's schedules together."""

from __future__ import annotations

from collections.abc import Mapping

from quantforge.methods.schedules import (
    LearningRateSchedule,
    PressureSchedule,
    TemperatureSchedule,
)
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear
from quantforge.train.quantizers import HARD, QUANTIZERS, Hardness


class Schedules:
    """Hardness of every layer and the rates' common factor.

    Attributes:
        soft: whether anything is ever between float and integer.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainedLinear],
        config: TrainingConfig,
        multipliers: Mapping[str, float],
    ) -> None:
        """Find where every layer starts.

        Args:
            layers: name → stand-in, as it starts.
            config: how all of them go on.
            multipliers: layer name → of its temperature; 1 where there is none.
        """
        self.soft = QUANTIZERS[config.quantizer].hardens
        self._names, self._multipliers = list(layers), multipliers
        self._pressure = PressureSchedule(ramp=config.pressure_ramp)
        self._rate = LearningRateSchedule(
            warmup=config.warm_up, decay=config.decay, floor=config.floor
        )
        self._temperatures = {
            name: TemperatureSchedule(
                initial=config.temperature or layer.first_temperature(),
                cooling=config.cooling,
                style=config.cooling_style,
                coldest=config.coldest,
            )
            for name, layer in (layers.items() if self.soft else ())
        }

    def rate(self, place: float) -> float:
        """Learning rates relative to their highest."""
        return self._rate.at(place)

    def hardness(self, place: float) -> dict[str, Hardness]:
        """Layer name → between float and integer."""
        if not self.soft:
            return dict.fromkeys(self._names, HARD)
        pressure = self._pressure.at(place)
        return {
            name: Hardness(
                temperature=schedule.at(place, self._multipliers.get(name, 1.0)),
                pressure=pressure,
            )
            for name, schedule in self._temperatures.items()
        }
