"""What used to become another function, or was refused too late: each network as its graph."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from quantforge.errors import InputError
from quantforge.types import QuantSpec
from quantforge.vision.building import build
from quantforge.vision.checkpoint import load_network, load_vision, save_vision
from quantforge.vision.compensation import quantize_layers
from quantforge.vision.network import Preprocessing, Simulation
from quantforge.vision.ranges import activation_grids, observe
from quantforge.vision.sites import layer_grids
from quantforge.vision.testing import quantized as rounded

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def described(module):
    preprocessing = Preprocessing(size=(8, 8), mean=(0.0,) * 3, deviation=(1.0,) * 3)
    return build(module.eval(), preprocessing, name="test", fingerprint="0")


def difference(module, network):
    """Largest of the results, relative, for several numbers of pictures."""
    with torch.no_grad():
        pairs = [(module(X[:count]), network.graph(X[:count])) for count in (1, 2, 5)]
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)


def survives(network, folder):
    """Quantized to 8 bits, saved and read: how far its results are from the float ones."""
    histograms = observe(network, [X])
    plan = {layer.name: QuantSpec(8) for layer in network.layers}
    quantized = quantize_layers(network, [X], plan, activation_grids(histograms, 8))
    save_vision(quantized, folder)
    with torch.no_grad():
        expected, simulated = network.graph(X), Simulation(load_network(folder)).run(X)
        packed = load_vision(folder)(X)
    assert float((packed - simulated).abs().max()) < 0.1 * float(expected.abs().max())
    return float((simulated - expected).abs().max() / expected.abs().max())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Shared(nn.Module):
    """One kernel, once with every option of its own."""

    def __init__(self, second):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)
        self.other, self.second = nn.Parameter(torch.ones(3)), second

    def forward(self, x):
        bias = None if self.second == {"bias": None} else self.conv.bias
        options = {} if "bias" in self.second else self.second
        if self.second == {"bias": 1}:
            bias = self.other
        x = functional.conv2d(self.conv(x), self.conv.weight, bias, **{"padding": 1, **options})
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize(
    "second",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"bias": None}, {"bias": 1}],
    ids=str,
)
def test_a_weight_used_in_two_ways_is_two_layers(second):
    module = Shared(second)
    network = described(module)
    assert difference(module, network) < 1e-5
    assert [layer.name for layer in network.layers] == ["conv", "conv_2", "head"]


def test_a_weight_used_twice_in_one_way_is_one_layer_that_is_saved(tmp_path):
    module = Shared({"padding": 1})
    network = described(module)
    assert [layer.name for layer in network.layers] == ["conv", "head"]
    assert difference(module, network) < 1e-5
    assert survives(network, tmp_path / "saved") < 0.1


class Liar(nn.Module):
    """Computes something else while it is exported."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x):
        y = self.head(x.flatten(1))
        return y * 2 if torch.compiler.is_compiling() else y


def test_a_graph_that_is_another_function_is_refused():
    with pytest.raises(InputError, match=r"differ by up to 1 of the largest") as raised:
        described(Liar())
    assert "\n" not in str(raised.value)


class NormBehindLinear(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, width), nn.BatchNorm1d(6)
        self.head = nn.Linear(6 * width, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return self.head(self.norm(self.linear(x.flatten(1, 2)[:, :6])).flatten(1))


@pytest.mark.parametrize("width", [6, 7])
def test_a_norm_of_another_dimension_is_not_folded_into_a_linear(width):
    module = NormBehindLinear(width)
    network = described(module)
    assert difference(module, network) < 1e-5
    assert not network.statistics


def classifier(*after, classes=5):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, classes), *after,
    )  # fmt: skip


@pytest.mark.parametrize("after", [nn.Softmax(1), nn.Softmax(-1), nn.LogSoftmax(dim=1)], ids=str)
def test_a_softmax_at_the_end_is_left_out(after, tmp_path):
    module = classifier(after)
    network = described(module)
    with torch.no_grad():
        logits, whole = network.graph(X), module(X)
        assert torch.allclose(logits, module[:-1](X), atol=1e-6)
        assert torch.allclose(after(logits), whole, atol=1e-6)
    assert torch.equal(logits.argmax(1), whole.argmax(1))
    assert survives(network, tmp_path / "saved") < 0.1


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (classifier(classes=1), r"gives \[n, 1\] for n pictures"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"gives \[n, 4, 6, 6\] for n pictures"),
        (classifier(nn.Flatten(0)), r"gives \[n\] for n pictures"),
    ],
)
def test_what_gives_no_logits_is_refused(module, said):
    with pytest.raises(InputError, match=said) as raised:
        described(module)
    assert "[n, classes] of 2 or more" in str(raised.value)


