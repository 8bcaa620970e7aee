"""Token scores from what enters the head: the arithmetic of `quality`, on tensors alone.

With logits `l = W h` and `Λ = log Σ_v exp(l_v)`, the log-probability of `v` is `l_v − Λ`, so

    KL(p ‖ q) = Σ_v p_v (l_v − l'_v) + Λ' − Λ = (Λ' − m·h') − (Λ − m·h),    m = Σ_v p_v W_v

when model (primed) and reference share the head. `m` has the size of a hidden state and does not
depend on the model, so it is worked out once; every further network costs one product with the head
and one pass for Λ', instead of two products and the passes of two log-softmaxes. The same formula
on the same state gives exactly zero. A head bias adds `Σ_v p_v b_v` to both brackets and cancels; a
factor on the logits goes into `m`.

Where the heads differ, or cap their logits, which are then not linear in `h`, both distributions
are formed and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.models import Head, LogitForm

TOKEN_CHUNK = 256
"""Most tokens whose logits exist at one time."""
STRIP_ROWS = 4
"""Rows a CPU's log-softmax passes handle together: 4 of 49,152 floats stay in a 1 MiB cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What is kept of every scored token.

    Attributes:
        kl: [tokens] float64, KL(reference ‖ model) in nats.
        nll: [tokens] float64, the model's cross-entropy in nats.
        agreement: [tokens] bool, whether the reference's first choice is the model's. A tie counts.
    """

    kl: Tensor
    nll: Tensor
    agreement: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScores:
    """What is kept of the reference at every scored token.

    Attributes:
        expectation: [tokens, hidden] `m`, the head's rows averaged under the reference; [tokens, 0]
            where logits are capped.
        bracket: [tokens] float64, `Λ − m·h`; `Λ` there.
        nll: [tokens] float64, cross-entropy in nats.
        first: [tokens] int64, the most likely token.
    """

    expectation: Tensor
    bracket: Tensor
    nll: Tensor
    first: Tensor

    @classmethod
    def unknown(cls, nll: Tensor, columns: int) -> ReferenceScores:
        """Of tokens whose cross-entropy alone is known, with expectations of so many columns."""
        return cls(
            expectation=torch.zeros(len(nll), columns),
            bracket=torch.zeros_like(nll),
            nll=nll,
            first=torch.zeros(len(nll), dtype=torch.int64),
        )

    @classmethod
    def joined(cls, parts: list[ReferenceScores]) -> ReferenceScores:
        """The scores of several ranges of tokens, one after another."""
        return cls(
            expectation=torch.cat([part.expectation for part in parts]),
            bracket=torch.cat([part.bracket for part in parts]),
            nll=torch.cat([part.nll for part in parts]),
            first=torch.cat([part.first for part in parts]),
        )

    def part(self, tokens: slice, device: torch.device) -> ReferenceScores:
        """The scores of a range of tokens, on `device`."""
        return ReferenceScores(
            expectation=self.expectation[tokens].to(device),
            bracket=self.bracket[tokens].to(device),
            nll=self.nll[tokens].to(device),
            first=self.first[tokens].to(device),
        )


class LinearHead:
    """Logits of a token chunk through a linear head, into one buffer that is used again."""

    def __init__(self, head: Head) -> None:
        self.weight, self.form = head.weight.detach().float(), head.form
        self.bias = None if head.bias is None else head.bias.detach().float()
        self._buffer: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] float32 → [tokens, vocabulary] float32, valid until the next call."""
        if self._buffer is None:
            self._buffer = hidden.new_empty(TOKEN_CHUNK, len(self.weight))
        out = torch.mm(hidden, self.weight.t(), out=self._buffer[: len(hidden)])
        return self.form.form_(out if self.bias is None else out.add_(self.bias))


