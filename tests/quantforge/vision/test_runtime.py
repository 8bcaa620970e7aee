"""What executes packed equals the simulation: codes but for ties, numbers but for rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, fx, nn

from quantforge.errors import UsageError
from quantforge.types import QuantSpec
from quantforge.vision.network import QuantizedNetwork, Simulation
from quantforge.vision.packed_layers import CodedLayer, WeightOnlyLayer
from quantforge.vision.runtime import Coded, VisionRuntime
from quantforge.vision.testing import (
    EfficientNetLike,
    ResNetLike,
    described,
    quantized,
    traced,
    with_negative_scales,
)

aten = torch.ops.aten


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
    stages = ((3, 1, 1, 16, 1), (5, 2, 6, 24, 2))
    model = EfficientNetLike(stages) if kind == "efficientnet" else ResNetLike(((64, 1),))
    network, x = described(traced(model)), images()
    compare(quantized(network, x, spec=QuantSpec(4)), x, 5e-3)


def test_memory_is_that_of_the_bits() -> None:
    network = described(traced(ResNetLike(((64, 1),))))
    floats = sum(one.numel() for one in network.graph.parameters()) * 4
    for bits in (8, 4, 2):
        runtime = VisionRuntime(quantized(network, images(1), spec=QuantSpec(bits)))
        factor = floats / runtime.stored_bytes
        assert 0.7 * 32 / bits < factor < 32 / bits, (bits, factor)
