"""One grid for all layers: what it costs, what it is checked against, and what it never claims."""

from fractions import Fraction

import pytest

from quantforge.errors import BudgetError, InputError, UsageError
from quantforge.search.budget import Budget
from quantforge.search.config import SearchConfig
from quantforge.search.settled import needed_budget, settled_plan
from quantforge.types import LayerInfo, QuantSpec


def layer(name, rows, columns):
    return LayerInfo(
        name=name, out_features=rows, in_features=columns, block=0, stage=0, fused_group=name
    )


LAYERS = [layer("a", 64, 384), layer("b", 96, 256)]


def config(**changes):
    values = {"solver": "uniform", "bits": (3,), "group_sizes": (64,)}
    return SearchConfig(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({}, "3b-g64"),
        ({"group_sizes": (-1,)}, "3b-pc"),
        ({"asymmetric": "only"}, "3b-g64-asym"),
        ({"bits": (3, 3)}, "3b-g64"),
        ({"asymmetric": True}, None),
        ({"bits": (3, 4)}, None),
        ({"group_sizes": (64, -1)}, None),
        ({"solver": "dynamic-program"}, None),
    ],
)
def test_a_plan_is_settled_where_one_candidate_is_for_all(changes, spec):
    found = config(**changes).settled
    assert found == (None if spec is None else QuantSpec.parse(spec))


def test_the_budget_is_what_the_plan_costs():
    plan = settled_plan(LAYERS, config(), None)
    assert dict(plan.assignment) == {"a": QuantSpec(3, 64), "b": QuantSpec(3, 64)}
    assert (plan.stored_bits, plan.code_bits, plan.budget) == (3.25, 3.0, "3.25bit")
    assert plan.predicted_loss is None
    assert plan.solver == "given"
    # Per channel: 16 bits a row over 64 rows of 384 and 96 of 256 weights, 3.0520833.. in all.
    whole = settled_plan(LAYERS, config(group_sizes=(-1,)), None)
    cost = 3 + Fraction(16 * (64 + 96), 64 * 384 + 96 * 256)
    assert whole.stored_bits == pytest.approx(float(cost), abs=1e-12)
    assert whole.budget == "3.053bit"
    assert Budget.parse(whole.budget).bits >= cost


def test_a_budget_that_is_given_is_kept_or_refused():
    assert settled_plan(LAYERS, config(), Budget.parse("3.25bpw")).budget == "3.25bpw"
    with pytest.raises(BudgetError, match=r"3b-g64 for all layers takes 3\.250 .* 3\.250bit"):
        settled_plan(LAYERS, config(), Budget.parse("3.249bit"))


def test_groups_that_do_not_divide_every_layer_are_refused_with_those_that_do():
    with pytest.raises(InputError) as caught:
        settled_plan([*LAYERS, layer("c", 8, 192)], config(group_sizes=(128,)), None)
    text = str(caught.value)
    assert text.startswith("groups of 128 do not divide 1 of 3 layers, first c with rows of 192")
    assert text.endswith("divide all: 32, 64, -1 (per channel)")
    with pytest.raises(UsageError, match="has to be searched"):
        settled_plan(LAYERS, config(bits=(2, 3)), None)


def test_a_budget_is_needed_where_there_is_something_to_search():
    assert needed_budget(None, config()) is None
    assert needed_budget("3bit", config()) == Budget.parse("3bit")
    with pytest.raises(UsageError, match="no budget is given"):
        needed_budget(None, SearchConfig())
