"""Interactions of layers from gradients of samples, and the search's objective with them.

To second order an error D of all weights loses ½ Dᵀ F D, F the Fisher information. Its pair terms
D_iᵀ F_ij D_j are a Gram matrix: with p_s,i,a = Σ_t g_tᵀ D x_t / √(2 T), the derivative of sample s
(a sequence of T tokens, labels drawn from the network) along the error of layer i at candidate a,

    f(c) = E_s[(Σ_i p_s,i,c_i)²],        pair(i a, j b) = 2 E_s[p_s,i,a p_s,j,b]

for m backward passes in the place of CLADO's evaluation of the network once a pair of candidates
(Deng et al. 2023, arXiv 2307.05657; `methods.mfac` has the Gram, `search.objective` its solvers).

A mean over 32 samples is not an expectation. A pair's noise is about 18 % of the geometric mean of
both layers' losses whatever their interaction is, and a search over all pairs would find the plan
whose noise cancels best. So pairs are shrunk towards 0 by how much of their mean square is signal,
w = 1 − noise / mean square, measured for each distance of blocks: pairs of one block, of adjacent
blocks, and others ("sparse" drops those). Losses of single layers stay the estimator's own, which
also says more than the Gram's diagonal does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantforge.errors import UsageError
from quantforge.search.choice import Losses
from quantforge.search.objective import PairwiseObjective
from quantforge.types import Interactions, LayerInfo, Sensitivity

# Distances of blocks that are told apart: 0, 1, and this or more.
FAR = 2
# Of the table of all pairs.
MOST_BYTES = 4 << 30


def shrunk_interactions(
    products: Tensor, length: int, layers: Sequence[LayerInfo], *, sparse: bool
) -> Interactions:
    """Interactions of all pairs, each class of pairs shrunk by how little of it is noise.

    Args:
        products: [samples, layers, specs] Σ_t g_tᵀ D x_t of every sample; 0 where nothing fits.
        length: tokens a sample.
        layers: gives their blocks.
        sparse: leave out pairs that are neither of one block nor of adjacent ones.
    """
    projections = products.double() / (2 * length) ** 0.5
    blocks = torch.tensor([layer.block for layer in layers])
    apart = (blocks[:, None] - blocks).abs().clamp_max(FAR)
    outside = blocks < 0
    apart[outside] = FAR
    apart[:, outside] = FAR
    share = _signal_shares(projections, apart)
    if sparse:
        share[FAR] = 0.0
    weights = share[apart]
    weights.fill_diagonal_(0.0)
    return Interactions(projections=projections, weights=weights)


def _signal_shares(projections: Tensor, apart: Tensor) -> Tensor:
    """[classes] of the mean square of pairs, relative to their layers' losses, what is not noise.

    Args:
        projections: [samples, layers, specs].
        apart: [layers, layers] class of every pair.
    """
    samples, count, width = projections.shape
    square, noise = torch.zeros(FAR + 1).double(), torch.zeros(FAR + 1).double()
    if samples < 2:
        return torch.zeros(FAR + 1).double()
    power = projections.square().mean(0)
    for first in range(count - 1):
        mine, rest = projections[:, first], projections[:, first + 1 :].flatten(1)
        mean = mine.T @ rest / samples  # [specs, later layers · specs]
        spread = (mine.square().T @ rest.square() / samples - mean.square()) / (samples - 1)
        size = power[first][:, None] * power[first + 1 :].flatten()
        known = size > 0
        size = torch.where(known, size, 1.0)
        classes = apart[first, first + 1 :].repeat_interleave(width).expand_as(mean)
        for total, values in ((square, mean.square()), (noise, spread)):
            part = torch.where(known, values / size, 0.0)
            total.index_add_(0, classes.flatten(), part.flatten())
    return torch.where(square > 0, 1.0 - noise / square.clamp_min(1e-300), 0.0).clamp_min(0.0)


def pair_loss(interactions: Interactions | None, columns: Sequence[int | None]) -> float:
    """What all pairs of layers add at these specs, in nats a token.

    Args:
        interactions: None for no pairs.
        columns: spec of every layer; None where it is kept.
    """
    if interactions is None:
        return 0.0
    rows = [row for row, column in enumerate(columns) if column is not None]
    picked = [column for column in columns if column is not None]
    taken = interactions.projections[:, rows, picked]
    pairs = taken.T @ taken / max(len(taken), 1)
    return float((pairs * interactions.weights[rows][:, rows]).sum())


def uniform_loss(sensitivity: Sensitivity, column: int) -> float:
    """Predicted loss of the network in which every layer has one spec; +inf where one cannot."""
    alone = float(sensitivity.loss[:, column].sum())
    return alone + pair_loss(sensitivity.interactions, [column] * len(sensitivity.layers))


def pairwise_objective(
    loss: Losses, interactions: Interactions, items: Sequence[Sequence[int]]
) -> PairwiseObjective:
    """The objective of a search over items, each of layers that share a spec.

    Args:
        loss: [items, specs + 1] what an item's layers lose, each alone; the last keeps them.
        interactions: of the layers.
        items: rows of the layers of each; an item's layers are of one block.

    Raises:
        UsageError: the table of all pairs would be too large.
    """
    width = loss.shape[1]
    if 8 * (len(items) * width) ** 2 > MOST_BYTES:
        raise UsageError(
            f"the interactions of {len(items)} groups of layers with {width} candidates each take "
            f"more than {MOST_BYTES >> 30} GB; leave some of search.bits or search.group_sizes out"
        )
    projections = interactions.projections.numpy()
    weights = interactions.weights.numpy()
    alone, samples = loss.copy(), len(projections)
    joint = np.zeros((samples, *loss.shape))
    for item, rows in enumerate(items):
        members = projections[:, list(rows)]  # [samples, layers of the item, specs]
        joint[:, item, :-1] = members.sum(axis=1)
        alone[item, :-1] += _within(members, weights[np.ix_(rows, rows)])
    first = [rows[0] for rows in items]
    between = weights[np.ix_(first, first)].copy()
    np.fill_diagonal(between, 0.0)
    flat = joint.reshape(samples, -1)
    pair = (2.0 / samples * (flat.T @ flat)).reshape(*loss.shape, *loss.shape)
    pair *= between[:, None, :, None]
    return PairwiseObjective(loss=alone, pair=pair)


def _within(members: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[specs] what the pairs of an item's own layers add when all have one spec."""
    found: NDArray[np.float64] = np.einsum("sia,ij,sja->a", members, weights, members)
    return found / len(members)
