"""Every candidate of every layer, really quantized: its predicted loss and its integers.

One walk through the float network gathers each block's grams; each gram is factored once and
serves all candidates of all layers that read it. The integers are kept in a store on disk, so
that uniform networks and plans can be put together and measured without quantizing again, and so
that `fast` effort has its final weights already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantforge.calibrate.config import CalibrateConfig
from quantforge.capture import BlockWalk, stage_grams
from quantforge.format.store import CandidateStore
from quantforge.methods.gptq import gptq
from quantforge.models import Model
from quantforge.numerics import Factor, factorize, output_error, relative
from quantforge.progress import Monitor
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec, Sensitivity


def predicted_loss(error: Tensor, moments: Tensor) -> float:
    """½ Σ_o E[g_o²] d_o gram d_oᵀ in nats a token (see `fisher`).

    Args:
        error: [out] d_o gram d_oᵀ, from `output_error`.
        moments: [out] E[g_o²].
    """
    return 0.5 * float((moments.double() * error.double()).sum())


def measure_layer(
    weight: Tensor,
    gram: Tensor,
    factor: Factor,
    moments: Tensor,
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
) -> tuple[list[float], list[float], dict[QuantSpec, QuantizedWeight]]:
    """Predicted loss, relative output error and integers of every candidate of one layer.

    A candidate that does not divide the row gets +inf and no integers.
    """
    losses, errors, quantized = [], [], {}
    reference = output_error(weight, gram)
    for spec in specs:
        if not spec.divides(weight.shape[1]):
            losses.append(torch.inf)
            errors.append(torch.inf)
            continue
        quantized[spec] = gptq(weight, factor, spec, grid=config.grid)
        error = output_error(quantized[spec].dequantize() - weight, gram)
        losses.append(predicted_loss(error, moments))
        errors.append(relative(error, reference))
    return losses, errors, quantized


def measure(
    model: Model,
    tokens: Tensor,
    moments: Mapping[str, Tensor],
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
    *,
    store: CandidateStore,
    fingerprint: str,
    monitor: Monitor,
) -> tuple[Sensitivity, Tensor]:
    """Quantize every layer at every candidate on the float network's inputs.

    Args:
        model: the float network; not changed.
        tokens: [sequences, length] fitting tokens.
        moments: layer name → [out] E[g_o²], from `fisher.output_gradient_moments`.
        specs: the candidates.
        config: calibration options.
        store: receives the integers of every candidate.
        fingerprint: of everything that determines the result.
        monitor: progress and cancellation.

    Returns:
        The table, and [sequences, length, hidden] bfloat16: what enters the head of the float
        network, from which its predictions can be formed again.
    """
    walk = _walk(model, tokens, config)
    rows: list[tuple[LayerInfo, list[float], list[float]]] = []
    for index, block in enumerate(walk.blocks):
        grams = stage_grams(walk, block, model.architecture, advance=True)
        factors = [factorize(gram, damping=config.damping) for gram in grams]
        for layer in (one for one in model.layers if one.block == index):
            weight: Any = model.module.get_submodule(layer.name).weight
            losses, errors, quantized = measure_layer(
                weight.detach().float(),
                grams[layer.stage],
                factors[layer.stage],
                moments[layer.name],
                specs,
                config,
            )
            if quantized:  # a layer that no group size divides can only be kept
                store.put(layer.name, quantized)
            rows.append((layer, losses, errors))
        monitor.step("candidates", index + 1, len(walk.blocks))
    return _table(rows, specs, config, fingerprint), _head_inputs(model, walk)


def final_hidden(model: Model, tokens: Tensor, config: CalibrateConfig, monitor: Monitor) -> Tensor:
    """[sequences, length, hidden] bfloat16: what enters the float network's head, and no more.

    Equal to what `measure` returns beside its table.

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


def _table(
    rows: Sequence[tuple[LayerInfo, list[float], list[float]]],
    specs: Sequence[QuantSpec],
    config: CalibrateConfig,
    fingerprint: str,
) -> Sensitivity:
    """Losses and errors of all layers as one table."""
    return Sensitivity(
        layers=tuple(layer for layer, _, _ in rows),
        specs=tuple(specs),
        loss=torch.tensor([losses for _, losses, _ in rows], dtype=torch.float64),
        error=torch.tensor([errors for _, _, errors in rows], dtype=torch.float64),
        estimator=config.estimator,
        fingerprint=fingerprint,
    )


@torch.no_grad()
def _head_inputs(model: Model, walk: BlockWalk) -> Tensor:
    """[sequences, length, hidden] bfloat16: what enters the head, from a walk at its end."""
    norm = model.module.get_submodule(model.architecture.final_norm)
    return torch.cat([norm(hidden).bfloat16() for hidden in walk.hidden])
