"""Bisection on quality: the fewest bits inside the target, for laws that are known."""

import math
import statistics
from fractions import Fraction

import pytest

from quantforge.errors import BudgetError, InputError
from quantforge.results import Quality
from quantforge.search.budget import Budget
from quantforge.targets import RESOLUTION, bound, meet
from quantforge.types import BitPlan, QuantSpec

REFERENCE = (3.0, 3.5, 2.5, 3.2)
# The tables' 95 % point of Student's t for three degrees of freedom.
STUDENT = 2.353363


def quality(kl, spread=0.1, windows=4):
    """KL and cross-entropy of four windows that differ by a share of the mean."""
    shares = (1 - spread, 1 + spread, 1 - spread / 2, 1 + spread / 2)[:windows]
    kls = tuple(kl * share for share in shares)
    stderr = statistics.stdev(kls) / math.sqrt(windows) if windows > 1 else math.inf
    return Quality(
        text="", windows=windows, window_length=8, perplexity=1.0, reference_perplexity=1.0,
        kl=statistics.fmean(kls), kl_stderr=stderr, top1=1.0, window_kl=kls,
        window_nll=tuple(r + k for r, k in zip(REFERENCE, kls, strict=False)),
    )  # fmt: skip


def plan(bits, loss=None):
    return BitPlan(
        assignment={"a": QuantSpec(3), "bits": QuantSpec(2, 1 + int(1e6 * bits))}, budget="text",
        stored_bits=float(bits), code_bits=0.0, predicted_loss=loss, solver="",
    )  # fmt: skip


def kl_at(bits):
    return 4.0 * math.exp(-1.7 * float(bits))


def test_the_upper_end_of_the_interval():
    target_kl, target_ppl = Budget.parse("kl:0.3,ppl:+20%").targets
    found = quality(0.2)
    one = bound(target_kl, found, REFERENCE)
    assert (one.mean, one.stderr) == (found.kl, found.kl_stderr)
    assert one.upper == pytest.approx(found.kl + STUDENT * found.kl_stderr)
    two = bound(target_ppl, found, REFERENCE)  # paired: the windows' own level cancels
    assert two.mean == pytest.approx(found.kl)
    assert two.stderr == pytest.approx(found.kl_stderr)
    with pytest.raises(InputError, match="two held-out sequences"):
        bound(target_kl, quality(0.2, windows=1), REFERENCE[:1])


@pytest.mark.parametrize("text", ["kl:0.05", "kl:0.3", "ppl:+2%", "ppl:+30%", "kl:0.1,ppl:+2%"])
@pytest.mark.parametrize("off", [0.3, 1.0, 4.0])
def test_the_fewest_bits_are_found_however_wrong_the_prediction(text, off):
    targets = Budget.parse(text).targets
    seen = []

    def measure(one):
        seen.append(one.stored_bits)
        return quality(kl_at(one.stored_bits))

    met = meet(
        targets, lambda bits: plan(bits, off * kl_at(bits)), measure, REFERENCE,
        bits=(Fraction(2), Fraction(16)),
    )  # fmt: skip
    factor = quality(1.0).kl + STUDENT * quality(1.0).kl_stderr
    exact = max(-math.log(min(t.nats for t in targets) / 4 / factor) / 1.7, 2)
    assert exact <= met.plan.stored_bits <= exact + float(RESOLUTION) + 1e-9
    assert len(seen) == len(set(seen)) <= 12
    for outcome, target in zip(met.outcomes, targets, strict=True):
        assert outcome.upper <= outcome.limit == target.nats
        assert outcome.measured == pytest.approx(kl_at(met.plan.stored_bits), rel=1e-6)
        assert outcome.predicted == pytest.approx(off * outcome.measured)
        assert (outcome.windows, outcome.plans) == (4, len(seen))


def test_the_floor_is_enough_or_the_most_is_too_little():
    targets = Budget.parse("kl:0.5").targets
    low = meet(
        targets, plan, lambda one: quality(kl_at(one.stored_bits)), REFERENCE,
        bits=(Fraction(2), Fraction(4)),
    )  # fmt: skip
    assert low.plan.stored_bits == 2.0
    with pytest.raises(BudgetError, match=r"the upper bound for kl:0.001 is 0\.\d+ nats"):
        meet(
            Budget.parse("kl:0.001").targets, plan,
            lambda one: quality(kl_at(one.stored_bits)), REFERENCE,
            bits=(Fraction(2), Fraction(4)),
        )  # fmt: skip


@pytest.mark.parametrize("predicted", [0.0, None])
def test_few_bits_that_no_plan_has_are_outside(predicted):
    """Where narrow weights are slow, a limit on the time leaves plans of many bits only."""

    def find(bits):
        if bits < 5:
            raise BudgetError("no plan is within all parts")
        return plan(bits, predicted)

    targets, span = Budget.parse("kl:0.3").targets, (Fraction(2), Fraction(8))
    met = meet(targets, find, lambda one: quality(kl_at(one.stored_bits)), REFERENCE, bits=span)
    assert 5 <= met.plan.stored_bits <= 5 + RESOLUTION
    with pytest.raises(BudgetError, match="within all parts"):
        meet(
            targets, find, lambda one: quality(kl_at(one.stored_bits)), REFERENCE,
            bits=(Fraction(2), Fraction(4)),
        )  # fmt: skip


def test_plans_that_come_in_steps_do_not_keep_it_from_ending():
    """A uniform solver: 2, 3 and 4 bits and nothing between."""
    steps = [plan(Fraction(b)) for b in (2, 3, 4)]
    met = meet(
        Budget.parse("kl:0.1").targets,
        lambda bits: max((s for s in steps if s.stored_bits <= bits), key=lambda s: s.stored_bits),
        lambda one: quality(kl_at(one.stored_bits)), REFERENCE, bits=(Fraction(2), Fraction(4)),
    )  # fmt: skip
    assert met.plan.stored_bits == 3.0  # 0.024; 2 bits lose 0.133
    assert met.outcomes[0].plans <= 3


def test_a_uniform_plan_of_fewer_bits_that_is_inside_is_taken():
    better, worse = plan(Fraction(5, 2)), plan(Fraction(9, 4))
    known = {better.stored_bits: 0.01, worse.stored_bits: 3.0}
    met = meet(
        Budget.parse("kl:0.02").targets, plan,
        lambda one: quality(known.get(one.stored_bits, kl_at(one.stored_bits))), REFERENCE,
        bits=(Fraction(2), Fraction(16)), also=[better, worse],
    )  # fmt: skip
    assert met.plan is better
