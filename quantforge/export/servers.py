"""Which programs load a checkpoint: their rules as data, checked without them.

The rules are those of compressed-tensors' `pack-quantized` form as the programs' sources state
them; of these, transformers was run on such files, the servers were not. They serve twice:
`refusal` takes candidates out of a search and judges finished folders, layer by layer; `violations`
adds what concerns several layers. Layers that a server fuses (q/k/v, gate/up) must share one spec,
because it reads the first member's for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantforge.export.gguf_source import described_problems
from quantforge.format.gguf_blocks import grouping, held_exactly
from quantforge.models.linears import WITHOUT_LINEARS
from quantforge.outcomes import ServerSupport
from quantforge.types import PER_CHANNEL, SUPPORTED_BITS, LayerInfo, QuantSpec

# Members that servers fuse where they stand side by side, by the last part of their names.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
# Layers whose inputs tensor parallelism slices; of all others it slices the outputs.
SLICED_INPUTS = frozenset({"o_proj", "down_proj", "out_proj", "w2", "dense", "c_proj", "fc2"})
# One that is called as those are, and is not: BERT's, whose outputs are sliced.
WIDENING = "intermediate.dense"
# Padded before they are sliced, or copied where there are fewer heads than devices.
UNSLICED = frozenset({"lm_head", "k_proj", "v_proj"})
EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings"})
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRule:
    """What one program loads.

    Attributes:
        name: program, and where it runs.
        bits: widths it has kernels or a decoder for.
        symmetric: it loads no zero-points.
        fuses: members of a fused group must share a spec, and so must the experts of a layer.
        group_sizes: those it has kernels for; empty: any.
        multiple: of which every side of a slice must be.
        embedding_bits: widths that its embedding decodes right; empty: it loads none quantized.
        tied: it loads a quantized embedding that is the head too.
        head: it loads a quantized head of its own.
        slices: it knows tensor parallelism.
        gguf: it reads GGUF files, which `convert` makes of this form; a type must hold every layer.
        levels: it reads ternary and balanced grids, which are in our own format.
        refuses: classes of networks for whose layers it has no packed ones.
        renames: classes of networks whose layers it knows by other names than transformers does,
            which are those of our folders. vLLM's mixtral.py has `block_sparse_moe.experts.0.w1`
            to `w3`, as the hub's checkpoints, and no way from `mlp.experts.0.gate_proj`.
    """

    name: str
    bits: tuple[int, ...] = SUPPORTED_BITS
    symmetric: bool = False
    fuses: bool = True
    group_sizes: tuple[int, ...] = ()
    multiple: int = 1
    embedding_bits: tuple[int, ...] = ()
    tied: bool = False
    head: bool = False
    slices: bool = True
    gguf: bool = False
    levels: bool = False
    refuses: tuple[str, ...] = tuple(WITHOUT_LINEARS)
    renames: tuple[str, ...] = ()


_TRANSFORMERS = ServerRule(
    name="transformers 5.23, compressed-tensors 0.20",
    bits=(2, 3, 4, 5, 6, 8),
    symmetric=True,
    fuses=False,
    head=True,
    slices=False,
)
_VLLM = ServerRule(
    name="vLLM 0.33 on NVIDIA (Turing or newer)",
    group_sizes=(32, 64, 128, PER_CHANNEL),
    multiple=32,
    embedding_bits=(2, 4, 8),
    head=True,
    refuses=("GPT2LMHeadModel",),
    renames=("MixtralForCausalLM",),
)
_RULES = (
    ServerRule(
        name="quantforge.load",
        fuses=False,
        levels=True,
        embedding_bits=SUPPORTED_BITS,
        tied=True,
        head=True,
        slices=False,
        refuses=(),
    ),
    _TRANSFORMERS,
    _VLLM,
    ServerRule(name="vLLM 0.33 on CPU and XPU", bits=(4,)),
    ServerRule(name="vLLM 0.33 on ROCm", bits=(4, 8)),
    ServerRule(name="SGLang", bits=(4, 8)),
)
# By the names of `--server`.
SERVERS: Mapping[str, ServerRule] = {
    "transformers": _TRANSFORMERS,
    "vllm": _VLLM,
    "llama.cpp": ServerRule(
        name="llama.cpp, of the file that convert --layout gguf writes",
        fuses=False,
        embedding_bits=SUPPORTED_BITS,
        tied=True,
        head=True,
        slices=False,
        gguf=True,
    ),
}


def refusal(rule: ServerRule, layer: LayerInfo, spec: QuantSpec | None, parts: int = 1) -> str:
    """Why a program does not load one layer in this form; empty where it does.

    Args:
        rule: the program's.
        layer: its shape and name.
        spec: None where it is kept in 16 bits.
        parts: devices that share every layer (tensor parallelism).
    """
    outputs, inputs, why = _slice(layer, parts)
    if why or spec is None:
        return why
    if spec.grid != "uniform" and not rule.levels:
        return f"it reads no {spec.grid} grids, which are in quantforge's own format"
    if spec.group_size > 0 and inputs % spec.group_size:
        return f"groups of {spec.group_size} do not divide a slice of {inputs} inputs"
    for side, count in (("inputs", inputs), ("outputs", outputs)):
        if count % rule.multiple:
            part = "" if parts == 1 else " of a slice"
            why = f"{count} {side}{part} are no multiple of {rule.multiple}"
    return _unknown_form(rule, layer, spec) or why


def _slice(layer: LayerInfo, parts: int) -> tuple[int, int, str]:
    """Outputs and inputs that one device has of a layer, and why it cannot be split."""
    outputs, inputs = layer.out_features, layer.in_features
    last = layer.name.rpartition(".")[2]
    if parts == 1 or layer.kind != "linear" or last in UNSLICED:
        return outputs, inputs, ""
    if last in SLICED_INPUTS and not layer.name.endswith(WIDENING):
        why = f"{inputs} inputs do not split into {parts}" if inputs % parts else ""
        return outputs, inputs // parts, why
    why = f"{outputs} outputs do not split into {parts}" if outputs % parts else ""
    return outputs // parts, inputs, why


def _unknown_form(rule: ServerRule, layer: LayerInfo, spec: QuantSpec) -> str:
    """What of a spec the program has no kernel or decoder for, whatever the layer's shape."""
    if spec.bits not in rule.bits:
        return f"it loads {_listed(rule.bits)} bits, not {spec.bits}"
    if layer.outside and (why := _unknown_outside(rule, layer, spec)):
        return why
    if rule.symmetric and not spec.symmetric:
        return "it loads no zero-points"
    if rule.gguf and not held_exactly(spec, layer.in_features):
        return grouping(spec, layer.in_features) or f"no type of GGUF holds {spec} exactly"
    if rule.group_sizes and spec.group_size not in rule.group_sizes:
        sizes = _listed([size for size in rule.group_sizes if size != PER_CHANNEL])
        return f"it loads groups of {sizes} or whole rows, not of {spec.group_size}"
    return ""


