"""Refinement: a plan made better by looking at the network that it gives.

A search predicts every plan from the float network. Once there is a plan, its network can be
differentiated itself: one backward pass of KL(float ‖ plan) on fitting tokens gives the exact
derivative along the difference of every candidate from what the plan has now, and so what moving
one layer changes,

    ⟨∇, Q'(W) − Q(W)⟩ + ½ (Q' − Q)ᵀ F (Q' − Q),

with all other layers as they are in the plan, interactions included. The second term is small
beside what the plan has lost; it comes from the predicted losses L' and L of both candidates and
the correlation ρ of both errors' derivatives over sequences: L' + L − 2 ρ √(L' L).

Derivatives are noisy and hold nearby only, so they choose what is measured, not what is taken: the
nearest exchanges, and the whole problem solved again with few and with many moves, some twenty
networks, are put together from stored integers and measured on held-out tokens, then once more
those exchanges together that lowered the KL each by itself. The best is kept if it is better than
the plan before, and the next round starts there.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantforge.errors import InputError
from quantforge.files import write_json
from quantforge.format.manifest import plan_from_dict, plan_to_dict
from quantforge.parallel import ALONE, Share
from quantforge.results import AnyQuality, RefinementRound
from quantforge.search.allocate import cost_tables, make_plan, tied_rows
from quantforge.search.choice import Picks
from quantforge.search.config import SearchConfig
from quantforge.search.exchanges import Exchange, joined, nearest_exchanges, solved_again
from quantforge.types import BitPlan, QuantSpec, Sensitivity

# Networks measured a round, beside the plan's own and the last one of joined exchanges.
MEASURED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A plan after refinement.

    Attributes:
        plan: the best that was measured; the one before if none was better.
        rounds: what was measured.
    """

    plan: BitPlan
    rounds: tuple[RefinementRound, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What refinement asks of the network.

    Attributes:
        derive: [layers, specs + 1] float64 derivative of the loss in nats a token of a plan's
            network along every candidate's difference from what the plan has; the last column is
            the float weight.
        measure: held-out quality of plans.
        within: whether a plan is within all limits of the budget.
        limit: on the stored bits of all layers.
    """

    derive: Callable[[BitPlan], Tensor]
    measure: Callable[[list[BitPlan]], list[AnyQuality]]
    within: Callable[[BitPlan], bool]
    limit: int


def refine(
    plan: BitPlan,
    sensitivity: Sensitivity,
    products: Tensor,
    config: SearchConfig,
    around: Surroundings,
) -> Refined:
    """Look around a plan `config.refine` times, or until nothing better is found.

    Args:
        plan: of a search, within the limits.
        sensitivity: predicted losses of all candidates.
        products: [sequences, layers, specs] derivatives along every candidate's error in the float
            network.
        config: rounds, and which layers share a spec.
        around: the network.
    """
    space = _Space(sensitivity, products, config)
    rounds: list[RefinementRound] = []
    quality: AnyQuality | None = None
    for _ in range(config.refine):
        first = around.derive(plan)
        if quality is None:
            (quality,) = around.measure([plan])
        found = _round(plan, quality, space, first, around)
        rounds.append(found.outcome)
        if found.plan is plan:
            break
        plan, quality = found.plan, found.quality
    return Refined(plan=plan, rounds=tuple(rounds))


def remembered(path: Path, look: Callable[[], Refined], share: Share = ALONE) -> Refined:
    """What `look` finds, kept in a file: another command with the same plan does not look again.

    A file that cannot be read is made again; where none can be written, there is none. Of several
    processes the first reads and writes it.
    """
    text = ""
    with suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8") if share.main else ""
    text = share.exchange(facts={"text": text})[0].facts["text"]
    with suppress(ValueError, KeyError, TypeError, InputError):
        kept = json.loads(text)
        plan = plan_from_dict(kept["plan"])
        order = {name: plan.assignment[name] for name in kept["order"]}  # JSON's is by name
        return Refined(
            plan=replace(plan, assignment=order),
            rounds=tuple(RefinementRound(**one) for one in kept["rounds"]),
        )
    found = look()
    if not share.main:
        return found
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        rounds = [asdict(one) for one in found.rounds]
        kept = {"plan": plan_to_dict(found.plan), "order": list(found.plan.assignment)}
        write_json(path, {**kept, "rounds": rounds})
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The best plan of a round, its quality, and what is told about it."""

    plan: BitPlan
    quality: AnyQuality
    outcome: RefinementRound


class _Space:
    """Plans as picks of items, groups of layers that share a spec."""

    def __init__(self, sensitivity: Sensitivity, products: Tensor, config: SearchConfig) -> None:
        self.sensitivity, self.products = sensitivity, products
        self.items = tied_rows(sensitivity, config)
        _, self.cost = cost_tables(sensitivity, self.items)
        self._column = {spec: index for index, spec in enumerate(sensitivity.specs)}
        self._kept = len(sensitivity.specs)

    def columns(self, plan: BitPlan) -> list[int]:
        """Candidate of every layer; the last one where it is kept."""
        specs = [plan.assignment[layer.name] for layer in self.sensitivity.layers]
        return [self._kept if spec is None else self._column[spec] for spec in specs]

    def picks(self, plan: BitPlan) -> Picks:
        """[items] candidates."""
        columns = self.columns(plan)
        return np.array([columns[rows[0]] for rows in self.items], dtype=np.intp)

    def plan(self, picks: Picks, budget: str) -> BitPlan:
        """The plan of these picks."""
        specs: list[QuantSpec | None] = [*self.sensitivity.specs, None]
        layers = self.sensitivity.layers
        chosen_specs = {
            layers[row].name: specs[pick]
            for rows, pick in zip(self.items, picks.tolist(), strict=True)
            for row in rows
        }
        ordered = {layer.name: chosen_specs[layer.name] for layer in layers}
        return make_plan(self.sensitivity, ordered, budget=budget, solver="refined")

    def changes(self, plan: BitPlan, first: Tensor) -> NDArray[np.float64]:
        """[items, candidates] predicted change of the loss of every move.

        Args:
            plan: where to move from.
            first: [layers, specs + 1] derivatives there.
        """
        columns = self.columns(plan)
        table = (first + swap_curvature(self.sensitivity.loss, self.products, columns)).numpy()
        table[np.arange(len(columns)), columns] = 0.0
        return np.stack([table[list(rows)].sum(axis=0) for rows in self.items])


def swap_curvature(loss: Tensor, products: Tensor, columns: Sequence[int]) -> Tensor:
    """[layers, specs + 1] ½ δᵀ F δ of every candidate's difference δ from a layer's own.

    Args:
        loss: [layers, specs] ½ Dᵀ F D of every candidate's error; +inf where it does not fit.
        products: [sequences, layers, specs] derivatives along those errors; 0 there.
        columns: own candidate of every layer, `specs` where it is kept.
    """
    padded = torch.nn.functional.pad(loss, (0, 1))
    along = torch.nn.functional.pad(products.double(), (0, 1))
    rows = torch.arange(len(loss))
    own, mine = padded[rows, list(columns)], along[:, rows, list(columns)]
    size = (along.square().sum(0) * mine.square().sum(0)[:, None]).sqrt()
    cosine = (along * mine[:, :, None]).sum(0) / torch.where(size > 0, size, 1.0)
    both = padded * own[:, None]
    return padded + own[:, None] - 2 * cosine * torch.where(both.isfinite(), both, 0.0).sqrt()


def _round(
    plan: BitPlan, quality: AnyQuality, space: _Space, first: Tensor, around: Surroundings
) -> _Found:
    """Measure what is nearest to a plan; the best of it, or the plan itself."""
    picks, changes = space.picks(plan), space.changes(plan, first)
    whole = solved_again(changes, space.cost, picks, around.limit)
    near = nearest_exchanges(changes, space.cost, picks, around.limit, MEASURED - len(whole))
    proposed = [space.plan(one, plan.budget) for one in whole]
    proposed += [space.plan(_moved(picks, one), plan.budget) for one in near]
    known = [one for one in proposed if around.within(one)]
    measured = list(zip(known, around.measure(known), strict=True))
    better = {id(one) for one, found in measured if found.loss < quality.loss}
    losses = {id(one): found.loss for one, found in measured}
    gains = [
        (losses[id(one)], exchange)
        for one, exchange in zip(proposed[len(whole) :], near, strict=True)
        if id(one) in better
    ]
    gains.sort(key=lambda pair: pair[0])
    together = joined([exchange for _, exchange in gains], space.cost, picks, around.limit)
    last = space.plan(together, plan.budget)
    if len(gains) > 1 and around.within(last):
        measured += zip([last], around.measure([last]), strict=True)
    best, found = min(measured, key=lambda pair: pair[1].loss, default=(plan, quality))
    if not found.loss < quality.loss:
        best, found = plan, quality
    return _Found(
        plan=best, quality=found, outcome=_outcome(plan, quality, best, found, len(measured))
    )


def _moved(picks: Picks, exchange: Exchange) -> Picks:
    moved = picks.copy()
    for item, candidate in exchange.moves.items():
        moved[item] = candidate
    return moved


def _outcome(
    before: BitPlan, old: AnyQuality, after: BitPlan, new: AnyQuality, measured: int
) -> RefinementRound:
    """What a round did."""
    differences = [b - a for a, b in zip(old.window_loss, new.window_loss, strict=True)]
    count = len(differences)
    spread = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.inf
    return RefinementRound(
        plans=measured,
        layers=sum(after.assignment[name] != spec for name, spec in before.assignment.items()),
        before=old.loss,
        after=new.loss,
        stderr=spread,
    )
