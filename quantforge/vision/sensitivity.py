"""How much the divergence from the float network grows with each layer's and site's width.

To second order the KL divergence of the softmax, in nats a picture, caused by a weight error D of a
layer, or by the rounding errors e of a site's tensor, is

    ½ E[⟨G, D⟩²],     ½ E[⟨g, e⟩²]

with G and g the gradients, for one picture, of the log-likelihood of a label drawn from the
network's own distribution: the Fisher information, which is the curvature of that divergence. G
sums over the positions of a convolution before the square is taken, so errors that every position
repeats count as they do. Errors are those that quantizing really makes: D of the candidate after
error feedback, with the bias that makes up for it, e of each grid on the pictures themselves.
Several labels are drawn for a picture, since a forward pass costs as much as two more gradients.

`measured_losses` quantizes one layer or one grid alone and measures. It has no second-order error,
and costs a pass over the pictures for every entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantforge.calibrate.sensitivity import standard_error
from quantforge.methods.convolution import Geometry
from quantforge.numerics import draw_categorical, relative
from quantforge.types import LayerInfo, QuantizedWeight, QuantSpec, Sensitivity
from quantforge.vision.compensation import CompensationConfig, quantize_and_correct
from quantforge.vision.moments import MomentAccumulator
from quantforge.vision.network import (
    ActivationGrid,
    QuantizedNetwork,
    Simulation,
    VisionNetwork,
    weight_matrix,
)
from quantforge.vision.ranges import Histogram, RangeMethod, fit_range
from quantforge.vision.streams import Stream, compute, evaluate

ESTIMATOR = "fisher"
LABELS = 4  # a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Every layer quantized with every spec, on the float network's inputs.

    Attributes:
        specs: of all layers; one that does not fit a layer has no weight.
        weights: (layer name, spec) → integers.
        biases: (layer name, spec) → [out] bias that goes with them.
        error: [layers, specs] float64 relative squared output error; +inf where a spec does not
            fit.
    """

    specs: tuple[QuantSpec, ...]
    weights: Mapping[tuple[str, QuantSpec], QuantizedWeight]
    biases: Mapping[tuple[str, QuantSpec], Tensor]
    error: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSensitivity:
    """What rounding activations is predicted to cost.

    Attributes:
        grids: names of the grids, in the order of their first sites.
        bits: widths.
        loss: [grids, widths] float64, nats a picture.
        stderr: [grids, widths] float64, standard error of `loss`.
        candidates: grid name → its grid at every width.
    """

    grids: tuple[str, ...]
    bits: tuple[int, ...]
    loss: Tensor
    stderr: Tensor
    candidates: Mapping[str, tuple[ActivationGrid, ...]]


def candidates(
    network: VisionNetwork,
    batches: Sequence[Tensor],
    specs: Sequence[QuantSpec],
    config: CompensationConfig | None = None,
) -> Candidates:
    """Quantize every layer with every spec that fits it.

    Args:
        network: the float network.
        batches: calibration pictures.
        specs: to try.
        config: how; its feedback sees no second stream.
    """
    config = config or CompensationConfig()
    stream = Stream(network, batches)
    weights: dict[tuple[str, QuantSpec], QuantizedWeight] = {}
    biases: dict[tuple[str, QuantSpec], Tensor] = {}
    error = torch.full((len(network.layers), len(specs)), torch.inf, dtype=torch.float64)
    for row, layer in enumerate(network.layers):
        module = network.layer(layer.name)
        made = MomentAccumulator(Geometry.of(module), cap=config.positions)
        for inputs in stream.value(network.reads[layer.name]):
            made.add(inputs)
        moments, weight = made.mean(), weight_matrix(module)
        whole = _group_errors(weight, moments.gram)
        for column, spec in enumerate(specs):
            if not spec.divides(layer.in_features):
                continue
            one, bias = quantize_and_correct(weight, module.bias.detach(), moments, spec, config)
            weights[layer.name, spec], biases[layer.name, spec] = one, bias
            lost = _group_errors(one.dequantize() - weight, moments.gram)
            error[row, column] = relative(lost, whole)
    return Candidates(specs=tuple(specs), weights=weights, biases=biases, error=error)


