"""How long the planned weights take a decoding step, by a roofline or by a table that was measured.

Decoding reads every weight once a step, whatever the batch, and little else: at small batches a
layer takes as long as its bytes take to arrive, and some time to be started. That is the roofline
(Williams et al. 2009): the larger of bytes over bandwidth and operations over their rate, and a
constant a layer. It says what a perfect kernel would do; a table measured with the kernels at hand
says what they do. Attention, norms and sampling are in neither, nor are embeddings that are only
looked up in: plans do not change them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.search.budget import Budget, Limit
from quantforge.types import KEPT_BITS, LayerInfo, QuantSpec, Sensitivity

# Times are counted in picoseconds.
UNIT = 1e-12
Assignment = Mapping[str, QuantSpec | None]


class LatencyModel(Protocol):
    """Says how long a layer takes."""

    @property
    def label(self) -> str:
        """What it is about, for people."""

    def seconds(self, layer: LayerInfo, spec: QuantSpec | None, batch: int) -> float:
        """Seconds a decoding step of `batch` sequences spends in a layer; None is 16 bits.

        Raises:
            InputError: this layer, spec or batch was not measured.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A device by its published numbers.

    Attributes:
        name: short name.
        description: one line for people.
        bandwidth: bytes of memory a second.
        operations: multiplications and additions a second, in 16 bits.
        overhead: seconds to start a layer.
    """

    name: str
    description: str
    bandwidth: float
    operations: float
    overhead: float

    @property
    def label(self) -> str:
        """Name, and that nothing was measured."""
        return f"{self.name}, roofline"

    def seconds(self, layer: LayerInfo, spec: QuantSpec | None, batch: int) -> float:
        """The larger of the two quotients, and the constant."""
        bits = KEPT_BITS * layer.numel
        if spec is not None:
            bits = spec.stored_bits(layer.out_features, layer.in_features)
        transfer, products = bits / 8 / self.bandwidth, 2 * batch * layer.numel / self.operations
        return self.overhead + max(transfer, products)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTable:
    """Medians measured on one machine.

    Attributes:
        name: where it came from, for people.
        times: (rows, columns, spec, batch) → seconds; the spec is None for 16 bits.
    """

    name: str
    times: Mapping[tuple[int, int, QuantSpec | None, int], float]

    @property
    def label(self) -> str:
        """Name, and that it was measured."""
        return f"{self.name}, measured"

    def seconds(self, layer: LayerInfo, spec: QuantSpec | None, batch: int) -> float:
        """What was measured for a layer of this shape.

        Raises:
            InputError: nothing was.
        """
        found = self.times.get((layer.out_features, layer.in_features, spec, batch))
        if found is None:
            what = "16 bits" if spec is None else str(spec)
            raise InputError(
                f"{self.name} has no time of {layer.out_features} x {layer.in_features} in {what} "
                f"at batch {batch} ({layer.name}); measure it with quantforge profile"
            )
        return found


def layer_seconds(
    model: LatencyModel, layer: LayerInfo, spec: QuantSpec | None, batch: int
) -> float:
    """Seconds in one layer; none in an embedding, of which a step reads a row a sequence."""
    return 0.0 if layer.kind == "embedding" else model.seconds(layer, spec, batch)


def plan_seconds(
    model: LatencyModel, layers: Iterable[LayerInfo], assignment: Assignment, batch: int
) -> float:
    """Seconds a decoding step spends in all planned layers."""
    return sum(layer_seconds(model, one, assignment[one.name], batch) for one in layers)


def limit_seconds(limit: Limit, layers: Sequence[LayerInfo], model: LatencyModel) -> float:
    """Seconds that a limit in time allows; a share is of what the layers take in 16 bits."""
    if limit.kind == "latency":
        return float(limit.amount)
    kept: Assignment = dict.fromkeys(layer.name for layer in layers)
    return float(limit.amount) * plan_seconds(model, layers, kept, limit.context)


def require_in_time(
    budget: Budget, layers: Sequence[LayerInfo], assignment: Assignment, model: LatencyModel | None
) -> None:
    """Refuse a plan that is over a limit in time.

    Raises:
        BudgetError: it is; names what it takes.
    """
    for limit in budget.latency:
        found = needed_model(model)
        taken = plan_seconds(found, layers, assignment, limit.context)
        if _units(taken) > math.floor(limit_seconds(limit, layers, found) / UNIT):
            raise BudgetError(_too_slow(budget, limit, "the only plan", taken, layers, found))


def in_time(
    budget: Budget, layers: Sequence[LayerInfo], assignment: Assignment, model: LatencyModel | None
) -> bool:
    """Whether a plan is within all limits in time."""
    try:
        require_in_time(budget, layers, assignment, model)
    except BudgetError:
        return False
    return True


def needed_model(model: LatencyModel | None) -> LatencyModel:
    """The model, where a limit needs one.

    Raises:
        UsageError: there is none.
    """
    if model is None:
        raise UsageError("the budget limits latency: --latency-device says on what")
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Limits in time as resources of the search, in whole units so that sums are exact.

    Attributes:
        layers: of the table.
        model: times of layers; None without limits.
        bounds: the limits.
        costs: of every limit [items, candidates + 1]; the last column is 16 bits.
        limits: what each allows.
        fastest: the least that a plan takes of each, in seconds.
    """

    layers: tuple[LayerInfo, ...]
    model: LatencyModel | None
    bounds: tuple[Limit, ...]
    costs: tuple[NDArray[np.int64], ...]
    limits: tuple[int, ...]
    fastest: tuple[float, ...]

    @classmethod
    def of(
        cls,
        sensitivity: Sensitivity,
        items: Sequence[Sequence[int]],
        present: NDArray[np.bool_],
        budget: Budget,
        model: LatencyModel | None,
    ) -> Times:
        """The limits of a budget for the items of a table.

        Args:
            sensitivity: names layers and candidates.
            items: rows that share a spec.
            present: [items, candidates + 1] which candidates there are.
            budget: holds the limits.
            model: times of layers.

        Raises:
            InputError: `model` does not know a candidate.
            UsageError: there are limits, but no model.
        """
        costs, limits, fastest = [], [], []
        specs = (*sensitivity.specs, None)
        for limit in budget.latency:
            found = needed_model(model)
            table = np.zeros(present.shape, dtype=np.int64)
            for item, column in np.argwhere(present):
                members = [sensitivity.layers[row] for row in items[item]]
                spec = specs[column]
                table[item, column] = sum(
                    _units(layer_seconds(found, one, spec, limit.context)) for one in members
                )
            costs.append(table)
            limits.append(math.floor(limit_seconds(limit, sensitivity.layers, found) / UNIT))
            least = np.where(present, table, np.iinfo(np.int64).max).min(axis=1).sum()
            fastest.append(float(least) * UNIT)
        return cls(
            layers=sensitivity.layers,
            model=model,
            bounds=budget.latency,
            costs=tuple(costs),
            limits=tuple(limits),
            fastest=tuple(fastest),
        )

    def require_reachable(self, budget: Budget) -> None:
        """Refuse a limit that the fastest plan is over.

        Raises:
            BudgetError: it is; names what that takes.
        """
        for limit, most, least in zip(self.bounds, self.limits, self.fastest, strict=True):
            if least / UNIT > most:
                model = needed_model(self.model)
                raise BudgetError(
                    _too_slow(budget, limit, "the fastest plan", least, self.layers, model)
                )


def _units(seconds: float) -> int:
    return math.ceil(seconds / UNIT)


def _too_slow(
    budget: Budget,
    limit: Limit,
    what: str,
    seconds: float,
    layers: Sequence[LayerInfo],
    model: LatencyModel,
) -> str:
    """Says what a plan takes, and which budget it would fit."""
    kept: Assignment = dict.fromkeys(layer.name for layer in layers)
    whole = plan_seconds(model, layers, kept, limit.context)
    less = math.floor(1000 * (1 - seconds / whole)) / 10
    batch = "" if limit.context == 1 else f"@{limit.context}"
    advice = f"latency:{math.ceil(1e6 * seconds) / 1e3:g}ms{batch}"
    if limit.kind == "latency-share" and less > 0:
        advice = f"latency:-{less:g}%{batch}"
    return (
        f"budget {budget.text} cannot be met: {what} takes {1e3 * seconds:.3g} ms of "
        f"{1e3 * whole:.3g} in 16 bits ({model.label}); raise --budget to at least {advice}"
    )
