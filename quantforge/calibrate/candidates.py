"""Every candidate of every layer, really quantized: its integers and its output errors.

One walk through the float network gathers each block's grams; each gram is factored once and
serves all candidates of all layers that read it. The integers are kept in a store on disk, so
that uniform networks and plans can be put together and measured without quantizing again, and so
that `fast` effort has its final weights already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.calibrate.config import CalibrateConfig
from quantforge.capture import BlockWalk, stage_grams
from quantforge.errors import InputError
from quantforge.format.store import CandidateStore, Circumstances
from quantforge.journal import NO_JOURNAL, Journal, numbered
from quantforge.methods.gptq import gptq
from quantforge.models import Model
from quantforge.numerics import Factor, factorize, output_error, relative
from quantforge.progress import Monitor, resumed
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec

BLOCK = "candidates"
_TABLES = ("rows", "relative", "squared")


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateErrors:
    """Output errors of one layer's candidates.

    Attributes:
        layer: the layer.
        rows: [candidates, out] float32 d_o gram d_oᵀ; +inf for candidates that do not fit.
        relative: [candidates] float64, their sum over that of the weight itself; likewise.
        squared: [candidates] float64 ‖Q(W) − W‖²; likewise.
    """

    layer: LayerInfo
    rows: Tensor
    relative: Tensor
    squared: Tensor


def measure_layer(
    layer: LayerInfo,
    weight: Tensor,
    gram: Tensor,
    factor: Factor,
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
) -> tuple[CandidateErrors, dict[QuantSpec, QuantizedWeight]]:
    """Output errors and integers of every candidate of one layer.

    A candidate that does not divide the row gets +inf and no integers.
    """
    rows = torch.full((len(specs), len(weight)), torch.inf)
    squared = torch.full((len(specs),), torch.inf, dtype=torch.float64)
    shares, quantized = [], {}
    reference = output_error(weight, gram)
    for index, spec in enumerate(specs):
        if not spec.divides(weight.shape[1]):
            shares.append(torch.inf)
            continue
        quantized[spec] = gptq(weight, factor, spec, grid=config.grid)
        difference = quantized[spec].dequantize() - weight
        error = output_error(difference, gram)
        squared[index] = difference.square().sum(dtype=torch.float64)
        rows[index] = error.cpu()
        shares.append(relative(error, reference))
    table = torch.tensor(shares, dtype=torch.float64)
    found = CandidateErrors(layer=layer, rows=rows, relative=table, squared=squared)
    return found, quantized


def quantize_candidates(
    model: Model,
    tokens: Tensor,
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
    *,
    store: CandidateStore,
    monitor: Monitor,
    journal: Journal = NO_JOURNAL,
) -> tuple[list[CandidateErrors], Tensor]:
    """Quantize every layer at every candidate on the float network's inputs.

    Args:
        model: the float network; not changed.
        tokens: [sequences, length] fitting tokens.
        specs: the candidates.
        config: calibration options.
        store: receives the integers of every candidate.
        monitor: progress and cancellation.
        journal: gets the errors of every block as it is finished; through blocks it has already the
            walk only runs forward.

    Returns:
        Errors of every layer, in forward order, and [sequences, length, hidden] bfloat16: what
        enters the head of the float network, from which its predictions can be formed again.
    """
    walk = _walk(model, tokens, config)
    found: list[CandidateErrors] = []
    count = len(walk.blocks)
    finished = journal.first_missing(BLOCK, count)
    if finished:
        monitor.step("candidates", 0, count, resumed("block", finished, count))
    for index in range(finished):
        found += _read_errors(journal, index, model)
        walk.advance(walk.blocks[index])
        monitor.step("candidates", index + 1, count)
    for index in range(finished, count):
        block = walk.blocks[index]
        stages = stage_grams(walk, block, model.architecture, advance=True)
        grams = [stage.mean() for stage in stages]
        layers = [one for one in model.layers if one.block == index]
        factors = _factors(layers, grams, config.damping)
        for layer in layers:
            errors, quantized = measure_layer(
                layer,
                float_weight(model, layer),
                grams[layer.stage],
                factors[layer.stage],
                specs,
                config,
            )
            if quantized:  # a layer that no group size divides can only be kept
                factor = factors[layer.stage]
                made = Circumstances(
                    asked=config.damping,
                    damping=factor.damping,
                    dead=int(factor.dead.sum()),
                    fallback=factor.fallback,
                    starved=stages[layer.stage].starved,
                )
                store.put(layer.name, quantized, made)
            found.append(errors)
        _write_errors(journal, index, [one for one in found if one.layer.block == index])
        monitor.step("candidates", index + 1, count)
    return found, _head_inputs(model, walk)


def _factors(layers: Sequence[LayerInfo], grams: Sequence[Tensor], damping: float) -> list[Factor]:
    """A factor for each stage of a block; an error names the first layer that reads its gram."""
    factors = []
    for stage, gram in enumerate(grams):
        try:
            factors.append(factorize(gram, damping=damping))
        except InputError as error:
            name = next(layer.name for layer in layers if layer.stage == stage)
            raise InputError(f"{name}: {error}") from error
    return factors


def _write_errors(journal: Journal, index: int, errors: Sequence[CandidateErrors]) -> None:
    """Note the errors of a block whose integers are in the store."""
    tensors = {}
    for one in errors:
        for field in _TABLES:
            tensors[f"{one.layer.name}.{field}"] = getattr(one, field)
    journal.write(numbered(BLOCK, index), tensors)


def _read_errors(journal: Journal, index: int, model: Model) -> list[CandidateErrors]:
    """What `_write_errors` noted of a block that is there."""
    entry = journal.read(numbered(BLOCK, index))
    if entry is None:
        raise ValueError(f"block {index} is not in the journal")
    return [
        CandidateErrors(
            layer=layer, **{field: entry.tensors[f"{layer.name}.{field}"] for field in _TABLES}
        )
        for layer in model.layers
        if layer.block == index
    ]


def weight_errors(
    model: Model, specs: Sequence[QuantSpec], store: CandidateStore, dtype: torch.dtype
) -> Callable[[LayerInfo], Tensor]:
    """A function that gives D = Q(W) − W of a layer's candidates, [candidates, out, in] in `dtype`.

    Zero for candidates that do not fit the layer.
    """

    def errors(layer: LayerInfo) -> Tensor:
        weight = float_weight(model, layer)
        table = weight.new_zeros(len(specs), *weight.shape, dtype=dtype)
        for index, spec in enumerate(specs):
            if spec.divides(layer.in_features):
                table[index] = store.get(layer.name, spec).dequantize() - weight
        return table

    return errors


def float_weight(model: Model, layer: LayerInfo) -> Tensor:
    """[out, in] float32 weight of a layer, without its history."""
    module: Any = model.module.get_submodule(layer.name)
    weight: Tensor = module.weight.detach().float()
    return weight


def final_hidden(model: Model, tokens: Tensor, config: CalibrateConfig, monitor: Monitor) -> Tensor:
    """[sequences, length, hidden] bfloat16: what enters the float network's head, and no more.

    Equal to what `quantize_candidates` returns beside the errors.

    Args:
        model: the float network.
        tokens: [sequences, length] fitting tokens.
        config: batch size and precision.
        monitor: progress and cancellation.
    """
    walk = _walk(model, tokens, config)
    for index, block in enumerate(walk.blocks):
        walk.advance(block)
        monitor.step("float network", index + 1, len(walk.blocks))
    return _head_inputs(model, walk)


def _walk(model: Model, tokens: Tensor, config: CalibrateConfig) -> BlockWalk:
    """The float network at its first block."""
    return BlockWalk(
        model.module,
        model.architecture,
        tokens,
        batch_size=config.batch_size,
        precision=config.precision,
    )


@torch.no_grad()
def _head_inputs(model: Model, walk: BlockWalk) -> Tensor:
    """[sequences, length, hidden] bfloat16: what enters the head, from a walk at its end."""
    states = model.architecture.final_states
    return torch.cat([states(model.module, hidden).bfloat16() for hidden in walk.hidden])
