"""A report of the size and shape of a real run, built from the dataclasses."""

from __future__ import annotations

import math

import pytest

from quantforge.outcomes import Report
from quantforge.results import CurvePoint, Generation, LayerReport, Quality, SizeReport
from quantforge.types import BitPlan, QuantSpec

KINDS = {  # kind: (rows, columns, sensitivity)
    "self_attn.q_proj": (576, 576, 0.4),
    "self_attn.k_proj": (192, 576, 0.5),
    "self_attn.v_proj": (192, 576, 2.2),
    "self_attn.o_proj": (576, 576, 1.2),
    "mlp.gate_proj": (1536, 576, 1.0),
    "mlp.up_proj": (1536, 576, 1.3),
    "mlp.down_proj": (576, 1536, 2.0),
}
LADDER = [QuantSpec(2, 64), QuantSpec(2, 192), QuantSpec(3, 64), QuantSpec(4, 192), QuantSpec(5)]


def make_quality(
    kl: float, *, text: str = "markov chain, 6 windows of 512 tokens, no BOS"
) -> Quality:
    window_kl = tuple(kl * (1 + 0.1 * math.sin(3 * i)) for i in range(6))
    mean = math.fsum(window_kl) / 6
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in window_kl) / 5 / 6)
    return Quality(
        text=text,
        windows=6,
        window_length=512,
        perplexity=12.34 * math.exp(kl),
        reference_perplexity=12.34,
        kl=mean,
        kl_stderr=spread,
        top1=math.exp(-0.9 * math.sqrt(kl)),
        window_kl=window_kl,
        window_nll=tuple(math.log(12.34) + v for v in window_kl),
    )


def make_layers(blocks: int = 30) -> tuple[LayerReport, ...]:
    layers = []
    for block in range(blocks):
        depth = 1.0 + 2.5 * math.exp(-block / 2) + 1.2 * math.exp(-(blocks - 1 - block))
        for kind, (_, _, weight) in KINDS.items():
            need = weight * depth * (1 + 0.3 * math.sin(7 * block + len(kind)))
            spec = LADDER[min(int(2.1 * math.log2(1 + need)), len(LADDER) - 1)]
            kept = block == 0 and kind == "mlp.down_proj"
            error = 0.0 if kept else 0.35 * 4.0 ** (2 - spec.bits)
            layers.append(
                LayerReport(
                    name=f"model.layers.{block}.{kind}",
                    spec="kept" if kept else str(spec),
                    predicted_loss=0.0 if kept else 2e-3 * need * 4.0 ** (2 - spec.bits),
                    weight_error=error,
                    output_error=0.45 * error,
                    rtn_output_error=1.1 * error,
                    damping=0.01,
                    dead_columns=3 if block == 2 and kind == "mlp.up_proj" else 0,
                    note="damping raised to 0.1" if block == 4 and weight == 2.2 else "",
                )
            )
    return tuple(layers)


def make_report(**changes: object) -> Report:
    layers = make_layers()
    uniform = {
        "2b-pc": (2.03, 6.1), "2b-g64": (2.25, 3.9), "2b-g32": (2.5, 2.9), "3b-pc": (3.02, 0.71),
        "3b-g192": (3.083, 0.6), "3b-g64": (3.25, 0.45), "3b-g32": (3.5, 0.46),
        "4b-pc": (4.02, 0.13), "4b-g64": (4.25, 0.085), "5b-g64": (5.25, 0.021),
    }  # fmt: skip
    curve = [
        CurvePoint(name=f"uniform {name}", stored_bits=bits, quality=make_quality(kl))
        for name, (bits, kl) in uniform.items()
    ]
    curve.append(CurvePoint(name="plan", stored_bits=2.998, quality=make_quality(0.41)))
    values: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct",
        "source": "SmolLM2-135M-Instruct, a folder with 272 tensors in float32",
        "output": "out/smollm2-3bit",
        "plan": BitPlan(
            assignment={
                layer.name: None if layer.spec == "kept" else QuantSpec.parse(layer.spec)
                for layer in layers
            },
            budget="3bit",
            stored_bits=2.998,
            code_bits=2.812,
            predicted_loss=math.fsum(layer.predicted_loss for layer in layers),
            solver="dynamic-program",
        ),
        "layers": layers,
        "sizes": SizeReport(
            planned_weights=106_168_320,
            code_bits=2.812,
            stored_bits=2.998,
            kept_weights=28_346_688,
            checkpoint_bytes=96_512_344,
            checkpoint_bits=8 * 96_512_344 / 134_515_008,
            reference_bytes=269_030_016,
        ),
        "quality": make_quality(0.29),
        "curve": tuple(curve),
        "hull_kl": 0.735,
        "cheapest_uniform": ("uniform 3b-pc", 0.71),
        "generations": (
            Generation(
                prompt="The capital of France is",
                reference=" Paris.\nIt lies on the Seine.",
                quantized=" Paris, the largest city of France.",
            ),
        ),
        "calibration": "pydoc: 112 sequences of 512 tokens for fitting, 16 held out",
        "settings": {"search": {"solver": "dynamic-program", "bits": [2, 3, 4]}, "seed": 0},
        "versions": {"torch": "2.13.0", "quantforge": "0.1.0", "transformers": "5.23.0"},
        "warnings": ("layer model.layers.4.self_attn.v_proj needed ten times the damping",),
        "timings": {"quantize": 12.5},
    }
    return Report(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="session")
def build():
    """Make a report with some fields changed."""
    return make_report
