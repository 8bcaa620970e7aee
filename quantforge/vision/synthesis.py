"""Calibration pictures made from a network's own BatchNorm statistics, where there are no others.

A BatchNorm remembers the mean and the deviation that every channel had in training. Pictures are
changed by gradient descent until a batch of them gives every folded layer's output the same two
(ZeroQ, Cai et al. 2020, arXiv 2001.00281), so that ranges, grams and block inputs are about those
of training pictures. What differs from the paper, all of it to need few steps:

- Pictures start as noise whose amplitude falls with frequency as that of photographs does (1 / f),
  and Adam works on the coefficients of these frequencies, not on pixels (Olah et al. 2017, "Feature
  visualization"): large shapes move as easily as single pixels.
- A layer's error is relative to its own variance in training, so that no layer outweighs others.
- Every picture is asked for a class of its own (DeepInversion, Yin et al. 2020, arXiv 1912.08795):
  logits become as decided, and pictures as different, as real ones (DSG, Zhang et al. 2021, names
  sameness as what is wrong with matching statistics alone).
- Pixels stay between black and white.

A network without BatchNorm has no statistics: its pictures are the noise at the start, and the
description says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from quantforge.progress import Monitor
from quantforge.vision.network import Preprocessing, VisionNetwork
from quantforge.vision.pictures import Pictures

# Pixels of photographs, in 0..1, have this mean and a deviation of 0.25, which the sigmoid of a
# normal variable of this deviation has too.
PIXEL_MEAN = 0.45
CONTRAST = 1.3
GREY_SHARE = 0.85  # of a pixel's variance that its channels have in common
BETAS = (0.9, 0.95)  # of few steps
TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """How pictures are made.

    Attributes:
        steps: of Adam; one takes about three seconds of a core for 64 pictures of 224 × 224.
        batch: pictures whose statistics are matched together.
        rate: of Adam, relative to the deviation that a coefficient starts with; it falls to 0 as a
            cosine.
        class_weight: of the cross-entropy to the classes asked for, beside the errors' mean.
    """

    steps: int = 60
    batch: int = 16
    rate: float = 0.3
    class_weight: float = 0.05


def synthesise(
    network: VisionNetwork,
    count: int,
    *,
    seed: int = 0,
    settings: Synthesis | None = None,
    monitor: Monitor | None = None,
) -> Pictures:
    """Pictures whose statistics are those that the network had in training.

    Args:
        network: the float one; `statistics` says what is matched.
        count: how many.
        seed: of the only generator used.
        settings: steps, batch and weights.
        monitor: told every step; its cancel event stops the work.
    """
    settings, monitor = settings or Synthesis(), monitor or Monitor()
    generator = torch.Generator().manual_seed(seed)
    matched = bool(network.statistics)
    sizes = [min(settings.batch, count - at) for at in range(0, count, settings.batch)]
    parts = []
    for number, size in enumerate(sizes):
        start = _coefficients(size, network, generator)
        if matched:
            part = monitor.part("synthesis", number * settings.steps, len(sizes) * settings.steps)
            parts.append(_matched(network, start, settings, generator, part))
        else:
            parts.append(_pictures(start, network.preprocessing))
    description = (
        f"made from the statistics of {len(network.statistics)} layers in {settings.steps} steps"
        if matched
        else "noise as smooth as photographs, because the network has no BatchNorm statistics"
    )
    return Pictures(inputs=torch.cat(parts), labels=None, description=description)


def statistics_error(network: VisionNetwork, inputs: Tensor) -> Tensor:
    """Mean over layers of the squared errors of means and deviations over the mean variance."""
    made = _Matching(network)
    made.run(inputs)
    return made.error()


class _Moments(torch.autograd.Function):
    """[n, channels, ..] → variance and mean of every channel.

    With its slope written out, 2 (x - mean) / count and 1 / count, it takes a third of the time of
    `torch.var_mean`, which would be most of a step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both [channels]."""
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        square = torch.linalg.vector_norm(rows, dim=0).square() / len(rows)
        ctx.save_for_backward(x, mean)
        return (square - mean.square()).clamp_min(0), mean

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        """Of the sum of both."""
        x, mean = ctx.saved_tensors
        of_variance, of_mean = slopes
        shape = (1, -1, *[1] * (x.ndim - 2))
        count = x.numel() / x.shape[1]
        slope = 2 * of_variance / count
        shift = of_mean / count - slope * mean
        return torch.addcmul(shift.view(shape), x, slope.view(shape))


class _Matching(fx.Interpreter):
    """The float network, which notes how far its layers' statistics are from those of training."""

    def __init__(self, network: VisionNetwork) -> None:
        super().__init__(network.graph)
        self._wanted: Mapping[str, tuple[Tensor, Tensor]] = network.statistics
        self._errors: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        """One node; of a layer with statistics its error too."""
        made = super().run_node(n)
        if n.op == "call_module" and n.target in self._wanted:
            mean, deviation = self._wanted[str(n.target)]
            variance, average = _Moments.apply(made)  # type: ignore[no-untyped-call]
            # The root's slope has no bound at 0, where dead channels are.
            off = (average - mean).square() + ((variance + TINY).sqrt() - deviation).square()
            self._errors.append(off.mean() / deviation.square().mean().clamp_min(TINY))
        return made

    def error(self) -> Tensor:
        """Mean of the errors since the last call."""
        errors, self._errors = self._errors, []
        return torch.stack(errors).mean()


