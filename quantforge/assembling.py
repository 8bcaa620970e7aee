"""Networks put together from stored integers: in place, on loan, and differentiated as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class Loan:
    """A network whose weights are changed for a while.

    Attributes:
        model: the network.
        own: layer name → [out, in] weight as it was, of the layers that were changed.
    """

    model: Model
    own: dict[str, Tensor] = field(default_factory=dict)

    def put(self, weights: Mapping[str, Tensor | None]) -> None:
        """Give layers other weights, in place.

        Args:
            weights: layer name → [out, in] weight, None for the layer's own. A layer that is not
                named stays as it is.
        """
        for name, weight in weights.items():
            if name not in self.own:
                module: Any = self.model.module.get_submodule(name)
                self.own[name] = self.model.scratch.copy(module.weight)
            put_weight(self.model, name, self.own[name] if weight is None else weight)


@contextmanager
def changed_weights(model: Model) -> Iterator[Loan]:
    """A loan of the network; every layer has its own weight again however the body ends."""
    loan = Loan(model)
    try:
        yield loan
    finally:  # an interrupt must not leave a caller's network in memory changed
        for name, weight in loan.own.items():
            put_weight(model, name, weight)


class StoredWeights(Mapping[str, Tensor | None]):
    """Layer name → [out, in] weight that a plan gives it; None where it is kept.

    A weight is decoded when it is asked for: all of them would be a second network in memory.

    Args:
        plan: whose specs are all in the store.
        store: integers of the candidates.
    """

    def __init__(self, plan: BitPlan, store: CandidateStore) -> None:
        self._specs, self._store = plan.assignment, store

    def __getitem__(self, name: str) -> Tensor | None:
        spec = self._specs[name]
        return None if spec is None else self._store.get(name, spec).dequantize()

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


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
    with changed_weights(model) as loan:
        loan.put(StoredWeights(plan, store))
        differences = weight_errors(model, specs, store, product)

        def errors(layer: LayerInfo) -> Tensor:
            back = loan.own[layer.name] - float_weight(model, layer)
            return torch.cat([differences(layer), back.to(product).unsqueeze(0)])

        found = gradient_statistics(
            model,
            tokens,
            batch_size=options.gradient_batch,
            precision=options.precision,
            head_gradient=toward(target),
            monitor=monitor,
            errors=errors,
            scratch=store.folder,
        )
    if found.products is None:
        raise ValueError("there is no layer in any block")
    return found.products / tokens.shape[1]
