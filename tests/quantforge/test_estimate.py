"""Work counted in closed form for a network of one block."""

import copy
from dataclasses import replace

import pytest
import torch

from quantforge import estimate as module
from quantforge.errors import ResourceError
from quantforge.estimate import (
    Shape,
    added_bytes,
    estimate,
    forward_rate,
    gradient_adds,
    multiply_adds,
    require_memory,
    states_bytes,
)
from quantforge.load.huggingface import from_module
from quantforge.parallel import Share
from quantforge.recipe import Recipe
from quantforge.testing import markov_tokens, tiny_llama
from quantforge.types import CalibrationSet

# q, k, v: 64, 32 and 32 rows of 64; o: 64 of 64; gate and up: 128 of 64; down: 64 of 128.
WEIGHTS = 64 * 128 + 64 * 64 + 2 * 128 * 64 + 64 * 128
HEAD = 96 * 64
FITTING, LENGTH, HELD_OUT, CURVE = 14 * 24, 24, 4 * 24, 2 * 24
PASSES = FITTING * WEIGHTS
GRAMS = FITTING * (3 * 64**2 + 128**2)
FACTORS = 3 * 64**3 + 128**3
ROWS = (128 + 64 + 256) * 64**2 + 64 * 128**2
FEEDBACK = (64**2 + 2 * 32**2) * 64 + 64**2 * 64 + 2 * 128**2 * 64 + 64**2 * 128
SCORED = (3 * CURVE + 2 * HELD_OUT) * (WEIGHTS + 2 * HEAD)


@pytest.fixture(scope="module")
def model():
    return from_module(tiny_llama(blocks=1))


@pytest.fixture(scope="module")
def calibration():
    tokens = markov_tokens(18, LENGTH)
    return CalibrationSet(fitting=tokens[:14], held_out=tokens[14:], description="", fingerprint="")


def recipe(**quantize):
    steps = quantize.pop("steps", 0)
    tuning = {"steps": steps, "batch": 2} if steps else {"steps": 0}
    training = quantize.pop("training", {})
    return Recipe.model_validate(
        {
            "quantize": {"tuning": tuning, **quantize},
            "training": training,
            "evaluate": {"curve_windows": 2},
        }
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sequential": False}, 0),
        ({"method": "rtn"}, 2 * PASSES + GRAMS + FACTORS),
        (
            {"method": "gptq", "output_feedback": False},
            2 * PASSES + GRAMS + FACTORS + ROWS,
        ),
        ({"method": "gptq"}, 2 * PASSES + GRAMS + FACTORS + ROWS + FEEDBACK),
        ({}, 3 * PASSES + 2 * GRAMS + FACTORS + ROWS + FEEDBACK),
        (
            {"true_sequential": True},
            6 * PASSES + 2 * GRAMS + FACTORS + ROWS + FEEDBACK,
        ),
        (
            {"method": "gptq", "rounding": {"steps": 6, "share": 0.5, "check_every": 4}},
            3 * PASSES
            + GRAMS
            + FACTORS
            + ROWS
            + FEEDBACK
            + (4 * 6 * LENGTH + 3 * HELD_OUT) // 2 * WEIGHTS,
        ),
        ({"sequential": False, "steps": 5}, 4 * 5 * 2 * LENGTH * (WEIGHTS + HEAD)),
    ],
)
def test_multiply_adds_in_closed_form(model, calibration, options, expected):
    chosen = recipe(**options)
    shape = Shape.of(model, calibration, chosen)
    assert (shape.weights, shape.head, shape.hidden) == (WEIGHTS, HEAD, 64)
    assert multiply_adds(shape, chosen) == expected + SCORED


def test_memory_in_closed_form(model, calibration):
    shape = Shape.of(model, calibration, recipe())
    assert added_bytes(shape, recipe(sequential=False)) == WEIGHTS
    streams = 4 * FITTING * 64
    plain = recipe(method="gptq", output_feedback=False)
    assert added_bytes(shape, plain) == WEIGHTS + streams + 24 * 128**2
    assert added_bytes(shape, recipe()) == WEIGHTS + 2 * streams + 24 * 2 * 128**2
    learned = recipe(rounding={"steps": 1})
    walking = 2 * 4 * (FITTING + HELD_OUT) * 64
    assert added_bytes(shape, learned) == 13 * WEIGHTS + walking + 24 * 2 * 128**2
    taught = 2 * FITTING * 64
    kept = 4 * LENGTH * (64 + 3 * 64 + 64 + 2 * 64 + 128 + 128 + 64 + 256 + 64)
    tuning = 2 * HEAD + 12 * 128 * 96 + kept
    blocks = 2 * streams + 24 * 2 * 128**2
    assert added_bytes(shape, recipe(steps=5)) == WEIGHTS + taught + max(blocks, tuning)
    # training: 16 bytes a weight, and twice 2 of what it is used as, less the 4 of the layer's own
    trained = recipe(sequential=False, training={"tokens": 1, "start": "dequantized"})
    assert added_bytes(shape, trained) == WEIGHTS + taught + tuning + 16 * WEIGHTS
    # what is in scratch files drops out: integers, originals and the layers' own weights
    files = replace(shape, in_files=True)
    assert added_bytes(files, recipe(steps=5)) == taught + max(blocks, tuning)
    assert added_bytes(files, trained) == taught + tuning + 20 * WEIGHTS
    assert added_bytes(files, learned) == added_bytes(shape, learned) - WEIGHTS


