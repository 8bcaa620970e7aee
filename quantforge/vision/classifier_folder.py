"""Image classifiers in transformers' folders: the network, and how its pictures are prepared.

`preprocessor_config.json` says the second in the ways of several processors:

- `crop_size` beside `size`: resize the short side to `size`, cut out the middle `crop_size`
  (MobileNetV2, and what was exported from torchvision);
- `crop_pct` or a ConvNeXt processor (ResNet, RegNet and ConvNeXt have it): below 384 pixels resize
  the short side to size / crop_pct and cut out the middle, from 384 on no crop;
- `size` alone: resize to it (ViT's processor).

A processor that resizes to a square without regard to the picture's shape gets the middle square
here instead. Normalisation is (value · factor - mean) / deviation, twice by the deviation where
EfficientNet's processor says `include_top`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.foreign import malformed
from quantforge.load.huggingface import check_finite
from quantforge.load.weights import read_config, read_json_object, weight_files
from quantforge.load.wording import some
from quantforge.silence import quiet
from quantforge.vision.network import Preprocessing

PROCESSOR_FILE = "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Pillow's numbers of its filters, as configurations write them.
FILTERS: Mapping[int, str] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming",
}  # fmt: skip
UNCROPPED_FROM = 384  # ConvNeXt's processor crops smaller pictures only
CROP_SHARE = 224 / 256
LARGEST_SIDE = 4096


def preprocessing_of(folder: Path) -> Preprocessing:
    """From a picture to the input of the network in a folder.

    Raises:
        InputError: the processor's configuration is missing, malformed or of an unknown form.
    """
    path = folder / PROCESSOR_FILE
    said = read_json_object(path)
    channels = _channels(folder)
    size, crop = _size_and_crop(said, path)
    factor = _number(said, "rescale_factor", 1 / 255, path) * 255
    if not said.get("do_rescale", True):
        factor = 255.0
    offset = 1.0 if said.get("rescale_offset", False) else 0.0
    mean, deviation = (0.0,) * channels, (1.0,) * channels
    if said.get("do_normalize", True):
        mean = _per_channel(said, "image_mean", IMAGENET_MEAN, channels, path)
        deviation = _per_channel(said, "image_std", IMAGENET_DEVIATION, channels, path)
        if said.get("include_top", False):
            deviation = tuple(one * one for one in deviation)
    if factor <= 0 or any(one <= 0 for one in deviation):
        raise InputError(f"{path}: rescale_factor and image_std must be positive")
    number = said.get("resample", 3)
    if number not in FILTERS:
        raise InputError(f"{path}: resample is {number!r}, expected one of {sorted(FILTERS)}")
    return Preprocessing(
        size=size,
        mean=tuple((one + offset) / factor for one in mean),
        deviation=tuple(one / factor for one in deviation),
        crop=crop,
        interpolation=FILTERS[number],
    )


class Classifier(nn.Module):
    """A transformers classifier as a function of pictures alone, which returns logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        """[n, channels, h, w] → [n, classes]."""
        logits: Tensor = self.model(pixel_values=pictures).logits
        return logits


def load_classifier(folder: Path) -> Classifier:
    """The network of a folder in float32 and evaluation mode; its own code is never run.

    Raises:
        InputError: weights are missing, pickled, quantized, truncated, superfluous or not finite,
            or transformers knows no image classifier of this kind.
    """
    from transformers import AutoModelForImageClassification

    weight_files(folder)
    with malformed(f"{folder} cannot be loaded as an image classifier"), quiet():
        model, loading = AutoModelForImageClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown")):
        if names := set(loading.get(kind) or ()):
            raise InputError(f"{folder} {verb} weights {some(names)}: get the checkpoint again")
    if loading.get("mismatched_keys"):
        raise InputError(f"{folder} has weights of other shapes than its config.json says")
    check_finite(model, str(folder))
    return Classifier(model).eval()


def _channels(folder: Path) -> int:
    """Channels of the input; 3 where the configuration does not say."""
    channels = read_config(folder).get("num_channels", 3)
    if not isinstance(channels, int) or not 1 <= channels <= 3:
        raise InputError(f"{folder / 'config.json'}: num_channels is {channels!r}, expected 1 to 3")
    return channels


def _size_and_crop(said: Mapping[str, Any], path: Path) -> tuple[tuple[int, int], float]:
    """Height and width of the input, and the share of the short side that it shows."""
    size = _sides(said.get("size", 224), "size", path)
    if "crop_size" in said and said.get("do_center_crop", True):
        inner = _sides(said["crop_size"], "crop_size", path)
        if not said.get("do_resize", True):
            return inner, 1.0
        # What is larger than the resized picture is padded by the processor; here it is all of it.
        return inner, min(1.0, max(inner[0] / size[0], inner[1] / size[1]))
    kind = str(said.get("image_processor_type", said.get("feature_extractor_type", "")))
    if "crop_pct" not in said and "convnext" not in kind.lower():
        return size, 1.0
    share = _number(said, "crop_pct", CROP_SHARE, path)
    if not 0 < share <= 1:
        raise InputError(f"{path}: crop_pct is {share}, expected a share of at most 1")
    edge = min(size)
    return size, edge / int(edge / share) if edge < UNCROPPED_FROM else 1.0


def _sides(value: Any, key: str, path: Path) -> tuple[int, int]:
    """Height and width as processors write them: a number, the shortest edge, or both."""
    sides = (value, value)
    if isinstance(value, Mapping):
        short = value.get("shortest_edge")
        sides = (value.get("height", short), value.get("width", short))
    elif isinstance(value, list) and len(value) == 2:
        sides = (value[0], value[1])
    if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise InputError(f"{path}: {key} is no height and width of 1 to {LARGEST_SIDE}")
    return sides


def _number(said: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = said.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{path}: {key} is {value!r}, expected a number")
    return float(value)


def _per_channel(
    said: Mapping[str, Any], key: str, default: tuple[float, ...], channels: int, path: Path
) -> tuple[float, ...]:
    """One number a channel; a single number is that of all."""
    value = said.get(key)
    value = list(default[:channels]) if value is None else value
    numbers = value if isinstance(value, list) else [value] * channels
    if len(numbers) != channels or not all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in numbers
    ):
        raise InputError(f"{path}: {key} must be {channels} numbers")
    return tuple(map(float, numbers))
