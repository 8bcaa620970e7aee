"""What is refused before anything is measured: networks and recipes that cannot go together."""

from __future__ import annotations

from quantforge.errors import ResourceError, UsageError
from quantforge.memory import available_bytes
from quantforge.types import QuantSpec
from quantforge.vision.network import VisionNetwork
from quantforge.vision.recipe import VisionSearchConfig

# Matrices of a layer's inputs squared at the peak of its compensation: the grams of both streams,
# their difference, and factorizations of them, measured on a linear layer of 3,200 inputs.
GRAMS = 22


def require_candidates(network: VisionNetwork, search: VisionSearchConfig) -> None:
    """Refuse a recipe that leaves a layer without a width, or no layer to be searched.

    Raises:
        UsageError: it does; names the key to change.
    """
    ends = (network.layers[0], network.layers[-1])
    inner = list(network.layers)
    if search.edges != "plan":
        spec = QuantSpec.parse(search.edges)
        for layer in ends:
            if not spec.divides(layer.in_features):
                raise UsageError(
                    f"search.edges={search.edges} does not divide rows of {layer.in_features} "
                    f"weights of {layer.name}: give a width per channel, e.g. {spec.bits}b-pc"
                )
        inner = [layer for layer in network.layers if layer not in ends]
    if not inner:
        raise UsageError(
            f"search.edges={search.edges} fixes all layers of {network.name}: set it to plan"
        )
    for layer in inner:
        if not search.candidates({layer.in_features}):
            sizes = ", ".join(map(str, search.group_sizes))
            raise UsageError(
                f"no group size of {sizes} divides rows of {layer.in_features} weights of "
                f"{layer.name}: add -1, per channel, to search.group_sizes"
            )


def require_room(network: VisionNetwork) -> None:
    """Refuse a network one of whose layers cannot be compensated in the memory that is left.

    Raises:
        ResourceError: there is too little memory.
    """
    left = available_bytes()
    for layer in network.layers:
        groups = getattr(network.layer(layer.name), "groups", 1)
        wanted = GRAMS * 4 * groups * layer.in_features**2
        if left is not None and wanted > left:
            raise ResourceError(
                f"{layer.name} has rows of {layer.in_features} weights: the moments of its inputs "
                f"take about {wanted / 1e9:.1f} GB of memory, of which {left / 1e9:.1f} GB are "
                "left; run it where there is more"
            )
