"""Networks of timm and torchvision, by name, where those packages are installed.

Neither is needed by anything else here. Names are "timm:resnet18" and "torchvision:resnet18"; the
packages fetch the weights themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from quantforge.errors import InputError, ResourceError
from quantforge.foreign import malformed
from quantforge.vision.network import Preprocessing


def is_zoo_name(source: str) -> bool:
    """Whether a source names a network of one of the packages."""
    return source.partition(":")[0] in ZOOS and ":" in source


def load_zoo(source: str) -> tuple[nn.Module, Preprocessing]:
    """A pretrained network in evaluation mode, and how its pictures are prepared.

    Raises:
        ResourceError: the package is not installed.
        InputError: it has no such network, or the weights cannot be had.
    """
    package, _, name = source.partition(":")
    try:
        zoo: Any = importlib.import_module(package)
    except ImportError:
        raise ResourceError(
            f"{source} needs the package {package}: install it, or give a transformers folder"
        ) from None
    with malformed(f"{package} has no network {name} with weights"):
        module, preprocessing = ZOOS[package](zoo, name)
    return module.float().eval(), preprocessing


def _timm(timm: Any, name: str) -> tuple[nn.Module, Preprocessing]:
    module = timm.create_model(name, pretrained=True)
    said = timm.data.resolve_model_data_config(module)
    return module, Preprocessing(
        size=(int(said["input_size"][1]), int(said["input_size"][2])),
        mean=tuple(map(float, said["mean"])),
        deviation=tuple(map(float, said["std"])),
        crop=float(said["crop_pct"]),
        interpolation=str(said["interpolation"]),
    )


def _torchvision(torchvision: Any, name: str) -> tuple[nn.Module, Preprocessing]:
    models = importlib.import_module("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    said = weights.transforms()
    crop, resize = said.crop_size[0], said.resize_size[0]
    if resize < crop:
        raise InputError(f"torchvision:{name} resizes to {resize} and crops to {crop}")
    return models.get_model(name, weights=weights), Preprocessing(
        size=(int(crop), int(crop)),
        mean=tuple(map(float, said.mean)),
        deviation=tuple(map(float, said.std)),
        crop=crop / resize,
        interpolation=str(said.interpolation.value),
    )


ZOOS: Mapping[str, Callable[[Any, str], tuple[nn.Module, Preprocessing]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}
