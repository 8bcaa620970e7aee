"""onnxruntime computes what our runtime does: within one output step, predictions but for ties."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantforge.errors import UsageError
from quantforge.types import QuantSpec
from quantforge.vision.efficientnet_lite import Stage
from quantforge.vision.network import QuantizedNetwork
from quantforge.vision.onnx_export import export_onnx, onnx_model, positive
from quantforge.vision.runtime import VisionRuntime
from quantforge.vision.testing import (
    ResNetLike,
    described,
    efficientnet,
    quantized,
    traced,
    with_negative_scales,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
aten = torch.ops.aten
SMALL_STAGES = (Stage(1, 3, 1, 1, 16), Stage(2, 5, 2, 6, 24), Stage(1, 3, 2, 6, 40))
SMALL = {
    "efficientnet": lambda: efficientnet(stages=SMALL_STAGES),
    "resnet": lambda: described(traced(ResNetLike(((64, 1),)))),
}


class Mixed(nn.Module):
    """What the exporter maps, in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.halves = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2, groups=2)
        self.tokens = nn.Linear(12, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = aten.max_pool2d.default(aten.relu.default(self.stem(x)), [3, 3], [2, 2], [1, 1])
        y = aten.hardswish.default(self.depthwise(x))
        x = aten.add.Tensor(x, aten.hardtanh.default(self.halves(y), 0.0, 6.0))
        gate = aten.hardsigmoid.default(aten.adaptive_avg_pool2d.default(x, [1, 1]))
        x = aten.silu.default(self.up(aten.mul.Tensor(x, gate)))
        x = aten.avg_pool2d.default(aten.constant_pad_nd.default(x, [1, 0, 1, 0]), [2, 2], [2, 2])
        parts = aten.chunk.default(x, 2, 1)
        x = aten.cat.default([parts[1], parts[0]], 1)
        x = aten.permute.default(aten.flatten.using_ints(x, 2), [0, 2, 1])
        x = aten.gelu.default(self.tokens(x))
        x = aten.layer_norm.default(x, [8])
        x = aten.mul.Scalar(aten.softmax.int(x, -1), 8.0)
        return self.head(aten.mean.dim(x, [1]))


def pictures(count: int = 8, size: int = 32) -> Tensor:
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1) * 2


# Steps of eight bits over the logits: as the graph says, with every optimisation that keeps its
# numbers, and with the integer operators by which onnxruntime replaces QDQ nodes of its own accord,
# whose biases are rounded to products of scales and whose pooled means to grids.
LEVELS = {"plain": 1.0, "optimized": 1.0, "integer": 8.0}


def session(model: object, level: str) -> object:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    plain = level == "plain"
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if plain else levels.ORT_ENABLE_ALL
    if level == "optimized":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    blob = model.SerializeToString()  # type: ignore[attr-defined]
    return onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])


def compare(network: QuantizedNetwork, x: Tensor) -> None:
    """Both against each other; a prediction may differ where its best logits nearly tie."""
    ours, model = VisionRuntime(network)(x), onnx_model(network)
    step = float(ours.max() - ours.min()) / 255  # of eight bits over the logits
    for level, allowed in LEVELS.items():
        runner = session(model, level)
        name = runner.get_inputs()[0].name  # type: ignore[attr-defined]
        theirs = torch.from_numpy(runner.run(None, {name: x.numpy()})[0])  # type: ignore[attr-defined]
        assert theirs.shape == ours.shape
        largest = float((theirs - ours).abs().max())
        assert largest <= allowed * step, (level, largest, step)
        best = ours.topk(2).values
        tied = (best[:, 0] - best[:, 1]) <= 2 * largest
        same = theirs.argmax(1) == ours.argmax(1)
        assert bool((same | tied).all())
        assert int(same.sum()) >= len(x) - (1 if allowed == 1.0 else 2)


SPECS = ["8b-pc", "4b-pc", "3b-pc", "6b-pc-asym", "4b-pc-asym", "2b-pc", "4b-g4", "5b-g4-asym"]


@pytest.mark.parametrize("text", SPECS)
def test_onnxruntime_gives_our_logits(text: str) -> None:
    x = pictures()
    compare(quantized(described(traced(Mixed())), x, spec=QuantSpec.parse(text)), x)


