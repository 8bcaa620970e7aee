"""Quantizing the layers of a convolutional network one after the other, each on what it reads.

A layer sees the inputs that the quantized layers and rounded activations before it make; its weight
is rounded with error feedback on their moments (`methods.grouped`), group by group, and its bias
gets back the mean outputs (`correction`). Nothing here is learned: what block reconstruction starts
from, and is held against.

Rounding to nearest is the same on grams without their off-diagonal part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.methods.compensation import FEEDBACKS
from quantforge.methods.convolution import POSITIONS, Geometry
from quantforge.methods.gptq import Grid
from quantforge.methods.grouped import quantize_groups
from quantforge.numerics import DIAGONAL_FLOOR
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec
from quantforge.vision.correction import corrected_bias, matched_deviations
from quantforge.vision.moments import MomentAccumulator, Moments
from quantforge.vision.network import (
    ActivationGrid,
    QuantizedNetwork,
    VisionNetwork,
    weight_matrix,
)
from quantforge.vision.streams import Stream

NEAREST = "nearest"  # beside the names of FEEDBACKS


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationConfig:
    """How layers are quantized before anything is learned.

    Attributes:
        feedback: a name of `FEEDBACKS`, or "nearest". One that answers for the difference
            between the streams is "gptq" where there is one stream.
        grid: what the grid minimises, see `gptq.fit_grid`.
        damping: of the grams, relative to their mean diagonals.
        correct_bias: give every channel back the mean it had.
        match_deviation: and the deviation, by its scales.
        positions: of a batch that the grams see; 0 takes all.
    """

    feedback: str = "qep"
    grid: Grid = "diagonal"
    damping: float = 0.01
    correct_bias: bool = True
    match_deviation: bool = True
    positions: int = POSITIONS

    def __post_init__(self) -> None:
        if self.feedback != NEAREST and self.feedback not in FEEDBACKS:
            raise ValueError(f"feedback is one of {(NEAREST, *FEEDBACKS)}, got {self.feedback!r}")


def quantize_layer(
    weight: Tensor, moments: Moments, spec: QuantSpec, config: CompensationConfig
) -> QuantizedWeight:
    """One layer's weight [out, n] as integers, on the moments of its inputs."""
    gram, nearest = seen_somewhat(moments.gram), config.feedback == NEAREST
    if nearest:
        gram = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    feedback = FEEDBACKS["gptq" if nearest else config.feedback]
    if feedback.needs_cross and moments.cross is None:
        feedback = FEEDBACKS["gptq"]
    return quantize_groups(
        weight, gram, spec, cross=moments.cross, feedback=feedback, grid=config.grid,
        damping=config.damping,
    )  # fmt: skip


def quantize_and_correct(
    weight: Tensor, bias: Tensor, moments: Moments, spec: QuantSpec, config: CompensationConfig
) -> tuple[QuantizedWeight, Tensor]:
    """One layer's integers, and the bias [out] that goes with them."""
    quantized = quantize_layer(weight, moments, spec, config)
    if config.match_deviation:
        quantized = matched_deviations(weight, quantized, moments)
    if config.correct_bias:
        matrix = quantized.dequantize()
        bias = corrected_bias(weight, matrix, bias, moments.native_mean, moments.mean)
    return quantized, bias


def seen_somewhat(gram: Tensor) -> Tensor:
    """[groups, n, n] the grams with a little on the diagonal for inputs that were always zero.

    A few dozen pictures leave channels unlit that other pictures light, so unlike a language
    model's dead inputs theirs keep their weights, rounded to nearest.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    little = DIAGONAL_FLOOR * diagonal.mean(1, keepdim=True)
    missing = torch.where(diagonal > 0, 0.0, little)
    return gram + torch.diag_embed(missing)


def quantize_layers(
    network: VisionNetwork,
    batches: Sequence[Tensor],
    plan: Mapping[str, QuantSpec | None],
    grids: Mapping[str, ActivationGrid],
    config: CompensationConfig | None = None,
    on_layer: Callable[[LayerInfo, Moments], None] | None = None,
) -> QuantizedNetwork:
    """Quantize the layers of a plan in forward order.

    Args:
        network: the float network.
        batches: calibration pictures.
        plan: layer name → spec; a layer that has none stays float.
        grids: `Site.grid` → grid.
        config: how.
        on_layer: is told each quantized layer and its moments.
    """
    config = config or CompensationConfig()
    native = Stream(network, batches)
    stream = Stream(network, batches, grids)
    weights: dict[str, QuantizedWeight] = {}
    for layer in network.layers:
        source = network.reads[layer.name]
        inputs, originals = stream.value(source), native.value(source)
        spec = plan.get(layer.name)
        if spec is None:
            continue
        module = network.layer(layer.name)
        made = MomentAccumulator(Geometry.of(module), cap=config.positions)
        for one, original in zip(inputs, originals, strict=True):
            made.add(one, original)
        moments = made.mean()
        weights[layer.name], bias = quantize_and_correct(
            weight_matrix(module), module.bias.detach(), moments, spec, config
        )
        stream.weights[layer.name] = weights[layer.name].dequantize()
        stream.biases[layer.name] = bias
        if on_layer is not None:
            on_layer(layer, moments)
    return QuantizedNetwork(
        network=network, weights=weights, biases=dict(stream.biases), grids=dict(grids)
    )
