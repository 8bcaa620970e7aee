"""A pipeline that records its calls and returns fixed reports, and a way to run commands on it."""

import dataclasses
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

import quantforge
from quantforge.cli.app import application
from quantforge.cli.outcome import run
from quantforge.landscape import CurvatureReport
from quantforge.latency import ProfileReport, TimedLayer
from quantforge.outcomes import (
    BenchReport,
    CheckReport,
    ConvertReport,
    EvaluationReport,
    FrontierPoint,
    GgufType,
    InspectReport,
    LatencyReport,
    ParetoReport,
    PlannedLayer,
    PlanReport,
    Report,
    ServerSupport,
    SpeedRow,
    TasksReport,
    UniformPlan,
    WorkEstimate,
)
from quantforge.results import (
    CurvePoint,
    EstimatorCost,
    Generation,
    LayerReport,
    PairedDifference,
    Quality,
    RefinementRound,
    SizeReport,
    TargetOutcome,
    TaskDifference,
    TaskScore,
)
from quantforge.spectra import LayerSpectrum
from quantforge.types import BitPlan, QuantSpec

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.x")
SPECS = ("2b-g64", "4b-pc", "kept")


def quality(kl: float = 0.25, stderr: float = 0.0125) -> Quality:
    return Quality(
        text="held-out text, 2 windows",
        windows=2,
        window_length=8,
        perplexity=31.5,
        reference_perplexity=21.25,
        kl=kl,
        kl_stderr=stderr,
        top1=0.75,
        window_kl=(kl - stderr, kl + stderr),
        window_nll=(3.0, 3.5),
    )


SIZES = SizeReport(
    planned_weights=1_000_000,
    code_bits=2.875,
    stored_bits=2.9921875,
    kept_weights=250_000,
    checkpoint_bytes=874_000,
    checkpoint_bits=5.5936,
    reference_bytes=2_500_000,
)
PLAN = BitPlan(
    assignment=dict(zip(NAMES, (QuantSpec(2, 64), QuantSpec(4), None), strict=True)),
    budget="3bit",
    stored_bits=2.9921875,
    code_bits=2.875,
    predicted_loss=0.125,
    solver="dynamic-program",
)
LAYERS = tuple(
    PlannedLayer(name=n, spec=s, weights=w, stored_bits=b, predicted_loss=p, predicted_error=e)
    for n, s, w, b, p, e in zip(
        NAMES,
        SPECS,
        (600_000, 300_000, 100_000),
        (2.25, 4.03, 16.0),
        (0.1, 0.02, None),
        (0.01, None, None),
        strict=True,
    )
)


def quantized_report() -> Report:
    rows = [
        LayerReport(
            name=name,
            spec=spec,
            predicted_loss=0.1,
            weight_error=0.2,
            output_error=0.03,
            rtn_output_error=0.05,
            damping=0.01,
            dead_columns=0,
        )
        for name, spec in zip(NAMES, SPECS, strict=True)
    ]
    return Report(
        model="llama",
        source="SmolLM2, from a package",
        output="out",
        plan=PLAN,
        layers=tuple(rows),
        sizes=SIZES,
        quality=quality(),
        curve=(
            CurvePoint(name="uniform 3b-pc", stored_bits=3.02, quality=quality(0.5, 0.02)),
            CurvePoint(name="plan", stored_bits=2.9921875, quality=quality()),
        ),
        hull_kl=0.375,
        cheapest_uniform=("uniform 3b-pc", 0.5),
        generations=(
            Generation(prompt="One [bold]two[/bold]", reference="three", quantized="th\x1b[31mree"),
        ),
        calibration="128 sequences of text",
        settings={"search": {"solver": "dynamic-program"}},
        versions={"torch": "2"},
        warnings=("damping was raised",),
        timings={"search": float("inf")},
    )


