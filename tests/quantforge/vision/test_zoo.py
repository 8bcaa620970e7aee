"""timm and torchvision as far as this side of them goes: what is asked and what is read."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from quantforge.errors import InputError, ResourceError
from quantforge.vision.network import Preprocessing
from quantforge.vision.zoo import is_zoo_name, load_zoo

MEAN, DEVIATION = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
EXPECTED = Preprocessing(
    size=(224, 224), mean=MEAN, deviation=DEVIATION, crop=0.875, interpolation="bilinear"
)


def timm() -> ModuleType:
    def create_model(name, *, pretrained):
        if name != "small" or not pretrained:
            raise RuntimeError(f"Unknown model ({name})")
        return nn.Linear(2, 2).double()

    module = ModuleType("timm")
    said = {"input_size": (3, 224, 224), "mean": MEAN, "std": DEVIATION, "crop_pct": 0.875}
    said["interpolation"] = "bilinear"
    module.create_model = create_model
    module.data = SimpleNamespace(resolve_model_data_config=lambda _: said)
    return module


def torchvision_models() -> ModuleType:
    kind = SimpleNamespace(value="bilinear")
    said = SimpleNamespace(
        crop_size=[224], resize_size=[256], mean=MEAN, std=DEVIATION, interpolation=kind
    )
    default = SimpleNamespace(transforms=lambda: said)
    module = ModuleType("torchvision.models")

    def get_model_weights(name):
        if name != "small":
            raise ValueError(f"Unknown model {name}")
        return SimpleNamespace(DEFAULT=default)

    module.get_model_weights = get_model_weights
    module.get_model = lambda name, *, weights: nn.Linear(2, 2) if weights is default else None
    return module


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_names_become_networks_with_their_preparation(monkeypatch, package):
    monkeypatch.setitem(sys.modules, "timm", timm())
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision_models())
    module, preprocessing = load_zoo(f"{package}:small")
    assert preprocessing == EXPECTED
    assert not module.training
    assert next(module.parameters()).dtype.itemsize == 4
    with pytest.raises(InputError, match=f"{package} has no network large"):
        load_zoo(f"{package}:large")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_one_line(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ResourceError, match=f"needs the package {package}"):
        load_zoo(f"{package}:resnet18")


def test_what_is_a_name():
    assert is_zoo_name("timm:resnet18")
    assert not any(map(is_zoo_name, ["timm", "other:resnet18", "timm/resnet18", "./timm"]))
