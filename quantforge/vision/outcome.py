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


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionDifference:
    """Difference of two networks over the same pictures (first minus second).

    Attributes:
        kl: mean difference of KL, in nats a picture.
        kl_stderr: its standard error over pictures.
        agreement: difference of the shares of pictures with the reference's likeliest class.
    """

    kl: float
    kl_stderr: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionEvaluation:
    """The outcome of `evaluate` of a convolutional network's folder.

    Attributes:
        model: what was measured.
        reference: the float network it was compared with.
        quality: the measurement.
        weight_bytes: of the file of weights.
        float_bytes: of the float network's weights and biases.
        against: a second folder measured on the same pictures; empty if none.
        against_quality: its measurement.
        difference: `model` minus `against`, paired over the pictures.
        versions: library versions.
        warnings: one line each.
    """

    model: str
    reference: str
    quality: VisionQuality
    weight_bytes: int
    float_bytes: int
    against: str = ""
    against_quality: VisionQuality | None = None
    difference: VisionDifference | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One layer of a folder.

    Attributes:
        name: module path.
        kind: "convolution" or "linear".
        spec: e.g. "4b-pc"; "kept" where it stays float.
        bits: of a code; 32 where it stays float.
        group: weights that share a scale.
        activation_bits: of its input; None where that stays float.
        weights: number of weights.
        stored_bits: of a weight: codes, scales and zero-points.
        size_bytes: of all its tensors, the bias among them.
    """

    name: str
    kind: str
    spec: str
    bits: int
    group: int
    activation_bits: int | None
    weights: int
    stored_bits: float
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInspection:
    """What a convolutional network's folder holds, read from its files alone.

    Attributes:
        path: the folder, as given.
        model: name of the network.
        format: on-disk format.
        budget: the budget it was made for; empty if unknown.
        input_size: channels, height and width of a picture.
        layers: one row a layer, in forward order.
        stored_bits: average over the weights of quantized layers; 0 where there are none.
        code_bits: of these in codes.
        weight_bytes: of the file of weights.
        float_bytes: of the same weights and biases in float32.
        rounded: tensors between layers that are rounded.
        versions: library versions that wrote it.
    """

    path: str
    model: str
    format: str
    budget: str
    input_size: tuple[int, int, int]
    layers: tuple[StoredLayer, ...]
    stored_bits: float
    code_bits: float
    weight_bytes: int
    float_bytes: int
    rounded: int
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionCheck:
    """Whether a convolutional network's folder is whole.

    Attributes:
        path: the folder.
        covers: what was looked at, in words.
        loads: whether `load_vision` takes it.
        problems: what is in the way, one line each.
        quantized: number of quantized layers.
        kept: number of layers in float32.
        tensors: tensors that were read and compared with their hashes.
    """

    path: str
    covers: str
    loads: bool
    problems: tuple[str, ...]
    quantized: int
    kept: int
    tensors: int
