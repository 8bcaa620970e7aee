"""The GPTQ layout, as AutoGPTQ, GPTQModel, vLLM and transformers read it: 4 and 8 bits.

For a linear `P` of [out, in] weights with unsigned codes of b bits, w = (code − zero) · scale:
`P.qweight` int32 [in·b/32, out] holds the codes packed along the inputs, `P.scales` float16
[groups, out], `P.qzeros` int32 [groups, out·b/32] the zero-points packed along the outputs, and
`P.g_idx` int32 [in] the group of every input. The first version of the layout stores zero − 1,
which leaves no way to write a zero of 0; the second stores the zero itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from quantforge_kernels.layout import pack, unpack
from torch import Tensor

from quantforge.errors import InputError, UsageError
from quantforge.types import PER_CHANNEL, QuantizedWeight, QuantSpec

METHOD = "gptq"
FIRST, SECOND = "gptq", "gptq_v2"
# Of these a 32-bit word holds a whole number of codes, and every reader has kernels for them.
BITS = (4, 8)
CODES, SCALES, ZEROS, GROUPS = "qweight", "scales", "qzeros", "g_idx"
# A scale in float16 may differ so much from ours: half a step of bfloat16.
_SCALE_TOLERANCE = 2.0**-8


def to_tensors(name: str, weight: QuantizedWeight, layout: str) -> dict[str, Tensor]:
    """The tensors that store `weight`, by suffix.

    Args:
        name: of the layer, for messages.
        weight: 4 or 8 bits.
        layout: `FIRST` or `SECOND`.

    Raises:
        UsageError: the layout cannot hold it.
    """
    bits, (out, columns) = weight.spec.bits, weight.codes.shape
    a_word = 32 // bits if bits in BITS else 0
    if not a_word or out % a_word or columns % a_word:
        raise UsageError(
            f"{name} is {weight.spec} of {out} x {columns}: the GPTQ layout holds "
            f"{' and '.join(map(str, BITS))} bits, and whole words of rows and columns"
        )
    scales = weight.scale.half()
    exact = weight.scale.float()
    worst = ((scales.float() - exact).abs() / exact.abs()).max()
    if not bool(worst <= _SCALE_TOLERANCE):
        raise UsageError(
            f"{name} has scales that float16, which the GPTQ layout asks for, cannot hold"
        )
    zeros = zero_points(weight)
    if layout == FIRST and bool((zeros == 0).any()):
        raise UsageError(f"{name} has a zero-point of 0, which only {SECOND} holds")
    stored = zeros - 1 if layout == FIRST else zeros
    groups = weight.scale.shape[1]
    return {
        CODES: pack(weight.codes, bits).t().contiguous(),
        SCALES: scales.t().contiguous(),
        ZEROS: pack(stored.t().contiguous(), bits),
        GROUPS: (torch.arange(columns) // (columns // groups)).int(),
    }


def from_tensors(tensors: Mapping[str, Tensor], spec: QuantSpec, layout: str) -> Tensor:
    """The float32 weight [out, in] that a reader of the layout makes of a layer's tensors."""
    columns, out = len(tensors[GROUPS]), tensors[SCALES].shape[1]
    codes = unpack(tensors[CODES].t().contiguous(), spec.bits, columns).float()
    zeros = unpack(tensors[ZEROS], spec.bits, out).float() + float(layout == FIRST)
    group = tensors[GROUPS].long()
    scales = tensors[SCALES].float()
    return (codes - zeros.t()[:, group]) * scales.t()[:, group]


def zero_points(weight: QuantizedWeight) -> Tensor:
    """[out, groups] uint8 codes that mean 0."""
    if weight.zero is not None:
        return weight.zero
    return torch.full_like(weight.scale, -weight.spec.code_min, dtype=torch.uint8)


def quantization_config(spec: QuantSpec, layout: str, version: str) -> dict[str, Any]:
    """The block of config.json, which is also quantize_config.json."""
    return {
        "quant_method": METHOD,
        "bits": spec.bits,
        "group_size": -1 if spec.group_size == PER_CHANNEL else spec.group_size,
        "desc_act": False,
        "sym": spec.symmetric,
        "lm_head": False,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"quantforge:{version}"]},
    }


def layout_for(spec: QuantSpec, weights: Iterable[QuantizedWeight]) -> str:
    """The older layout, which more programs read, unless a zero-point needs the newer.

    Args:
        spec: of all layers; symmetric ones are not looked at.
        weights: the layers.
    """
    if spec.symmetric:
        return FIRST
    return SECOND if any(bool((zero_points(one) == 0).any()) for one in weights) else FIRST


def only_spec(specs: Mapping[str, QuantSpec]) -> QuantSpec:
    """The one spec of all layers.

    Raises:
        InputError: there are none, or several, or one that the layout does not hold.
    """
    found = sorted(set(specs.values()))
    if len(found) != 1 or found[0].bits not in BITS:
        names = ", ".join(map(str, found)) or "none"
        widths = " or ".join(map(str, BITS))
        raise InputError(
            f"the GPTQ layout takes one width of {widths} bits and one group size for all layers, "
            f"the checkpoint has {names}; make it with --budget left out and one of the uniform "
            "recipes, e.g. gptq-w4g128"
        )
    return found[0]
