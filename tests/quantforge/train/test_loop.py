"""The loop: what it starts from, what it lowers, what it gives back, and going on after a break."""

import math

import pytest
import torch

from quantforge.errors import CancelledError, InputError, ResourceError
from quantforge.journal import NO_JOURNAL, Journal
from quantforge.progress import Monitor
from quantforge.train.config import TrainingConfig
from quantforge.train.loop import train
from quantforge.train.teacher import HiddenTeacher, stored_teacher, top_teacher

LENGTH = 32  # of the sequences of `case`
BATCH = 4
STEP = BATCH * LENGTH
SHORT = {"tokens": 12 * STEP, "evaluate_every": 4 * STEP, "batch": BATCH, "precision": "float32"}
# Rates for a network that is far smaller than those the defaults are for, and a start from which
# a dozen steps turn codes.
FAST = {"weight_rate": 0.03, "scale_rate": 0.01, "norm_rate": 0.003, "start": "compensated"}


def run(case, monitor=None, journal=NO_JOURNAL, task=None, **settings):
    config = TrainingConfig(**SHORT | FAST | settings)
    monitor = monitor or Monitor()
    return train(task or case.task(), config, seed=0, monitor=monitor, journal=journal)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantizer": "straight-through", "cross_entropy": 0.2},
        {"quantizer": "lsq", "precision": "bfloat16"},
        {"optimizer": "sophia", "weight_rate": 0.02, "curvature_every": 4, "hidden_term": 0.1},
        {"optimizer": "sophia", "weight_rate": 0.02, "curvature": "hutchinson", "recompute": 2},
        {"pressure_ramp": 0.0, "start": None, "at_once": 2, "weight_rate": 0.1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
def test_it_lowers_the_divergence_and_gives_what_it_measured(case, settings):
    before, module = case.kl(), case.model.module
    kinds = {name: type(one) for name, one in module.named_modules()}
    made = run(case, **settings)
    points, best = made.outcome.points, made.outcome.best
    assert [point.step for point in points] == [0, 4, 8, 12]
    assert points[0].kl == pytest.approx(before, rel=1e-5)  # training starts at the integers
    assert points[best].kl == min(point.kl for point in points) < 0.8 * before
    # the network has its layers back, with the weights from before, and no gradients
    assert {name: type(one) for name, one in module.named_modules()} == kinds
    for name, weight in case.weights.items():
        assert torch.equal(module.get_submodule(name).weight, weight.dequantize())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    # integers and scales give what was measured
    case.put(made.weights)
    assert case.kl() == pytest.approx(points[best].kl, rel=1e-6)
    changed = sum(int((w.codes != case.weights[n].codes).sum()) for n, w in made.weights.items())
    assert changed > 50
    for name, weight in made.weights.items():
        start = case.weights[name]
        assert weight.spec == start.spec
        assert (weight.zero is None) == (start.zero is None)


def test_soft_and_hard_meet_at_the_end_and_not_before(case):
    first, *middle, last = run(case).outcome.points
    # without pressure the float weights, drawn into their cells, are nearer than the codes
    assert first.soft_kl < 0.7 * first.kl
    assert all(point.kl != point.soft_kl for point in middle)
    assert last.soft_kl == pytest.approx(last.kl, rel=1e-4)
    rounded = run(case, quantizer="straight-through").outcome
    assert all(point.kl == point.soft_kl for point in rounded.points)
    assert rounded.gap == 0.0


def test_the_float_network_is_where_there_is_no_pressure(case):
    first = run(case, start="float", tokens=STEP).outcome.points[0]
    assert abs(first.soft_kl) < 1e-6
    assert first.kl == pytest.approx(case.kl(), rel=1e-5)  # here the codes are the rounded ones


@pytest.mark.parametrize("optimizer", ["adamw", "sophia"])
def test_going_on_after_a_break_ends_in_the_same_bits(case, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "evaluate_every": 2 * STEP}
    start = [norm.detach().clone() for norm in case.norms]
    whole = run(case, **settings)
    expected = [norm.detach().clone() for norm in case.norms]
    assert any(not torch.equal(a, b) for a, b in zip(expected, start, strict=True))

    class StopError(Exception):
        pass

    journal, said = Journal(tmp_path), []
    for stop in (1, 5):

        def watch(event, stop=stop):
            said.append(event.message)
            if event.done == stop and not event.message.startswith("resumed"):
                raise StopError

        case.restore_norms()
        with pytest.raises(StopError):
            run(case, Monitor(progress=watch), journal, **settings)
    case.restore_norms()
    again = run(case, Monitor(progress=lambda e: said.append(e.message)), journal, **settings)
    resumed = [text for text in said if text.startswith("resumed")]
    assert resumed == ["resumed at step 5 of 12"]
    assert again.outcome == whole.outcome
    for name, weight in whole.weights.items():
        assert torch.equal(again.weights[name].codes, weight.codes)
        assert torch.equal(again.weights[name].scale, weight.scale)
    assert all(torch.equal(a, b) for a, b in zip(case.norms, expected, strict=True))


def test_the_start_is_kept_where_nothing_better_comes(case):
    made = run(case, weight_rate=50.0, scale_rate=1.0, clip=0.0)
    assert made.outcome.best == 0
    for name, weight in made.weights.items():
        assert torch.equal(weight.codes, case.weights[name].codes)
        assert torch.equal(weight.scale, case.weights[name].scale)


def test_a_loss_that_is_no_number_ends_it(case):
    task = case.task()
    task.teacher.hidden[:] = math.nan
    outcome = run(case, task=task).outcome
    assert (outcome.steps, outcome.best) == (0, 0)
    assert outcome.note == "training diverged at step 1 and was ended there"


def test_minutes_become_tokens_once(case, tmp_path):
    journal = Journal(tmp_path)
    timed = run(case, journal=journal, tokens=0, minutes=0.002, evaluate_every=STEP)
    assert timed.outcome.steps >= 1
    assert journal.read("training-length").facts["tokens"] > 0
    journal.write("training-length", {}, {"tokens": 3 * STEP})
    (tmp_path / "training.safetensors").unlink()
    settings = {"evaluate_every": STEP, "tokens": 0, "minutes": 100.0}
    case.put(case.weights)
    again = run(case, journal=journal, **settings)
    assert again.outcome.steps == 3


def test_timing_leaves_no_trace(case, monkeypatch):
    plain = run(case, tokens=2 * STEP)
    monkeypatch.setattr("quantforge.train.loop._Run._affordable", timed_but_told(2 * STEP))
    case.restore_norms()
    timed = run(case, tokens=0, minutes=1.0)
    assert timed.outcome == plain.outcome
    for name, weight in plain.weights.items():
        assert torch.equal(timed.weights[name].codes, weight.codes)


def timed_but_told(tokens):
    from quantforge.train.loop import _Run

    measured = _Run._affordable

    def affordable(self):
        assert measured(self) > 0
        return float(tokens)

    return affordable


def test_recomputing_changes_no_bit_and_fixed_parameters_stay(case):
    before = [norm.detach().clone() for norm in case.norms]
    kept, again = (
        run(case, tokens=2 * STEP, recompute=every, norm_rate=0.0, scale_rate=0.0)
        for every in (0, 1)
    )
    assert kept.outcome == again.outcome
    assert all(torch.equal(a, b) for a, b in zip(case.norms, before, strict=True))
    assert all(torch.equal(w.scale, case.weights[n].scale) for n, w in kept.weights.items())


def test_the_likeliest_tokens_teach_as_the_hidden_states_do(case, tmp_path):
    def logits():
        for states in case.hidden:
            yield case.head.logits(states)

    whole = run(case, tokens=4 * STEP)
    case.restore_norms()
    teacher = stored_teacher(tmp_path / "top", "key", 64, logits)
    stored = run(case, task=case.task(teacher=teacher), tokens=4 * STEP)
    for a, b in zip(whole.outcome.points[1:], stored.outcome.points[1:], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
    # found by itself, in memory and in a file that is then read again, they are the same
    known = HiddenTeacher(hidden=case.hidden, head=case.head)
    path = tmp_path / "made"
    for made in (top_teacher(known, 5, None, "x"), *(top_teacher(known, 5, path, "x"),) * 2):
        assert torch.equal(made.tokens, teacher.tokens[..., :5])
        assert torch.allclose(made.chances, teacher.chances[..., :5], atol=1e-6)
    for k, key in ((6, "x"), (5, "y")):
        with pytest.raises(InputError, match="is of another network or text"):
            top_teacher(known, k, path, key)


def test_layers_cool_by_their_multipliers(case):
    names = list(case.weights)
    soft = [
        run(case, task=case.task(multipliers=dict.fromkeys(names, by)), tokens=STEP)
        for by in (1.0, 0.01)
    ]
    gaps = [abs(made.outcome.points[1].soft_kl - made.outcome.points[1].kl) for made in soft]
    assert gaps[1] < 0.5 * gaps[0]


def test_a_cancelled_run_leaves_the_network_as_it_was(case):
    import threading

    cancel = threading.Event()
    module = case.model.module
    kinds = {name: type(one) for name, one in module.named_modules()}
    monitor = Monitor(progress=lambda _: cancel.set(), cancel=cancel)
    with pytest.raises(CancelledError):
        run(case, monitor)
    assert {name: type(one) for name, one in module.named_modules()} == kinds
    for name, weight in case.weights.items():
        assert torch.equal(module.get_submodule(name).weight, weight.dequantize())


def test_a_full_disk_is_said_before_the_first_step(case, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    steps = []
    with pytest.raises(ResourceError, match=r"training writes 0\.00 GB to the cache"):
        run(case, Monitor(progress=steps.append), Journal(tmp_path))
    assert steps == []
