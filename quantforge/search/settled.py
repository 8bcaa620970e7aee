"""Where there is nothing to search: one grid for all layers, as papers' tables have them.

A uniform solver with one width and one group size leaves one plan. No sensitivity bears on it, so
none is asked for, its loss is not predicted, and its budget is what it costs unless a limit is
given. Layers that the groups do not divide are an error: left in 16 bits without a word they would
make the network another one than was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.search.allocate import average_bits, planned_weights, spent_bits
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.types import BitPlan, LayerInfo, QuantSpec

SUGGESTED_GROUP_SIZES = (32, 64, 96, 128, 192, 256)


def needed_budget(text: str | None, config: SearchConfig) -> Budget | None:
    """The budget as parsed; None where there is none and none is needed.

    Args:
        text: as the user or the recipe wrote it.
        config: says whether there is anything to search.

    Raises:
        UsageError: it is not understood, or missing though plans are searched, or a target of
            quality though none are.
    """
    if text is not None:
        budget = Budget.parse(text)
        if budget.targets and config.settled is not None:
            raise UsageError(
                f"{budget.targets[0].text} needs plans to choose among, but search has one "
                "candidate; give a size, or more search.bits"
            )
        return budget
    if config.settled is None:
        raise UsageError(
            "no budget is given: say e.g. --budget 3bit, or leave nothing to search "
            "(search.solver=uniform with one of search.bits and one of search.group_sizes)"
        )
    return None


def settled_plan(
    layers: Sequence[LayerInfo], config: SearchConfig, budget: Budget | None
) -> BitPlan:
    """The only plan, without a predicted loss.

    Args:
        layers: the planned layers, in forward order.
        config: with one candidate.
        budget: limit to check; None takes what the plan costs, rounded up to three digits.

    Raises:
        BudgetError: the plan exceeds the budget.
        InputError: the groups do not divide every layer.
        UsageError: there are several candidates.
    """
    spec = config.settled
    if spec is None:
        raise UsageError("there are several candidates: the plan has to be searched")
    _require_fit(layers, spec)
    assignment = dict.fromkeys((layer.name for layer in layers), spec)
    weights, cost = planned_weights(layers), spent_bits(layers, assignment)
    stored, code = average_bits(layers, assignment)
    if budget is None:
        text = f"{math.ceil(Fraction(1000 * cost, weights)) / 1000:g}bit"
    elif cost > budget.total_bits(weights):
        floor = math.ceil(Fraction(1000 * cost, weights)) / 1000
        raise BudgetError(
            f"budget {budget.text} cannot be met: {spec} for all layers takes {floor:.3f} stored "
            f"bits a weight; raise --budget to at least {floor:.3f}bit, or leave it out"
        )
    else:
        text = budget.text
    return BitPlan(
        assignment=assignment,
        budget=text,
        stored_bits=stored,
        code_bits=code,
        predicted_loss=None,
        solver="given",
    )


def _require_fit(layers: Sequence[LayerInfo], spec: QuantSpec) -> None:
    """Refuse groups that do not divide every layer, and name some that do."""
    unfit = [layer for layer in layers if not spec.divides(layer.in_features)]
    if not unfit:
        return
    lengths = {layer.in_features for layer in layers}
    usable = [
        str(size)
        for size in SUGGESTED_GROUP_SIZES
        if all(QuantSpec(spec.bits, size).divides(length) for length in lengths)
    ]
    raise InputError(
        f"groups of {spec.group_size} do not divide {len(unfit)} of {len(layers)} layers, first "
        f"{unfit[0].name} with rows of {unfit[0].in_features}; search.group_sizes that divide all: "
        f"{', '.join([*usable, '-1 (per channel)'])}"
    )
