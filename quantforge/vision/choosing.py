"""Which plan a budget gets: searched for, held against uniform networks, measured where it must be.

Predictions choose among plans; what is compared and what targets are held against is measured on
held-out pictures, of networks without reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from quantforge.errors import BudgetError, UsageError
from quantforge.results import TargetOutcome
from quantforge.search.allocate import planned_weights, stored_cost
from quantforge.search.budget import Budget, Limit
from quantforge.targets import Met, is_inside, meet, outcomes
from quantforge.types import QuantSpec
from quantforge.vision.costs import Costs, file_cost
from quantforge.vision.outcome import VisionPoint
from quantforge.vision.quality import VisionQuality
from quantforge.vision.search import Limits, Table, VisionPlan, search, uniform_plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan and what it was compared with.

    Attributes:
        plan: what is made.
        curve: uniform networks, and the plan's, without reconstruction; empty where nothing was
            searched.
        targets: how the budget's targets were met.
    """

    plan: VisionPlan
    curve: tuple[VisionPoint, ...] = ()
    targets: tuple[TargetOutcome, ...] = ()

    @property
    def tried(self) -> int:
        """How many plans were measured for the targets."""
        return max((one.plans for one in self.targets), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """Finds plans of one network.

    Attributes:
        name: of the network.
        table: what widths are predicted to lose, and what they cost.
        costs: what budgets are counted by.
        edges: layer name → spec that the policy gives it.
        solver: "integer-program", or "uniform".
        quality_of: measures a plan's network on held-out pictures.
        right: of every held-out picture 1 where the float network is right, else 0.
    """

    name: str
    table: Table
    costs: Costs
    edges: Mapping[str, QuantSpec]
    solver: str
    quality_of: Callable[[VisionPlan], VisionQuality]
    right: Sequence[float]

    def find(self, budget: Budget) -> Found:
        """The plan within a budget, and the uniform networks beside it.

        Raises:
            BudgetError: there is none.
            UsageError: a part of the budget is not about classifiers.
        """
        for target in budget.targets:
            if target.kind not in ("acc", "kl"):
                raise UsageError(
                    f"{target.text}: {self.name} is a classifier; give acc:-0.5% or kl:0.05"
                )
        limits = self.costs.limits(budget)
        every = uniform_plans(self.table, self.edges)
        fitting = [plan for plan in every if self._fits(plan, limits)]
        if self.solver == "uniform":
            return self._uniform(budget, limits, fitting)
        plan = search(self.table, limits, budget=budget.text)
        curve = tuple(self._point(one) for one in every)
        if budget.targets:
            met = self._meet(budget, fitting)
            return Found(plan=met.plan, curve=curve, targets=met.outcomes)
        # Predictions may be wrong where measurements are not: never worse than uniform.
        best = min((plan, *fitting), key=lambda one: self.quality_of(one).kl)
        return Found(
            plan=replace(best, budget=budget.text), curve=(*curve, self._point(plan, "plan"))
        )

    def _uniform(self, budget: Budget, limits: Limits, fitting: Sequence[VisionPlan]) -> Found:
        """The widest of the uniform plans within a budget's limits, or the narrowest on target."""
        plans = [replace(one, budget=budget.text, predicted_loss=None) for one in fitting]
        if not plans:
            search(self.table, limits, budget=budget.text)  # says what the least is
            raise UsageError(f"budget {budget.text}: no uniform plan is within it; search")
        if not budget.targets:
            return Found(plan=plans[-1])
        best = next((one for one in plans if self._on_target(budget, one)), None)
        if best is None:
            least = outcomes(
                budget.targets, plans[-1], self.quality_of(plans[-1]), self.right, len(plans)
            )
            said = ", ".join(f"{one.text}: at most {one.upper:.4g}" for one in least)
            raise BudgetError(
                f"budget {budget.text} cannot be met by a uniform network; of the widest one "
                f"{said}; allow more bits or more loss"
            )
        tried = plans.index(best) + 1
        return Found(
            plan=best,
            targets=outcomes(budget.targets, best, self.quality_of(best), self.right, tried),
        )

    def _on_target(self, budget: Budget, plan: VisionPlan) -> bool:
        return is_inside(budget.targets, self.quality_of(plan), self.right)

    def _fits(self, plan: VisionPlan, limits: Limits) -> bool:
        bits = plan.stored_bits * planned_weights(self.table.layers)
        file = sum(file_cost(x, s) for x in self.table.layers if (s := plan.assignment[x.name]))
        return bits <= limits.bits and file <= limits.file and plan.operations <= limits.operations

    def _meet(self, budget: Budget, uniform: Sequence[VisionPlan]) -> Met[VisionPlan]:
        """The plan of fewest bits whose measured network is inside the targets.

        Args:
            budget: with its targets.
            uniform: plans within its limits that are taken if they need fewer bits.
        """
        weights = planned_weights(self.table.layers)
        costs = [
            [
                stored_cost(layer, spec)
                for spec, loss in zip(self.table.specs, row.tolist(), strict=True)
                if math.isfinite(loss)
            ]
            for layer, row in zip(self.table.layers, self.table.loss, strict=True)
            if not layer.fixed
        ]
        low = Fraction(sum(min(one) for one in costs), weights)
        high = min(Fraction(sum(max(one) for one in costs), weights), budget.bits)

        def find(bits: Fraction) -> VisionPlan:
            limits = replace(budget, limits=(*budget.limits, Limit("bits", bits)))
            return search(self.table, self.costs.limits(limits), budget=budget.text)

        also = [replace(one, budget=budget.text) for one in uniform]
        return meet(budget.targets, find, self.quality_of, self.right, bits=(low, high), also=also)

    def _point(self, plan: VisionPlan, name: str = "") -> VisionPoint:
        return VisionPoint(
            name=name or plan.budget,
            stored_bits=plan.stored_bits,
            operations=plan.operations,
            quality=self.quality_of(plan),
        )
