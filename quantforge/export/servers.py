"""Which programs load the checkpoint that a plan makes: their rules as data, checked without them.

The rules are those of compressed-tensors' `pack-quantized` form as the programs' sources state
them; of these, transformers was run on such files, the servers were not. Layers that a server fuses
(q/k/v, gate/up) must share one spec, because it reads the first member's for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantforge.outcomes import ServerSupport
from quantforge.types import LayerInfo, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What one program loads.

    Attributes:
        name: program, and where it runs.
        bits: widths it has kernels or a decoder for.
        symmetric: it loads no zero-points.
        fuses: members of a fused group must share a spec.
        embedding: it loads a quantized token embedding.
        head: it loads a quantized head of its own, not tied to the embedding.
    """

    name: str
    bits: tuple[int, ...]
    symmetric: bool = False
    fuses: bool = True
    embedding: bool = False
    head: bool = False


_RULES = (
    _Rule(
        name="quantforge.load", bits=(2, 3, 4, 5, 6, 7, 8), fuses=False, embedding=True, head=True
    ),
    _Rule(
        name="transformers 5.23, compressed-tensors 0.20",
        bits=(2, 3, 4, 5, 6, 8),
        symmetric=True,
        fuses=False,
        head=True,
    ),
    _Rule(name="vLLM 0.33 on NVIDIA (Turing or newer)", bits=(2, 3, 4, 5, 6, 7, 8)),
    _Rule(name="vLLM 0.33 on CPU and XPU", bits=(4,)),
    _Rule(name="vLLM 0.33 on ROCm", bits=(4, 8)),
    _Rule(name="SGLang", bits=(4, 8)),
)


def server_support(
    layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]
) -> tuple[ServerSupport, ...]:
    """What every known program makes of a plan, with the rule that decides.

    Args:
        layers: of the network, in forward order.
        assignment: layer name → spec; None where it is kept.
    """
    return tuple(_judge(rule, layers, assignment) for rule in _RULES)


def _judge(
    rule: _Rule, layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]
) -> ServerSupport:
    specs = {spec for spec in assignment.values() if spec is not None}
    refused = sorted({spec.bits for spec in specs} - set(rule.bits))
    if refused:
        why = f"loads {_listed(rule.bits)} bits, the plan has {_listed(refused)}"
        return ServerSupport(name=rule.name, loads=False, why=why)
    if rule.symmetric and any(not spec.symmetric for spec in specs):
        return ServerSupport(name=rule.name, loads=False, why="loads no zero-points")
    for layer in layers:
        known = rule.head if layer.kind == "linear" else rule.embedding
        if layer.outside and assignment[layer.name] is not None and not known:
            why = f"loads no quantized {'head' if layer.kind == 'linear' else 'embedding'}"
            return ServerSupport(name=rule.name, loads=False, why=why)
    split = _split_group(layers, assignment) if rule.fuses else None
    if split is not None:
        why = f"fuses {split}, whose members have different specs"
        return ServerSupport(name=rule.name, loads=False, why=why)
    return ServerSupport(
        name=rule.name, loads=True, why=f"loads {_listed(rule.bits)} bits, per layer"
    )


def _split_group(
    layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]
) -> str | None:
    """The first fused group whose members differ."""
    seen: dict[str, QuantSpec | None] = {}
    for layer in layers:
        spec = assignment[layer.name]
        if seen.setdefault(layer.fused_group, spec) != spec:
            return layer.fused_group
    return None


def _listed(bits: Sequence[int]) -> str:
    return ", ".join(map(str, bits))
