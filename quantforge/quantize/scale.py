"""Channel scaling of one block (AWQ): searched on its inputs, folded into its float weights.

Wherever the architecture says that a module's output channels reach the layers of a stage one by
one (`Architecture.folds`), the channels are divided in the module and multiplied in those layers.
The block computes what it did before, so everything after it, and what the float network is
compared with, stays as it was; only the weights that are about to be rounded are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError
from quantforge.methods.awq import (
    ChosenScale,
    divide_outputs,
    multiply_inputs,
    rounding_error,
    search_scale,
)
from quantforge.models import Model
from quantforge.numerics import factorize
from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.streams import Streams
from quantforge.types import BitPlan, QuantSpec


def scale_block(
    model: Model, index: int, plan: BitPlan, streams: Streams, config: QuantizeConfig
) -> dict[str, ChosenScale]:
    """Scale the channels of a float block in place where rounding to nearest gains by it.

    Costs as many fits of the grid as the search has steps, for every quantized layer.

    Args:
        model: holds the block, whose weights are still float.
        index: of the block.
        plan: specs; a stage whose layers are all kept is left alone.
        streams: stand at the block's entrance.
        config: grid, and damping of the grams.

    Returns:
        Module path inside the block → the scale its outputs were divided by; of a norm, before
        that was rounded. Modules whose channels do not correspond to inputs are not in it.

    Raises:
        InputError: the architecture has no such pair, or an input's moments hold NaN or Inf.
    """
    architecture = model.architecture
    if not architecture.folds:
        raise InputError(f"awq: nothing can be folded in the architecture {architecture.name}")
    block = streams.quantized.blocks[index]
    statistics = streams.statistics(block)
    found: dict[str, ChosenScale] = {}
    for path, stage in architecture.folds:
        source: Any = block.get_submodule(path)
        readers: dict[str, Any] = {
            f"{architecture.blocks}.{index}.{member}": block.get_submodule(member)
            for member in architecture.stages[stage]
        }
        specs = {name: plan.assignment[name] for name in readers}
        layers = [
            (reader.weight.detach().float(), spec)
            for name, reader in readers.items()
            if (spec := specs[name]) is not None
        ]
        gram, magnitude = statistics[stage]
        if not layers or len(source.weight) != len(gram):
            continue
        try:
            found[path] = _search(layers, gram, magnitude, config)
        except InputError as error:
            raise InputError(f"{next(iter(readers))}: {error}") from error
        if found[path].exponent > 0.0:
            fold(source, list(readers.values()), found[path].scale)
    return found


def refold(model: Model, index: int, scales: Mapping[str, Tensor]) -> None:
    """Fold channel scales that `scale_block` had found into a float block again, in place.

    Args:
        model: holds the block, as it was before.
        index: of the block.
        scales: module path inside the block → [n] what its outputs are divided by.
    """
    block = model.architecture.block_list(model.module)[index]
    for path, stage in model.architecture.folds:
        if path in scales:
            readers = [block.get_submodule(one) for one in model.architecture.stages[stage]]
            fold(block.get_submodule(path), readers, scales[path])


def _search(
    layers: Sequence[tuple[Tensor, QuantSpec]],
    gram: Tensor,
    magnitude: Tensor,
    config: QuantizeConfig,
) -> ChosenScale:
    """The scale with the least rounding error, summed over the layers that read the channels."""
    factor = factorize(gram, damping=config.damping[0], act_order=config.order != "natural")

    def loss(scale: Tensor) -> float:
        return sum(
            rounding_error(weight, gram, factor, spec, config.grid, scale)
            for weight, spec in layers
        )

    return search_scale(magnitude, loss)


@torch.no_grad()
def fold(source: Any, readers: Sequence[Any], scale: Tensor) -> None:
    """Divide the output channels of a module and multiply what reads them, in place.

    A norm's weight is stored in bfloat16, so it becomes a number that has no more digits than that,
    and the layers are multiplied by what it was really divided by.

    Args:
        source: norm or linear, with a weight of [n] or [n, in] and perhaps a bias of [n].
        readers: linears of n inputs.
        scale: [n], positive.
    """
    weight = source.weight
    divided = divide_outputs(weight, scale)
    if weight.dim() == 1:
        divided = divided.bfloat16().to(weight.dtype)
        usable = torch.isfinite(divided) & (divided != 0)
        divided = torch.where(usable, divided, weight)
        scale = torch.where(usable, weight / divided, 1.0)
    weight.copy_(divided)
    bias = getattr(source, "bias", None)
    if bias is not None:
        bias.copy_(divide_outputs(bias, scale))
    for reader in readers:
        reader.weight.copy_(multiply_inputs(reader.weight, scale))


def rescale_outputs(grams: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """Output gram of a module whose outputs were divided by `scale` [out]: gradients grow by it.

    Args:
        grams: diagonal blocks, which cover the outputs in order.
        scale: [out], positive.
    """
    parts = torch.split(scale, [len(gram) for gram in grams])
    return [gram * part * part.unsqueeze(1) for gram, part in zip(grams, parts, strict=True)]
