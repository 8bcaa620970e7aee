"""compressed-tensors `pack-quantized`: weights as named tensors, specs as a config block.

For a linear `P` of [out, in] weights with codes of b bits: `P.weight_packed` int32
[out, ceil(in*b/32)] holds the codes packed along the row (`quantforge_kernels.layout`),
`P.weight_scale` [out, groups] the 16-bit scales, `P.weight_shape` int64 [2] the shape, and, where
the spec is asymmetric, `P.weight_zero_point` int32 [ceil(out*b/32), groups] the zero-points packed
along the columns. The signed code of the format is ours minus `2**(b-1)`, for zero-points too.

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
from quantforge.types import PER_CHANNEL, SUPPORTED_BITS, QuantizedWeight, QuantSpec

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
# The first release that packs 3, 5, 6 and 7 bits densely; older readers decode those wrongly.
FORMAT_VERSION = "0.17.0"

PACKED = "weight_packed"
SCALE = "weight_scale"
SHAPE = "weight_shape"
ZERO_POINT = "weight_zero_point"

_DENSE_SINCE = (0, 17)
_UNCHANGED_WIDTHS = (2, 4, 8)  # packed alike by every release


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that store `weight`, by suffix, in the order they are written."""
    out_features, in_features = weight.codes.shape
    tensors = {
        PACKED: pack(weight.codes, weight.spec.bits),
        SCALE: weight.scale.contiguous(),
        SHAPE: torch.tensor([out_features, in_features], dtype=torch.int64),
    }
    if weight.zero is not None:
        tensors[ZERO_POINT] = pack(weight.zero.t().contiguous(), weight.spec.bits).t().contiguous()
    return tensors


def stored_shapes(
    out_features: int, in_features: int, spec: QuantSpec
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of what `to_tensors` gives for a weight of this shape, in its order."""
    groups = spec.groups(in_features)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        PACKED: (torch.int32, (out_features, packed_words(in_features, spec.bits))),
        SCALE: (torch.bfloat16, (out_features, groups)),
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
    codes = unpack(tensors[PACKED].contiguous(), spec.bits, in_features)
    if not torch.equal(pack(codes, spec.bits), tensors[PACKED]):
        raise InputError(
            f"{name}.{PACKED} has set bits beyond the end of a row; the file is damaged"
        )
    return QuantizedWeight(
        codes=codes,
        scale=tensors[SCALE].contiguous(),
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
    wanted = {PACKED, SCALE, SHAPE} | (set() if spec.symmetric else {ZERO_POINT})
    if set(tensors) != wanted:
        raise InputError(
            f"{name} ({spec}) needs the tensors {', '.join(sorted(wanted))}, "
            f"the checkpoint has {', '.join(sorted(tensors)) or 'none'}"
        )
    out_features, in_features = layer_shape(name, tensors[SHAPE], spec)
    groups, words = spec.groups(in_features), packed_words(in_features, spec.bits)
    _expect(name, tensors, PACKED, (torch.int32,), (out_features, words))
    _expect(name, tensors, SCALE, (torch.bfloat16, torch.float16), (out_features, groups))
    if not spec.symmetric:
        rows = packed_words(out_features, spec.bits)
        _expect(name, tensors, ZERO_POINT, (torch.int32,), (rows, groups))
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
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": FORMAT_VERSION,
        "ignore": sorted(set(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def _group(spec: QuantSpec, targets: list[str]) -> dict[str, Any]:
    per_channel = spec.group_size == PER_CHANNEL
    return {
        "targets": targets,
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "channel" if per_channel else "group",
            "group_size": None if per_channel else spec.group_size,
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
    if block.get("format") != FORMAT:
        raise InputError(f"config.json: format {block.get('format')!r} is not {FORMAT!r}")
    groups = block.get("config_groups")
    if not isinstance(groups, dict):
        raise InputError("config.json: quantization_config has no config_groups")
    dense = _version(block.get("version")) >= _DENSE_SINCE
    specs: dict[str, QuantSpec] = {}
    for label, group in groups.items():
        spec = _read_group(label, group)
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


def _read_group(label: str, group: Any) -> QuantSpec:
    if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
        raise InputError(f"config.json: {label} has no list of targets")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise InputError(f"config.json: {label} has no weights")
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise InputError(f"config.json: {label} quantizes {part}, which is not supported")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" and size in (None, PER_CHANNEL):
        size = PER_CHANNEL
    elif strategy != "group" or type(size) is not int or size < 1:
        raise InputError(f"config.json: {label} has strategy {strategy!r}, group_size {size!r}")
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric")
    if weights.get("type") != "int" or type(bits) is not int or bits not in SUPPORTED_BITS:
        raise InputError(f"config.json: {label} has {bits!r} bits of {weights.get('type')!r}")
    if type(symmetric) is not bool or weights.get("dynamic") or weights.get("actorder"):
        raise InputError(f"config.json: {label} is dynamic, reordered or of unknown symmetry")
    return QuantSpec(bits, size, symmetric)


def _version(text: object) -> tuple[int, int]:
    """(major, minor) of "0.17.0"; (0, 0) where it cannot be read."""
    parts = str(text).split(".")[:2]
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        return (0, 0)
    return int(parts[0]), int(parts[1])