def test_a_run_that_memory_cannot_hold_is_refused_with_what_to_change(
    model, calibration, monkeypatch
):
    chosen = recipe(rounding={"steps": 1})
    wanted = added_bytes(Shape.of(model, calibration, chosen), chosen)
    monkeypatch.setattr(module, "available_bytes", lambda processes: wanted // processes)
    require_memory(model, calibration, chosen)
    monkeypatch.setattr(module, "available_bytes", lambda _: None)
    require_memory(model, calibration, chosen)
    monkeypatch.setattr(module, "available_bytes", lambda processes: 2 * wanted // processes - 1)
    monkeypatch.setattr(model, "share", Share(count=2, here=2))
    with pytest.raises(ResourceError, match=r"each of 2 processes, .* start fewer processes"):
        require_memory(model, calibration, chosen)
    monkeypatch.setattr(model, "share", Share(count=2))  # the other one is on another machine
    require_memory(model, calibration, chosen)
    monkeypatch.setattr(module, "available_bytes", lambda _: wanted - 1)
    with pytest.raises(ResourceError, match=r"sequences lower or set quantize\.rounding\.steps=0"):
        require_memory(model, calibration, chosen)
    monkeypatch.setattr(module, "available_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"0\.00 GB are left: .* or leave training out"):
        require_memory(model, calibration, recipe(training={"tokens": 1}))


def test_the_rate_is_measured_on_the_network_and_leaves_it_alone(model, calibration):
    before = copy.deepcopy(model.module.state_dict())
    rate = forward_rate(model, calibration, recipe())
    assert 1e5 < rate < 1e15
    found = estimate(model, calibration, recipe())
    assert found.seconds == pytest.approx(found.multiply_adds / found.rate)
    assert found.memory_bytes > 50_000_000  # the interpreter and torch are part of it
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_disk_that_states_take_is_what_is_written(model, calibration, precision):
    """Blocks' entrances, noted gradients, output grams, tokens, the head's input; no headers."""
    sequences = 6
    changes = {
        "calibrate": {"gradient_sequences": sequences, "precision": precision},
        "quantize": {"token_weighting": 0.5},
    }
    asked = Recipe.model_validate(changes)
    shape = Shape.of(model, calibration, asked)
    size = 2 if precision == "bfloat16" else 4
    entrances = sequences * LENGTH * 64 * (size + 4)  # of one block
    grams = 2 * (2 * 64**2 + 2 * 32**2 + 2 * 128**2 + 64**2)
    squares = 2 * len(model.layers) * FITTING
    assert states_bytes(shape, asked) == entrances + grams + squares + 2 * FITTING * 64
    alone = asked.model_copy(
        update={
            "quantize": asked.quantize.model_copy(
                update={"output_feedback": False, "token_weighting": 0.0}
            )
        }
    )
    assert states_bytes(shape, alone) == entrances + 2 * FITTING * 64
    assert states_bytes(shape, alone, hidden=False) == entrances
    assert states_bytes(shape, asked, gradients=False) == 2 * FITTING * 64
    assert states_bytes(shape, asked, gradients=False, hidden=False) == 0


def test_gradients_that_are_still_to_be_taken_are_counted(model, calibration):
    changes = {"calibrate": {"gradient_sequences": 6}, "quantize": {"token_weighting": 0.5}}
    asked = Recipe.model_validate(changes)
    shape = Shape.of(model, calibration, asked)
    assert gradient_adds(shape, asked) == FITTING * (3 * WEIGHTS + 2 * HEAD)
    alone = Recipe.model_validate({"calibrate": {"gradient_sequences": 6}})
    assert gradient_adds(shape, alone) == 6 * LENGTH * (3 * WEIGHTS + 2 * HEAD)
    added = estimate(model, calibration, asked, gradients=True).multiply_adds
    assert added - estimate(model, calibration, asked).multiply_adds == gradient_adds(shape, asked)
