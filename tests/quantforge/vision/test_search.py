from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from quantforge.errors import BudgetError
from quantforge.search.integer_program import Agreement, integer_program
from quantforge.types import LayerInfo, QuantSpec
from quantforge.vision.search import Limits, Table, make_plan, search, uniform_plans

# HAWQ-V3's published table of ResNet-18 (Zhen-Dong/HAWQ, the notebook of its integer program).
TRACES = [
    0.06857826, 0.03162379, 0.03298575, 0.01205663, 0.02222431, 0.00596336, 0.06931772, 0.00807129,
    0.00372905, 0.00530698, 0.00209011, 0.00737569, 0.00210454, 0.00151197, 0.00158041, 0.00078146,
    0.00451841, 0.00098745, 0.00072944,
]  # fmt: skip
EIGHT = [
    0.0235, 0.0125, 0.0102, 0.0082, 0.0145, 0.0344, 0.0023, 0.0287, 0.0148, 0.0333, 0.0682, 0.0027,
    0.0448, 0.0336, 0.0576, 0.1130, 0.0102, 0.0947, 0.0532,
]  # fmt: skip
FOUR = [
    6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, 0.6827, 9.0942, 4.8857, 10.7599, 21.7546,
    0.8603, 14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016,
]  # fmt: skip
SIZES = [
    36864, 36864, 36864, 36864, 73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824,
    589824, 1179648, 2359296, 131072, 2359296, 2359296,
]  # fmt: skip
MACS = [115605504] * 19
for index in (4, 9, 14):
    MACS[index] = 57802752
for index in (6, 11, 16):
    MACS[index] = 6422528
TIES = {6: 4, 11: 9, 16: 14}


def hawq_table() -> Table:
    """Weights and activations of a layer at the same width: grids of their own, losses shared."""
    layers = tuple(
        LayerInfo(
            name=str(i), kind="convolution", out_features=1, in_features=size, block=0, stage=i,
            fused_group=str(TIES.get(i, i)),
        )
        for i, size in enumerate(SIZES)
    )  # fmt: skip
    trace = torch.tensor(TRACES, dtype=torch.float64)
    loss = torch.stack([trace * torch.tensor(d, dtype=torch.float64) for d in (FOUR, EIGHT)], 1)
    return Table(
        layers=layers,
        specs=(QuantSpec(4), QuantSpec(8)),
        loss=loss,
        grids=("x",),
        widths=(8,),
        activation_loss=torch.zeros(1, 1, dtype=torch.float64),
        reads={layer.name: "x" for layer in layers},
        macs={str(i): macs for i, macs in enumerate(MACS)},
    )


def eights(table: Table, limits: Limits) -> set[int]:
    plan = search(table, limits, budget="test")
    return {int(name) for name, spec in plan.assignment.items() if spec == QuantSpec(8)}


def test_hawq_v3_sizes() -> None:
    table = hawq_table()
    sizes = np.array(SIZES)
    # The published limit is halfway between all at 4 and all at 8 bits; scales count here too.
    low, high = (bits * sizes.sum() + 16 * len(sizes) for bits in (4, 8))
    assert eights(table, Limits(bits=(low + high) / 2)) == set(range(19)) - {15, 17, 18}


def test_hawq_v3_operations() -> None:
    """Bits of both operands at once: activations follow their layer's weight."""
    table = hawq_table()
    # HAWQ-V3 counts 1/64 for 4 × 4 and 1/16 for 8 × 8 of 115 million MACs: halfway is 66.232.
    weights = np.array([[m / 64 / 1e6, m / 16 / 1e6] for m in MACS])
    limit = weights.sum(0).mean()
    assert limit == pytest.approx(66.232320)
    labels = np.broadcast_to(np.arange(2), (19, 2))
    ties = [Agreement([a, b], labels) for b, a in TIES.items()]
    found = integer_program(table.loss.numpy(), weights[None], [limit], agreements=ties).choice
    assert found is not None
    assert {i for i, pick in enumerate(found.picks) if pick} == {0, 1, 2, 4, 5, 6, 7, 9, 10, 11}
    assert found.costs[0] == pytest.approx(65.028096)
    assert found.loss == pytest.approx(0.215689, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_joint_widths_equal_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(
        LayerInfo(
            name=name, kind="convolution", out_features=2, in_features=size, block=0, stage=i,
            fused_group=group,
        )
        for i, (name, size, group) in enumerate(
            [("a", 8, "a"), ("b", 16, "b"), ("c", 4, "b"), ("d", 8, "d")]
        )
    )  # fmt: skip
    loss = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    loss[2, 1] = torch.inf
    table = Table(
        layers=layers,
        specs=(QuantSpec(2), QuantSpec(4), QuantSpec(8)),
        loss=loss,
        grids=("x", "y"),
        widths=(4, 8),
        activation_loss=torch.rand(2, 2, generator=generator, dtype=torch.float64),
        reads={"a": "x", "b": "y", "c": "x", "d": "y"},
        macs={"a": 100, "b": 50, "c": 30, "d": 20},
    )
    every = []
    for specs in product(table.specs, repeat=4):
        if specs[1] != specs[2] or specs[2] == QuantSpec(4):
            continue
        assignment = dict(zip("abcd", specs, strict=True))
        for widths in product(table.widths, repeat=2):
            named = dict(zip(table.grids, widths, strict=True))
            every.append(make_plan(table, assignment, named, budget="x"))
    weights = sum(layer.numel for layer in layers)
    for bits, operations in [(9.0, 8000.0), (7.0, 12000.0), (12.0, 6000.0)]:
        fitting = [p for p in every if p.stored_bits <= bits and p.operations <= operations]
        best = min(fitting, key=lambda plan: plan.predicted_loss or 0.0)
        found = search(table, Limits(bits=bits * weights, operations=operations), budget="x")
        assert found.predicted_loss == pytest.approx(best.predicted_loss)
        assert found.assignment == best.assignment
        assert found.widths == best.widths
        assert found.stored_bits <= bits
        assert found.operations <= operations
        assert found.gap == 0


def test_what_cannot_be_met_names_the_least() -> None:
    with pytest.raises(BudgetError, match=r"at least 4\.\d+ stored bits"):
        search(hawq_table(), Limits(bits=100.0), budget="1bit")


def test_uniform_plans_keep_the_edges() -> None:
    table = hawq_table()
    plans = uniform_plans(table, {"0": QuantSpec(8)})
    assert [plan.budget for plan in plans] == ["uniform 4b-pc-a8", "uniform 8b-pc-a8"]
    assert plans[0].assignment["0"] == QuantSpec(8)
    assert plans[0].assignment["1"] == QuantSpec(4)
    assert plans[0].operations == 8 * (4 * sum(MACS) + 4 * MACS[0])


def test_a_width_of_the_edges_alone_makes_no_uniform_plan() -> None:
    table = hawq_table()
    losses = torch.tensor([[torch.inf, 0.0], [0.1, torch.inf]], dtype=torch.float64)
    reads = {layer.name: "x" if layer.name == "0" else "y" for layer in table.layers}
    table = replace(
        table, grids=("x", "y"), widths=(4, 8), activation_loss=losses, reads=reads
    )  # fmt: skip
    plans = uniform_plans(table, {})
    assert [plan.budget for plan in plans] == ["uniform 4b-pc-a4", "uniform 8b-pc-a4"]
    assert all(plan.widths == {"x": 8, "y": 4} for plan in plans)
