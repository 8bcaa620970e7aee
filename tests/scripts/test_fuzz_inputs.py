"""Fuzzed inputs: each is read, or refused in one line; and the fuzzer sees what it has to see.

What it found is tested in `tests/quantforge/test_malformed_inputs.py`; `--only SEED` of the script
shows one input again.
"""

import os

import fuzz_targets
import pytest
from fuzz_inputs import Fuzzer, Limits, seeds_of
from fuzz_targets import KINDS, Case

SEEDS = 176  # eight of every kind


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QUANTFORGE_CACHE", "")
        environment.setenv("HF_HUB_OFFLINE", "")  # both are put back after the fuzzer set them
        yield Fuzzer(tmp_path_factory.mktemp("fuzz"), Limits(seconds=60.0))


@pytest.mark.parametrize("number", range(len(KINDS)), ids=list(KINDS))
def test_every_kind_is_read_where_nothing_is_broken(fuzzer, number):
    outcome = fuzzer.run(number, broken=False)
    assert (outcome.kind, outcome.result) == (list(KINDS)[number], "ok"), outcome.detail


def test_broken_inputs_are_read_or_refused_in_one_line(fuzzer):
    outcomes = [fuzzer.run(seed) for seed in range(SEEDS)]
    assert [one for one in outcomes if one.result == "failed"] == []
    refusals = [one for one in outcomes if one.result == "refused"]
    assert len(refusals) > SEEDS / 2  # the mutations do break
    assert {one.kind for one in refusals} == set(KINDS)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_five_thousand_broken_inputs(fuzzer):
    outcomes = [fuzzer.run(seed) for seed in range(5000)]
    assert [one for one in outcomes if one.result == "failed"] == []


def test_a_seed_is_one_input(fuzzer):
    first, again = fuzzer.run(7), fuzzer.run(7)
    assert (first.kind, first.detail) == (again.kind, again.detail)
    assert list(seeds_of(3, 0, ["recipe"])) == [13, 35, 57]


@pytest.mark.parametrize(
    ("misdeed", "says"),
    [
        (lambda case: 1 / 0, "ZeroDivisionError"),
        (lambda case: os.write(2, b"hello\n"), "printed 'hello'"),
        (lambda case: (case.folder / "new").write_text("x"), "left behind"),
        (lambda case: (case.output / "..").resolve().joinpath("x").write_text(""), "left behind"),
        (lambda case: (case.folder / "model.bin").read_bytes(), "model.bin opened"),
        (lambda case: open("/etc/passwd").close(), "/etc/passwd opened"),  # noqa: PTH123
        (lambda case: bytearray(400_000_000), "MB"),
        (lambda case: (case.workshop.root / "ran").touch(), "of the input ran"),
    ],
)
def test_the_fuzzer_notices(fuzzer, monkeypatch, misdeed, says):
    plan = list(KINDS).index("plan")
    misdeed.__name__ = "misdeed"
    kind = {"artefact": "plan", "file": "plan.json", "mutate": lambda data, generator: data}
    monkeypatch.setattr(
        fuzz_targets, "KINDS", {**KINDS, "plan": fuzz_targets.Kind(**kind, entries=(misdeed,))}
    )
    outcome = fuzzer.run(plan)
    assert outcome.result == "failed"
    assert says in outcome.detail


def test_the_fuzzer_ends_what_hangs(fuzzer):
    case = Case(workshop=fuzzer.workshop, file=fuzzer.root / "x", output=fuzzer.root / "y")
    impatient = object.__new__(Fuzzer)
    impatient.__dict__.update(fuzzer.__dict__, limits=Limits(seconds=0.2))

    def hang(case):
        while True:
            pass

    error, _ = impatient._call(hang, case)
    assert type(error).__name__ == "HangError"
