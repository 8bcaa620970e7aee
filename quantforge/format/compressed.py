"""compressed-tensors `pack-quantized`: weights as named tensors, specs as a config block.

For a linear `P` of [out, in] weights with codes of b bits: `P.weight_packed` int32
[out, ceil(in*b/32)] holds the codes packed along the row (`quantforge_kernels.layout`),
`P.weight_scale` [out, groups] the 16-bit scales, `P.weight_shape` int64 [2] the shape, and, where
the spec is asymmetric, `P.weight_zero_point` int32 [ceil(out*b/32), groups] the zero-points packed
along the columns. The signed code of the format is ours minus `2**(b-1)`, for zero-points too.

Ternary and balanced weights (`levels`) are not of that format. `P.weight_levels` uint8 holds their
codes in the place of `weight_packed`, `P.weight_scale` is [1, 1] where one scale serves the whole
matrix, and all other layers are stored as above. Where there is one, config.json names a format and
types of weights of our own. The method stays, for loaders that know it read the types and refuse
these, while transformers passes over a method that it does not know and makes up the weights.

config.json lists one group per distinct spec with the exact names of its layers; patterns and class
names are refused when reading because different readers give them different precedence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from quantforge_kernels.layout import pack, packed_words, unpack
from torch import Tensor

from quantforge.errors import InputError
from quantforge.format.levels import pack_levels, unpack_levels
from quantforge.types import (
    LEVEL_GRIDS,
    PER_CHANNEL,
    PER_TENSOR,
    SUPPORTED_BITS,
    Grid,
    QuantizedWeight,
    QuantSpec,
)

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
# Of checkpoints with ternary or balanced weights; the version is of the layout of these.
OWN_FORMAT = "quantforge-levels"
OWN_VERSION = 1
OWN_TYPES: Mapping[str, Grid] = {f"quantforge-{grid}": grid for grid in LEVEL_GRIDS}
# The first release that packs 3, 5, 6 and 7 bits densely; older readers decode those wrongly.
FORMAT_VERSION = "0.17.0"

PACKED = "weight_packed"
LEVELS = "weight_levels"
SCALE = "weight_scale"
SHAPE = "weight_shape"
ZERO_POINT = "weight_zero_point"

_DENSE_SINCE = (0, 17)
_UNCHANGED_WIDTHS = (2, 4, 8)  # packed alike by every release


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that store `weight`, by suffix, in the order they are written."""
    spec, scale = weight.spec, weight.scale
    if spec.group_size == PER_TENSOR:
        if not torch.equal(scale, scale[:1].expand_as(scale)):
            raise ValueError(f"{spec} has one scale, the weight has several")
        scale = scale[:1]
    uniform = spec.grid == "uniform"
    codes = pack(weight.codes, spec.bits) if uniform else pack_levels(weight.codes, spec)
    tensors = {
        codes_suffix(spec): codes,
        SCALE: scale.contiguous(),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors[ZERO_POINT] = pack(weight.zero.t().contiguous(), weight.spec.bits).t().contiguous()
    return tensors


def codes_suffix(spec: QuantSpec) -> str:
    """The suffix under which a weight's codes are stored."""
    return PACKED if spec.grid == "uniform" else LEVELS


def stored_shapes(
    out_features: int, in_features: int, spec: QuantSpec
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of what `to_tensors` gives for a weight of this shape, in its order."""
    groups = spec.groups(in_features)
    codes = torch.int32, (out_features, packed_words(in_features, spec.bits))
    if spec.grid != "uniform":
        codes = torch.uint8, (out_features, spec.row_bytes(in_features))
    rows = 1 if spec.group_size == PER_TENSOR else out_features
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        codes_suffix(spec): codes,
        SCALE: (torch.bfloat16, (rows, groups)),
        SHAPE: (torch.int64, (2,)),
    }
    if not spec.symmetric:
        shapes[ZERO_POINT] = (torch.int32, (packed_words(out_features, spec.bits), groups))
    return shapes


def from_tensors(name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Inverse of `to_tensors`.

    Args:
        name: of the layer, for messages.
        tensors: the layer's tensors by suffix.
        spec: of the layer.

    Raises:
        InputError: a tensor is missing or superfluous, or has another dtype or shape than the spec
            requires, or a padding bit is set.
    """
    out_features, in_features = check_tensors(name, tensors, spec)
    stored = tensors[codes_suffix(spec)].contiguous()
    if spec.grid == "uniform":
        codes = unpack(stored, spec.bits, in_features)
        again = pack(codes, spec.bits)
    else:
        codes = unpack_levels(stored, spec, in_features)
        again = pack_levels(codes, spec)
    if not torch.equal(again, stored):
        raise InputError(
            f"{name}.{codes_suffix(spec)} has set bits beyond the end of a row; the file is damaged"
        )
    scale = tensors[SCALE]
    if spec.group_size == PER_TENSOR:
        scale = scale.expand(out_features, 1)
    return QuantizedWeight(
        codes=codes,
        scale=scale.contiguous(),
        zero=unpack_zero(tensors, spec, out_features),
        spec=spec,
    )


def unpack_zero(tensors: Mapping[str, Tensor], spec: QuantSpec, rows: int) -> Tensor | None:
    """[out, groups] uint8 zero-points of checked tensors; None for a symmetric spec."""
    if spec.symmetric:
        return None
    return unpack(tensors[ZERO_POINT].t().contiguous(), spec.bits, rows).t().contiguous()


def check_tensors(name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> tuple[int, int]:
    """Check the tensors of one layer against its spec; return (out, in).

    Raises:
        InputError: see `from_tensors`; padding bits are not looked at.
    """
    wanted = {codes_suffix(spec), SCALE, SHAPE} | (set() if spec.symmetric else {ZERO_POINT})
    if set(tensors) != wanted:
        raise InputError(
            f"{name} ({spec}) needs the tensors {', '.join(sorted(wanted))}, "
            f"the checkpoint has {', '.join(sorted(tensors)) or 'none'}"
        )
    out_features, in_features = layer_shape(name, tensors[SHAPE], spec)
    for suffix, (dtype, shape) in stored_shapes(out_features, in_features, spec).items():
        dtypes = (torch.bfloat16, torch.float16) if suffix == SCALE else (dtype,)
        _expect(name, tensors, suffix, dtypes, shape)
    return out_features, in_features


def layer_shape(name: str, shape: Tensor, spec: QuantSpec) -> tuple[int, int]:
    """(out, in) of a layer, from its `weight_shape`.

    Raises:
        InputError: it holds something else, or a row that the spec's groups do not divide.
    """
    if shape.dtype != torch.int64 or tuple(shape.shape) != (2,) or int(shape.min()) < 1:
        raise InputError(f"{name}.{SHAPE} must be two positive int64 numbers, got {shape!r}")
    out_features, in_features = (int(extent) for extent in shape)
    if not spec.divides(in_features):
        raise InputError(f"{name}: groups of {spec.group_size} do not divide {in_features} columns")
    return out_features, in_features


def _expect(
    name: str,
    tensors: Mapping[str, Tensor],
    suffix: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    tensor = tensors[suffix]
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise InputError(
            f"{name}.{suffix} must be {' or '.join(map(str, dtypes))} of shape {shape}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def quantization_config(
    assignment: Mapping[str, QuantSpec], ignore: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` block of config.json.

    Args:
        assignment: layer name → spec, quantized layers only.
        ignore: names of the linears left alone.
    """
    members: dict[QuantSpec, list[str]] = {}
    for name, spec in assignment.items():
        members.setdefault(spec, []).append(name)
    groups = {
        f"group_{spec}": _group(spec, sorted(names)) for spec, names in sorted(members.items())
    }
    own = any(spec.grid != "uniform" for spec in members)
    return {
        "quant_method": METHOD,
        "format": OWN_FORMAT if own else FORMAT,
        **({"format_version": OWN_VERSION} if own else {}),
        "quantization_status": "compressed",
        "version": FORMAT_VERSION,
        "ignore": sorted(set(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def _group(spec: QuantSpec, targets: list[str]) -> dict[str, Any]:
    strategy = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(spec.group_size, "group")
    uniform = spec.grid == "uniform"
    return {
        "targets": targets,
        "format": FORMAT if uniform else OWN_FORMAT,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": spec.bits,
            "type": "int" if uniform else f"quantforge-{spec.grid}",
            "symmetric": spec.symmetric,
            "strategy": strategy,
            "group_size": spec.group_size if strategy == "group" else None,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
        },
    }


def specs_from_config(config: Mapping[str, Any]) -> dict[str, QuantSpec]:
    """The spec of every quantized layer, from the config.json of a checkpoint.

    Raises:
        InputError: there is no such block, or it asks for something this reader does not decode.
    """
    block = config.get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != METHOD:
        raise InputError(f"config.json has no quantization_config of method {METHOD!r}")
    own = block.get("format") == OWN_FORMAT
    if not own and block.get("format") != FORMAT:
        raise InputError(f"config.json: format {block.get('format')!r} is not {FORMAT!r}")
    if own and block.get("format_version") != OWN_VERSION:
        raise InputError(
            f"config.json: version {block.get('format_version')!r} of {OWN_FORMAT!r}, this reads "
            f"{OWN_VERSION}; take the quantforge that wrote it"
        )
    groups = block.get("config_groups")
    if not isinstance(groups, dict):
        raise InputError("config.json: quantization_config has no config_groups")
    dense = _version(block.get("version")) >= _DENSE_SINCE
    specs: dict[str, QuantSpec] = {}
    for label, group in groups.items():
        spec = _read_group(label, group, own=own)
        if not dense and spec.bits not in _UNCHANGED_WIDTHS:
            raise InputError(
                f"config.json: {label} has {spec.bits} bits in the layout of compressed-tensors "
                f"{block.get('version')}; only layouts since 0.17 are read"
            )
        for target in group["targets"]:
            if not isinstance(target, str) or target.startswith("re:") or target == "Linear":
                raise InputError(f"config.json: {label} targets {target!r}, not an exact name")
            if target in specs:
                raise InputError(f"config.json: {target} is in two groups")
            specs[target] = spec
    return specs


def _read_group(label: str, group: Any, *, own: bool) -> QuantSpec:
    if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
        raise InputError(f"config.json: {label} has no list of targets")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise InputError(f"config.json: {label} has no weights")
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise InputError(f"config.json: {label} quantizes {part}, which is not supported")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    kind = weights.get("type")
    grid = OWN_TYPES.get(kind) if own and isinstance(kind, str) else None
    if strategy == "tensor" and grid is not None and size is None:
        strategy, size = "group", PER_TENSOR
    elif strategy == "channel" and size in (None, PER_CHANNEL):
        size = PER_CHANNEL
    elif strategy != "group" or type(size) is not int or size < 1:
        raise InputError(f"config.json: {label} has strategy {strategy!r}, group_size {size!r}")
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    if (grid is None and kind != "int") or type(bits) is not int or bits not in SUPPORTED_BITS:
        raise InputError(f"config.json: {label} has {bits!r} bits of {kind!r}")
    if type(symmetric) is not bool or weights.get("dynamic") or weights.get("actorder"):
        raise InputError(f"config.json: {label} is dynamic, reordered or of unknown symmetry")
    if grid is None:
        return QuantSpec(bits, size, symmetric)
    if bits != 2 or not symmetric:
        raise InputError(f"config.json: {label} is {grid} of {bits} bits, symmetric {symmetric}")
    return QuantSpec(bits, size, symmetric, grid)


def _version(text: object) -> tuple[int, int]:
    """(major, minor) of "0.17.0"; (0, 0) where it cannot be read."""
    parts = str(text).split(".")[:2]
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        return (0, 0)
    return int(parts[0]), int(parts[1])