class Greatest(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(x).flatten(2).max(-1).values)


@pytest.mark.parametrize("kind", ["pooled", "greatest"])
def test_one_of_several_results_is_a_site(kind, tmp_path):
    module = Greatest()
    if kind == "pooled":
        layers = nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        module = nn.Sequential(*layers)
    network = described(module)
    assert difference(module, network) < 1e-5
    assert {site.node for site in network.sites} == {"pictures", "getitem"}
    assert layer_grids(network)[network.layers[-1].name] == "getitem"
    assert survives(network, tmp_path / "saved") < 0.1


def test_a_part_of_what_is_split_is_on_the_grid_of_the_whole():
    class Split(Greatest):
        def forward(self, x):
            first, second = self.conv(x).relu().mean((2, 3)).split(2, 1)
            return self.head(torch.cat([second, first], 1))

    assert layer_grids(described(Split()))["head"] == "mean_dim"


class Numbers(nn.Module):
    """Buffers of whole numbers and truths; shapes with the number of pictures in them."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.register_buffer("whole", torch.arange(1, 5, dtype=torch.int32))
        self.register_buffer("truths", torch.tensor([True, False, True, True]))
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        x = self.conv(x)
        count, channels, height, width = x.shape
        x = x.view(count, 2, 2, height, width).transpose(1, 2).reshape(count, channels, -1)
        x = x.view(count * 2, 2, -1).view(count, channels, -1) + torch.arange(36) / 36
        x = torch.cat([self.token.expand(count, -1, -1), x.transpose(1, 2)], 1)
        return self.head(x.mean(1) * self.whole * self.truths)


def normed(norm):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def tracked():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    norm.running_mean.normal_()
    return norm


def weight_normed():
    module = classifier()
    parametrizations.weight_norm(module[0])
    parametrizations.weight_norm(module[4])
    return module


def hyphened():
    parts = [("conv-1", nn.Conv2d(3, 4, 3)), ("a b/c", nn.Conv2d(4, 4, 3)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict([*parts, ("head-2", nn.Linear(64, 5))]))


SAVED = {
    "weight_norm": (weight_normed, ["0", "4"]),
    "instance_norm": (lambda: normed(nn.InstanceNorm2d(4, affine=True)), ["0", "5"]),
    "tracked instance_norm": (lambda: normed(tracked()), ["0", "5"]),
    "paths": (hyphened, ["conv-1", "a_b_c", "head-2"]),
    "numbers": (Numbers, ["conv", "head"]),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_traced_is_the_same_and_can_be_saved(name, tmp_path):
    make, layers = SAVED[name]
    module = make()
    network = described(module)
    assert difference(module, network) < 1e-5
    assert [layer.name for layer in network.layers] == layers
    assert survives(network, tmp_path / "saved") < 0.1


def test_a_wide_linear_layer_is_saved(tmp_path):
    network = described(
        nn.Sequential(nn.Upsample(size=(160, 160)), nn.Flatten(), nn.Linear(76_800, 2))
    )
    assert network.layers[0].in_features == 76_800
    save_vision(rounded(network, X), tmp_path / "saved")
    weight = load_network(tmp_path / "saved").weights[network.layers[0].name]
    assert torch.equal(weight.codes, rounded(network, X).weights[network.layers[0].name].codes)


def test_windows_of_pictures_are_saved():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4,
        num_labels=5,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.SwinForImageClassification(config)

        def forward(self, pictures):
            return self.model(pixel_values=pictures).logits

    module = Logits().eval()
    preprocessing = Preprocessing(size=(16, 16), mean=(0.0,) * 3, deviation=(1.0,) * 3)
    network = build(module, preprocessing, name="test", fingerprint="0")
    pictures = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = module(pictures)
        assert float((network.graph(pictures) - expected).abs().max()) < 1e-5
    targets = {str(node.target) for node in network.graph.graph.nodes}
    assert not targets & {"aten.view.default", "<built-in function mul>"}


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (normed(nn.BatchNorm2d(4, track_running_stats=False)), "without running statistics in '1'"),
        (normed(nn.LocalResponseNorm(2)), r"calls aten\.avg_pool3d\.default, which is not saved"),
        (classifier(nn.LogSigmoid()), r"in '5' calls aten\.log_sigmoid\.default, which is not"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(module, said):
    with pytest.raises(InputError, match=said) as raised:
        described(module)
    assert "\n" not in str(raised.value)


def test_the_modes_of_all_parts_are_as_before():
    module = classifier()
    module.train()
    module[0].eval()
    preprocessing = Preprocessing(size=(8, 8), mean=(0.0,) * 3, deviation=(1.0,) * 3)
    build(module, preprocessing, name="test", fingerprint="0")
    assert [part.training for part in module] == [False, True, True, True, True]
