"""Pressure, temperature and learning rate at the points that are published."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from quantforge.methods.schedules import (
    LearningRateSchedule,
    PressureSchedule,
    TemperatureSchedule,
)


def test_pressure_rises_in_the_first_fifth():
    schedule = PressureSchedule()
    assert [schedule.at(p) for p in (0.0, 0.05, 0.1, 0.2, 0.7, 1.0)] == [0, 0.25, 0.5, 1, 1, 1]
    assert PressureSchedule(ramp=0.0).at(0.0) == 1.0
    assert PressureSchedule(ramp=1.0).at(0.5) == 0.5


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_temperature_stays_then_falls_to_exactly_nothing(style):
    schedule = TemperatureSchedule(initial=0.35, style=style)
    assert [schedule.at(p) for p in (0.0, 0.1, 0.2)] == [0.35] * 3
    assert schedule.at(0.6) == pytest.approx(0.175)  # half way, either way
    quarter = 0.75 if style == "linear" else 0.5 * (1 + math.cos(math.pi / 4))
    assert schedule.at(0.4) == pytest.approx(0.35 * quarter)
    assert schedule.at(1.0) == 0.0
    curve = [schedule.at(step / 100) for step in range(101)]
    assert all(b <= a for a, b in pairwise(curve))
    assert curve[-2] > 0.0


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_a_layers_multiplier_holds_at_all_times(style):
    schedule = TemperatureSchedule(initial=0.4, style=style)
    for step in range(101):
        progress = step / 100
        assert schedule.at(progress, 0.7) == pytest.approx(0.7 * schedule.at(progress), abs=1e-15)


def test_the_last_phase_may_pass_gradients_straight_through():
    schedule = TemperatureSchedule(initial=0.4, style="linear", coldest=0.1)
    assert schedule.at(0.7) == pytest.approx(0.15)
    assert schedule.at(0.79) > 0.1
    assert [schedule.at(p) for p in (0.81, 0.9, 1.0)] == [0.0] * 3
    assert schedule.at(0.85, multiplier=2.0) == pytest.approx(0.15)  # of the layer's temperature


def test_nothing_cools_before_the_end_without_cooling():
    schedule = TemperatureSchedule(initial=0.4, cooling=0.0)
    assert (schedule.at(0.999), schedule.at(1.0)) == (0.4, 0.0)


def test_the_learning_rate_warms_up_stays_and_decays():
    schedule = LearningRateSchedule()
    assert schedule.at(0.0) == 0.0
    assert schedule.at(0.025) == pytest.approx(0.5)
    assert [schedule.at(p) for p in (0.05, 0.5, 0.9)] == [1.0] * 3
    assert schedule.at(0.95) == pytest.approx(0.55)  # half way to the floor of 0.1
    assert schedule.at(1.0) == pytest.approx(0.1)
    flat = LearningRateSchedule(warmup=0.0, decay=0.0)
    assert (flat.at(0.0), flat.at(1.0)) == (1.0, 1.0)
    assert LearningRateSchedule(floor=0.0).at(1.0) == 0.0


def test_what_is_out_of_range_is_refused():
    for schedule in (
        PressureSchedule(), TemperatureSchedule(initial=0.3), LearningRateSchedule(),
    ):  # fmt: skip
        for progress in (-0.01, 1.01, math.nan):
            with pytest.raises(ValueError, match=r"progress must be 0\.\.1"):
                schedule.at(progress)
    with pytest.raises(ValueError, match="ramp must be a share"):
        PressureSchedule(ramp=1.5)
    with pytest.raises(ValueError, match="cooling must be a share"):
        TemperatureSchedule(initial=0.3, cooling=-0.1)
    with pytest.raises(ValueError, match="negative"):
        TemperatureSchedule(initial=-0.3)
    with pytest.raises(ValueError, match="style must be"):
        TemperatureSchedule(initial=0.3, style="hessian")
    with pytest.raises(ValueError, match="more than training"):
        LearningRateSchedule(warmup=0.6, decay=0.5)
