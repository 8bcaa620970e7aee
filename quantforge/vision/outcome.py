"""What compiling a convolutional network hands back: plain records without times or hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantforge.results import TargetOutcome, TrainingOutcome
from quantforge.vision.quality import VisionQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionPoint:
    """A measured network on the size-KL plane.

    Attributes:
        name: e.g. "uniform 4b-pc-a8" or "plan".
        stored_bits: average stored bits a weight.
        operations: bit operations of a picture.
        quality: held-out measurement.
    """

    name: str
    stored_bits: float
    operations: int
    quality: VisionQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLayer:
    """What became of one layer.

    Attributes:
        name: module path.
        kind: "convolution" or "linear".
        block: name of its block.
        spec: e.g. "4b-pc"; "kept" where it stays float.
        activation_bits: of its input; None where that stays float.
        weights: number of weights.
        macs: multiplications of one picture.
        predicted_loss: nats a picture; None where nothing was searched.
    """

    name: str
    kind: str
    block: str
    spec: str
    activation_bits: int | None
    weights: int
    macs: int
    predicted_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionReport:
    """The outcome of `quantize` of a convolutional network.

    Attributes:
        model: name of the source.
        source: where it came from, as printed to the user.
        output: folder written, as given; empty in memory.
        budget: as the user wrote it.
        solver: what found the plan.
        layers: one row a layer, in forward order.
        stored_bits: average stored bits a weight that the budget counts.
        code_bits: average code bits, likewise.
        operations: bit operations of one picture.
        float_operations: the same of 8-bit weights and activations, for comparison.
        seconds: that all layers take for a batch; None where the budget limits no time.
        predicted_loss: nats a picture.
        quality: held-out quality of the finished network.
        curve: uniform networks and the plan, without block reconstruction.
        targets: how the budget's targets were met, before reconstruction.
        blocks: blocks that reconstruction made better, and all of them.
        training: how training end to end went; None without.
        weight_bytes: of codes, scales and biases in the file; 0 in memory.
        float_bytes: of the float network's weights and biases.
        calibration: description of the pictures.
        settings: the effective recipe.
        warnings: one line each.
        timings: seconds by stage; not in files.
    """

    model: str
    source: str
    output: str
    budget: str
    solver: str
    layers: tuple[VisionLayer, ...]
    stored_bits: float
    code_bits: float
    operations: int
    float_operations: int
    seconds: float | None
    predicted_loss: float | None
    quality: VisionQuality
    curve: tuple[VisionPoint, ...]
    targets: tuple[TargetOutcome, ...]
    blocks: tuple[int, int]
    training: TrainingOutcome | None
    weight_bytes: int
    float_bytes: int
    calibration: str
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
