"""Bias correction: every channel of a quantized layer gets back the mean it had.

Rounding weights moves the mean of what a layer outputs, and rounded inputs move it once more. Both
are made up for by

    b̂ = b + W E[u] − Ŵ E[ũ]

with u the columns of the float network's unfolded inputs and ũ those of the quantized one
(Nagel et al. 2019, arXiv 1906.04721, the empirical form). The means are over all positions of all
pictures, so on the calibration set no channel's mean is off at all before the activation function.
Layers are corrected in order, each on inputs behind those that are corrected already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from quantforge.methods.convolution import Geometry
from quantforge.vision.moments import MomentAccumulator, output_mean
from quantforge.vision.network import QuantizedNetwork, weight_matrix
from quantforge.vision.streams import Stream


def corrected_bias(
    weight: Tensor, quantized: Tensor, bias: Tensor, native_mean: Tensor, mean: Tensor
) -> Tensor:
    """[out] float32 bias under which the quantized layer's mean outputs are the float layer's.

    Args:
        weight: [out, n] W.
        quantized: [out, n] Ŵ.
        bias: [out] float bias.
        native_mean: [groups, n] float64 E[u].
        mean: [groups, n] float64 E[ũ].
    """
    zero = bias.double() * 0.0
    made = output_mean(weight, bias, native_mean) - output_mean(quantized, zero, mean)
    return made.float()


def correct_biases(quantized: QuantizedNetwork, batches: Sequence[Tensor]) -> QuantizedNetwork:
    """The same network with the biases of its quantized layers corrected.

    Args:
        quantized: weights and grids, which stay as they are.
        batches: calibration pictures.
    """
    network = quantized.network
    native = Stream(network, batches)
    stream = Stream(
        network, batches, quantized.grids,
        {name: (one.dequantize(), quantized.biases[name])
         for name, one in quantized.weights.items()},
    )  # fmt: skip
    biases = dict(quantized.biases)
    for layer in network.layers:
        source = network.reads[layer.name]
        inputs, originals = stream.value(source), native.value(source)
        if layer.name not in quantized.weights:
            continue
        module = network.layer(layer.name)
        made = MomentAccumulator(Geometry.of(module), products=False)
        for one, original in zip(inputs, originals, strict=True):
            made.add(one, original)
        mean, native_mean = made.means()
        biases[layer.name] = corrected_bias(
            weight_matrix(module), stream.weights[layer.name], module.bias.detach(),
            native_mean, mean,
        )  # fmt: skip
        stream.biases[layer.name] = biases[layer.name]
    return replace(quantized, biases=biases)