def _group_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """[groups, rows] d gram_g dᵀ of every row d of [out, n]."""
    apart = difference.view(len(gram), -1, difference.shape[1])
    return ((apart @ gram) * apart).sum(2)


def sensitivities(
    network: VisionNetwork,
    pictures: Tensor,
    tried: Candidates,
    histograms: Mapping[str, Histogram],
    bits: Sequence[int],
    *,
    method: RangeMethod = "mse",
    labels: int = LABELS,
    seed: int = 0,
) -> tuple[Sensitivity, ActivationSensitivity]:
    """Predicted losses of all candidates, of weights and of activations, from one pass.

    Args:
        network: the float network.
        pictures: [pictures, channels, height, width]; two at least.
        tried: the layers' candidates.
        histograms: `Site.grid` → what is there, from `ranges.observe`.
        bits: widths of activations to try.
        method: of their ranges.
        labels: drawn for a picture.
        seed: of the labels.
    """
    tables = {
        name: tuple(fit_range(one, width, method) for width in bits)
        for name, one in histograms.items()
    }
    grids = tables if bits else {}
    products, rounding = gradient_products(
        network, pictures, tried, grids, labels=labels, seed=seed
    )
    # labels of one picture are no independent samples of pictures: they are averaged first
    weights = 0.5 * products.square().mean(1)
    sites = 0.5 * rounding.square().mean(1)
    fits = tried.error.isfinite()
    sensitivity = Sensitivity(
        layers=network.layers, specs=tried.specs, error=tried.error, estimator=ESTIMATOR,
        loss=torch.where(fits, weights.mean(0), torch.inf), fingerprint=network.fingerprint,
        stderr=torch.where(fits, standard_error(weights), torch.inf),
    )  # fmt: skip
    activations = ActivationSensitivity(
        grids=tuple(grids), bits=tuple(bits), loss=sites.mean(0),
        stderr=standard_error(sites) if grids else sites.mean(0),
        candidates=grids,
    )  # fmt: skip
    return sensitivity, activations


