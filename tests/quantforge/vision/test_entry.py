"""The commands on a small classifier: from its folder and pictures to a folder that runs."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from quantforge import pipeline
from quantforge.errors import InputError, UsageError
from quantforge.vision.checkpoint import load_network, load_vision
from quantforge.vision.entry import compile_network, takes
from quantforge.vision.network import Simulation
from quantforge.vision.outcome import VisionReport
from quantforge.vision.sources import open_memory

FAST = {"calibration.count": 24, "calibration.held_out": 16, "reconstruction.steps": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of transformers whose BatchNorms have seen something."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
    )
    model = transformers.ResNetForImageClassification(config).train()
    for _ in range(8):
        model(pixel_values=torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("model") / "tiny-resnet"
    model.eval().save_pretrained(path)
    said = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
            "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pixels with labels."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    pixels = generator.integers(0, 256, (48, 36, 36, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=generator.integers(0, 6, 48))
    return path


def test_a_folder_becomes_a_folder_that_runs(folder, pictures, tmp_path):
    output = tmp_path / "out"
    report = pipeline.quantize(
        folder, budget="4.5bit", calibration=pictures, output=output, settings=FAST
    )
    assert isinstance(report, VisionReport)
    assert report.stored_bits <= 4.5
    assert report.output == str(output)
    assert report.quality.count == 16
    assert report.quality.accuracy is not None
    assert {point.name for point in report.curve} >= {"plan", "uniform 4b-pc-a8"}
    file = output / "model.safetensors"
    assert report.weight_bytes == file.stat().st_size
    counted = sum(
        load_network(output)
        .weights[layer.name]
        .spec.stored_bits(len(bias), layer.weights // len(bias))
        for layer in report.layers
        for bias in [load_network(output).biases[layer.name]]
    )
    assert counted / sum(layer.weights for layer in report.layers) == pytest.approx(
        report.stored_bits
    )
    # What runs packed is what was measured, and what is read back.
    network = load_network(output)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = Simulation(network).run(x)
    assert torch.allclose(load_vision(output)(x), expected, atol=0.05 * float(expected.abs().max()))
    page = (output / "report.html").read_text(encoding="utf-8")
    for text in ("tiny-resnet", "Held-out agreement", "uniform 4b-pc-a8", "<svg"):
        assert text in page
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    assert plan["stored_bits"] == report.stored_bits
    assert set(plan["activations"].values()) == {8}


def test_the_same_seed_gives_the_same_bytes(folder, pictures, tmp_path):
    names = ("model.safetensors", "graph.json", "plan.json", "report.html")
    kept = []
    for run in ("a", "b"):
        pipeline.quantize(
            folder, budget="4bit", calibration=pictures, output=tmp_path / run, settings=FAST
        )
        kept.append([(tmp_path / run / name).read_bytes() for name in names])
    assert kept[0] == kept[1]


def test_without_pictures_they_are_made_from_the_networks_statistics(folder, tmp_path):
    report = pipeline.plan(
        folder, budget="5bit", output=tmp_path / "plan",
        settings={"calibration.count": 8, "calibration.held_out": 4},
    )  # fmt: skip
    assert "statistics" in report.calibration or "made" in report.calibration
    assert report.weight_bytes == 0
    assert (tmp_path / "plan" / "plan.json").is_file()


def test_a_network_in_memory_comes_with_its_pictures():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = torch.randn(40, 1, 12, 12)
    made, report = compile_network(
        module, x, budget="5bit", labels=torch.zeros(40, dtype=torch.int64), settings=FAST
    )
    assert report.quality.count == 16
    assert set(made.weights) == {"0", "3", "7"}
    assert takes(module)
    with pytest.raises(UsageError, match="needs an output folder"):
        pipeline.quantize(module, budget="4bit", calibration=x)
    with pytest.raises(UsageError, match="needs its pictures"):
        pipeline.plan(module, budget="4bit")


def test_networks_of_one_class_have_keys_of_their_own():
    x = torch.randn(4, 1, 12, 12)
    keys = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        keys.add(open_memory(module.eval(), x, operands=True).network.fingerprint)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"budget": None}, UsageError, "no budget"),
        ({"budget": "ppl:+2%"}, UsageError, "is a classifier"),
        ({"budget": "vram:8GB@4096"}, UsageError, "no keys and values"),
        ({"budget": "4bit", "calibration": "nowhere.npz"}, InputError, "nowhere.npz"),
        ({"budget": "4bit", "settings": {"calibration.held_out": 48}}, InputError, "too few"),
        ({"budget": "4bit", "settings": {"activations.bits": [9]}}, UsageError, "activations.bits"),
        ({"budget": "4bit", "device": "cuda"}, UsageError, "on the cpu"),
        ({"budget": "4bit", "trust_remote_code": True}, UsageError, "--trust-remote-code"),
        ({"budget": "4bit", "plan": {"a": "4b-pc"}}, UsageError, "plan of one's own"),
    ],
)
def test_wrong_input_is_one_line(folder, pictures, tmp_path, arguments, error, said):
    given = {"calibration": pictures, "output": tmp_path / "out", **arguments}
    given["settings"] = {**FAST, **arguments.get("settings", {})}
    with pytest.raises(error, match=said) as raised:
        pipeline.quantize(folder, **given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_activations_are_of_convolutional_networks_alone():
    with pytest.raises(UsageError, match="convolutional networks alone"):
        pipeline.quantize("llama", budget="3bit", settings={"activations.bits": [8]})
