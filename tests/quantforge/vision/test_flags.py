"""Every named option of `quantize` works for a convolutional network or says what to do."""

import numpy as np
import pytest
import torch
from torch import nn

from quantforge import pipeline
from quantforge.cli.app import application
from quantforge.cli.options import Estimator
from quantforge.cli.outcome import run
from quantforge.errors import UsageError
from quantforge.vision import entry
from quantforge.vision.flags import ESTIMATORS, REFUSED, vision_settings
from quantforge.vision.recipe import VisionRecipe

MODEL = "efficientnet-lite0"
RUN = ("quantize", MODEL, "--budget", "4bit")


@pytest.mark.parametrize("name", ["fisher", "hawq", "hawq-v2", "measured"])
def test_sensitivity_is_a_key_of_the_search(name, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(entry, "quantize", lambda model, **options: seen.update(options))
    assert run(application(), [*RUN, "--sensitivity", name, "--json"]) == 0
    assert seen["settings"] == {"search.sensitivity": "hawq" if "hawq" in name else name}
    assert VisionRecipe.model_validate({"search": {"sensitivity": ESTIMATORS[name]}})
    capsys.readouterr()


def test_measured_sensitivities_go_through_a_whole_plan():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    sizes = {"calibration.count": 16, "calibration.held_out": 8}
    losses = []
    for key in ("calibrate.estimator", "search.sensitivity"):
        report = pipeline.plan(
            module, budget="7bit", calibration=torch.randn(24, 1, 12, 12,
            generator=torch.Generator().manual_seed(1)), settings={**sizes, key: "measured"},
        )  # fmt: skip
        losses.append(report.predicted_loss)
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0])


OPTIONS = {
    "--sensitivity": ("gram", "give fisher, hawq"),
    "--server": ("vllm", "quantforge convert writes ONNX"),
    "--tp": ("2", "leave it out"),
    "--include-embeddings": ("8bit", "search.edges"),
    "--latency-device": ("a100", "timed on this machine"),
    "--train-minutes": ("3", "training.steps"),
    "--plan": ("plan.json", "give a budget instead"),
    "--device": ("cuda", "on the cpu"),
    "--fresh": (None, "every run starts over"),
    "--trust-remote-code": (None, "leave tokenizer and --trust-remote-code out"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["quantize", "plan"])
def test_what_is_of_language_models_says_what_to_do(name, option, capsys):
    value, words = OPTIONS[option]
    if (name, option) == ("plan", "--train-minutes"):
        return
    given = [option] if value is None else [option, value]
    assert run(application(), [name, *RUN[1:], *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert "unknown key" not in captured.err


def test_no_option_of_quantize_is_forgotten(monkeypatch):
    """Keys that named options set are keys of this recipe, or are spoken of."""
    from quantforge.recipe import setting_keys

    named = {"model", "calibrate.estimator", "search.server", "search.tensor_parallel",
             "embeddings.include", "device", "training.minutes", "activations.bits"}  # fmt: skip
    known = set(setting_keys(VisionRecipe)) | set(REFUSED) | {"calibrate.estimator"}
    assert named <= known
    assert set(ESTIMATORS) <= {one.value for one in Estimator}
    with pytest.raises(UsageError, match="frontiers are of language models"):
        pipeline.pareto(MODEL)
    for command, options in ((pipeline.curvature, {}), (pipeline.profile, {"output": "x.json"})):
        with pytest.raises(UsageError, match="is a convolutional network"):
            command(MODEL, **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="in one process"):
        vision_settings({})