@pytest.mark.parametrize("text", ["8b-pc", "4b-pc", "3b-g4"])
def test_negative_scales_become_positive_and_nothing_changes(text: str) -> None:
    x = pictures()
    made = quantized(described(traced(Mixed())), x, spec=QuantSpec.parse(text), activations=6)
    weights = {name: with_negative_scales(weight) for name, weight in made.weights.items()}
    for weight in weights.values():
        codes, scale, zero = positive(weight)
        assert bool((scale > 0).all())
        assert zero is not None
        assert int(codes.min()) >= 0
        assert int(codes.max()) <= weight.spec.top
        groups = (codes.view(*scale.shape, -1) - zero.unsqueeze(-1)).float() * scale.unsqueeze(-1)
        assert torch.equal(groups.flatten(1), weight.dequantize())
    compare(dataclasses.replace(made, weights=weights), x)


@pytest.mark.parametrize("kind", ["efficientnet", "resnet"])
def test_the_real_shapes_give_our_predictions(kind: str) -> None:
    network = SMALL[kind]()
    x = pictures(16)
    compare(quantized(network, x, spec=QuantSpec(4)), x)


class Rarer(nn.Module):
    """One layer called twice, and operators that few classifiers have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        for name, low, high in (("slope", 0.1, 0.5), ("gain", 0.5, 2.0), ("shift", -1.0, 1.0)):
            self.register_buffer(name, torch.linspace(low, high, 8))
        self.register_buffer("one", torch.tensor([0.25]))

    def forward(self, x: Tensor) -> Tensor:
        x = aten.prelu.default(self.again(aten.relu.default(self.stem(x))), self.slope)
        x = aten.group_norm.default(self.again(x), 2, self.gain, self.shift, 1e-5)
        x = aten.upsample_nearest2d.vec(x, None, [1.5, 2.0])
        x = aten.upsample_bilinear2d.vec(aten.prelu.default(x, self.one), [12, 20], False, None)
        x = aten.upsample_bilinear2d.default(x, [9, 11], True)
        x = aten.upsample_bilinear2d.vec(x, None, False, [1.3, 1.7])
        x = aten.upsample_nearest2d.default(x, [10, 17])
        x = aten.group_norm.default(x, 4)
        y = aten.sum.dim_IntList(aten.maximum.default(x, aten.neg.default(x)), [3])
        x = aten.add.Tensor(aten.amax.default(x, [-1]), aten.mul.Tensor(y, 0.01))
        return self.head(aten.mean.dim(x, [2]))


@pytest.mark.parametrize("text", ["8b-pc", "4b-pc-asym", "4b-g4"])
def test_a_layer_called_twice_and_rarer_operators(text: str) -> None:
    x = pictures()
    network = described(traced(Rarer()))
    assert [info.name for info in network.layers] == ["stem", "again", "again", "head"]
    once = dataclasses.replace(network, layers=(network.layers[0], *network.layers[2:]))
    made = quantized(once, x, spec=QuantSpec.parse(text))
    compare(made, x)
    names = [one.name for one in onnx_model(made).graph.node]
    assert len(names) == len(set(names))
    bare = dataclasses.replace(made, weights={}, biases={}, grids={})
    runner = session(onnx_model(bare), "plain")
    (theirs,) = runner.run(None, {"x": x.numpy()})  # type: ignore[attr-defined]
    with torch.no_grad():
        ours = network.graph(x)
    assert float((torch.from_numpy(theirs) - ours).abs().max()) < 1e-5 * float(ours.abs().max())


def test_containers_are_the_smallest_that_hold_the_codes(tmp_path: Path) -> None:
    x = pictures(1)
    types, sizes = onnx.TensorProto, {}
    for text, kind in (("2b-pc", types.INT4), ("4b-pc", types.INT4), ("5b-pc", types.INT8),
                       ("4b-pc-asym", types.UINT4), ("8b-pc-asym", types.UINT8)):  # fmt: skip
        made = quantized(
            described(traced(Mixed())), x, spec=QuantSpec.parse(text), keep=("tokens",)
        )
        path = export_onnx(made, tmp_path / f"{text}.onnx")
        model = onnx.load(path)
        held = {one.name: one for one in model.graph.initializer}
        assert held["stem.codes"].data_type == kind
        numbers = 16 * 27
        halves = kind in (types.INT4, types.UINT4)
        assert len(held["stem.codes"].raw_data) == (numbers // 2 if halves else numbers)
        assert held["tokens.weight"].data_type == types.FLOAT
        sizes[text] = path.stat().st_size
    assert sizes["4b-pc"] < sizes["5b-pc"]
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(f"{one}.onnx" for one in sizes)


def test_an_operator_without_a_counterpart_is_one_clear_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return aten.mean.dim(aten.mish.default(self.one(x)), [2, 3])

    network = quantized(described(traced(Odd())), pictures(1))
    with pytest.raises(UsageError, match=r"calls aten\.mish\.default, which has no ONNX operator"):
        export_onnx(network, tmp_path / "odd.onnx")
    assert list(tmp_path.iterdir()) == []
