"""Every candidate of every layer, really quantized: its integers and its output errors.

One walk through the float network gathers each block's grams; each gram is factored once and
serves all candidates of all layers that read it. The integers are kept in a store on disk, so
that uniform networks and plans can be put together and measured without quantizing again, and so
that `fast` effort has its final weights already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.calibrate.config import CalibrateConfig
from quantforge.capture import BlockWalk, StageGram, stage_grams
from quantforge.errors import InputError
from quantforge.format.store import CandidateStore, Circumstances, weight_tensors
from quantforge.journal import NO_JOURNAL, Journal, numbered
from quantforge.methods.gptq import gptq
from quantforge.models import Model
from quantforge.numerics import Factor, factorize, output_error, relative
from quantforge.progress import Monitor, resumed
from quantforge.types import LayerInfo, QuantSpec

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


# Errors, integers and circumstances of one layer.
_Measured = tuple[CandidateErrors, dict[str, Tensor], Circumstances]


def measure_layer(
    layer: LayerInfo,
    weight: Tensor,
    gram: Tensor,
    factor: Factor,
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
    columns: Sequence[int] | None = None,
) -> tuple[CandidateErrors, dict[str, Tensor]]:
    """Output errors and integers of candidates of one layer, as `CandidateStore` takes them.

    A candidate that does not divide the row gets +inf and no integers, as one that is left out.

    Args:
        layer: the layer.
        weight: [out, in] float32.
        gram: [in, in] of its input.
        factor: of the gram.
        specs: the candidates.
        config: grid of the scales.
        columns: candidates to measure; None measures all that divide the row.
    """
    rows = torch.full((len(specs), len(weight)), torch.inf)
    shares, squared = torch.full((2, len(specs)), torch.inf, dtype=torch.float64)
    reference = output_error(weight, gram)
    made: dict[str, Tensor] = {}
    for column in _fitting(layer, specs) if columns is None else columns:
        quantized = gptq(weight, factor, specs[column], grid=config.grid)
        difference = quantized.dequantize() - weight
        error = output_error(difference, gram)
        squared[column] = difference.square().sum(dtype=torch.float64)
        rows[column] = error.cpu()
        shares[column] = relative(error, reference)
        made |= weight_tensors(quantized, str(specs[column]))
    return CandidateErrors(layer=layer, rows=rows, relative=shares, squared=squared), made


def _fitting(layer: LayerInfo, specs: Sequence[QuantSpec]) -> list[int]:
    """Places of the candidates that divide a layer's row."""
    return [column for column, spec in enumerate(specs) if spec.divides(layer.in_features)]


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
        block, share = walk.blocks[index], model.share
        stages = stage_grams(walk, block, model.architecture, advance=True, share=share)
        layers = [one for one in model.layers if one.block == index]
        made = _measure_block(model, layers, stages, specs, config, store)
        _write_errors(journal, index, made)
        found += made
        model.scratch.trim()
        monitor.step("candidates", index + 1, count)
    return found, _head_inputs(model, walk)


def _measure_block(
    model: Model,
    layers: Sequence[LayerInfo],
    stages: Sequence[StageGram],
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
    store: CandidateStore,
) -> list[CandidateErrors]:
    """Errors of every candidate of a block's layers; their integers are put into the store.

    Processes measure candidates in runs of about the same work, so that few of them need the
    factor of one gram.
    """
    share = model.share
    pairs = [(layer, column) for layer in layers for column in _fitting(layer, specs)]
    first, last = share.span([layer.numel * layer.in_features for layer, _ in pairs])
    own: dict[str, list[int]] = {}
    for layer, column in pairs[first:last]:
        own.setdefault(layer.name, []).append(column)
    measured: Iterable[_Measured] = _measured(model, layers, stages, specs, config, own)
    if share.count > 1:  # what is exchanged layer by layer is made without waiting
        measured = list(measured)
    found = []
    for layer, (mine, tensors, under) in zip(layers, measured, strict=True):
        tables = {field: getattr(mine, field) for field in _TABLES}
        given = share.exchange({**tables, **tensors}, asdict(under) if tensors else None)
        whole = {name: one for message in given for name, one in message.tensors.items()}
        for field in _TABLES:  # of what others measured +inf
            whole.pop(field)
            tables[field] = torch.stack([one.tensors[field] for one in given]).amin(0)
        if whole and share.main:  # a layer that no group size divides can only be kept
            told = next(message.facts for message in given if message.facts)
            store.put_tensors(layer.name, whole, layer.in_features, Circumstances(**told))
        found.append(CandidateErrors(layer=layer, **tables))
    return found


def _measured(
    model: Model,
    layers: Sequence[LayerInfo],
    stages: Sequence[StageGram],
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
    own: Mapping[str, Sequence[int]],
) -> Iterator[_Measured]:
    """Layer by layer what this process measures; a gram is factored where that needs it."""
    grams = [stage.mean() for stage in stages]
    factors: dict[int, Factor] = {}
    for layer in layers:
        columns, stage = own.get(layer.name, ()), layer.stage
        if columns and stage not in factors:
            try:
                factors[stage] = factorize(grams[stage], damping=config.damping)
            except InputError as error:
                raise InputError(f"{layer.name}: {error}") from error
        if not columns:
            rows = torch.full((len(specs), layer.out_features), torch.inf)
            ratios, squared = torch.full((2, len(specs)), torch.inf, dtype=torch.float64)
            nothing = CandidateErrors(layer=layer, rows=rows, relative=ratios, squared=squared)
            yield nothing, {}, Circumstances()
            continue
        factor, weight = factors[stage], float_weight(model, layer)
        found, made = measure_layer(layer, weight, grams[stage], factor, specs, config, columns)
        under = Circumstances(
            asked=config.damping,
            damping=factor.damping,
            dead=int(factor.dead.sum()),
            fallback=factor.fallback,
            starved=stages[stage].starved,
        )
        yield found, made, under


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
    """The float network at its first block, with this process's share of the batches."""
    return BlockWalk(
        model.module,
        model.architecture,
        tokens,
        batch_size=config.batch_size,
        precision=config.precision,
        own=model.share.batches(-(-len(tokens) // config.batch_size)),
    )


@torch.no_grad()
def _head_inputs(model: Model, walk: BlockWalk) -> Tensor:
    """[sequences, length, hidden] bfloat16: what enters the head, from a walk at its end."""
    states = model.architecture.final_states
    mine = {str(b): states(model.module, walk.hidden[b]).bfloat16() for b in walk.own}
    whole = model.share.joined(mine)
    return torch.cat([whole[str(batch)].to(walk.device) for batch in range(len(walk.hidden))])
