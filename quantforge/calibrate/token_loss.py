"""Losses over tokens, by their gradient at the head's input.

Each is a sum over the tokens of a sequence whose gradient with respect to the logits is p − target,
where p is the network's own distribution. They differ in the target:

    sampled    one token drawn from p: the gradients whose mean square is the Fisher information
    following  the token that follows in the text: the loss the network was trained on
    toward     the distribution of another network: the gradient of KL(other ‖ this)

An encoder has no logits: the same is asked of its pooled output (`models.pooled`), which follows
nothing. Logits are formed a chunk of tokens at a time, because a vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantforge.errors import UsageError
from quantforge.models import Head, Output, PooledOutput
from quantforge.numerics import draw_categorical

HEAD_CHUNK = 512

HeadGradient = Callable[[slice, Tensor, Output], Tensor]
"""Rows of a batch among all sequences, what enters the output and the output to the gradient of the
loss's sum over tokens, in the inputs' shape and dtype. A head is entered by [tokens, hidden], an
encoder's output by [sequences, length, hidden]."""

# Tokens of the chunk and their probabilities [tokens, vocabulary], to be changed to p − target.
_Residual = Callable[[slice, Tensor], Tensor]


def sampled_labels(generator: torch.Generator, batch: int | None = None) -> HeadGradient:
    """Labels drawn from the network, batch by batch; the generator is of the network's device.

    What batches that are passed over would draw, because another process runs them, is drawn too:
    labels are the same whoever draws them.

    Args:
        generator: draws them.
        batch: sequences of every batch but the last; None where no batch is passed over.
    """
    following = 0

    def gradient(rows: slice, hidden: Tensor, output: Output) -> Tensor:
        nonlocal following
        size = batch or max(1, rows.start)
        for _ in range(following, rows.start, size):
            if isinstance(output, PooledOutput):
                output.draw(size, hidden, generator)
            else:
                tokens = size * (len(hidden) // (rows.stop - rows.start))
                for start in range(0, tokens, HEAD_CHUNK):
                    count = min(HEAD_CHUNK, tokens - start)
                    torch.rand(count, 1, generator=generator, device=generator.device)
        following = rows.stop
        if isinstance(output, PooledOutput):
            return output.sampled_gradient(hidden, generator)
        return sampled_label_gradient(hidden, output, generator)

    return gradient


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

    Raises:
        UsageError: the network is an encoder (when the gradient is asked for).
    """

    def gradient(rows: slice, hidden: Tensor, output: Output) -> Tensor:
        head = _predicting(output)
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

    def gradient(rows: slice, hidden: Tensor, output: Output) -> Tensor:
        wanted = target[rows].to(hidden.device, hidden.dtype)
        if isinstance(output, PooledOutput):
            return output.toward(hidden, wanted)[1]
        head, flat = output, wanted.flatten(0, 1)

        def residual(chunk: slice, probability: Tensor) -> Tensor:
            return probability.sub_(torch.softmax(head.logits(flat[chunk]), -1))

        return _through_head(hidden, head, residual)

    return gradient


def _predicting(output: Output) -> Head:
    """The head of a decoder."""
    if isinstance(output, PooledOutput):
        raise UsageError(
            "an encoder predicts no next tokens, and this loss is about them; choose another "
            "calibrate.estimator, e.g. fisher"
        )
    return output


def _through_head(hidden: Tensor, head: Head, residual: _Residual) -> Tensor:
    """[tokens, hidden] residuals taken back through the head, in the dtype of `hidden`."""
    pieces = []
    for first in range(0, len(hidden), HEAD_CHUNK):
        chunk = slice(first, first + HEAD_CHUNK)
        probability, slope = head.distribution(hidden[chunk])
        pieces.append(head.input_gradient(residual(chunk, probability), slope))
    return torch.cat(pieces).to(hidden.dtype)
