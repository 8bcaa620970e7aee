"""What an encoder is measured by: the direction of its mean last hidden state over a sequence.

    u = m / ‖m‖,    m = the mean of the last block's output over a sequence's tokens

Sentences are compared by the cosine of such vectors, so the loss of a network whose direction is v,
where the float network's is u, is

    1 − cos(u, v) = ½ ‖u − v‖²

That is also the divergence, in nats, of two normal distributions of unit variance around them. So
what rests on a decoder's distribution over tokens rests on this one too: labels drawn from it are
v + ε with ε standard normal, the gradient of their likelihood at v is ε, and half the mean square
of Σ_t g_tᵀ D x_t is the loss that a weight error D causes, to second order.

A decoder predicts at every token, an encoder has one output a sequence. Sums over tokens count its
loss once for each of the sequence's tokens, so that a mean over tokens is 1 − cosine again.

Tokens whose mask is 0 are no part of the mean. What is calibrated and measured on are sequences of
one length without padding, all of whose tokens count; networks of transformers compute the same of
a sequence that stands in a padded batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.models.head import wide

# Below any length that a direction can be taken of.
LEAST_LENGTH = 1e-12


@dataclass(frozen=True, slots=True)
class PooledOutput:
    """An encoder's output, in the place of a decoder's `Head`."""

    def rounded(self, _dtype: torch.dtype) -> PooledOutput:
        """Itself: there is no product whose operands could be rounded."""
        return self

    def entering(self, states: Tensor) -> Tensor:
        """[sequences, length, hidden] in float32 at least: sequences stay apart."""
        return wide(states)

    def sampled_gradient(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of −Σ_t log-likelihood of drawn labels, with respect to the last hidden states.

        Args:
            hidden: [sequences, length, hidden].
            generator: draws them; of the device of `hidden`.
        """
        mean, length = mean_over_tokens(hidden), hidden.shape[1]
        drawn = self.draw(len(hidden), hidden, generator)
        return _at_tokens(mean, drawn * math.sqrt(length), hidden)

    def draw(self, sequences: int, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """[sequences, hidden] standard normal, for states like `hidden` [.., hidden]."""
        shape, kind = (sequences, hidden.shape[-1]), wide(hidden[:1]).dtype
        return torch.randn(shape, generator=generator, device=hidden.device, dtype=kind)

    def toward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_t (1 − cosine) of every sequence, and its gradient with respect to `hidden`.

        Args:
            hidden: [sequences, length, hidden] of this network.
            target: [sequences, length, hidden] of the float network.

        Returns:
            [sequences] float64, and [sequences, length, hidden].
        """
        mean, length = mean_over_tokens(hidden), hidden.shape[1]
        apart = direction(mean) - direction(mean_over_tokens(target))
        losses = 0.5 * length * apart.square().sum(-1, dtype=torch.float64)
        return losses, _at_tokens(mean, apart * length, hidden)


def mean_over_tokens(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """[sequences, hidden] mean of [sequences, length, hidden], in float32 at least.

    Args:
        hidden: states of all tokens.
        mask: [sequences, length], 0 where a token is padding; None counts all.
    """
    states = wide(hidden)
    if mask is None:
        return states.mean(1)
    counted = mask.to(states).unsqueeze(-1)
    return (states * counted).sum(1) / counted.sum(1)


def direction(mean: Tensor) -> Tensor:
    """[..., hidden] of length 1."""
    return mean / _length(mean)


def _length(mean: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    return length.clamp_min(LEAST_LENGTH)


def _at_tokens(mean: Tensor, gradient: Tensor, hidden: Tensor) -> Tensor:
    """A gradient at the direction, [sequences, hidden], taken back to every token's state.

    A direction changes only with what is across it; every token has an equal share in the mean.
    """
    along = direction(mean)
    across = gradient - along * (along * gradient).sum(-1, keepdim=True)
    share = across / (_length(mean) * hidden.shape[1])
    return share.unsqueeze(1).expand(hidden.shape).to(hidden.dtype)
