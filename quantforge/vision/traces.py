"""HAWQ-V2's scores of weights and activations, from traces of the divergence's curvature.

The mean curvature of a tensor's entries times the squared error that quantizing makes in it,

    ½ (tr H / n) ‖error‖²,

as if errors were isotropic (Dong et al. 2020, arXiv 1911.03852). It is what the exact products of
`sensitivity` are held against: it knows how much a layer matters, not which of its errors do. H is
of the mean divergence over the pictures from the float network itself, so it is positive
semi-definite and needs no labels. An activation's is block-diagonal over pictures, so one probe of
a whole batch gives the mean over them. Weights and sites are probed together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quantforge.methods.curvature.scores import cautious
from quantforge.methods.curvature.trace import BlockTraces, hutchinson_blocks
from quantforge.vision.network import ActivationGrid, VisionNetwork, weight_matrix
from quantforge.vision.sensitivity import Candidates, rounding_noise
from quantforge.vision.streams import evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTraces:
    """Traces of every layer's weight and every site's tensor.

    Attributes:
        layers: names, in the order of the columns.
        sites: names of nodes, in the order of the columns behind those of the layers.
        sizes: entries of each: weights, or numbers of a site's tensor of one picture.
        traces: of all of them.
    """

    layers: tuple[str, ...]
    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    traces: BlockTraces

    def means(self) -> Tensor:
        """[layers + sites] float64 mean curvature of an entry, nowhere below its standard error."""
        values = cautious(self.traces.values, self.traces.standard_errors)
        return values / torch.tensor(self.sizes, dtype=torch.float64)


def network_traces(
    network: VisionNetwork,
    pictures: Tensor,
    *,
    probes: int = 16,
    tolerance: float = 0.1,
    seed: int = 0,
) -> NetworkTraces:
    """Probe all layers and sites of the float network on a batch of pictures.

    Args:
        network: the float network.
        pictures: [pictures, channels, height, width].
        probes: at most so many; each costs about four passes.
        tolerance: relative standard error at which probing stops.
        seed: of the probes.
    """
    names = tuple(layer.name for layer in network.layers)
    nodes = tuple(site.node for site in network.sites)
    matrices = [weight_matrix(network.layer(name)).clone().requires_grad_() for name in names]
    moved: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: object) -> object:
        if node.name in nodes and isinstance(value, Tensor):
            moved[node.name] = torch.zeros_like(value, requires_grad=True)
            return value + moved[node.name]
        return value

    with torch.enable_grad():
        logits = evaluate(network, pictures, dict(zip(names, matrices, strict=True)), watch)
        logs = logits.log_softmax(1)
        wanted = logs.detach()
        loss = (wanted.exp() * (wanted - logs)).sum(1).mean()
        read = [*matrices, *(moved[node] for node in nodes)]
        # the gradient is 0 there, its derivative is not
        first = torch.autograd.grad(loss, read, create_graph=True)
    sizes = [one.numel() for one in read]

    def product(vector: Tensor) -> Tensor:
        parts = [
            part.view_as(one) for part, one in zip(torch.split(vector, sizes), read, strict=True)
        ]
        made = torch.autograd.grad(first, read, parts, retain_graph=True)
        return torch.cat([one.reshape(-1) for one in made])

    found = hutchinson_blocks(
        product, sizes, generator=torch.Generator().manual_seed(seed), tolerance=tolerance,
        max_probes=probes,
    )  # fmt: skip
    a_picture = [one.numel() // len(pictures) for one in read[len(names) :]]
    return NetworkTraces(
        layers=names, sites=nodes, sizes=(*sizes[: len(names)], *a_picture), traces=found
    )


def weight_losses(network: VisionNetwork, found: NetworkTraces, tried: Candidates) -> Tensor:
    """[layers, specs] float64 predicted losses, nats a picture; +inf where a spec does not fit."""
    means = found.means()
    losses = torch.full_like(tried.error, torch.inf)
    for row, name in enumerate(found.layers):
        weight = weight_matrix(network.layer(name))
        for column, spec in enumerate(tried.specs):
            if (one := tried.weights.get((name, spec))) is not None:
                square = (one.dequantize() - weight).double().square().sum()
                losses[row, column] = 0.5 * means[row] * square
    return losses


def activation_losses(
    network: VisionNetwork,
    found: NetworkTraces,
    pictures: Tensor,
    grids: Mapping[str, Sequence[ActivationGrid]],
) -> Tensor:
    """[grids, widths] float64 predicted losses in nats a picture; sites of a grid add up.

    Args:
        network: the float network.
        found: its traces.
        pictures: on which roundings are made.
        grids: `Site.grid` → grids to try, as many of each.
    """
    means = found.means()[len(found.layers) :]
    rows = {name: index for index, name in enumerate(grids)}
    width = max((len(one) for one in grids.values()), default=0)
    losses = torch.zeros(len(rows), width, dtype=torch.float64)
    held: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: object) -> object:
        if isinstance(value, Tensor):
            held[node.name] = value
        return value

    with torch.no_grad():
        evaluate(network, pictures, {}, watch)
    sites = {site.node: site.grid for site in network.sites if site.grid in rows}
    noise = rounding_noise(network, {node: held[node] for node in sites}, grids)
    for site, mean in zip(network.sites, means, strict=True):
        if site.node in noise:
            squares = noise[site.node].double().square().sum(1) / len(pictures)
            losses[rows[site.grid], : len(squares)] += 0.5 * mean * squares
    return losses