def plan_report() -> PlanReport:
    return PlanReport(
        model="llama",
        source="SmolLM2, from a package",
        plan=PLAN,
        layers=LAYERS,
        reachable=(2.03, 8.5),
        sizes=SIZES,
        uniform=(UniformPlan(name="3b-pc", stored_bits=3.02, predicted_loss=0.5, fits=False),),
        scratch_bytes=4_529_848_320,
        calibration="128 sequences of text",
        settings={},
        predicted_error=0.0125,
        memory=1_234_000_000,
        latency=(LatencyReport(device="a100, roofline", batch=4, seconds=0.0015, reference=0.002),),
        targets=(
            TargetOutcome(
                text="kl:0.2",
                limit=0.2,
                predicted=0.15,
                measured=0.16,
                stderr=0.02,
                upper=0.1929,
                windows=10,
                plans=7,
            ),
        ),
        servers=(ServerSupport(name="vLLM", loads=False, why="loads 4 bits, the plan has 2"),),
        work=WorkEstimate(multiply_adds=6e12, rate=5e10, seconds=120.0, memory_bytes=2_500_000_000),
        refinement=(
            RefinementRound(plans=21, layers=4, before=0.25, after=0.24, stderr=0.002),
            RefinementRound(plans=20, layers=0, before=0.24, after=0.24, stderr=0.0),
        ),
        sensitivity=EstimatorCost(name="hawq-v2", what="32 products", seconds=61.0),
    )


def pareto_report() -> ParetoReport:
    return ParetoReport(
        model="llama",
        source="SmolLM2, from a package",
        points=(
            FrontierPoint(
                plan=PLAN, predicted_error=0.0125, checkpoint_bytes=874_000, quality=quality()
            ),
            FrontierPoint(
                plan=dataclasses.replace(PLAN, stored_bits=4.0, predicted_loss=0.03125),
                predicted_error=None,
                checkpoint_bytes=1_000_000,
            ),
        ),
        uniform=(CurvePoint(name="uniform 3b-pc", stored_bits=3.02, quality=quality(0.5, 0.02)),),
        reference_bytes=2_500_000,
        calibration="128 sequences of text",
        settings={},
        warnings=("one thing",),
    )


def evaluation_report() -> EvaluationReport:
    return EvaluationReport(
        model="out",
        reference="SmolLM2",
        quality=quality(),
        sizes=SIZES,
        against="other",
        against_quality=quality(0.5, 0.02),
        difference=PairedDifference(kl=-0.25, kl_stderr=0.05, nll=-0.125, nll_stderr=0.25),
    )


def inspect_report() -> InspectReport:
    return InspectReport(
        path="out",
        model="LlamaForCausalLM",
        format="compressed-tensors pack-quantized",
        budget="3bit",
        layers=LAYERS,
        kept=("model.embed_tokens",),
        sizes=SIZES,
        versions={"torch": "2", "quantforge": "1"},
    )


def profile_report() -> ProfileReport:
    def row(spec: str, median: float) -> TimedLayer:
        return TimedLayer(
            out_features=64,
            in_features=32,
            spec=spec,
            median=median,
            p20=0.5 * median,
            p80=2 * median,
        )

    return ProfileReport(
        model="llama",
        output="here.json",
        machine=("x86_64", "AVX512"),
        backend="auto",
        dtype="bfloat16",
        batch=1,
        threads=2,
        repeats=15,
        rows=(row("kept", 4e-5), row("3b-g32", 1e-5)),
    )


def curvature_report() -> CurvatureReport:
    def layer(name: str, trace: float, heads: tuple[float, ...] = ()) -> LayerSpectrum:
        return LayerSpectrum(
            name=name, weights=1000, trace=trace, trace_error=0.1 * trace, highest=0.25,
            lowest=-0.125, extreme_ratio=0.5, negative_weight=0.375, negative_weight_error=0.01,
            heads=heads, head_errors=tuple(0.01 for _ in heads),
            squared_error=4.0 if heads else None, input_trace=0.5, input_trace_error=0.02,
        )  # fmt: skip

    return CurvatureReport(
        model="llama", text="a text", sequences=1, length=128, labels="true", steps=6, starts=2,
        products=24, layers=(layer("a.q_proj", 2.0, (0.25, 0.75)), layer("a.k_proj", 4.0)),
        spec="3b-g64", output="curvature.json",
    )  # fmt: skip


