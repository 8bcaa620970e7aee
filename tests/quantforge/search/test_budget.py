"""Every unit of a budget becomes an exact number; what is not understood is refused."""

import math
from fractions import Fraction

import pytest

from quantforge.errors import UsageError
from quantforge.search.budget import Budget, Limit, Target


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("3bit", Limit("bits", Fraction(3))),
        (" 3.25 BPW ", Limit("bits", Fraction(13, 4))),
        ("2.1bits", Limit("bits", Fraction(21, 10))),
        ("120MB", Limit("bytes", Fraction(120_000_000))),
        ("120 mib", Limit("bytes", Fraction(120 * 2**20))),
        ("1.2GB", Limit("bytes", Fraction(1_200_000_000))),
        ("1.5GiB", Limit("bytes", Fraction(3 * 2**29))),
        ("900kB", Limit("bytes", Fraction(900_000))),
        ("0.4x", Limit("share", Fraction(2, 5))),
        ("vram:8GB@4096", Limit("vram", Fraction(8 * 10**9), 4096)),
        ("vram: 24GiB @ 32k", Limit("vram", Fraction(24 * 2**30), 32_768)),
    ],
)
def test_a_size(text, limit):
    budget = Budget.parse(text)
    assert budget.limits == (limit,)
    assert (budget.targets, budget.text) == ((), text.strip())
    assert budget.bits == (limit.amount if limit.kind == "bits" else 16)
    assert budget.sizes == (() if limit.kind == "bits" else (limit,))


@pytest.mark.parametrize(
    ("text", "kind", "nats"),
    [
        ("kl:0.05", "kl", 0.05),
        ("kl:5e-2", "kl", 0.05),
        ("ppl:+2%", "ppl", math.log(1.02)),
        ("ppl: +2.5 %", "ppl", math.log(1.025)),
        ("PPL:5%", "ppl", math.log(1.05)),
        ("acc:-0.5%", "acc", 0.005),
    ],
)
def test_a_target(text, kind, nats):
    budget = Budget.parse(text)
    ((found),) = budget.targets
    assert (found.kind, found.nats) == (kind, pytest.approx(nats, rel=1e-12))
    assert (budget.limits, budget.bits) == ((), 16)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("bops:5G", Limit("operations", Fraction(5 * 10**9))),
        ("bops: 0.5 t", Limit("operations", Fraction(5 * 10**11))),
        ("bops:-25%", Limit("operations-share", Fraction(3, 4))),
    ],
)
def test_bit_operations(text, limit):
    budget = Budget.parse(f"4bit,{text}")
    assert budget.operations == (limit,)
    assert (budget.bits, budget.sizes, budget.latency) == (4, (), ())


@pytest.mark.parametrize("text", ["3bit,80MB,ppl:+2%", "3bit + 80MB + ppl:+2%"])
def test_parts_are_joined_by_commas_or_pluses(text):
    budget = Budget.parse(text)
    assert budget.limits == (Limit("bits", Fraction(3)), Limit("bytes", Fraction(80_000_000)))
    assert budget.targets == (Target("ppl", math.log1p(0.02), "ppl:+2%"),)
    assert (budget.bits, budget.total_bits(7)) == (3, 21)
    assert budget.sizes == budget.limits[1:]
    lowered = budget.in_bits(Fraction(5, 2))
    assert (lowered.bits, lowered.sizes, lowered.targets, lowered.text) == (2.5, (), (), text)
    assert Budget.parse("4bit,3.5bit").bits == Fraction(7, 2)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "0MB",
            "0x",
            "1.1x",
            "vram:8GB",
            "vram:8GB@0",
            "vram:3bit@4",
            "kl:0",
            "kl:",
            "kl:-1",
            "kl:1e999",
        ),
        *(
            "ppl:+0%",
            "ppl:2",
            "ppl:-2%",
            "3bit,",
            ",3bit",
            "3bit 4bit",
            "latency:25%",
            "bops:5",
            "bops:-100%",
            "bops:0G",
            "acc:0.5%",
            "acc:-0%",
            "latency:-100%",
            "3b",
            "12B",
        ),
        *("3bit+", "17bit,80MB", "1e3MB", "MB", "nanx"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match="budget") as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_the_part_at_fault_is_named():
    with pytest.raises(UsageError, match="budget 'soon' of '3bit,soon' is not understood; write"):
        Budget.parse("3bit,soon")