class ModuleHead:
    """Logits of a token chunk through any module, e.g. a packed one."""

    def __init__(self, module: nn.Module, form: LogitForm) -> None:
        self.module, self.form = module, form

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] float32 → [tokens, vocabulary] float32."""
        made: Tensor = self.module(hidden)
        return self.form.form_(made.float())


AnyHead = Callable[[Tensor], Tensor]


def reference_scores(
    hidden: Tensor, head: LinearHead, following: Tensor, storage: torch.dtype
) -> ReferenceScores:
    """Score the reference.

    Args:
        hidden: [tokens, hidden] float32 that enters the head.
        head: the reference's.
        following: [tokens] the next tokens.
        storage: dtype in which the expectation is kept; `bracket` is formed from what is kept.
    """
    pieces = []
    for rows in _chunks(len(hidden)):
        logits = head(hidden[rows])
        log_sum, _ = _log_sum(logits)
        nll = log_sum - _picked(logits, following[rows])
        first = logits.argmax(-1)
        if head.form.cap is None:
            share = logits.sub_(log_sum.float().unsqueeze(1)).exp_()
            expectation = (share @ head.weight).mul_(head.form.scale).to(storage)
            bracket = log_sum - _dots(expectation, hidden[rows])
        else:
            expectation, bracket = hidden.new_empty(len(log_sum), 0, dtype=storage), log_sum
        pieces.append((expectation, bracket, nll, first))
    expectation, bracket, nll, first = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return ReferenceScores(expectation=expectation, bracket=bracket, nll=nll, first=first)


def shared_head_scores(
    hidden: Tensor, head: LinearHead, following: Tensor, reference: ReferenceScores
) -> TokenScores:
    """Score a model whose head is the reference's and caps nothing.

    Args:
        hidden: [tokens, hidden] float32 that enters the model's head.
        head: of both.
        following: [tokens] the next tokens.
        reference: of the same tokens.
    """
    pieces = []
    for rows in _chunks(len(hidden)):
        logits = head(hidden[rows])
        log_sum, largest = _log_sum(logits)
        bracket = log_sum - _dots(reference.expectation[rows], hidden[rows])
        agreement = _picked(logits, reference.first[rows]) == largest
        nll = log_sum - _picked(logits, following[rows])
        pieces.append((bracket - reference.bracket[rows], nll, agreement))
    return _joined(pieces)


def own_head_scores(
    hidden: Tensor,
    head: AnyHead,
    following: Tensor,
    reference_hidden: Tensor,
    reference_head: AnyHead,
) -> TokenScores:
    """Score a model whose head is its own, by forming both distributions.

    Args:
        hidden: [tokens, hidden] float32 that enters the model's head.
        head: the model's.
        following: [tokens] the next tokens.
        reference_hidden: [tokens, hidden] float32 that enters the reference's head.
        reference_head: the reference's.

    Raises:
        InputError: the two vocabularies differ.
    """
    pieces = []
    for rows in _chunks(len(hidden)):
        expected, actual = reference_head(reference_hidden[rows]), head(hidden[rows])
        if actual.shape != expected.shape:
            raise InputError(
                f"the model has a vocabulary of {actual.shape[1]}, "
                f"the reference of {expected.shape[1]}"
            )
        for strip in _strips(expected):
            log_p = torch.log_softmax(expected[strip], dim=-1)
            log_q = torch.log_softmax(actual[strip], dim=-1)
            agreement = _picked(log_q, log_p.argmax(-1)) == log_q.amax(-1)
            nll = -_picked(log_q, following[rows][strip])
            difference = log_p - log_q
            kl = log_p.exp_().mul_(difference).sum(dim=-1, dtype=torch.float64)
            pieces.append((kl, nll, agreement))
    return _joined(pieces)


def _joined(pieces: list[tuple[Tensor, Tensor, Tensor]]) -> TokenScores:
    kl, nll, agreement = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return TokenScores(kl=kl, nll=nll, agreement=agreement)


def _log_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(Λ [tokens] float64, largest logit [tokens] float64) of logits [tokens, vocabulary]."""
    largest = torch.empty(len(logits), dtype=logits.dtype, device=logits.device)
    total = torch.empty_like(largest)
    for strip in _strips(logits):
        top = logits[strip].amax(-1, keepdim=True)
        largest[strip] = top.squeeze(1)
        total[strip] = (logits[strip] - top).exp_().sum(-1)
    return largest.double() + total.double().log(), largest.double()


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """[rows] float64: one entry of every row."""
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1).double()


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """[rows] float64: dot products of the rows of two matrices."""
    return (a.double() * b.double()).sum(-1)


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, start + TOKEN_CHUNK) for start in range(0, tokens, TOKEN_CHUNK)]


def _strips(logits: Tensor) -> list[slice]:
    """Row ranges of a chunk: small on a CPU, where each stays in the cache, else all at once."""
    rows = STRIP_ROWS if logits.device.type == "cpu" else max(len(logits), 1)
    return [slice(top, top + rows) for top in range(0, len(logits), rows)]