def tasks_report() -> TasksReport:
    def score(metric: str, value: float, stderr: float) -> TaskScore:
        return TaskScore(task="copa", metric=metric, value=value, stderr=stderr, questions=4)

    return TasksReport(
        model="out",
        scores=(score("acc", 0.75, 0.25), score("acc_norm", 0.5, math.nan)),
        against="llama",
        against_scores=(score("acc", 1.0, 0.0), score("acc_norm", 0.5, 0.25)),
        differences=(
            TaskDifference(task="copa", metric="acc", value=-0.25, stderr=0.25),
            TaskDifference(task="copa", metric="acc_norm", value=0.0, stderr=math.nan),
        ),
    )


def bench_report() -> BenchReport:
    packed = SpeedRow(
        name="packed, exact",
        prefill_tokens_a_second=812.25,
        decode_tokens_a_second=125.5,
        resident_bytes=157_000_000,
        bytes_a_token=99_900_000,
        share_of_bandwidth=0.625,
    )
    unknown = SpeedRow(
        name="llama.cpp",
        prefill_tokens_a_second=400.0,
        decode_tokens_a_second=90.0,
        resident_bytes=None,
        bytes_a_token=None,
        share_of_bandwidth=None,
    )
    return BenchReport(
        model="out",
        rows=(packed, unknown),
        read_bandwidth=20.06e9,
        threads=2,
        instructions="AVX2",
        prompt_tokens=128,
        new_tokens=32,
        rounds=3,
    )


@pytest.fixture
def reports() -> types.SimpleNamespace:
    """The fixed reports, by name."""
    makers = (
        quantized_report, plan_report, pareto_report, evaluation_report, inspect_report,
        profile_report, bench_report, check_report, curvature_report, gguf_report, tasks_report,
    )  # fmt: skip
    return types.SimpleNamespace(**{maker.__name__: maker for maker in makers})


@dataclass
class FakePipeline:
    """What `quantforge.pipeline` is replaced with: `effect` runs first, calls are kept."""

    calls: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)
    effect: Callable[[dict[str, Any]], object] = field(default=lambda options: None)

    def function(self, name: str, result: Callable[[], object]) -> Callable[..., object]:
        def call(*arguments: object, **options: Any) -> object:
            self.calls.append((name, arguments, options))
            self.effect(options)
            return result()

        return call


def check_report(*problems: str) -> CheckReport:
    return CheckReport(
        path="out",
        server="vLLM 0.33",
        tensor_parallel=2,
        loads=not problems,
        problems=problems,
        quantized=7,
        kept=2,
    )


def convert_report() -> ConvertReport:
    return ConvertReport(
        source="out", output="out-gptq", layout="gptq", spec="4b-g128", layers=7, size_bytes=90_000
    )


def gguf_report() -> ConvertReport:
    return ConvertReport(
        source="out",
        output="out.gguf",
        layout="gguf",
        spec="3b-g64, 8b-g32-asym",
        layers=7,
        size_bytes=90_000,
        source_bytes=70_000,
        types=(
            GgufType(name="Q4_0", held="3b-g64", tensors=6, size_bytes=60_000, difference=0.0),
            GgufType(
                name="F16", held="8b-g32-asym", tensors=1, size_bytes=20_000, difference=3.1e-5
            ),
            GgufType(name="BF16", held="kept", tensors=1, size_bytes=5_000, difference=0.0),
        ),
        warnings=("out has no tokenizer.json",),
    )


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    module = types.ModuleType("quantforge.pipeline")
    for name, result in (
        ("quantize", quantized_report),
        ("plan", plan_report),
        ("pareto", pareto_report),
        ("evaluate", evaluation_report),
        ("evaluate_tasks", tasks_report),
        ("inspect", inspect_report),
        ("profile", profile_report),
        ("bench", bench_report),
        ("check", check_report),
        ("curvature", curvature_report),
        ("convert", convert_report),
        ("generate", lambda: iter((" Paris", ".\n", "\x1b[2J"))),
    ):
        setattr(module, name, fake.function(name, result))
    monkeypatch.setitem(sys.modules, "quantforge.pipeline", module)
    monkeypatch.setattr(quantforge, "pipeline", module, raising=False)
    return fake


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str) -> Outcome:
        code = run(application(), arguments)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