def _matched(
    network: VisionNetwork, start: Tensor, settings: Synthesis, generator: torch.Generator,
    monitor: Monitor,
) -> Tensor:  # fmt: skip
    """[n, channels, h, w] pictures after descent from their coefficients."""
    coefficients = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([coefficients], lr=settings.rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / max(settings.steps, 1))
    )
    matching = _Matching(network)
    classes: Tensor | None = None
    for step in range(settings.steps):
        pictures = _pictures(coefficients, network.preprocessing)
        # Twice as fast on CPUs, depthwise layers above all.
        logits = matching.run(pictures.contiguous(memory_format=torch.channels_last))
        if classes is None:
            classes = torch.randint(logits.shape[1], (len(start),), generator=generator)
        loss = matching.error() + settings.class_weight * functional.cross_entropy(logits, classes)
        (coefficients.grad,) = torch.autograd.grad(loss, [coefficients])
        adam.step()
        schedule.step()
        monitor.step("synthesis", step + 1, settings.steps, f"error {float(loss.detach()):.3f}")
    return _pictures(coefficients.detach(), network.preprocessing)


def _coefficients(count: int, network: VisionNetwork, generator: torch.Generator) -> Tensor:
    """[count, channels, h, w // 2 + 1, 2] of standard deviation 1: real and imaginary parts."""
    height, width = network.preprocessing.size
    shape = (count, network.channels, height, width // 2 + 1, 2)
    return torch.randn(shape, generator=generator)


def _pictures(coefficients: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[n, channels, h, w] normalised pictures of coefficients, between black and white."""
    height, width = preprocessing.size
    down = torch.fft.fftfreq(height).unsqueeze(1)
    frequency = (down.square() + torch.fft.rfftfreq(width).square()).sqrt()
    amplitude = 1 / frequency.clamp_min(1 / max(height, width))
    # Of unit variance: a column that stands for two frequencies has twice the amplitude.
    waves = torch.full((width // 2 + 1,), 2.0)
    waves[0] = 1.0
    if width % 2 == 0:
        waves[-1] = 1.0
    amplitude = amplitude / (waves * amplitude).square().sum().sqrt()
    spectrum = torch.view_as_complex(coefficients) * amplitude
    noise = torch.fft.irfft2(spectrum, s=(height, width), norm="forward")
    channels = noise.shape[1]
    common = noise.sum(1, keepdim=True) / math.sqrt(channels)
    mixed = math.sqrt(GREY_SHARE) * common + math.sqrt(1 - GREY_SHARE) * noise
    spread = math.sqrt(1 + 2 * math.sqrt(GREY_SHARE * (1 - GREY_SHARE) / channels))
    # Towards the ends pixels bend softly, so that their gradients never vanish at once.
    bent = CONTRAST * mixed / spread + math.log(PIXEL_MEAN / (1 - PIXEL_MEAN))
    pixels = torch.sigmoid(bent)
    mean, deviation = (
        torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)
        for numbers in (preprocessing.mean, preprocessing.deviation)
    )
    return (pixels - mean) / deviation
