"""What each command hands back: plain, JSON-friendly records without times, dates or hosts.

Times live in `run.json`, outside the promise that one seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantforge.results import (
    AnyDifference,
    AnyQuality,
    CurvePoint,
    EstimatorCost,
    Generation,
    LayerReport,
    RefinementRound,
    SizeReport,
    TargetOutcome,
    TaskDifference,
    TaskScore,
    TrainingOutcome,
)
from quantforge.types import BitPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of `quantize`; `report.html` and the model card are drawn from it.

    Attributes:
        model: name of the source model.
        source: where it came from, as printed to the user.
        output: folder written, as given; empty in memory.
        plan: the plan that was executed.
        layers: one row a layer, in forward order.
        sizes: sizes counted from the written files.
        quality: held-out quality of the final network.
        curve: measured uniform networks and the plan, one-pass compensation for all; empty where
            nothing was searched.
        hull_kl: loss of the uniform lower hull at the plan's stored bits; None if out of range.
        cheapest_uniform: name and held-out loss of the cheapest uniform ceil(budget)-bit plan.
        generations: short continuations before and after.
        calibration: description of the calibration text.
        settings: the effective recipe.
        versions: library versions.
        warnings: one line each.
        targets: how the budget's targets of quality were met, before tuning.
        refinement: what looking around the plan found; empty without `search.refine`.
        training: how recovery by training went; None without `training.tokens` or `minutes`.
    """

    model: str
    source: str
    output: str
    plan: BitPlan
    layers: tuple[LayerReport, ...]
    sizes: SizeReport
    quality: AnyQuality
    curve: tuple[CurvePoint, ...]
    hull_kl: float | None
    cheapest_uniform: tuple[str, float] | None
    generations: tuple[Generation, ...]
    calibration: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[TargetOutcome, ...] = ()
    refinement: tuple[RefinementRound, ...] = ()
    training: TrainingOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One row of a plan.

    Attributes:
        name: module path.
        spec: spec as text, "kept" where left alone.
        weights: number of weights.
        stored_bits: stored bits a weight.
        predicted_loss: predicted loss increase in nats a token; None where it was not predicted.
        predicted_error: its standard error; None where it is unknown.
    """

    name: str
    spec: str
    weights: int
    stored_bits: float
    predicted_loss: float | None = None
    predicted_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPlan:
    """One spec everywhere, as a plan is compared with.

    Attributes:
        name: e.g. "uniform 3b-g64".
        stored_bits: average stored bits a weight.
        predicted_loss: predicted loss increase in nats a token; None where it was not estimated.
        fits: whether it is within the budget.
    """

    name: str
    stored_bits: float
    predicted_loss: float | None
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSupport:
    """Whether a program loads the checkpoint that a plan makes, by its rules.

    Attributes:
        name: program and version.
        loads: whether it does.
        why: the rule that decides.
    """

    name: str
    loads: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkEstimate:
    """What `quantize` will take after this plan, see `quantforge.estimate`.

    Attributes:
        multiply_adds: of all forward and backward passes, grams and compensation.
        rate: multiply-adds a second of this network's forward pass, measured here.
        seconds: their quotient: the products alone, so a lower bound.
        memory_bytes: largest resident size, the process as it is now included; what is in scratch
            files is not. Several processes on one machine count together.
    """

    multiply_adds: float
    rate: float
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """How long a decoding step spends in the planned weights, by the times of a device.

    Attributes:
        device: which, and whether it was measured.
        batch: sequences a step.
        seconds: of the plan.
        reference: of the same layers in 16 bits.
    """

    device: str
    batch: int
    seconds: float
    reference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The outcome of `plan`, a run that stops before any weight is quantized.

    Attributes:
        model: name of the source model.
        source: where it came from, as printed to the user.
        plan: the plan that `quantize` would execute, unless a uniform network turns out to be
            better; where that may be, a warning names it.
        layers: one row a layer, in forward order.
        reachable: lowest and highest stored bits a weight that the candidates can give.
        sizes: sizes computed from the plan.
        uniform: uniform plans, by stored bits; empty where nothing is searched.
        scratch_bytes: disk in the cache that calibration takes at its peak.
        calibration: description of the calibration text.
        settings: the effective recipe.
        warnings: one line each.
        predicted_error: standard error of the plan's predicted loss, in nats; None where there is
            no prediction or nothing was measured to judge it by.
        memory: with a budget of memory: weights, keys and values together, in bytes.
        targets: how the budget's targets of quality were met.
        servers: which programs load the checkpoint.
        work: time and memory of `quantize`.
        sensitivity: what the estimator took, or would where it came from the cache; None where
            nothing is searched.
        latency: one for every batch that the budget names, or for one sequence; empty where no
            device was named.
        refinement: what looking around the plan found; empty without `search.refine`.
        measure: what losses are, see `results.METRICS`.
    """

    model: str
    source: str
    plan: BitPlan
    layers: tuple[PlannedLayer, ...]
    reachable: tuple[float, float]
    sizes: SizeReport
    uniform: tuple[UniformPlan, ...]
    scratch_bytes: int
    calibration: str
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    predicted_error: float | None = None
    memory: int | None = None
    targets: tuple[TargetOutcome, ...] = ()
    servers: tuple[ServerSupport, ...] = ()
    work: WorkEstimate | None = None
    sensitivity: EstimatorCost | None = None
    latency: tuple[LatencyReport, ...] = ()
    refinement: tuple[RefinementRound, ...] = ()
    measure: str = "kl"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One plan of the frontier.

    Attributes:
        plan: of least predicted loss for its bits.
        predicted_error: standard error of its predicted loss, in nats; None if unknown.
        checkpoint_bytes: bytes of its safetensors files.
        quality: held-out measurement before tuning; None where it was not measured.
    """

    plan: BitPlan
    predicted_error: float | None
    checkpoint_bytes: int
    quality: AnyQuality | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoReport:
    """The outcome of `pareto`: the plans worth having, from the smallest on.

    Attributes:
        model: name of the source model.
        source: where it came from, as printed to the user.
        points: by stored bits; each predicted to lose less than the ones before it.
        uniform: measured uniform networks, by stored bits.
        reference_bytes: bytes of the same network in 16 bits.
        calibration: description of the calibration text.
        settings: the effective recipe.
        warnings: one line each.
        measure: what losses are, see `results.METRICS`.
    """

    model: str
    source: str
    points: tuple[FrontierPoint, ...]
    uniform: tuple[CurvePoint, ...]
    reference_bytes: int
    calibration: str
    settings: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    measure: str = "kl"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """The outcome of `evaluate`.

    Attributes:
        model: what was measured.
        reference: the float model it was compared with.
        quality: the measurement.
        sizes: sizes counted from the files; None for a network in memory or a float model.
        against: a second network measured on the same windows; empty if none.
        against_quality: its measurement.
        difference: `model` minus `against`, paired over the windows.
        precision: dtype of the matrix products.
        versions: library versions.
        warnings: one line each.
    """

    model: str
    reference: str
    quality: AnyQuality
    sizes: SizeReport | None = None
    against: str = ""
    against_quality: AnyQuality | None = None
    difference: AnyDifference | None = None
    precision: str = "float32"
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksReport:
    """The outcome of `evaluate_tasks`.

    Attributes:
        model: what was measured.
        scores: one for each metric of each task.
        against: a second network on the same questions; empty if none.
        against_scores: its scores, in the same order.
        differences: `model` minus `against`, likewise.
        versions: library versions.
    """

    model: str
    scores: tuple[TaskScore, ...]
    against: str = ""
    against_scores: tuple[TaskScore, ...] = ()
    differences: tuple[TaskDifference, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """What a folder holds, read from its files alone.

    Attributes:
        path: the folder, as given.
        model: model class and name of its source.
        format: on-disk format, e.g. "compressed-tensors pack-quantized".
        budget: the budget it was made for; empty if unknown.
        layers: one row a quantized layer, in file order.
        kept: names of the weights left in 16 bits.
        sizes: sizes counted from the files.
        versions: library versions that wrote it.
        warnings: one line each.
    """

    path: str
    model: str
    format: str
    budget: str
    layers: tuple[PlannedLayer, ...]
    kept: tuple[str, ...]
    sizes: SizeReport
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """How fast one way to run a network is.

    Attributes:
        name: of the way.
        prefill_tokens_a_second: of the prompt.
        decode_tokens_a_second: after it.
        resident_bytes: of its weights; None if unknown.
        bytes_a_token: of weights read for one token; None if unknown.
        share_of_bandwidth: what that is of the measured bandwidth while decoding; None if unknown.
    """

    name: str
    prefill_tokens_a_second: float
    decode_tokens_a_second: float
    resident_bytes: int | None
    bytes_a_token: int | None
    share_of_bandwidth: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """The outcome of `bench`.

    Attributes:
        model: the folder, as given.
        rows: one a way to run it.
        read_bandwidth: bytes a second that the threads read from memory.
        threads: torch's.
        instructions: what the kernels were compiled for.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded after it.
        rounds: turns of every row; medians are reported.
        versions: library versions.
    """

    model: str
    rows: tuple[SpeedRow, ...]
    read_bandwidth: float
    threads: int
    instructions: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Whether a server loads a finished folder, by its rules.

    Attributes:
        path: the folder.
        server: program and version whose rules they are.
        tensor_parallel: devices that share every layer.
        loads: whether it does.
        problems: what is in the way, one line each.
        quantized: number of quantized layers.
        kept: number of matrices in 16 bits.
    """

    path: str
    server: str
    tensor_parallel: int
    loads: bool
    problems: tuple[str, ...]
    quantized: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufType:
    """The tensors of a GGUF file that have one type and were stored in one form.

    Attributes:
        name: of the type, e.g. "Q4_0".
        held: what they were: a spec ("3b-g64"), or "kept" in 16 bits.
        tensors: number of them.
        size_bytes: of their data.
        difference: largest |weight read back - weight of the checkpoint|; 0 where all are the same.
    """

    name: str
    held: str
    tensors: int
    size_bytes: int
    difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """The outcome of `convert`.

    Attributes:
        source: the folder that was read, as given.
        output: the folder or file that was written, as given.
        layout: what its config.json says, "gptq" or "gptq_v2", or "gguf".
        spec: of all its quantized layers, joined by commas.
        layers: number of those.
        size_bytes: of all its files.
        source_bytes: of the safetensors files that were read; 0 where the layout cannot be larger.
        types: what a GGUF file holds; empty for a folder.
        warnings: what its reader should know, one line each.
    """

    source: str
    output: str
    layout: str
    spec: str
    layers: int
    size_bytes: int
    source_bytes: int = 0
    types: tuple[GgufType, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What a machine offers.

    Attributes:
        versions: distribution → version, "missing" where it is not installed.
        devices: what torch can compute on.
        threads: of torch.
        instruction_set: machine, what torch uses of it, and what the native kernels may use.
        compiler: version of the C++ compiler, or why there is none.
        kernels: native kernel → "built" or "compiled on first use".
        cache: its folder.
        cache_bytes: what it holds.
        disk_free_bytes: on its disk.
        memory_free_bytes: of the machine; None where the system does not tell.
        problems: what keeps quantforge from running, one line each with the remedy.
        notes: known bad pairs that are installed, one line each.
    """

    versions: Mapping[str, str]
    devices: tuple[str, ...]
    threads: int
    instruction_set: str
    compiler: str
    kernels: Mapping[str, str]
    cache: str
    cache_bytes: int
    disk_free_bytes: int
    memory_free_bytes: int | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing keeps quantforge from running."""
        return not self.problems
