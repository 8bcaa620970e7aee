"""Losses on a network's distribution, by their gradient at the head's input.

The gradient of each with respect to the logits is q − t: q is the network's own distribution, t
what it is pulled towards. Taken back through the head ((q − t) W where it is W alone) it is the
gradient at the head's input, and no graph over a [tokens, vocabulary] matrix exists: logits are
formed for a few tokens at a time and forgotten.

    KL(p ‖ q) to a teacher          t = p
    the same to its k likeliest     t = p on those; on all others what is left of p, (1 − Σ_k p),
      tokens and the rest             shared out as q shares it: they are one outcome
    cross-entropy                   t = 1 on the token that follows
    a mixture of the two            t = (1 − c) t_teacher + c t_text

Everything is float32; the products are in the head's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantforge.models.head import Head, wide
from quantforge.numerics import draw_categorical

# Tokens whose logits are formed at a time: three [tokens, vocabulary] float32 matrices are held,
# four where logits are capped.
HEAD_CHUNK = 128
TINY = 1e-30  # below any probability that matters: keeps logarithms and quotients finite


class Target(Protocol):
    """What a network's distribution over some tokens is pulled towards."""

    def residual(self, tokens: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(Loss of every token [tokens], q − t [tokens, vocabulary]), both float32.

        Args:
            tokens: which of all.
            logits: [tokens, vocabulary] float32 of the network; stay as they are.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FullTeacher:
    """The distribution that a head gives for a teacher's hidden states.

    Attributes:
        hidden: [tokens, hidden], what enters the teacher's head.
        head: the teacher's.
    """

    hidden: Tensor
    head: Head

    def residual(self, tokens: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Target`: KL(teacher ‖ network)."""
        wanted = self.head.logits(self.hidden[tokens])
        ours, theirs = logits.logsumexp(-1, keepdim=True), wanted.logsumexp(-1, keepdim=True)
        gap = wanted - logits
        share = wanted.sub_(theirs).exp_()
        losses = gap.mul_(share).sum(-1) + (ours - theirs).squeeze(-1)
        return losses, (logits - ours).exp_().sub_(share)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTeacher:
    """A teacher's k likeliest tokens; all others are one outcome.

    Attributes:
        tokens: [tokens, k] int64, which.
        chances: [tokens, k] float their probabilities.
    """

    tokens: Tensor
    chances: Tensor

    def residual(self, tokens: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Target`: KL over k + 1 outcomes, which is at most that over the vocabulary."""
        top, wanted = self.tokens[tokens], self.chances[tokens].float()
        own = torch.softmax(logits, -1)
        # Summed over the others, not 1 − Σ: near certainty that would be rounding errors.
        left = own.scatter(1, top, 0.0).sum(-1, keepdim=True)
        rest = (1.0 - wanted.sum(-1, keepdim=True)).clamp_min_(0.0)
        outcomes = torch.cat([wanted, rest], -1), torch.cat([own.gather(1, top), left], -1)
        p, q = (one.clamp_min(TINY) for one in outcomes)
        losses = (outcomes[0] * (p.log() - q.log())).sum(-1)
        target = own * (rest / left.clamp_min(TINY))
        return losses, own.sub_(target.scatter_(1, top, wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """A teacher's distribution, mixed with the text's own next tokens.

    Attributes:
        teacher: the target without them.
        following: [tokens] int64 the next tokens; -1 where there is none: the teacher counts alone.
        share: of the cross-entropy, 0..1.
    """

    teacher: Target
    following: Tensor
    share: float

    def residual(self, tokens: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Target`: (1 − share) · the teacher's loss + share · cross-entropy."""
        losses, residual = self.teacher.residual(tokens, logits)
        following = self.following[tokens].unsqueeze(1)
        label = following.clamp_min(0)
        share = self.share * (following >= 0).float()
        chances = torch.log_softmax(logits, -1)
        entropy = -chances.gather(1, label).squeeze(1)
        text = chances.exp_().scatter_add_(1, label, -torch.ones_like(share))
        mixed = losses.lerp_(entropy, share.squeeze(1))
        return mixed, residual.lerp_(text, share)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Labels drawn from the network itself: the loss whose mean square gradient is the curvature.

    Attributes:
        generator: draws one label a token; of the logits' device.
    """

    generator: torch.Generator

    def residual(self, tokens: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Target`: cross-entropy with the drawn labels; `tokens` is passed over."""
        own = torch.softmax(logits, -1)
        label = draw_categorical(own, self.generator)
        losses = -own.gather(1, label).clamp_min(TINY).log().squeeze(1)
        return losses, own.scatter_add_(1, label, -torch.ones_like(label, dtype=own.dtype))


@torch.no_grad()
def head_gradient(hidden: Tensor, head: Head, target: Target) -> tuple[Tensor, Tensor]:
    """The loss's sum over tokens and its gradient with respect to the head's input.

    Args:
        hidden: [tokens, hidden] head input of the network that is trained.
        head: its head, which is not trained.
        target: of these tokens.

    Returns:
        Scalar float64, and [tokens, hidden] float32.
    """
    total, pieces = torch.zeros((), dtype=torch.float64, device=hidden.device), []
    for start in range(0, len(hidden), HEAD_CHUNK):
        chunk = slice(start, min(start + HEAD_CHUNK, len(hidden)))
        logits = head.logits(hidden[chunk])
        losses, residual = target.residual(chunk, logits)
        total += losses.sum(dtype=torch.float64)
        pieces.append(wide(head.input_gradient(residual, head.form.slope(logits))))
    return total, torch.cat(pieces)


@torch.no_grad()
def distillation_gradient(
    student: Tensor, teacher: Tensor, head: Head, teacher_head: Head | None = None
) -> Tensor:
    """Gradient of Σ_t KL(p_t ‖ q_t) with respect to the student's head input, [tokens, hidden].

    As `head_gradient` with a `FullTeacher`, without the loss and what that takes.

    Args:
        student: [tokens, hidden] head input of the network being tuned.
        teacher: [tokens, hidden] head input of the float network.
        head: the student's.
        teacher_head: the teacher's; None where they share one.
    """
    teacher_head = head if teacher_head is None else teacher_head
    pieces = []
    for ours, theirs in zip(
        torch.split(student, HEAD_CHUNK), torch.split(teacher, HEAD_CHUNK), strict=True
    ):
        difference, slope = head.distribution(ours)
        difference -= torch.softmax(teacher_head.logits(theirs), -1)
        pieces.append(wide(head.input_gradient(difference, slope)))
    return torch.cat(pieces)


def following_tokens(tokens: Tensor) -> Tensor:
    """[sequences · length] int64 the token after each of [sequences, length]; -1 at the ends."""
    following = torch.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    return following.flatten()
