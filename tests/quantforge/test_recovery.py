"""Training as a part of `quantize`: what it writes, never worse, and going on after a break."""

import copy
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import quantforge
from quantforge.recovery import layer_multipliers
from quantforge.testing import markov_tokens, save_tiny_checkpoint, tiny_llama, train
from quantforge.train.config import TrainingConfig

LENGTH, BUDGET = 32, "2.3bit"
SETTINGS = {
    "search.bits": [2, 3],
    "search.group_sizes": [32, -1],
    "search.refine": 0,
    "evaluate.curve_bits": [2],
    "evaluate.curve_windows": 4,
    "evaluate.tokens": 2,
    "quantize.rounding.steps": 0,
    "quantize.tuning.steps": 2,
    "training.tokens": 12 * 4 * LENGTH,
    "training.batch": 4,
    "training.evaluate_every": 4 * 4 * LENGTH,
    "training.weight_rate": 0.005,
    "training.scale_rate": 0.005,
}


@pytest.fixture(scope="module")
def trained():
    return train(tiny_llama(blocks=1), steps=80)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One for the module: the second run of a network finds its measurement."""
    folder = tmp_path_factory.getbasetemp() / "recovery-cache"
    monkeypatch.setenv("QUANTFORGE_CACHE", str(folder))


def quantized(module, output=None, *, settings=SETTINGS, **training):
    given = settings | {f"training.{key}": value for key, value in training.items()}
    batches = [markov_tokens(4, LENGTH, seed=seed) for seed in range(10)]
    return quantforge.quantize(
        module, budget=BUDGET, calibration=batches, output=output, settings=given
    )


@pytest.mark.parametrize("sequential", [True, False])
def test_what_was_trained_is_what_is_written(trained, tmp_path, sequential):
    module = copy.deepcopy(trained)
    settings = SETTINGS | {"quantize.sequential": sequential}
    if not sequential:  # blocks too, once
        settings["training.block_steps"] = 4
    report = quantized(module, tmp_path / "out", settings=settings)
    training = report.training
    assert training.kept
    assert (training.tokens, training.steps) == (12 * 4 * LENGTH, 12)
    assert [point.step for point in training.points] == [0, 4, 8, 12]
    assert training.points[training.best].kl < 0.85 * training.points[0].kl
    assert report.timings["train"] > 0
    assert ("train blocks" in report.timings) != sequential
    # what blocks gained may leave nothing to tuning, which then says so
    assert report.warnings == () or not sequential
    assert all(text.endswith("and was undone") for text in report.warnings)
    loaded = quantforge.load(tmp_path / "out")
    tokens = markov_tokens(2, LENGTH, seed=99)
    with torch.no_grad():
        written, kept = loaded(tokens).logits, module(tokens).logits
    assert torch.allclose(written, kept, atol=1e-4)


def test_training_that_does_not_help_is_undone(trained):
    plain, spoilt = copy.deepcopy(trained), copy.deepcopy(trained)
    off = {key: value for key, value in SETTINGS.items() if not key.startswith("training.")}
    before = quantized(plain, settings=off)
    after = quantized(spoilt, weight_rate=40.0, clip=0.0)
    assert before.training is None
    assert (after.training.kept, after.training.best) == (False, 0)
    assert after.warnings == ("training did not lower the held-out KL and was undone",)
    assert after.quality == before.quality
    for one, other in zip(plain.parameters(), spoilt.parameters(), strict=True):
        assert torch.equal(one, other)


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "run.json"
    }


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
    source = save_tiny_checkpoint(tmp_path / "tiny", blocks=1, steps=40)
    settings = SETTINGS | {"calibration.sequences": 24, "calibration.sequence_length": LENGTH}
    settings["training.teacher_top_k"] = 16
    said, times = [], []

    class StopError(Exception):
        pass

    def run(output, stop=None, look=None):
        def watch(event):
            said.append((event.stage, event.message))
            if look is not None and event.stage == "train":
                look()
            if stop is not None and (event.stage, event.done) == ("train", stop):
                raise StopError

        return quantforge.quantize(
            source, budget=BUDGET, calibration="pydoc", output=tmp_path / output,
            settings=settings, progress=watch,
        )  # fmt: skip

    run("whole")
    with pytest.raises(StopError):
        run("broken", stop=6)
    # the teacher is noted beside the state, and the run that goes on takes it
    (noted,) = Path(os.environ["QUANTFORGE_CACHE"]).rglob("teacher-16.safetensors")
    before = noted.stat().st_mtime_ns
    run("broken", look=lambda: times.append(noted.stat().st_mtime_ns))
    assert set(times) == {before}
    assert not noted.exists()
    messages = [message for stage, message in said if stage == "train" and message]
    # before the break, and after it
    assert messages[4] == "resumed at step 5 of 12"
    assert messages[3] == messages[0]
    assert messages[5:] == messages[1:3]
    assert all(message.startswith("held-out loss 0.0") for message in messages[:4])
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "broken")


def test_layers_of_large_trace_harden_earlier_and_with_the_other_sign_later():
    names = ["small", "middle", "large"]
    evidence = SimpleNamespace(
        layers=[SimpleNamespace(name=name) for name in ("large", "small", "middle", "other")],
        traces=torch.tensor([[900.0, 1.0, 10.0, 5.0], [1100.0, 1.0, 10.0, 5.0]]),
    )
    config = TrainingConfig(tokens=1, alpha=0.5)
    found, note = layer_multipliers(names, lambda: evidence, config)
    assert note == ""
    assert 1.0 > found["small"] > found["middle"] > found["large"] > 0.6
    other, _ = layer_multipliers(names, lambda: evidence, TrainingConfig(tokens=1, alpha=-0.5))
    for name in names:
        assert other[name] == pytest.approx(1 / found[name])
    assert layer_multipliers(names, None, TrainingConfig(tokens=1)) == ({}, "")
    multipliers, note = layer_multipliers(names, None, config)
    assert (multipliers, "training.alpha did nothing" in note) == ({}, True)
