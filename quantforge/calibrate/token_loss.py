"""Losses over tokens, by their gradient at the head's input.

Each is a sum over the tokens of a sequence whose gradient with respect to the logits is p − target,
where p is the network's own distribution. They differ in the target:

    sampled    one token drawn from p: the gradients whose mean square is the Fisher information
    following  the token that follows in the text: the loss the network was trained on
    toward     the distribution of another network: the gradient of KL(other ‖ this)

Logits are formed a chunk of tokens at a time, because a vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantforge.models import Head
from quantforge.numerics import draw_categorical

HEAD_CHUNK = 512

HeadGradient = Callable[[slice, Tensor, Head], Tensor]
"""Rows of a batch among all sequences, head inputs [tokens, hidden] and the head to the gradient
[tokens, hidden] of the loss's sum over tokens, in the inputs' dtype."""

# Tokens of the chunk and their probabilities [tokens, vocabulary], to be changed to p − target.
_Residual = Callable[[slice, Tensor], Tensor]


def sampled_labels(generator: torch.Generator) -> HeadGradient:
    """Labels drawn from the network, batch by batch; the generator is of the network's device."""
    return lambda _, hidden, head: sampled_label_gradient(hidden, head, generator)


def sampled_label_gradient(hidden: Tensor, head: Head, generator: torch.Generator) -> Tensor:
    """Gradient of Σ_t −log p(y_t) with y_t ~ p, with respect to the head's input.

    Args:
        hidden: [tokens, hidden] input of the head.
        head: of the network.
        generator: draws the labels; of the device of `hidden`.

    Returns:
        [tokens, hidden] in the dtype of `hidden`; (p − onehot(y)) · W where the head is W alone.
    """

    def residual(_: slice, probability: Tensor) -> Tensor:
        label = draw_categorical(probability, generator)
        one = torch.ones_like(label, dtype=probability.dtype)
        return probability.scatter_add_(1, label, -one)

    return _through_head(hidden, head, residual)


def following_tokens(tokens: Tensor) -> HeadGradient:
    """The text's own next tokens as labels; the last position predicts nothing.

    Args:
        tokens: [sequences, length] int64, all that are run.
    """

    def gradient(rows: slice, hidden: Tensor, head: Head) -> Tensor:
        following = tokens[rows].to(hidden.device).roll(-1, dims=1).flatten()
        predicting = torch.ones_like(tokens[rows], dtype=torch.bool, device=hidden.device)
        predicting[:, -1] = False
        counted = predicting.flatten()

        def residual(chunk: slice, probability: Tensor) -> Tensor:
            label = following[chunk].unsqueeze(1)
            one = torch.ones_like(label, dtype=probability.dtype)
            return probability.scatter_add_(1, label, -one) * counted[chunk].unsqueeze(1)

        return _through_head(hidden, head, residual)

    return gradient


def toward(target: Tensor) -> HeadGradient:
    """The divergence from a network that has the same head: Σ_t KL(target ‖ this).

    Args:
        target: [sequences, length, hidden] that network's head inputs for all that is run.
    """

    def gradient(rows: slice, hidden: Tensor, head: Head) -> Tensor:
        wanted = target[rows].to(hidden.device, hidden.dtype).flatten(0, 1)

        def residual(chunk: slice, probability: Tensor) -> Tensor:
            return probability.sub_(torch.softmax(head.logits(wanted[chunk]), -1))

        return _through_head(hidden, head, residual)

    return gradient


def _through_head(hidden: Tensor, head: Head, residual: _Residual) -> Tensor:
    """[tokens, hidden] residuals taken back through the head, in the dtype of `hidden`."""
    pieces = []
    for first in range(0, len(hidden), HEAD_CHUNK):
        chunk = slice(first, first + HEAD_CHUNK)
        probability, slope = head.distribution(hidden[chunk])
        pieces.append(head.input_gradient(residual(chunk, probability), slope))
    return torch.cat(pieces).to(hidden.dtype)