def gradient_products(
    network: VisionNetwork,
    pictures: Tensor,
    tried: Candidates,
    grids: Mapping[str, Sequence[ActivationGrid]],
    *,
    labels: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """⟨G, D⟩ and ⟨g, e⟩ of every picture and label.

    Args:
        network: the float network.
        pictures: [pictures, channels, height, width].
        tried: the layers' candidates.
        grids: `Site.grid` → grids to try, as many of each.
        labels: drawn for a picture.
        seed: of the labels.

    Returns:
        [pictures, labels, layers, specs] and [pictures, labels, grids, widths] float64, in nats; 0
        for candidates that do not fit.
    """
    names = [layer.name for layer in network.layers]
    matrices = {name: weight_matrix(network.layer(name)).clone() for name in names}
    biases = {name: network.layer(name).bias.detach().clone() for name in names}
    errors = {name: _errors(matrices[name], biases[name], name, tried) for name in names}
    for parameter in (*matrices.values(), *biases.values()):
        parameter.requires_grad_()
    site_of = {site.node: site.grid for site in network.sites if site.grid in grids}
    rows = {name: index for index, name in enumerate(grids)}
    generator = torch.Generator().manual_seed(seed)
    shape = (len(pictures), labels)
    products = torch.zeros(*shape, len(names), len(tried.specs), dtype=torch.float64)
    width = max((len(one) for one in grids.values()), default=0)
    rounding = torch.zeros(*shape, len(grids), width, dtype=torch.float64)
    for index in range(len(pictures)):
        held: dict[str, Tensor] = {}
        with torch.enable_grad():
            entering = pictures[index : index + 1].clone().requires_grad_()
            logits = evaluate(network, entering, matrices, _holding(site_of, held), biases)
            logs = logits.flatten().log_softmax(0)
        drawn = draw_categorical(logs.detach().exp().expand(labels, -1), generator).flatten()
        noise = rounding_noise(network, {n: one.detach() for n, one in held.items()}, grids)
        read = [*matrices.values(), *biases.values(), *held.values()]
        for number, label in enumerate(drawn.tolist()):
            made = torch.autograd.grad(
                logs[label], read, retain_graph=number + 1 < labels, allow_unused=True
            )
            count = len(names)
            own, shift, felt = made[:count], made[count : 2 * count], made[2 * count :]
            for row, (name, *both) in enumerate(zip(names, own, shift, strict=True)):
                if both[0] is not None:
                    gradient = torch.cat([both[0].flatten(), both[1]])
                    products[index, number, row] = errors[name] @ gradient
            for node, gradient in zip(held, felt, strict=True):
                if gradient is not None:
                    rounding[index, number, rows[site_of[node]]] += noise[node] @ gradient.flatten()
    return products, rounding


def rounding_noise(
    network: VisionNetwork,
    values: Mapping[str, Tensor],
    grids: Mapping[str, Sequence[ActivationGrid]],
) -> dict[str, Tensor]:
    """Name of a site's node → [widths, numbers] what rounding adds there.

    A sum of numbers that are on the grid is on it too, so what functions alone make of sites of
    the same grid has only the error of clipping: there the values are made anew from rounded ones.

    Args:
        network: the float network.
        values: name of a site's node → its tensor.
        grids: `Site.grid` → grids to try.
    """
    site_of = {site.node: site.grid for site in network.sites if site.node in values}
    found = {}
    for node in network.graph.graph.nodes:
        if node.name not in site_of:
            continue
        rows = []
        for grid in grids[site_of[node.name]]:
            again = _from_rounded(network, node, values, site_of, grid)
            value = values[node.name] if again is None else again
            rows.append((grid.rounded(value) - value).flatten())
        found[node.name] = torch.stack(rows)
    return found


def _from_rounded(
    network: VisionNetwork,
    node: fx.Node,
    values: Mapping[str, Tensor],
    site_of: Mapping[str, str],
    grid: ActivationGrid,
) -> Tensor | None:
    """A site's tensor from the rounded sites of its own grid; None where it reads others."""
    known: dict[fx.Node, Tensor] = {}
    if node.op != "call_function":
        return None
    for one in node.all_input_nodes:
        if one.name in site_of:
            if site_of[one.name] != site_of[node.name]:
                return None
            known[one] = grid.rounded(values[one.name])
            continue
        made = None
        if one.op == "call_function":
            made = _from_rounded(network, one, values, {**site_of, one.name: site_of[node.name]},
                                 grid)  # fmt: skip
        if made is None:
            return None
        known[one] = made
    result: Tensor = compute(network.graph, node, known)
    return result if isinstance(result, Tensor) else None


def _errors(weight: Tensor, bias: Tensor, name: str, tried: Candidates) -> Tensor:
    """[specs, out · n + out] D of every candidate and of its bias, 0 where there is none."""
    found = torch.zeros(len(tried.specs), weight.numel() + len(bias))
    for row, spec in enumerate(tried.specs):
        if (one := tried.weights.get((name, spec))) is not None:
            moved = tried.biases[name, spec] - bias
            found[row] = torch.cat([(one.dequantize() - weight).flatten(), moved])
    return found


def _holding(sites: Mapping[str, str], held: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    """A watcher of nodes that notes the values of sites."""

    def watch(node: fx.Node, value: object) -> object:
        if node.name in sites and isinstance(value, Tensor):
            held[node.name] = value
        return value

    return watch


@torch.no_grad()
def divergence(
    quantized: QuantizedNetwork, pictures: Tensor, reference: Tensor, batch: int = 16
) -> Tensor:
    """[pictures] float64 KL divergence from the float network's softmax, in nats.

    Args:
        quantized: the network.
        pictures: [pictures, channels, height, width].
        reference: [pictures, classes] the float network's logits.
        batch: pictures at a time.
    """
    run = Simulation(quantized)
    made = torch.cat([run.run(part) for part in torch.split(pictures, batch)])
    wanted, found = reference.double().log_softmax(1), made.double().log_softmax(1)
    return (wanted.exp() * (wanted - found)).sum(1)


@torch.no_grad()
def measured_losses(
    network: VisionNetwork,
    pictures: Tensor,
    tried: Candidates,
    grids: Mapping[str, Sequence[ActivationGrid]],
    *,
    layers: Sequence[LayerInfo] | None = None,
    batch: int = 16,
) -> tuple[Tensor, Tensor]:
    """Divergence in nats a picture with one layer quantized, and with one grid in use, at a time.

    Args:
        network: the float network.
        pictures: [pictures, channels, height, width].
        tried: the layers' candidates.
        grids: `Site.grid` → grids to try, as many of each.
        layers: to measure; all if None.
        batch: pictures at a time.

    Returns:
        [layers, specs] and [grids, widths] float64; +inf for candidates that do not fit.
    """
    chosen = network.layers if layers is None else layers
    reference = torch.cat([network.graph(part) for part in torch.split(pictures, batch)])

    def lost(
        weights: Mapping[str, QuantizedWeight],
        biases: Mapping[str, Tensor],
        used: Mapping[str, ActivationGrid],
    ) -> float:
        made = QuantizedNetwork(network=network, weights=weights, biases=biases, grids=used)
        return float(divergence(made, pictures, reference, batch).mean())

    weights = torch.full((len(chosen), len(tried.specs)), torch.inf, dtype=torch.float64)
    for row, layer in enumerate(chosen):
        for column, spec in enumerate(tried.specs):
            one = tried.weights.get((layer.name, spec))
            if one is not None:
                bias = tried.biases[layer.name, spec]
                weights[row, column] = lost({layer.name: one}, {layer.name: bias}, {})
    rows = [[lost({}, {}, {name: grid}) for grid in tables] for name, tables in grids.items()]
    return weights, torch.tensor(rows, dtype=torch.float64)


def importances(
    network: VisionNetwork, pictures: Tensor, *, labels: int = LABELS, seed: int = 0
) -> dict[str, Tensor]:
    """Name of a block → [pictures, ...] mean squared gradient at its output, with mean 1.

    BRECQ's weights of the squared error: the diagonal of the Fisher information of each number.

    Args:
        network: the float network.
        pictures: [pictures, channels, height, width].
        labels: drawn for a picture.
        seed: of the labels.
    """
    generator = torch.Generator().manual_seed(seed)
    results = {block.result: block.name for block in network.blocks}
    found: dict[str, list[Tensor]] = {name: [] for name in results.values()}
    for index in range(len(pictures)):
        held: dict[str, Tensor] = {}
        with torch.enable_grad():
            entering = pictures[index : index + 1].clone().requires_grad_()
            logits = evaluate(network, entering, {}, _holding(results, held))
            logs = logits.flatten().log_softmax(0)
        drawn = draw_categorical(logs.detach().exp().expand(labels, -1), generator).flatten()
        total = {node: torch.zeros_like(one) for node, one in held.items()}
        for number, label in enumerate(drawn.tolist()):
            made = torch.autograd.grad(
                logs[label], list(held.values()), retain_graph=number + 1 < labels
            )
            for node, gradient in zip(held, made, strict=True):
                total[node] += gradient.square() / labels
        for node, one in total.items():
            found[results[node]].append(one.detach())
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: one / one.mean().clamp_min(1e-30) for name, one in joined.items()}
