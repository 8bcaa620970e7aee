"""Pictures from statistics: what they are matched to, and that they come to match it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from quantforge.errors import CancelledError
from quantforge.progress import Monitor
from quantforge.vision.building import build
from quantforge.vision.network import Preprocessing, VisionNetwork
from quantforge.vision.synthesis import Synthesis, _Moments, statistics_error, synthesise

PREPARE = Preprocessing(size=(16, 12), mean=(0.5, 0.4, 0.3), deviation=(0.2, 0.25, 0.5))


def network(*, norms: bool = True, dead: bool = False) -> VisionNetwork:
    """Two convolutions whose BatchNorms saw pictures of stripes."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if norms else lambda _: nn.Identity()
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1), norm(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    if norms:
        stripes = torch.sin(torch.arange(12) * torch.rand(64, 3, 1, 1) * 2)
        seen = (0.5 + 0.4 * stripes.expand(-1, -1, 16, -1) - 0.4) / 0.3
        for one in (module[1], module[4]):
            one.momentum = 1.0
        module.train()
        with torch.no_grad():
            module(seen)
            for one in (module[1], module[4]):
                one.weight.uniform_(0.5, 2)
                one.bias.uniform_(-1, 1)
            if dead:
                module[0].weight[0] = 0
                module[1].running_var[0] = 0
    return build(module.eval(), PREPARE, name="tiny", fingerprint="0")


@pytest.fixture(scope="module")
def tiny() -> VisionNetwork:
    return network()


def test_the_error_is_the_formula(tiny):
    x = torch.randn(5, 3, 16, 12)
    first = tiny.graph.get_submodule("0")(x)
    second = tiny.graph.get_submodule("3")(first.relu())
    errors = []
    for name, made in (("0", first), ("3", second)):
        mean, deviation = tiny.statistics[name]
        parts = []
        for channel in range(made.shape[1]):
            values = made[:, channel].flatten().tolist()
            average = sum(values) / len(values)
            spread = (sum((v - average) ** 2 for v in values) / len(values)) ** 0.5
            off = (average - float(mean[channel])) ** 2 + (spread - float(deviation[channel])) ** 2
            parts.append(off)
        errors.append(sum(parts) / sum(float(d) ** 2 for d in deviation))
    assert float(statistics_error(tiny, x)) == pytest.approx(sum(errors) / 2, rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 6), (3, 4, 5, 6)])
def test_moments_and_their_slopes_are_those_of_autograd(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    sides = [d for d in range(len(shape)) if d != 1]
    expected = torch.var_mean(x, dim=sides, correction=0)
    made = _Moments.apply(x)
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    slopes = []
    for one, other in zip(made, expected, strict=True):
        assert torch.allclose(one, other)
    for pair in (made, expected):
        total = (pair[0] * weights[0]).sum() + (pair[1] * weights[1]).sum()
        slopes.append(torch.autograd.grad(total, x)[0])
    assert torch.allclose(*slopes)


def test_pictures_come_to_have_the_statistics(tiny):
    settings = Synthesis(steps=60, batch=8)
    noise = synthesise(tiny, 8, settings=Synthesis(steps=0, batch=8))
    made = synthesise(tiny, 8, settings=settings)
    assert made.inputs.shape == (8, 3, 16, 12)
    before, after = (float(statistics_error(tiny, p.inputs)) for p in (noise, made))
    assert after < 0.2 * before
    assert "statistics of 2 layers" in made.description
    pixels = made.inputs * torch.tensor(PREPARE.deviation).view(3, 1, 1)
    pixels += torch.tensor(PREPARE.mean).view(3, 1, 1)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1


def test_pictures_are_asked_for_classes_of_their_own(tiny):
    losses = []
    for weight in (0.0, 1.0):
        settings = Synthesis(steps=40, batch=8, class_weight=weight)
        made = synthesise(tiny, 8, seed=3, settings=settings)
        # The one generator gave the coefficients first, then the classes.
        generator = torch.Generator().manual_seed(3)
        torch.randn(8, 3, 16, 12 // 2 + 1, 2, generator=generator)
        classes = torch.randint(4, (8,), generator=generator)
        losses.append(float(nn.functional.cross_entropy(tiny.graph(made.inputs), classes)))
    assert losses[1] < 0.8 * losses[0]


def test_the_seed_decides_and_nothing_else(tiny):
    settings = Synthesis(steps=3, batch=2)
    state = torch.random.get_rng_state()
    first, again = (synthesise(tiny, 5, seed=1, settings=settings).inputs for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = synthesise(tiny, 5, seed=2, settings=settings).inputs
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert len(first) == 5
    assert len({float(one.sum()) for one in first}) == 5


def test_a_dead_channel_harms_nothing():
    dead = network(dead=True)
    assert float(dead.statistics["0"][1][0]) == 0
    assert torch.isfinite(synthesise(dead, 2, settings=Synthesis(steps=5)).inputs).all()


def test_without_statistics_pictures_are_smooth_noise():
    plain = network(norms=False)
    made = synthesise(plain, 400)
    assert "no BatchNorm" in made.description
    pixels = made.inputs * torch.tensor(PREPARE.deviation).view(3, 1, 1)
    pixels += torch.tensor(PREPARE.mean).view(3, 1, 1)
    assert float(pixels.mean()) == pytest.approx(0.45, abs=0.02)
    assert float(pixels.std()) == pytest.approx(0.25, abs=0.01)
    power = torch.fft.fft2(pixels - pixels.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    # Amplitude falls as 1 / f, so power as 1 / f²: from 1/16 to 3/16 by nine, but for the bend.
    assert float(power[1, 0] / power[3, 0]) == pytest.approx(9, rel=0.25)


def test_every_step_is_reported_and_cancelling_stops_it(tiny):
    events = []
    synthesise(
        tiny, 4, settings=Synthesis(steps=3, batch=2), monitor=Monitor(progress=events.append)
    )
    assert [(one.done, one.total) for one in events] == [(n, 6) for n in range(1, 7)]
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        synthesise(tiny, 4, settings=Synthesis(steps=3), monitor=Monitor(cancel=cancel))