def _unknown_outside(rule: ServerRule, layer: LayerInfo, spec: QuantSpec) -> str:
    """Why it loads no such embedding or head."""
    if layer.kind == "linear":
        return "" if rule.head else "it loads no quantized head"
    if layer.kind == "tied" and not rule.tied:
        return "it loads no quantized embedding that is the head too"
    if spec.bits not in rule.embedding_bits:
        known = _listed(rule.embedding_bits) or "16"
        return f"it loads embeddings of {known} bits, not {spec.bits}"
    return ""


def network_problems(
    rule: ServerRule, config: Mapping[str, Any], parts: int, folder: Path | None = None
) -> list[str]:
    """What of a network's shape a program does not load, one line each.

    GGUF has some architectures and some tokenizers. Heads are never cut: each device has whole
    ones, or a copy of one of keys and values.

    Args:
        rule: the program's.
        config: the network's, as in its config.json.
        parts: devices.
        folder: with its tokenizer; None where there is none.
    """
    heads = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads", heads)
    found = described_problems(config, folder) if rule.gguf else []
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    if isinstance(named, str) and named in rule.refuses:
        found.append(
            f"{named}: {WITHOUT_LINEARS[named]}, where it puts no packed linears; "
            "quantforge.load does"
        )
    if isinstance(named, str) and named in rule.renames:
        found.append(
            f"{named}: it reads experts by the names of the hub's checkpoints, not by those of "
            "transformers, which the folder has; quantforge.load does"
        )
    if isinstance(heads, int) and heads % parts:
        found.append(f"{heads} attention heads do not split into {parts}")
    if isinstance(shared, int) and shared % parts and parts % shared:
        found.append(f"{shared} heads of keys and values do not split into {parts}")
    return found


