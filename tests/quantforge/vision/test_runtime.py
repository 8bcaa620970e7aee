"""What executes packed equals the simulation: codes but for ties, numbers but for rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, fx, nn

from quantforge.errors import UsageError
from quantforge.types import QuantSpec
from quantforge.vision.efficientnet_lite import Stage
from quantforge.vision.network import ActivationGrid, QuantizedNetwork, Simulation
from quantforge.vision.packed_layers import CodedLayer, WeightOnlyLayer
from quantforge.vision.runtime import Coded, VisionRuntime
from quantforge.vision.testing import (
    ResNetLike,
    described,
    efficientnet,
    quantized,
    traced,
    with_negative_scales,
)

aten = torch.ops.aten
SMALL_STAGES = (Stage(1, 3, 1, 1, 16), Stage(2, 5, 2, 6, 24), Stage(1, 3, 2, 6, 40))
SMALL = {
    "efficientnet": lambda: efficientnet(stages=SMALL_STAGES),
    "resnet": lambda: described(traced(ResNetLike(((64, 1),)))),
}


class Mixed(nn.Module):
    """Pooling, depthwise, groups, a residual, a concatenation, float islands, a transposed one."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.wide = nn.Conv2d(width, 40, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(40, 12, 2, stride=2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = aten.max_pool2d.default(aten.relu.default(self.stem(x)), [3, 3], [2, 2], [1, 1])
        inner = self.point(aten.hardtanh.default(self.depthwise(x), 0.0, 6.0))
        x = aten.relu.default(aten.add.Tensor(x, inner))
        x = aten.silu.default(self.up(aten.hardswish.default(self.wide(x))))
        return self.head(aten.flatten.using_ints(aten.mean.dim(x, [2, 3], True), 1))


def images(count: int = 4, size: int = 32, seed: int = 5) -> Tensor:
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1) * 2


class Padded(nn.Module):
    """Zeros around images, not alike on all sides: before layers of every kind, and before others.

    No activation function follows most layers, so that the code that means 0 lies in the middle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, stride=2)
        self.halved = nn.Conv2d(20, 20, 5, stride=2, groups=20)
        self.same = nn.Conv2d(20, 20, (2, 4), padding=(1, 0), groups=20)
        self.dense = nn.Conv2d(20, 70, 3)
        self.point = nn.Conv2d(70, 24, 1)
        self.parts = nn.Conv2d(24, 24, (1, 3), stride=(1, 2), groups=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        def pad(x: Tensor, sides: list[int]) -> Tensor:
            made: Tensor = aten.constant_pad_nd.default(x, sides, 0.0)
            return made

        x = self.halved(pad(self.stem(pad(x, [0, 1, 0, 1])), [1, 2, 1, 2]))
        x = self.dense(pad(aten.relu.default(self.same(pad(x, [2, 1]))), [2, 0, 0, 1]))
        x = self.point(pad(x, [0, 1, 1, 0]))
        both = aten.pad.default(x, [1, 0, 0, 1])  # read by a layer and by what is none
        largest = aten.max_pool2d.default(both, [1, 3], [1, 2])
        x = aten.add.Tensor(self.parts(both), largest)
        return self.head(aten.flatten.using_ints(aten.mean.dim(x, [2, 3], True), 1))


def on_powers_of_two(network: QuantizedNetwork) -> QuantizedNetwork:
    """The same with scales and biases of which every product and sum is exact in float32."""

    def power(scale: Tensor) -> Tensor:
        return 2.0 ** scale.float().log2().ceil()

    grids = {
        name: ActivationGrid(
            bits=grid.bits, scale=float(power(torch.tensor(grid.scale))), zero=grid.zero
        )
        for name, grid in network.grids.items()
    }
    weights = {
        name: dataclasses.replace(weight, scale=power(weight.scale).bfloat16())
        for name, weight in network.weights.items()
    }
    biases = {name: (bias * 1024).round() / 1024 for name, bias in network.biases.items()}
    return dataclasses.replace(network, grids=grids, weights=weights, biases=biases)


class Observed(Simulation):
    """The simulation, every node's result kept."""

    def __init__(self, network: QuantizedNetwork) -> None:
        super().__init__(network)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        made = super().run_node(n)
        self.found[n.name] = made
        return made


