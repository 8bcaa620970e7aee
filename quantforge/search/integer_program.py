"""The integer program, solved by HiGHS: several limits at once (size, operations, latency).

    min Σ loss[i,c] x[i,c]   with   Σ_c x[i,c] = 1,   Σ cost[r,i,c] x[i,c] ≤ limit[r],   x binary,

which is HAWQ-V3's program (Yao et al. 2021, arXiv 2011.10680) for any number of candidates and
resources, and for items that must agree in some property of what is picked: the width of an
activation that several layers read, say. A solver in floating point meets limits and its own
optimality within tolerances, so here limits and losses are scaled to where its tolerances are
small, the picks are summed again in the caller's units, and where they pass a limit the program is
solved again with less of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantforge.search.choice import (
    Choice,
    Costs,
    Limits,
    Losses,
    Picks,
    additive_choice,
    require_problem,
    totals,
)
from quantforge.search.frontier import additive_bound

# HiGHS stops at an absolute gap of 1e-6, so the optimum is scaled to about this; where that would
# blow up the largest losses, they are scaled instead.
OBJECTIVE_SIZE = 1e3
LEAST_SHARE = 1e-5
# Rows are met within 1e-6, so limits are scaled to this: within a billionth of them.
LIMIT_SIZE = 1e3
# A limit that tolerances let the picks pass is lowered by this share, doubled each time.
TIGHTENING = 1e-9
MAX_TRIES = 20
# What a proof in floating point is worth, relative to the loss.
PROOF = 1e-9
OPTIMAL, TIME_LIMIT, INFEASIBLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How the solver ended.

    Attributes:
        status: "optimal" is proved; "time limit" may hold the best choice found by then;
            "infeasible": no picks are within all limits.
        choice: the picks and the solver's lower bound; None if none were found.
    """

    status: Literal["optimal", "time limit", "infeasible"]
    choice: Choice | None


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Items whose picks must have one label.

    Attributes:
        items: of them.
        labels: [items, candidates] whole numbers, of all items.
    """

    items: Sequence[int]
    labels: NDArray[np.intp]


def integer_program(
    loss: Losses,
    costs: Costs,
    limits: Limits,
    *,
    agreements: Sequence[Agreement] = (),
    time_limit: float | None = None,
) -> ProgramResult:
    """Pick one candidate an item with the least total loss within all limits.

    Args:
        loss: [items, candidates]; +inf where an item has no such candidate.
        costs: [resources, items, candidates], non-negative.
        limits: [resources]; +inf does not limit.
        agreements: sets of items whose picks must agree.
        time_limit: seconds after which the best picks found are returned.

    Returns:
        Status, picks and bound. The picks are within the limits exactly.

    Raises:
        ValueError: tables do not belong together, or the solver failed.
    """
    require_problem(loss, costs, limits)
    lowest = additive_bound(loss, costs, limits)
    if np.isinf(lowest):
        return ProgramResult(status="infeasible", choice=None)
    tightened = np.array([float(limit) for limit in limits])
    bound, ends = lowest, np.inf if time_limit is None else time.monotonic() + time_limit
    for attempt in range(MAX_TRIES):
        solved, unit, offset = _run(
            loss, costs, tightened, lowest, ends - time.monotonic(), agreements
        )
        if solved.status == INFEASIBLE:
            return ProgramResult(status="infeasible", choice=None)
        if solved.status not in (OPTIMAL, TIME_LIMIT):
            raise ValueError(f"the integer program failed: {solved.message}")
        if attempt == 0 and solved.mip_dual_bound is not None:
            bound = max(bound, float(solved.mip_dual_bound) * unit + offset)
        if solved.x is None:
            return ProgramResult(status="time limit", choice=None)
        picks = _picks(loss, solved.x)
        over = totals(costs, picks) > np.asarray(limits)
        if not over.any():
            proved = solved.status == OPTIMAL and attempt == 0
            choice = additive_choice(loss, costs, picks, bound=bound)
            if proved and choice.gap <= PROOF * max(abs(choice.loss), unit):
                choice = additive_choice(loss, costs, picks)
            ended = solved.status == OPTIMAL
            return ProgramResult(status="optimal" if ended else "time limit", choice=choice)
        tightened[over] *= 1 - TIGHTENING * 2.0**attempt
    raise ValueError("the integer program's picks pass a limit within every tolerance")


def _run(
    loss: Losses,
    costs: Costs,
    limits: NDArray[np.float64],
    lowest: float,
    seconds: float,
    agreements: Sequence[Agreement] = (),
) -> tuple[Any, float, float]:
    """HiGHS on the scaled program: its result, and unit and offset of its objective."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    present = np.isfinite(loss)
    item = np.nonzero(present)[0]
    count = len(item)
    one_each = csr_array((np.ones(count), (item, np.arange(count))), shape=(len(loss), count))
    rules = [LinearConstraint(one_each, 1.0, 1.0)]
    least = loss.min(axis=1)
    offset = float(least.sum())
    spread = float(np.where(present, loss - least[:, None], 0.0).max(axis=1).sum())
    unit = (max(lowest - offset, LEAST_SHARE * spread) or 1.0) / OBJECTIVE_SIZE
    for cost, limit in zip(costs, limits, strict=True):
        if np.isfinite(limit):
            size = (limit or 1.0) / LIMIT_SIZE
            row = csr_array(cost[present][None].astype(np.float64) / size)
            rules.append(LinearConstraint(row, -np.inf, limit / size))
    rules += [LinearConstraint(rows, 0.0, 0.0) for rows in _agreeing(agreements, present)]
    options = {"mip_rel_gap": 0.0, "time_limit": max(0.0, seconds)}
    with _nothing_on_stdout():
        solved = milp(
            (loss - least[:, None])[present] / unit,
            integrality=np.ones(count),
            bounds=Bounds(0.0, 1.0),
            constraints=rules,
            options=options,
        )
    return solved, unit, offset


def _agreeing(agreements: Sequence[Agreement], present: NDArray[np.bool_]) -> Iterator[Any]:
    """Rows that are 0 where the items of an agreement pick one label: each less the first."""
    from scipy.sparse import csr_array

    item, candidate = np.nonzero(present)
    for agreement in agreements:
        label = agreement.labels[item, candidate]
        first, *others = agreement.items
        for other in others:
            signs = (item == other).astype(np.float64) - (item == first)
            places = np.flatnonzero(signs)
            row = np.searchsorted(values := np.unique(label[places]), label[places])
            shape = (len(values), len(item))
            yield csr_array((signs[places], (row, places)), shape=shape)


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Send what compiled code writes to standard output to standard error.

    HiGHS 1.12 has a line left in it that it prints whatever its options say (HiGHS.jl issue 312);
    standard output belongs to results.
    """
    try:
        kept = os.dup(1) if sys.platform != "win32" else None
    except OSError:  # standard output is closed: nothing to protect
        kept = None
    if kept is None:
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _picks(loss: Losses, values: NDArray[np.float64]) -> Picks:
    """[items] candidate whose variable is largest."""
    table = np.full(loss.shape, -1.0)
    table[np.isfinite(loss)] = values
    picks: Picks = table.argmax(axis=1)
    return picks
