"""From networks to the canonical graph: the same function, folded, with its sites and blocks."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantforge.errors import InputError
from quantforge.vision.building import build
from quantforge.vision.network import Preprocessing
from quantforge.vision.sites import layer_grids
from quantforge.vision.streams import segment


def described(module, size=(16, 16), channels=3, **options):
    preprocessing = Preprocessing(size=size, mean=(0.0,) * channels, deviation=(1.0,) * channels)
    return build(module, preprocessing, name="test", fingerprint="0", channels=channels, **options)


def with_statistics(module):
    """BatchNorms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm):
            one.running_var.copy_(0.5 + torch.rand(one.running_var.shape, generator=generator))
            one.running_mean.copy_(torch.randn(one.running_mean.shape, generator=generator))
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.affine:
            one.weight.data.copy_(0.5 + torch.rand(one.weight.shape, generator=generator))
            one.weight.data[0] *= -1
            one.bias.data.copy_(torch.randn(one.bias.shape, generator=generator))
    return module.eval()


def equal(module, network, size=(16, 16), channels=3):
    for batch in (1, 2, 5):
        x = torch.randn(batch, channels, *size)
        with torch.no_grad():
            expected = module(x)
            made = network.graph(x)
        assert float((made - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) + 1e-5


class Zoo(nn.Module):
    """A bit of everything that classifiers hold."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(12, affine=False)
        self.dilated = nn.Conv2d(12, 6, 3, dilation=2, padding=2)
        self.even = nn.Conv2d(18, 8, 2, padding="same")
        self.lone = nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5, bias=False)
        self.head_norm = nn.BatchNorm1d(5)
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = functional.relu6(self.stem(functional.pad(x, (0, 1, 0, 1))))
        y = functional.hardswish(self.norm(self.depthwise(x)))
        y += x
        z = functional.relu(self.up_norm(self.up(y)))
        z = torch.cat([z, self.dilated(z)], 1)
        z = self.lone(functional.max_pool2d(self.even(z), 2))
        z = functional.silu(functional.adaptive_avg_pool2d(z, 1).flatten(1))
        return self.head_norm(self.head(self.drop(z))) + self.shift


def test_a_network_of_many_parts_is_the_same_function():
    module = with_statistics(Zoo())
    network = described(module)
    equal(module, network)
    names = [layer.name for layer in network.layers]
    assert names == ["stem.0", "depthwise", "up", "dilated", "even", "head"]
    rows = {layer.name: (layer.out_features, layer.in_features) for layer in network.layers}
    assert rows["depthwise"] == (8, 9)
    assert rows["up"] == (12, 16)
    assert {layer.name for layer in network.layers if layer.kind == "linear"} == {"head"}
    assert all(name for block in network.blocks for name in block.layers)
    assert [name for block in network.blocks for name in block.layers] == names
    # Folded norms leave their statistics, one that stands alone does not.
    assert set(network.statistics) == {"stem.0", "depthwise", "up", "head"}
    mean, deviation = network.statistics["stem.0"]
    assert torch.equal(mean, module.stem[1].bias)
    norm = module.stem[1]
    gain = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(deviation, gain * norm.running_var.sqrt(), rtol=1e-6)
    assert not module.training
    assert not any(p.requires_grad for p in network.graph.parameters())


def test_sites_are_behind_activations_and_shared_by_what_is_concatenated():
    network = described(with_statistics(Zoo()))
    nodes = {node.name: node for node in network.graph.graph.nodes}
    kinds = {site.node: str(nodes[site.node].target) for site in network.sites}
    assert list(kinds.values()) == [
        "pictures", "aten.relu6.default", "aten.hardswish.default", "aten.add.Tensor",
        "aten.relu.default", "dilated", "aten.silu.default",
    ]  # fmt: skip
    grids = layer_grids(network)
    # The input is padded with 0, which is on its grid.
    assert grids["stem.0"] == "pictures"
    joined = {
        site.grid for site in network.sites if kinds[site.node] in ("aten.relu.default", "dilated")
    }
    assert joined == {grids["even"]} == {grids["dilated"]}
    assert len({site.grid for site in network.sites}) == 6
    fewer = described(with_statistics(Zoo()), operands=False)
    # relu6's output is read by the depthwise layer; hardswish's by the addition alone.
    assert len(fewer.sites) == 6
    assert "hardswish" not in "".join(site.node for site in fewer.sites)


class Residual(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.one = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.one_norm = nn.BatchNorm2d(after)
        self.two = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.two_norm = nn.BatchNorm2d(after)
        self.down = nn.Identity()
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        y = functional.relu(self.one_norm(self.one(x)))
        return functional.relu(self.two_norm(self.two(y)) + self.down(x))


def test_residual_blocks_are_blocks_and_their_shortcuts_are_tied():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Residual(8, 8, 1), Residual(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    module = with_statistics(module)
    network = described(module)
    equal(module, network)
    assert [block.layers for block in network.blocks] == [
        ("0",), ("2.one", "2.two"), ("3.one", "3.two", "3.down.0"), ("6",),
    ]  # fmt: skip
    for before, after in zip(network.blocks, network.blocks[1:], strict=False):
        assert before.result == after.source
    for block in network.blocks:
        assert segment(network, block)  # needs nothing but its source
    groups = {layer.name: layer.fused_group for layer in network.layers}
    assert groups["3.down.0"] == "3.one"
    assert groups["2.two"] == "2.two"


def test_a_bottleneck_without_a_residual_is_one_block():
    part = [nn.Conv2d(8, 24, 1), nn.ReLU6(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU6(),
            nn.Conv2d(24, 8, 1)]  # fmt: skip
    module = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(*part),
                           nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))  # fmt: skip
    network = described(module.eval())
    assert [block.layers for block in network.blocks] == [("0.0",), ("1.0", "1.2", "1.4"), ("4",)]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.conv(self.norm(self.conv(x)).relu()).mean((2, 3)))


def test_a_layer_that_runs_twice_is_not_folded():
    module = with_statistics(Twice())
    network = described(module)
    equal(module, network)
    assert [layer.name for layer in network.layers] == ["conv", "head"]
    assert not network.statistics


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Branches(), "Branches cannot be exported as a graph"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "nothing to quantize"),
    ],
)
def test_what_is_no_classifier_is_refused(module, said):
    with pytest.raises(InputError, match=said) as raised:
        described(module)
    assert "\n" not in str(raised.value)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pictures):
        return self.model(pixel_values=pictures).logits


def transformers_networks():
    import transformers

    small = {"num_labels": 5}
    yield transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", **small
    )
    yield transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, **small
    )
    yield transformers.MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32, **small)
    yield transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **small)


@pytest.mark.parametrize("config", list(transformers_networks()), ids=lambda one: one.model_type)
def test_transformers_networks_are_the_same_function(config):
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config)
    module = with_statistics(Logits(model))
    network = described(module, (32, 32))
    equal(module, network, (32, 32))
    inside = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim > 1)
    assert sum(layer.numel for layer in network.layers) == inside
    assert all(layer_grids(network).values())
    assert sum(len(block.layers) for block in network.blocks) == len(network.layers)
    assert len(network.blocks) > 3
    for block in network.blocks:
        assert segment(network, block)
