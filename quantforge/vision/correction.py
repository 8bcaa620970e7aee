"""Bias correction: every channel of a quantized layer gets back the mean it had.

Rounding weights moves the mean of what a layer outputs, and rounded inputs move it once more. Both
are made up for by

    b̂ = b + W E[u] − Ŵ E[ũ]

with u the columns of the float network's unfolded inputs and ũ those of the quantized one
(Nagel et al. 2019, arXiv 1906.04721, the empirical form). The means are over all positions of all
pictures, so on the calibration set no channel's mean is off at all before the activation function.
Layers are corrected in order, each on inputs behind those that are corrected already.

Deviations can be given back likewise (`matched_deviations`): grids that clip, noise that an
activation function cuts on one side and feedback that fits the least error all make outputs vary
less than they did, a few per cent a layer, which adds up over fifty layers to logits that are too
flat. A channel's scales are multiplied by what its deviation lacks; the codes stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantforge.methods.convolution import Geometry
from quantforge.types import QuantizedWeight
from quantforge.vision.moments import MomentAccumulator, Moments, output_mean, output_variance
from quantforge.vision.network import QuantizedNetwork, weight_matrix
from quantforge.vision.streams import Stream

MOST_GAIN = 1.5


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


def matched_deviations(
    weight: Tensor, quantized: QuantizedWeight, moments: Moments
) -> QuantizedWeight:
    """The same codes, with scales under which every channel varies as much as the float layer's.

    Args:
        weight: [out, n] W.
        quantized: Ŵ.
        moments: of the layer's inputs; where they are of one stream it is both.
    """
    native = moments.gram if moments.native is None else moments.native
    wanted = output_variance(weight, native, moments.native_mean)
    found = output_variance(quantized.dequantize(), moments.gram, moments.mean)
    usable = (wanted > 0) & (found > 0)
    ratio = torch.where(usable, wanted / found.clamp_min(1e-300), 1.0).sqrt()
    factor = ratio.clamp(1.0 / MOST_GAIN, MOST_GAIN).float().unsqueeze(1)
    scale = (quantized.scale.float() * factor).to(quantized.scale.dtype)
    return replace(quantized, scale=scale)


def correct_biases(
    quantized: QuantizedNetwork, batches: Sequence[Tensor], *, deviations: bool = False
) -> QuantizedNetwork:
    """The same codes and grids with the biases of quantized layers corrected.

    Args:
        quantized: the network.
        batches: calibration pictures.
        deviations: match those too, by the scales.
    """
    network = quantized.network
    native = Stream(network, batches)
    stream = Stream(
        network, batches, quantized.grids,
        {name: (one.dequantize(), quantized.biases[name])
         for name, one in quantized.weights.items()},
    )  # fmt: skip
    weights, biases = dict(quantized.weights), dict(quantized.biases)
    for layer in network.layers:
        source = network.reads[layer.name]
        inputs, originals = stream.value(source), native.value(source)
        if layer.name not in weights:
            continue
        module = network.layer(layer.name)
        weight, own = weight_matrix(module), weights[layer.name]
        made = MomentAccumulator(Geometry.of(module), products=deviations)
        for one, original in zip(inputs, originals, strict=True):
            made.add(one, original)
        mean, native_mean = made.means()
        if deviations:
            own = weights[layer.name] = matched_deviations(weight, own, made.mean())
        matrix = own.dequantize()
        bias = corrected_bias(weight, matrix, module.bias.detach(), native_mean, mean)
        biases[layer.name] = stream.biases[layer.name] = bias
        stream.weights[layer.name] = matrix
    return replace(quantized, weights=weights, biases=biases)