def compare(network: QuantizedNetwork, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Codes of every site, at most `share` of which differ, by a tie; then the logits of both."""
    simulation, runtime = Observed(network), VisionRuntime(network)
    with torch.no_grad():
        expected = simulation.run(x)
        results = runtime.results(x)
    seen = apart = 0
    for name, value in results.items():
        if isinstance(value, Coded) and name in simulation.found and name in sites(network):
            codes = value.grid.codes(simulation.found[name])
            difference = (codes.int() - value.codes.int()).abs()
            seen, apart = seen + codes.numel(), apart + int((difference > 0).sum())
            # A tie moves what reads it by less than a step or two.
            assert int(difference.max()) <= 2, name
    assert seen > 1000
    assert apart <= share * seen, (apart, seen)
    logits = runtime(x)
    step = max(grid.scale for grid in network.grids.values())
    assert float((logits - expected).abs().max()) < step
    return logits, expected


def sites(network: QuantizedNetwork) -> set[str]:
    return {site.node for site in network.network.sites}


@pytest.mark.parametrize(
    "spec", ["8b-pc", "4b-pc", "3b-g12", "2b-pc-asym", "5b-g12-asym", "8b-pc-asym"]
)
def test_every_kind_of_node_equals_the_simulation(spec: str) -> None:
    network = described(traced(Mixed()))
    x = images()
    made = quantized(network, x, spec=QuantSpec.parse(spec))
    logits, expected = compare(made, x, 2e-3)
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_negative_scales_and_narrow_activations_equal_the_simulation() -> None:
    network, x = described(traced(Mixed())), images()
    made = quantized(network, x, spec=QuantSpec(4), activations=4)
    weights = {name: with_negative_scales(weight) for name, weight in made.weights.items()}
    compare(dataclasses.replace(made, weights=weights), x, 2e-3)


def test_layers_on_codes_are_integers_and_the_rest_weight_only() -> None:
    network = described(traced(Mixed()), leave=("relu_default",))
    made = quantized(network, images(), keep=("point",))
    runtime = VisionRuntime(made)
    kinds = {key.partition("_")[2]: type(one) for key, one in runtime.layers.items()}
    # The pooled stem has no site, so the depthwise layer reads numbers; `point` is kept.
    assert kinds == {
        "stem": CodedLayer, "depthwise": WeightOnlyLayer, "point": nn.Conv2d, "wide": CodedLayer,
        "up": WeightOnlyLayer, "head": CodedLayer,
    }  # fmt: skip
    compare(made, images(), 2e-3)


def test_codes_are_carried_from_layer_to_layer() -> None:
    network = described(traced(Mixed()))
    results = VisionRuntime(quantized(network, images())).results(images())
    codes = {name for name, value in results.items() if isinstance(value, Coded)}
    assert {"x", "stem", "max_pool2d_default", "depthwise", "point", "add_tensor"} <= codes
    assert "relu_default" not in results  # part of the stem
    assert "hardtanh_default" not in results
    assert results["stem"].codes.is_contiguous(memory_format=torch.channels_last)


def test_integers_alone_equal_the_float_rescaling_but_for_ties() -> None:
    network, x = described(traced(Mixed())), images()
    made = quantized(network, x)
    plain, whole = VisionRuntime(made), VisionRuntime(made, dyadic=True)
    for name, value in plain.results(x).items():
        other = whole.results(x)[name]
        if isinstance(value, Coded):
            difference = (value.codes.int() - other.codes.int()).abs()
            assert int(difference.max()) <= 2
            # A bias is a whole number of products of scales, half of one off at most.
            assert float((difference > 0).double().mean()) < 0.1
    step = max(grid.scale for grid in made.grids.values())
    assert float((plain(x) - whole(x)).abs().max()) < step
    grouped = quantized(network, x, spec=QuantSpec(4, 12))
    with pytest.raises(UsageError, match="groups of scales, which integers alone do not rescale"):
        VisionRuntime(grouped, dyadic=True)


def test_the_definition_in_torch_gives_the_same_without_a_compiler() -> None:
    network, x = described(traced(Mixed())), images(2)
    made = quantized(network, x, spec=QuantSpec(4))
    slow, fast = VisionRuntime(made, native_code=False)(x), VisionRuntime(made)(x)
    assert float((slow - fast).abs().max()) < max(grid.scale for grid in made.grids.values())


@pytest.mark.parametrize("kind", ["efficientnet", "resnet"])
def test_small_ones_of_the_real_shapes_equal_the_simulation(kind: str) -> None:
    network = SMALL[kind]()
    x = images()
    made = quantized(network, x, spec=QuantSpec(4))
    compare(made, x, 5e-3)
    layers = VisionRuntime(made).layers.values()
    assert all(isinstance(one, CodedLayer) for one in layers)


@pytest.mark.parametrize("native_code", [True, False])
@pytest.mark.parametrize("spec", ["8b-pc", "4b-pc", "3b-pc-asym", "8b-pc-asym", "4b-g4"])
def test_zeros_around_images_belong_to_the_layers_that_read_them(
    spec: str, native_code: bool
) -> None:
    x = images(3, 30)
    made = quantized(described(traced(Padded())), x, spec=QuantSpec.parse(spec))
    made = on_powers_of_two(made)
    simulation, runtime = Observed(made), VisionRuntime(made, native_code=native_code)
    assert all(isinstance(one, CodedLayer) for one in runtime.layers.values())
    with torch.no_grad():
        logits = simulation.run(x)
    results, zeros = runtime.results(x), set()
    for name in sites(made) & results.keys():
        value = results[name]
        assert torch.equal(value.codes, value.grid.codes(simulation.found[name])), name
        zeros.add(value.grid.zero)
    assert len(zeros - {0}) > 4
    paddings = {name for name in results if "pad" in name}
    assert paddings == {"pad_default"}  # one of six stays a step, on codes
    assert isinstance(results["pad_default"], Coded)
    assert float((results[runtime.result] - logits).abs().max()) < 1e-5


def test_a_padding_stays_where_a_layer_reads_numbers() -> None:
    class Small(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(aten.constant_pad_nd.default(x, [0, 1, 0, 1], self.value))
            x = self.two(aten.constant_pad_nd.default(x, [1, 1, 1, 1], 0.0))
            return aten.flatten.using_ints(x, 1)

    x = images(2, 8)
    for value, leave, numbers in ((0.5, (), {"one"}), (0.0, ("one",), {"two"}), (0.0, (), set())):
        network = described(traced(Small(value)), leave=leave)
        made = quantized(network, x)
        with torch.no_grad():
            apart = VisionRuntime(made)(x) - Simulation(made).run(x)
        layers = VisionRuntime(made).layers
        found = {key[2:] for key, one in layers.items() if isinstance(one, WeightOnlyLayer)}
        assert found == numbers
        assert float(apart.abs().max()) < 1e-2


def test_memory_is_that_of_the_bits() -> None:
    network = described(traced(ResNetLike(((64, 1),))))
    floats = sum(one.numel() for one in network.graph.parameters()) * 4
    for bits in (8, 4, 2):
        runtime = VisionRuntime(quantized(network, images(1), spec=QuantSpec(bits)))
        factor = floats / runtime.stored_bytes
        assert 0.7 * 32 / bits < factor < 32 / bits, (bits, factor)
