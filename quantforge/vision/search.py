"""Widths of weights and of activations, chosen together.

    min Σ_l w[l, s] + Σ_g a[g, b]   within   Σ stored bits,   Σ MACs · bits of s · b

over a spec s for every layer and a width b for every activation grid. A layer's bit operations are
the product of both widths, so its candidates are pairs, and layers that read one grid must agree in
the width, tied layers in the spec (`integer_program.Agreement`). With one width of activations and
no limit on operations that is the additive problem of HAWQ-V2 and HAWQ-V3 (arXiv 1911.03852,
2011.10680), whose published tables are solved through it in the tests.

Bit operations are MACs · bits · bits; HAWQ-V3 divides them by 64 for 4 × 4 and by 16 for 8 × 8,
which is another constant. A float activation counts 32.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantforge.errors import BudgetError
from quantforge.search.allocate import average_bits, planned_weights, stored_cost
from quantforge.search.integer_program import Agreement, integer_program
from quantforge.types import KEPT_BITS, LayerInfo, QuantSpec

FLOAT_BITS = 32
SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What widths lose and cost.

    Attributes:
        layers: in forward order.
        specs: candidates of weights.
        loss: [layers, specs] float64 nats a picture; +inf where a layer has no such candidate.
        grids: activation grids; "" at most once, for layers whose input stays float.
        widths: candidates of activations in bits; `FLOAT_BITS` for none.
        activation_loss: [grids, widths] float64 nats a picture; +inf where there is none.
        reads: layer name → its input's grid.
        macs: layer name → multiplications of one picture.
        file: [layers, specs] bits in a file; None counts none.
    """

    layers: tuple[LayerInfo, ...]
    specs: tuple[QuantSpec, ...]
    loss: Tensor
    grids: tuple[str, ...]
    widths: tuple[int, ...]
    activation_loss: Tensor
    reads: Mapping[str, str]
    macs: Mapping[str, int]
    file: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionPlan:
    """Which layer gets which spec and which activation which width, and what that costs.

    Attributes:
        assignment: layer name → spec; None stays float.
        widths: grid → bits; grids that are not in it stay float.
        budget: as the user wrote it.
        stored_bits: average stored bits a weight over all planned weights.
        code_bits: average code bits a weight, likewise.
        operations: bit operations of one picture.
        predicted_loss: predicted KL to the float network, in nats a picture; None if not searched.
        gap: no plan within the budget is predicted to lose less by more than this.
        solver: what found it.
    """

    assignment: Mapping[str, QuantSpec | None]
    widths: Mapping[str, int]
    budget: str
    stored_bits: float
    code_bits: float
    operations: int
    predicted_loss: float | None
    gap: float | None = None
    solver: str = "integer-program"

    @property
    def identity(self) -> Hashable:
        """Equal for plans that make the same network."""
        return (tuple(self.assignment.items()), tuple(self.widths.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that a plan may take.

    Attributes:
        bits: stored bits of all planned weights.
        file: bits of all layers' integers and scales in a file.
        operations: bit operations of one picture.
    """

    bits: float = math.inf
    file: float = math.inf
    operations: float = math.inf


def operations(
    layers: Sequence[LayerInfo],
    macs: Mapping[str, int],
    reads: Mapping[str, str],
    assignment: Mapping[str, QuantSpec | None],
    widths: Mapping[str, int],
) -> int:
    """Bit operations of one picture: MACs times the bits of both operands."""
    total = 0
    for layer in layers:
        spec = assignment[layer.name]
        bits = KEPT_BITS * 2 if spec is None else spec.bits
        total += macs[layer.name] * bits * widths.get(reads[layer.name], FLOAT_BITS)
    return total


def make_plan(
    table: Table,
    assignment: Mapping[str, QuantSpec | None],
    widths: Mapping[str, int],
    *,
    budget: str,
    gap: float | None = None,
    solver: str = "integer-program",
) -> VisionPlan:
    """A plan from its widths, with its costs and predicted loss filled in."""
    stored, code = average_bits(table.layers, assignment)
    column = {spec: index for index, spec in enumerate(table.specs)}
    lost = 0.0
    for row, layer in enumerate(table.layers):
        spec = assignment[layer.name]
        lost += 0.0 if spec is None else float(table.loss[row, column[spec]])
    for row, grid in enumerate(table.grids):
        if grid in widths:
            lost += float(table.activation_loss[row, table.widths.index(widths[grid])])
    return VisionPlan(
        assignment=dict(assignment),
        widths={grid: bits for grid, bits in widths.items() if bits != FLOAT_BITS},
        budget=budget,
        stored_bits=stored,
        code_bits=code,
        operations=operations(table.layers, table.macs, table.reads, assignment, widths),
        predicted_loss=lost,
        gap=gap,
        solver=solver,
    )


def search(table: Table, limits: Limits, *, budget: str) -> VisionPlan:
    """The plan of least predicted loss within the limits.

    Raises:
        BudgetError: no plan is within them; names the least that plans take.
    """
    pairs = list(product(range(len(table.specs)), range(len(table.widths))))
    spec_of, width_of = (np.array(side, dtype=np.intp) for side in zip(*pairs, strict=True))
    count = len(table.layers)
    items = count + len(table.grids)
    loss = np.full((items, len(pairs)), np.inf)
    costs = np.zeros((3, items, len(pairs)))
    loss[:count] = table.loss.numpy()[:, spec_of]
    for row, layer in enumerate(table.layers):
        fits = np.isfinite(loss[row])
        stored = np.array([stored_cost(layer, spec) if ok else 0 for spec, ok in _with(table, row)])
        costs[0, row] = np.where(fits, 0 if layer.fixed else stored[spec_of], 0)
        bits = np.array([spec.bits for spec in table.specs])[spec_of]
        costs[1, row] = table.macs[layer.name] * bits * np.array(table.widths)[width_of]
    if table.file is not None:
        costs[2, :count] = table.file.numpy()[:, spec_of]
    # A grid's candidates are those of the first spec: the others would be the same once more.
    loss[count:, : len(table.widths)] = table.activation_loss.numpy()
    choice = integer_program(
        loss,
        costs,
        [limits.bits, limits.operations, limits.file],
        agreements=[*_tied(table, spec_of), *_read(table, width_of)],
        time_limit=SECONDS,
    ).choice
    if choice is None:
        raise BudgetError(_unreachable(table, loss, costs, budget))
    assignment: dict[str, QuantSpec | None] = {
        layer.name: table.specs[spec_of[pick]]
        for layer, pick in zip(table.layers, choice.picks, strict=False)
    }
    widths = {
        grid: table.widths[pick]
        for grid, pick in zip(table.grids, choice.picks[count:], strict=True)
    }
    return make_plan(table, assignment, widths, budget=budget, gap=choice.gap)


def _with(table: Table, row: int) -> list[tuple[QuantSpec, bool]]:
    fits = table.loss[row].isfinite().tolist()
    return list(zip(table.specs, fits, strict=True))


def _tied(table: Table, spec_of: NDArray[np.intp]) -> list[Agreement]:
    """Layers of one fused group take one spec."""
    groups: dict[str, list[int]] = {}
    for row, layer in enumerate(table.layers):
        groups.setdefault(layer.fused_group, []).append(row)
    items = len(table.layers) + len(table.grids)
    labels = np.broadcast_to(spec_of, (items, len(spec_of)))
    return [Agreement(rows, labels) for rows in groups.values() if len(rows) > 1]


def _read(table: Table, width_of: NDArray[np.intp]) -> list[Agreement]:
    """Layers take the width of the grid that they read."""
    items = len(table.layers) + len(table.grids)
    labels = np.broadcast_to(width_of, (items, len(width_of)))
    found = []
    for row, grid in enumerate(table.grids):
        readers = [i for i, layer in enumerate(table.layers) if table.reads[layer.name] == grid]
        found.append(Agreement([len(table.layers) + row, *readers], labels))
    return found


def _unreachable(
    table: Table, loss: NDArray[np.float64], costs: NDArray[np.float64], budget: str
) -> str:
    """Says what the cheapest plan takes."""
    least = np.where(np.isfinite(loss), costs, np.inf).min(axis=2)[:, : len(table.layers)]
    floor = math.ceil(float(least[0].sum()) / planned_weights(table.layers) * 1000) / 1000
    return (
        f"budget {budget} cannot be met: plans take at least {floor:.3f} stored bits a weight, "
        f"{math.ceil(least[2].sum() / 8)} bytes of integers and scales and {least[1].sum():.3g} "
        "bit operations a picture; raise the budget or allow narrower widths"
    )


def uniform_plans(table: Table, edges: Mapping[str, QuantSpec]) -> list[VisionPlan]:
    """One plan for every spec that fits all layers and every width, by stored bits.

    Args:
        table: of all candidates.
        edges: layer name → spec that it has in all of them: the policy's first and last layers.
    """
    inside = [row for row, layer in enumerate(table.layers) if layer.name not in edges]
    plans: dict[Hashable, VisionPlan] = {}
    for column, spec in enumerate(table.specs):
        if not bool(table.loss[inside, column].isfinite().all()):
            continue
        assignment = {layer.name: edges.get(layer.name, spec) for layer in table.layers}
        for bits in table.widths:
            widths = {
                grid: min(_allowed(table, row), key=partial(_apart, bits))
                for row, grid in enumerate(table.grids)
            }
            name = f"uniform {spec}-a{bits}"
            plan = make_plan(table, assignment, widths, budget=name, solver="uniform")
            plans.setdefault(plan.identity, plan)  # a width that only the edges may have adds none
    return sorted(plans.values(), key=lambda plan: plan.stored_bits)


def _allowed(table: Table, row: int) -> list[int]:
    """Widths that a grid may have."""
    fits = table.activation_loss[row].isfinite().tolist()
    return [bits for bits, fit in zip(table.widths, fits, strict=True) if fit]


def _apart(first: int, second: int) -> int:
    return abs(first - second)
