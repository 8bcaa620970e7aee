"""Networks put together from stored integers: in place, on loan, and differentiated as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quantforge.calibrate.candidates import float_weight, weight_errors
from quantforge.calibrate.config import CalibrateConfig
from quantforge.calibrate.fisher import gradient_statistics
from quantforge.calibrate.token_loss import toward
from quantforge.capture import product_dtype
from quantforge.format.store import CandidateStore
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.quantize.sequential import put_weight
from quantforge.types import BitPlan, LayerInfo, QuantSpec


@contextmanager
def borrowed_weights(model: Model) -> Iterator[dict[str, Tensor]]:
    """The planned layers' weights, [out, in] each; they are put back however the body ends."""
    modules: dict[str, Any] = {
        layer.name: model.module.get_submodule(layer.name) for layer in model.layers
    }
    floats = {name: module.weight.detach().clone() for name, module in modules.items()}
    try:
        yield floats
    finally:  # an interrupt must not leave a caller's network in memory changed
        for name, weight in floats.items():
            put_weight(model, name, weight)


def put_together(
    model: Model, plan: BitPlan, store: CandidateStore, floats: Mapping[str, Tensor]
) -> None:
    """Give every layer the integers of a plan, in place.

    Args:
        model: the network.
        plan: whose specs are all in the store.
        store: integers of the candidates.
        floats: weights of the layers that the plan keeps.
    """
    for name, spec in plan.assignment.items():
        kept = floats[name] if spec is None else store.get(name, spec).dequantize()
        put_weight(model, name, kept)


def derivatives(
    model: Model,
    plan: BitPlan,
    specs: Sequence[QuantSpec],
    store: CandidateStore,
    tokens: Tensor,
    target: Tensor,
    *,
    options: CalibrateConfig,
    monitor: Monitor,
) -> Tensor:
    """Derivatives of KL(float ‖ plan) along every candidate's difference from what the plan has.

    Args:
        model: the float network; as before afterwards.
        plan: whose specs are all in the store.
        specs: the candidates.
        store: their integers.
        tokens: [sequences, length] int64.
        target: [sequences, length, hidden] the float network's head inputs on them.
        options: batch size and precision of gradients.
        monitor: progress and cancellation.

    Returns:
        [sequences, layers, specs + 1] float64 in nats a token, of each sequence's mean over tokens;
        the last along the difference of the float weight. 0 for candidates that do not fit.
    """
    product = product_dtype(options.precision)
    with borrowed_weights(model) as floats:
        put_together(model, plan, store, floats)
        differences = weight_errors(model, specs, store, product)

        def errors(layer: LayerInfo) -> Tensor:
            back = floats[layer.name] - float_weight(model, layer)
            return torch.cat([differences(layer), back.to(product).unsqueeze(0)])

        found = gradient_statistics(
            model,
            tokens,
            batch_size=options.gradient_batch,
            precision=options.precision,
            head_gradient=toward(target),
            monitor=monitor,
            errors=errors,
        )
    if found.products is None:
        raise ValueError("there is no layer in any block")
    return found.products / tokens.shape[1]
