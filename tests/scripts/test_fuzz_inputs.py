"""Fuzzed inputs: each is read, or refused in one line; and the fuzzer sees what it has to see.

What it found is tested in `tests/quantforge/test_malformed_inputs.py`; `--only SEED` of the script
shows one input again.
"""

import os
import shutil
import sys
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_inputs import Fuzzer, Limits, seeds_of
from fuzz_targets import KINDS, Case

from quantforge.errors import UsageError

SEEDS = 176  # eight of every kind


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QUANTFORGE_CACHE", "")
        environment.setenv("HF_HUB_OFFLINE", "")  # both are put back after the fuzzer set them
        environment.setattr(sys, "dont_write_bytecode", True)
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


def outside(case):
    """A folder beside the valid inputs, made before a misdeed and gone after it."""
    return case.workshop.root / "elsewhere"


def valid_plan(case):
    return case.workshop.root / "valid" / "plan" / "plan.json"


def renames(case):
    plan = valid_plan(case)
    plan.rename(plan.with_name("other")).rename(plan)


def removes(case):
    shutil.copyfile(case.file, case.folder / "mine")
    moved = case.workshop.root / "moved"
    os.link(case.folder / "mine", moved)
    moved.unlink()
    (case.folder / "mine").unlink()


def removes_a_folder(case):
    outside(case).mkdir()
    shutil.rmtree(outside(case))


def truncates(case):
    os.truncate(valid_plan(case), valid_plan(case).stat().st_size)


def links(case):
    outside(case).symlink_to(case.folder)
    outside(case).unlink()


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
        (lambda case: (case.folder / "new").mkdir(), "input/new"),
        (lambda case: (case.folder / "new").symlink_to("/etc"), "input/new"),
        (lambda case: valid_plan(case).open("ab").close(), "valid/plan/plan.json opened for wri"),
        (lambda case: valid_plan(case).touch(), "changed the valid"),
        (lambda case: valid_plan(case).chmod(0o644), "valid/plan/plan.json os.chmod"),
        (renames, "valid/plan/plan.json os.rename"),
        (removes, "moved os.link"),
        (removes, "moved os.remove"),
        (removes_a_folder, "elsewhere os.mkdir"),
        (removes_a_folder, "elsewhere shutil.rmtree"),
        (links, "elsewhere os.symlink"),
        (truncates, "valid/plan/plan.json os.truncate"),
    ],
)
def test_the_fuzzer_notices(fuzzer, monkeypatch, misdeed, says):
    outcome = outcome_of(fuzzer, monkeypatch, misdeed)
    assert outcome.result == "failed"
    assert says in outcome.detail


def outcome_of(fuzzer, monkeypatch, *entries):
    """How an unbroken plan ends that these read."""
    kind = {"artefact": "plan", "file": "plan.json", "mutate": lambda data, generator: data}
    monkeypatch.setattr(
        fuzz_targets, "KINDS", {**KINDS, "plan": fuzz_targets.Kind(**kind, entries=entries)}
    )
    return fuzzer.run(list(KINDS).index("plan"))


def test_half_an_output_is_noticed_though_a_later_entry_would_replace_it(fuzzer, monkeypatch):
    def half(case):
        case.output.mkdir()
        raise UsageError("no room")

    outcome = outcome_of(fuzzer, monkeypatch, half, lambda case: None)
    assert outcome.result == "failed"
    assert outcome.detail.startswith("half: left behind: ")
    assert outcome.detail.endswith("/output")


def test_outputs_and_the_cache_may_be_changed(fuzzer, monkeypatch):
    def works(case):
        cache = Path(os.environ["QUANTFORGE_CACHE"])
        cache.mkdir(exist_ok=True)
        (cache / "kept").write_text("x")
        partial = case.output.with_name(".partial")
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "file").write_text("x")
        (partial / "deep").chmod(0o700)
        partial.rename(case.output)
        shutil.copytree(case.output, partial)
        shutil.rmtree(partial)

    outcome = outcome_of(fuzzer, monkeypatch, works)
    assert (outcome.result, outcome.detail) == ("ok", "")


def test_the_fuzzer_ends_what_hangs(fuzzer):
    case = Case(workshop=fuzzer.workshop, file=fuzzer.root / "x", output=fuzzer.root / "y")
    impatient = object.__new__(Fuzzer)
    impatient.__dict__.update(fuzzer.__dict__, limits=Limits(seconds=0.2))

    def hang(case):
        while True:
            pass

    error, _ = impatient._call(hang, case)
    assert type(error).__name__ == "HangError"
