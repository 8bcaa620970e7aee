import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec
from quantforge.vision.network import (
    ActivationGrid,
    Preprocessing,
    QuantizedNetwork,
    Simulation,
    Site,
    VisionNetwork,
    kernel_of,
    weight_matrix,
)


def test_a_grid_holds_zero_and_rounds_to_the_nearest_of_its_values() -> None:
    grid = ActivationGrid.covering(0.5, 6.0, 4)
    assert grid.zero == 0
    assert grid.scale == pytest.approx(6.0 / 15)
    x = torch.tensor([-1.0, 0.0, 0.19, 0.21, 5.9, 9.0])
    expected = torch.tensor([0, 0, 0, 1, 15, 15], dtype=torch.uint8)
    assert torch.equal(grid.codes(x), expected)
    assert torch.equal(grid.rounded(x), expected.float() * grid.scale)
    both = ActivationGrid.covering(-1.0, 3.0, 8)
    assert float(both.rounded(torch.zeros(1))) == 0.0
    values = torch.linspace(-1.0, 3.0, 1001)
    assert float((both.rounded(values) - values).abs().max()) <= both.scale * 0.51


@pytest.mark.parametrize("fields", [{"bits": 1}, {"scale": 0.0}, {"zero": 16}])
def test_what_is_no_grid_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        ActivationGrid(**{"bits": 4, "scale": 1.0, "zero": 0, **fields})


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolutions_matrix_has_a_row_for_every_output(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups)
    matrix = weight_matrix(layer)
    assert torch.equal(kernel_of(layer, matrix), layer.weight)
    # Only that output channel changes with a row.
    changed = matrix.clone()
    changed[4] += 1.0
    x = torch.randn(1, 4, 5, 5)
    other = functional.conv_transpose2d(x, kernel_of(layer, changed), layer.bias, groups=groups)
    moved = (other - layer(x)).abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [False] * 4 + [True, False]


def test_the_simulation_rounds_weights_and_sites_and_nothing_else() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.ops.aten.relu.default(self.first(x)))

    torch.manual_seed(0)
    graph = fx.symbolic_trace(Net().eval())
    relu = next(node.name for node in graph.graph.nodes if node.op == "call_function")
    info = LayerInfo(
        name="first", kind="convolution", out_features=4, in_features=27, block=0, stage=0,
        fused_group="first",
    )  # fmt: skip
    network = VisionNetwork(
        graph=graph, name="net", layers=(info,), reads={"first": "x"}, blocks=(), channels=3,
        sites=(Site(node=relu, grid="a"),), fingerprint="0",
        preprocessing=Preprocessing(size=(8, 8), mean=(0.0,), deviation=(1.0,)),
    )  # fmt: skip
    spec = QuantSpec(4)
    codes = torch.randint(16, (4, 27), dtype=torch.uint8)
    weight = QuantizedWeight(codes=codes, scale=torch.full((4, 1), 0.125).bfloat16(), zero=None,
                             spec=spec)  # fmt: skip
    bias, grid = torch.arange(4.0), ActivationGrid(bits=3, scale=0.5, zero=0)
    made = Simulation(
        QuantizedNetwork(network=network, weights={"first": weight}, biases={"first": bias},
                         grids={"a": grid})
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    kernel = (codes.float() - 8).view(4, 3, 3, 3) * 0.125
    hidden = functional.conv2d(x, kernel, bias).relu()
    hidden = (hidden / 0.5).round().clamp(0, 7) * 0.5
    with torch.no_grad():
        assert torch.equal(made.run(x), graph.second(hidden))
        assert not torch.equal(graph(x), graph.second(hidden))