def violations(
    rule: ServerRule,
    layers: Sequence[LayerInfo],
    assignment: Mapping[str, QuantSpec | None],
    parts: int = 1,
) -> list[str]:
    """Everything for which a program does not load a checkpoint, one line each.

    Args:
        rule: the program's.
        layers: of the network; `fused_group` says what belongs together.
        assignment: layer name → spec; None where it is kept.
        parts: devices that share every layer.
    """
    found = [
        f"{layer.name}: {why}"
        for layer in layers
        if (why := refusal(rule, layer, assignment[layer.name], parts))
    ]
    if rule.fuses:
        found += [
            f"{group}: its members are fused and have different specs"
            for group in _split_groups(layers, assignment)
        ]
    return found


def server_support(
    layers: Sequence[LayerInfo],
    assignment: Mapping[str, QuantSpec | None],
    config: Mapping[str, Any] | None = None,
) -> tuple[ServerSupport, ...]:
    """What every known program makes of a plan, with the rule that decides.

    Args:
        layers: of the network, in forward order.
        assignment: layer name → spec; None where it is kept.
        config: the network's, as in its config.json; None looks at the plan alone.
    """
    return tuple(_judge(rule, layers, assignment, config or {}) for rule in _RULES)


def _judge(
    rule: ServerRule,
    layers: Sequence[LayerInfo],
    assignment: Mapping[str, QuantSpec | None],
    config: Mapping[str, Any],
) -> ServerSupport:
    specs = {spec for spec in assignment.values() if spec is not None}
    others = sorted({spec.grid for spec in specs if spec.grid != "uniform"})
    if others and not rule.levels:
        why = f"reads no {' or '.join(others)} grids, which are in quantforge's own format"
        return ServerSupport(name=rule.name, loads=False, why=why)
    refused = sorted({spec.bits for spec in specs} - set(rule.bits))
    if refused:
        why = f"loads {_listed(rule.bits)} bits, the plan has {_listed(refused)}"
        return ServerSupport(name=rule.name, loads=False, why=why)
    found = [*network_problems(rule, config, 1), *violations(rule, layers, assignment)]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return ServerSupport(name=rule.name, loads=False, why=found[0] + more)
    return ServerSupport(
        name=rule.name, loads=True, why=f"loads {_listed(rule.bits)} bits, per layer"
    )


def fused_group(name: str) -> str:
    """What a layer of a finished checkpoint is fused with, from its name alone.

    The experts of one layer share a spec, because servers look at the first expert's; elsewhere
    members of `FUSED` under one parent do.
    """
    expert = _EXPERT.match(name)
    if expert:
        return expert[1]
    parent, _, last = name.rpartition(".")
    members = next((group for group in FUSED if last in group), (last,))
    return f"{parent}.{'+'.join(members)}"


def _split_groups(
    layers: Sequence[LayerInfo], assignment: Mapping[str, QuantSpec | None]
) -> list[str]:
    """Fused groups whose members differ."""
    seen: dict[str, set[QuantSpec | None]] = {}
    for layer in layers:
        seen.setdefault(layer.fused_group, set()).add(assignment[layer.name])
    return [group for group, specs in seen.items() if len(specs) > 1]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
