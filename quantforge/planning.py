"""From a budget in any unit of size to a plan.

Search knows one limit, in stored bits. A limit in bytes is that limit and what comes on top: kept
tensors, headers, padding. The top hardly depends on the plan: through the headers (a kept layer has
one tensor, a quantized one three or, with zero-points, four) and padded rows. So it is taken from
the smallest plan first, and as long as a plan is too large all the same, the limit in bits is
lowered by just what it is too large by. It ends within every limit, mostly in the first round, and
leaves at most a difference of headers unused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.export.servers import SERVERS, network_problems, refusal, violations
from quantforge.format.footprint import Footprint
from quantforge.format.gguf_blocks import is_dominated
from quantforge.search.allocate import (
    average_bits,
    interaction_loss,
    known_losses,
    planned_weights,
    reachable_bits,
    search,
    spent_bits,
)
from quantforge.search.budget import Budget, Limit
from quantforge.search.config import SearchConfig
from quantforge.search.latency import LatencyModel, require_in_time
from quantforge.search.settled import settled_plan
from quantforge.search.vocabulary import Candidates
from quantforge.types import BitPlan, LayerInfo, QuantSpec, Sensitivity

Assignment = Mapping[str, QuantSpec | None]
_MOST_ROUNDS = 12


def find_plan(
    sensitivity: Sensitivity,
    budget: Budget,
    footprint: Footprint,
    config: SearchConfig,
    latency: LatencyModel | None = None,
) -> BitPlan:
    """The plan of least predicted loss within all limits of a budget; targets are not looked at.

    Raises:
        BudgetError: no plan is within the limits; names what the smallest takes.
    """
    if not budget.sizes:
        return search(sensitivity, budget, config, latency)
    weights = planned_weights(sensitivity.layers)
    smallest = _smallest(sensitivity, budget, config)
    require_within(budget, footprint, smallest.assignment, "the smallest plan")
    room = min(-excess(limit, footprint, smallest.assignment) for limit in budget.sizes)
    floor = spent_bits(sensitivity.layers, smallest.assignment)
    total = min(budget.total_bits(weights), floor + 8 * room)
    for _ in range(_MOST_ROUNDS):
        plan = search(sensitivity, budget.in_bits(Fraction(total, weights)), config, latency)
        too_large = max(excess(limit, footprint, plan.assignment) for limit in budget.sizes)
        if too_large <= 0:
            return plan
        total = spent_bits(sensitivity.layers, plan.assignment) - 8 * too_large
        if total <= floor:
            break
    require_in_time(budget, sensitivity.layers, smallest.assignment, latency)
    return smallest


def require_reachable(
    layers: Sequence[LayerInfo],
    budget: Budget,
    footprint: Footprint,
    config: SearchConfig,
    vocabulary: Candidates,
) -> None:
    """Refuse limits of size that not even the smallest plan is within; nothing is measured for it.

    Args:
        layers: of the blocks.
        budget: of the call.
        footprint: of the checkpoint.
        config: candidates of the blocks' layers, and the server that is to load them.
        vocabulary: candidates of embedding and head, where they are planned.

    Raises:
        BudgetError: no plan is within the limits; names what the smallest takes.
        InputError: the only plan there is does not fit every layer, or no candidate fits any.
    """
    if config.settled is not None:
        only = settled_plan(layers, config, budget)
        fixed = {layer.name: specs[0] for layer, specs in vocabulary.items()}
        require_within(budget, footprint, {**only.assignment, **fixed})
        return
    common = block_candidates(layers, config)
    allowed = {layer: tuple(s for s in common if s.divides(layer.in_features)) for layer in layers}
    allowed |= vocabulary
    specs = tuple(sorted({spec for candidates in allowed.values() for spec in candidates}))
    fits = [[0.0 if spec in own else math.inf for spec in specs] for own in allowed.values()]
    unmeasured = torch.tensor(fits, dtype=torch.float64)
    sensitivity = Sensitivity(
        layers=tuple(allowed), specs=specs, loss=unmeasured, error=unmeasured,
        estimator="none", fingerprint="",
    )  # fmt: skip
    smallest = _smallest(loadable(sensitivity, config), budget, config)
    require_within(budget, footprint, smallest.assignment, "the smallest plan")


def block_candidates(layers: Sequence[LayerInfo], config: SearchConfig) -> tuple[QuantSpec, ...]:
    """Grids that fit at least one of the blocks' layers, sorted.

    Raises:
        InputError: there is none.
    """
    lengths = {layer.in_features for layer in layers}
    specs = config.candidates(lengths)
    if not specs:
        sizes = ", ".join(map(str, sorted(config.group_sizes)))
        rows = ", ".join(map(str, sorted(lengths)))
        raise InputError(
            f"search.group_sizes={sizes} divides no row of any layer (rows of {rows}); "
            "add -1, a group per row"
        )
    return specs


def loadable(sensitivity: Sensitivity, config: SearchConfig) -> Sensitivity:
    """The same without candidates that the configured server does not load, or has no use for."""
    if config.server == "any":
        return sensitivity
    specs = sensitivity.specs
    kept = [_worthwhile(layer, specs, config) for layer in sensitivity.layers]
    refused = torch.tensor([[spec not in own for spec in specs] for own in kept])
    stderr = sensitivity.stderr
    return replace(
        sensitivity,
        loss=sensitivity.loss.masked_fill(refused, torch.inf),
        stderr=None if stderr is None else stderr.masked_fill(refused, torch.inf),
    )


def loadable_vocabulary(vocabulary: Candidates, config: SearchConfig) -> Candidates:
    """The same without what the configured server does not load; what has nothing left is kept.

    Raises:
        UsageError: that is a spec that was asked for.
    """
    if config.server == "any":
        return vocabulary
    rule, parts = SERVERS[config.server], config.tensor_parallel
    found: dict[LayerInfo, tuple[QuantSpec, ...]] = {}
    for layer, specs in vocabulary.items():
        if layer.fixed and (why := refusal(rule, layer, specs[0], parts)):
            raise UsageError(f"{config.server} would not load this plan: {layer.name}: {why}")
        if fitting := _worthwhile(layer, specs, config):
            found[layer] = fitting
    return found


def _worthwhile(
    layer: LayerInfo, specs: Sequence[QuantSpec], config: SearchConfig
) -> tuple[QuantSpec, ...]:
    """Specs that the configured server loads, for GGUF without those that save nothing there.

    Budgets count the bits of the folder; a spec of fewer that takes the same block type as a finer
    one would only make the file worse.
    """
    rule, parts = SERVERS[config.server], config.tensor_parallel
    fitting = (spec for spec in specs if spec.divides(layer.in_features))
    loaded = tuple(spec for spec in fitting if not refusal(rule, layer, spec, parts))
    if not rule.gguf:
        return loaded
    return tuple(spec for spec in loaded if not is_dominated(spec, loaded, layer.in_features))


def require_loadable(
    layers: Sequence[LayerInfo], assignment: Assignment, config: SearchConfig
) -> None:
    """Refuse a plan that the configured server does not load, whoever made it.

    Raises:
        UsageError: it does not; names the first reason.
    """
    if config.server == "any":
        return
    found = violations(SERVERS[config.server], layers, assignment, config.tensor_parallel)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UsageError(f"{config.server} would not load this plan: {found[0]}{more}")


def require_split(
    described: Mapping[str, Any], config: SearchConfig, folder: Path | None = None
) -> None:
    """Refuse to plan for more devices than the heads split into, or for what GGUF does not know.

    Args:
        described: the network's configuration, as in its config.json.
        config: names the server and the devices.
        folder: with its tokenizer; None where there is none.

    Raises:
        UsageError: the server loads no plan of this network; names the first reason.
    """
    if config.server == "any":
        return
    parts = config.tensor_parallel
    if found := network_problems(SERVERS[config.server], described, parts, folder):
        devices, more = (f" on {parts} devices", "; choose another --tp") if parts > 1 else ("", "")
        raise UsageError(f"{config.server} would not load any plan{devices}: {found[0]}{more}")


def _smallest(sensitivity: Sensitivity, budget: Budget, config: SearchConfig) -> BitPlan:
    """The plan of fewest stored bits, however long it takes; refuses limits in bits below it."""
    budget = replace(budget, limits=tuple(x for x in budget.limits if x not in budget.latency))
    weights = planned_weights(sensitivity.layers)
    low, _ = reachable_bits(sensitivity, config)
    total = round(low * weights)
    if budget.total_bits(weights) < total:  # raises, and names the range
        search(sensitivity, budget, config)
    return search(sensitivity, budget.in_bits(Fraction(total, weights)), config)


def taken(limit: Limit, footprint: Footprint, assignment: Assignment) -> int:
    """Bytes that a plan takes of what a limit in bytes counts."""
    if limit.kind == "vram":
        return footprint.memory_bytes(assignment, limit.context)
    return footprint.checkpoint_bytes(assignment)


def excess(limit: Limit, footprint: Footprint, assignment: Assignment) -> int:
    """Bytes by which a plan is over a limit in bytes; negative where there is room."""
    amount = limit.amount
    if limit.kind == "share":
        amount *= footprint.reference_bytes
    return taken(limit, footprint, assignment) - math.floor(amount)


def require_within(
    budget: Budget, footprint: Footprint, assignment: Assignment, what: str = "the only plan"
) -> None:
    """Refuse a plan that is over a limit in bytes; `what` is its name in the message.

    Raises:
        BudgetError: it is; names what it takes.
    """
    for limit in budget.sizes:
        if excess(limit, footprint, assignment) > 0:
            raise BudgetError(_cannot(budget, limit, footprint, assignment, what))


def _cannot(
    budget: Budget,
    limit: Limit,
    footprint: Footprint,
    assignment: Assignment,
    what: str,
) -> str:
    """Says what a plan takes of a limit, and which budget it would fit."""
    size = taken(limit, footprint, assignment)
    if limit.kind == "share":
        share = math.ceil(1000 * size / footprint.reference_bytes) / 1000
        return (
            f"budget {budget.text} cannot be met: the checkpoint of {what} takes {share:g} of the "
            f"weights in 16 bits; raise --budget to at least {share:g}x"
        )
    shown = _rounded_up(size)
    if limit.kind == "vram":
        cache = footprint.memory_bytes(assignment, limit.context) - footprint.memory_bytes(
            assignment, 0
        )
        return (
            f"budget {budget.text} cannot be met: {what} takes {shown}, {_rounded_up(cache)} of it "
            f"keys and values of {limit.context} tokens; raise --budget to at least "
            f"vram:{shown}@{limit.context}, or take fewer tokens"
        )
    return (
        f"budget {budget.text} cannot be met: the checkpoint of {what} takes {shown}, embeddings, "
        f"head and norms included; raise --budget to at least {shown}"
    )


def _rounded_up(size: int) -> str:
    """Bytes as a budget that is no smaller: 61_234_567 → "61.3MB"."""
    unit, scale = ("GB", 10**9) if size >= 10**9 else ("MB", 10**6)
    if size < 10**6:
        unit, scale = "kB", 10**3
    digits = 10 ** max(0, 3 - len(str(size // scale)))
    return f"{math.ceil(size * digits / scale) / digits:g}{unit}"


def cost_text(layers: Sequence[LayerInfo], assignment: Assignment) -> str:
    """What an assignment costs, as a budget that it just meets: "3.053bit"."""
    spent = Fraction(1000 * spent_bits(layers, assignment), planned_weights(layers))
    return f"{math.ceil(spent) / 1000:g}bit"


def priced(
    layers: Sequence[LayerInfo], assignment: Assignment, sensitivity: Sensitivity | None
) -> BitPlan:
    """A plan that was given, with what it costs and, where every spec was measured, its loss."""
    stored, code = average_bits(layers, assignment)
    losses = [] if sensitivity is None else list(known_losses(sensitivity, assignment).values())
    known = [loss for loss in losses if loss is not None]
    predicted = None
    if sensitivity is not None and len(known) == len(layers):
        predicted = math.fsum(known) + interaction_loss(sensitivity, assignment)
    return BitPlan(
        assignment=dict(assignment),
        budget=cost_text(layers, assignment),
        stored_bits=stored,
        code_bits=code,
        predicted_loss=predicted,
        solver="file",
        fixed=tuple(layer.name for layer in layers if layer.fixed),
    )


def frontier(
    sensitivity: Sensitivity, config: SearchConfig, *, points: int, most_bits: float = 6.0
) -> list[BitPlan]:
    """Plans from the smallest to `most_bits` stored bits a weight, each for a budget of its own.

    Args:
        sensitivity: predicted losses of all candidates.
        config: solver and tying rules.
        points: budgets, evenly spread; at least two.
        most_bits: the largest, unless candidates end before.

    Returns:
        By stored bits; a plan that is not predicted better than a smaller one is left out.
    """
    low, high = reachable_bits(sensitivity, config)
    least, most = math.ceil(1000 * low), max(math.floor(1000 * min(high, most_bits)), 0)
    budgets = {
        round(least + i * (most - least) / (points - 1)) for i in range(points) if most > least
    } | {least}
    found: list[BitPlan] = []
    for bits in sorted(budgets):
        plan = search(sensitivity, Budget.parse(f"{bits / 1000:g}bit"), config)
        loss = plan.predicted_loss
        if not found or (loss or 0.0) < (found[-1].predicted_loss or 0.0):
            found.append(plan)
    return found
