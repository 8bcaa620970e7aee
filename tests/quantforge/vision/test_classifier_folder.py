"""Transformers' folders of image classifiers: preparation by hand, weights complete or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantforge.errors import InputError
from quantforge.vision.classifier_folder import load_classifier, preprocessing_of

CONVNEXT = {"image_processor_type": "ConvNextImageProcessor"}


def described(tmp_path, processor, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return preprocessing_of(tmp_path)


@pytest.mark.parametrize(
    ("processor", "size", "crop"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224, 0.875),
        ({"size": 256, "crop_size": 192}, 192, 0.75),
        ({"size": 256, "crop_size": 192, "do_center_crop": False}, 256, 1.0),
        ({"size": 256, "crop_size": 192, "do_resize": False}, 192, 1.0),
        ({"size": 192, "crop_size": 256}, 256, 1.0),
        ({"size": {"height": 224, "width": 224}}, 224, 1.0),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, 0.875),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.95}, 224, 224 / 235),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 384, 1.0),
        ({"size": {"shortest_edge": 224}, **CONVNEXT}, 224, 0.875),
        ({"size": 224, "feature_extractor_type": "ConvNextFeatureExtractor"}, 224, 0.875),
    ],
)
def test_sizes_and_crops_of_the_processors(tmp_path, processor, size, crop):
    made = described(tmp_path, processor)
    assert made.size == (size, size)
    assert made.crop == pytest.approx(crop)


@pytest.mark.parametrize(
    ("processor", "formula"),
    [
        ({}, lambda v: (v / 255 - 0.485) / 0.229),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, lambda v: (v / 255 - 0.5) / 0.25),
        ({"image_mean": 0.5, "image_std": 0.5}, lambda v: (v / 255 - 0.5) / 0.5),
        ({"do_normalize": False}, lambda v: v / 255),
        ({"do_normalize": False, "do_rescale": False}, lambda v: v),
        (
            {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
            lambda v: v / 127.5 - 1,
        ),
        ({"include_top": True}, lambda v: ((v / 255 - 0.485) / 0.229) / 0.229),
    ],
)
def test_normalisation_is_the_processors(tmp_path, processor, formula):
    made = described(tmp_path, processor)
    for value in (0.0, 100.0, 255.0):
        ours = (value / 255 - made.mean[0]) / made.deviation[0]
        assert ours == pytest.approx(formula(value), abs=1e-9)


def test_grey_pictures_and_filters(tmp_path):
    made = described(tmp_path, {"resample": 2, "image_mean": [0.1]}, num_channels=1)
    assert (len(made.mean), len(made.deviation), made.interpolation) == (1, 1, "bilinear")
    assert described(tmp_path, {"size": {"height": 8, "width": 6}}).size == (8, 6)
    assert described(tmp_path, {}).interpolation == "bicubic"


@pytest.mark.parametrize(
    ("processor", "part"),
    [
        ({"size": {"longest_edge": 8}}, "size is no height"),
        ({"size": 0}, "size is no height"),
        ({"size": 1 << 20}, "size is no height"),
        ({"crop_size": "a"}, "crop_size is no height"),
        ({"crop_pct": 2}, "crop_pct is 2"),
        ({"crop_pct": "x"}, "crop_pct is 'x'"),
        ({"image_mean": [0.5]}, "image_mean must be 3 numbers"),
        ({"image_std": [0.0] * 3}, "must be positive"),
        ({"rescale_factor": -1}, "must be positive"),
        ({"resample": 9}, "resample is 9"),
    ],
)
def test_malformed_processors_are_refused(tmp_path, processor, part):
    with pytest.raises(InputError, match=part):
        described(tmp_path, processor)


@pytest.fixture(scope="module")
def model():
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config).eval()


def test_a_folder_gives_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    loaded = load_classifier(tmp_path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), model(pixel_values=x).logits)
    with pytest.raises(InputError, match="preprocessor_config"):
        preprocessing_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop("classifier.1.weight"), "lacks weights"),
        (lambda t: t.update({"more": torch.ones(2)}), "has unknown weights"),
        (lambda t: t["classifier.1.bias"].fill_(torch.nan), "finite"),
    ],
)
def test_other_weights_are_refused(model, tmp_path, change, part):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=part):
        load_classifier(tmp_path)


def test_pickled_weights_and_other_tasks_are_refused(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights"):
        load_classifier(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="cannot be loaded as an image classifier"):
        load_classifier(tmp_path)
