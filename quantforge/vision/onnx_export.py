"""A quantized network as ONNX with QDQ nodes: what other runtimes read.

Weights are integers in initialisers behind DequantizeLinear: codes of 2 to 4 bits in (u)int4, two
a byte, of 5 to 8 in (u)int8; a scale for an output channel, or for a block of a flattened row where
there are groups. Activations pass QuantizeLinear and DequantizeLinear in uint8 where they have a
grid, and a Clip before them where it has fewer than 8 bits. Opset 21 is the first with int4 and
blocks.

ONNX wants positive scales. Where one is negative, its codes are mirrored: (c − z)·s is
((top − c) − (top − z))·(−s), which fits the codes' own width, with zero-points in an unsigned
container. So nothing changes but the signs.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quantforge.errors import ResourceError, UsageError
from quantforge.files import atomic_path
from quantforge.types import QuantizedWeight
from quantforge.vision.graph_file import shapes_of
from quantforge.vision.network import ActivationGrid, QuantizedNetwork
from quantforge.vision.onnx_operators import write_operator

OPSET = 21
_IR_VERSION = 10
_NARROW = 4  # bits of the smaller container


def export_onnx(quantized: QuantizedNetwork, path: Path) -> Path:
    """Write a network to `path`, which appears when it is whole.

    Raises:
        UsageError: an operator has no ONNX counterpart here.
        ResourceError: the package `onnx` is not installed.
    """
    model = onnx_model(quantized)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return path


def onnx_model(quantized: QuantizedNetwork) -> Any:
    """The same as an `onnx.ModelProto`."""
    try:
        import onnx
    except ImportError as error:
        raise ResourceError("onnx is not installed; install the extra `onnx`") from error
    return _Exporter(onnx, quantized).model()


class _Exporter:
    """Builds the graph of one network."""

    def __init__(self, onnx: Any, quantized: QuantizedNetwork) -> None:
        self.onnx, self.quantized = onnx, quantized
        self.network = quantized.network
        size = self.network.preprocessing.size
        self.shapes = shapes_of(self.network.graph, self.network.channels, size)
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.written: dict[str, str] = {}  # path of a layer → name of its dequantized weight
        self.grids = {
            site.node: quantized.grids[site.grid]
            for site in self.network.sites
            if site.grid in quantized.grids
        }

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append an operator with one output `name`, and return that name."""
        self.add_many(kind, inputs, [name], **attributes)
        return name

    def add_many(self, kind: str, inputs: list[str], names: list[str], **attributes: Any) -> None:
        """Append an operator with several outputs."""
        node = self.onnx.helper.make_node(
            kind, inputs, names, name=f"{names[0]}/{kind}", **attributes
        )
        self.nodes.append(node)

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """An initialiser, and its name."""
        held = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        array = np.ascontiguousarray(np.asarray(held, dtype=dtype))
        self.tensors[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def integers(self, name: str, values: Tensor, bits: int, *, signed: bool) -> str:
        """An initialiser of the smallest container that holds `bits`."""
        types = self.onnx.TensorProto
        narrow = bits <= _NARROW
        kind = (
            (types.INT4 if signed else types.UINT4) if narrow
            else (types.INT8 if signed else types.UINT8)
        )  # fmt: skip
        flat = (values.flatten().to(torch.int16) & 0xFF).to(torch.uint8)
        if narrow:
            flat = torch.nn.functional.pad(flat & 0xF, (0, flat.numel() % 2))
            flat = flat[::2] | (flat[1::2] << 4)
        raw = flat.numpy().tobytes()
        self.tensors[name] = types(name=name, data_type=kind, dims=list(values.shape), raw_data=raw)
        return name

    def model(self) -> Any:
        """The whole model, checked."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        source = result = ""
        for node in self.network.graph.graph.nodes:
            if node.op == "placeholder":
                source = node.name if node.name not in self.grids else f"{node.name}.numbers"
                self._round(node)
            elif node.op == "output":
                result = node.args[0].name
            else:
                self._node(node)
        shape: Any = self.shapes[result]
        picture = ("batch", self.network.channels, *self.network.preprocessing.size)
        graph = helper.make_graph(
            self.nodes, self.network.name or "network",
            [helper.make_tensor_value_info(source, types.FLOAT, picture)],
            [helper.make_tensor_value_info(result, types.FLOAT, ("batch", *shape[1:]))],
            list(self.tensors.values()),
        )  # fmt: skip
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION,
            producer_name="quantforge",
        )  # fmt: skip
        self.onnx.checker.check_model(model)
        return model

    def _node(self, node: fx.Node) -> None:
        out = f"{node.name}.numbers" if node.name in self.grids else node.name
        if node.op == "call_module":
            self._layer(node, out)
        elif node.op == "get_attr":
            held: Any = self.network.graph
            for part in str(node.target).split("."):
                held = getattr(held, part)
            self.constant(out, held)
        elif node.target is operator.getitem:
            source: Any = node.args[0]
            self.add("Identity", [f"{source.name}.{node.args[1]}"], out)
        else:
            write_operator(self, node, out)
        self._round(node)

    def _round(self, node: fx.Node) -> None:
        """Pass a result through its grid."""
        grid: ActivationGrid | None = self.grids.get(node.name)
        if grid is None:
            return
        name, source = node.name, f"{node.name}.numbers"
        if grid.top < 255:
            low, high = (self.constant(f"{name}.site.{word}", (end - grid.zero) * grid.scale)
                         for word, end in (("least", 0), ("most", grid.top)))  # fmt: skip
            source = self.add("Clip", [source, low, high], f"{name}.site.clipped")
        step = [
            self.constant(f"{name}.site.step", grid.scale),
            self.constant(f"{name}.site.zero", grid.zero, np.uint8),
        ]
        codes = self.add("QuantizeLinear", [source, *step], f"{name}.site.codes")
        self.add("DequantizeLinear", [codes, *step], name)

    def _layer(self, node: fx.Node, out: str) -> None:
        path, source = str(node.target), node.args[0]
        assert isinstance(source, fx.Node)
        layer: Any = self.network.layer(path)
        weight = self.quantized.weights.get(path)
        if weight is None:
            named = self.constant(f"{path}.weight", layer.weight)
            bias = layer.bias
        else:
            if path not in self.written:  # a layer may be called again
                self.written[path] = self._weight(path, layer, weight)
            named, bias = self.written[path], self.quantized.biases[path]
        inputs = [source.name, named, self.constant(f"{path}.bias", bias)]
        if isinstance(layer, nn.Linear):
            self._linear(inputs, len(self.shapes[source.name]), out)
            return
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UsageError(f"{path} pads with {layer.padding_mode} {layer.padding}; use numbers")
        numbers = {
            "kernel_shape": layer.kernel_size, "strides": layer.stride, "group": layer.groups,
            "dilations": layer.dilation, "pads": (*layer.padding, *layer.padding),
        }  # fmt: skip
        if isinstance(layer, nn.ConvTranspose2d):
            self.add("ConvTranspose", inputs, out, output_padding=layer.output_padding, **numbers)
        else:
            self.add("Conv", inputs, out, **numbers)

    def _linear(self, inputs: list[str], rank: int, out: str) -> None:
        if rank == 2:
            self.add("Gemm", inputs, out, transB=1)
            return
        turned = self.add("Transpose", [inputs[1]], f"{out}.turned", perm=[1, 0])
        product = self.add("MatMul", [inputs[0], turned], f"{out}.product")
        self.add("Add", [product, inputs[2]], out)

    def _weight(self, path: str, layer: Any, weight: QuantizedWeight) -> str:
        """A weight behind DequantizeLinear, in the shape that the layer's operator wants."""
        codes, scale, zero = positive(weight)
        bits, signed = weight.spec.bits, zero is None
        transposed = isinstance(layer, nn.ConvTranspose2d)
        blocks = scale.shape[1] > 1
        if signed:
            codes = codes - (1 << (bits - 1))
        shaped = codes if blocks or transposed else codes.view(layer.weight.shape)
        inputs = [
            self.integers(f"{path}.codes", shaped, bits, signed=signed),
            self.constant(f"{path}.scale", scale if blocks else scale[:, 0]),
        ]
        if zero is not None:
            held = zero if blocks else zero[:, 0]
            inputs.append(self.integers(f"{path}.zero", held, bits, signed=False))
        final = f"{path}.weight"
        plain = not (blocks and not isinstance(layer, nn.Linear)) and not transposed
        matrix = final if plain else f"{path}.matrix"
        numbers = (
            {"axis": 1, "block_size": codes.shape[1] // scale.shape[1]} if blocks else {"axis": 0}
        )
        self.add("DequantizeLinear", inputs, matrix, **numbers)
        if plain:
            return final
        if not transposed:
            return self._reshaped(matrix, tuple(layer.weight.shape), final)
        apart = (layer.groups, -1, layer.in_channels // layer.groups, *layer.kernel_size)
        five = self._reshaped(matrix, apart, f"{path}.apart")
        turned = self.add("Transpose", [five], f"{path}.turned", perm=[0, 2, 1, 3, 4])
        return self._reshaped(turned, tuple(layer.weight.shape), final)

    def _reshaped(self, source: str, shape: tuple[int, ...], name: str) -> str:
        sizes = self.constant(f"{name}.shape", list(shape), np.int64)
        return self.add("Reshape", [source, sizes], name)


def positive(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same weight with positive scales.

    Returns:
        [out, in] int16 codes, [out, groups] float32 scales, and [out, groups] int16 zero-points;
        None where all of them are the middle code.
    """
    top, scale = weight.spec.top, weight.scale.float()
    codes = weight.codes.to(torch.int16).view(*scale.shape, -1)
    zero = torch.full(scale.shape, 1 << (weight.spec.bits - 1), dtype=torch.int16)
    if weight.zero is not None:
        zero = weight.zero.to(torch.int16)
    negative, nothing = scale < 0, scale == 0
    codes = torch.where(negative.unsqueeze(-1), top - codes, codes)
    zero = torch.where(negative, top - zero, zero)
    codes = torch.where(nothing.unsqueeze(-1), zero.unsqueeze(-1), codes)
    scale = torch.where(nothing, torch.ones_like(scale), scale.abs())
    symmetric = weight.zero is None and not bool(negative.any())
    return codes.view(weight.codes.shape), scale, None if symmetric else zero
