"""How far a network is from its float reference: perplexity, KL and top-1 on equal windows.

A text is cut into windows that do not overlap. At every position but the last of a window both
networks predict the next token, and with `p` the reference's and `q` the model's distribution

    KL = Σ_v p_v (log p_v − log q_v),    NLL = −log q_next,    top-1 = [argmax p = argmax q].

Tokens of a window are not independent, so the standard error of the mean KL is taken over windows.

A [tokens, vocabulary] matrix of a whole text is far too large to keep (2 GB for 10,000 tokens and a
vocabulary of 49,152). Of the reference, what enters its head and the head's rows averaged under its
prediction are kept, each `vocabulary / hidden` times smaller; logits are formed for a few hundred
tokens at a time (`scoring` has the arithmetic). The head's product is always float32: rounded to
bfloat16, as its output would be, logits are off by more than small KLs can bear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.capture import Precision, compute_in
from quantforge.errors import InputError
from quantforge.evaluate.scoring import (
    AnyHead,
    LinearHead,
    ModuleHead,
    ReferenceScores,
    TokenScores,
    own_head_scores,
    reference_scores,
    shared_head_scores,
)
from quantforge.evaluate.windows import checked_windows, require_same, standard_error
from quantforge.models import Architecture, Head
from quantforge.numerics import OVERFLOW, require_finite
from quantforge.parallel import ALONE, Share
from quantforge.progress import Monitor
from quantforge.results import PairedDifference, Quality

_HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutputs:
    """What the float model says about a set of windows, kept on the CPU.

    Attributes:
        windows: [windows, length] int64 tokens.
        hidden: [windows, length - 1, hidden] output of the final norm at the scored positions, in
            the storage dtype; of windows that other processes score it is not known.
        scores: of the scored positions, flattened to [windows * (length - 1), ...]; likewise, but
            for the cross-entropy.
        head: the reference's; its weight is the model's own tensor unless there is a copy
            (`with_own_head`), its bias is a copy.
        head_version: in-place changes the head's weight had seen, by torch's count.
        batch: windows the decoder ran at one time; `measure` uses the same, so that the reference
            measured against itself gives exactly zero.
    """

    windows: Tensor
    hidden: Tensor
    scores: ReferenceScores
    head: Head
    head_version: int
    batch: int

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        module: nn.Module,
        architecture: Architecture,
        windows: Tensor,
        *,
        batch: int = 4,
        precision: Precision = "float32",
        storage: torch.dtype = torch.float32,
        keep_head_copy: bool = False,
        monitor: Monitor | None = None,
        share: Share = ALONE,
    ) -> ReferenceOutputs:
        """Run the float model once over all windows.

        Args:
            module: a causal language model in evaluation mode.
            architecture: its shape.
            windows: [windows, length] integer tokens, at least two a window.
            batch: windows the decoder runs at one time.
            precision: "float32" is exact; "bfloat16" rounds the operands of the decoder's matrix
                products.
            storage: dtype in which hidden states and expectations are kept.
            keep_head_copy: copy the head's weight, because the module's will be changed in place;
                without it such a change is an error in `measure`.
            monitor: receives one step a batch.
            share: of the batches; `measure` takes the same.

        Raises:
            InputError: the windows are not [windows, length ≥ 2] tokens of the vocabulary, the head
                is not a plain linear, or the network does something between final norm and logits
                that the architecture does not describe.
        """
        tokens = checked_windows(module, architecture, windows)
        head = _checked_head(module, architecture, tokens)
        count, length = tokens.shape
        hidden = torch.empty(count, length - 1, head.weight.shape[1], dtype=storage)
        linear, parts = LinearHead(head), {}
        own = share.part(range(0, count, batch))
        for start, state in _final_states(module, architecture, tokens, batch, precision, own):
            rows = slice(start, start + len(state))
            following = tokens[rows, 1:].flatten().to(state.device)
            scores = reference_scores(state.flatten(0, 1).float(), linear, following, storage)
            parts[start] = scores.part(slice(None), torch.device("cpu"))
            hidden[rows] = state
            if monitor is not None:
                monitor.step("reference", min(start + batch, count), count)
        bias = None if head.bias is None else head.bias.clone()
        made = cls(
            windows=tokens,
            hidden=hidden,
            scores=ReferenceScores.joined(_with_others(parts, share)),
            head=replace(head, bias=bias),
            head_version=head.weight._version,
            batch=batch,
        )
        return made.with_own_head() if keep_head_copy else made

    @property
    def output(self) -> Head:
        """What the reference makes of its last hidden states."""
        return self.head

    def with_own_head(self) -> ReferenceOutputs:
        """The same with a copy of the head, for a network whose own will be changed in place."""
        head = replace(self.head, weight=self.head.weight.clone())
        return replace(self, head=head, head_version=head.weight._version)

    @property
    def window_nll(self) -> tuple[float, ...]:
        """Mean cross-entropy of the float network on every window."""
        means = self.scores.nll.view(len(self.windows), -1).double().mean(dim=-1)
        return tuple(means.tolist())

    def rows(self, rows: slice, device: torch.device) -> tuple[ReferenceScores, Tensor]:
        """Scores and float32 hidden states [tokens, hidden] of some windows, on `device`."""
        per_window = self.windows.shape[1] - 1
        tokens = slice(rows.start * per_window, rows.stop * per_window)
        return self.scores.part(tokens, device), self.hidden[rows].flatten(0, 1).to(device).float()


@torch.no_grad()
def measure(
    module: nn.Module,
    architecture: Architecture,
    windows: Tensor,
    reference: ReferenceOutputs,
    *,
    text: str,
    monitor: Monitor | None = None,
    precision: Precision = "float32",
    share: Share = ALONE,
) -> Quality:
    """Compare a network with its float reference on the reference's windows.

    Args:
        module: the network, with the reference's architecture and vocabulary; its head may be any
            module that maps [tokens, hidden] to [tokens, vocabulary].
        architecture: its shape.
        windows: [windows, length] the tokens the reference was collected on, or its first rows.
        reference: of the float model.
        text: which text this is, for the report.
        monitor: receives one step a batch.
        precision: "float32" is exact; "bfloat16" rounds the operands of the decoder's matrix
            products. The reference keeps its own precision.
        share: of the batches, as the reference was collected.

    Returns:
        The measurement; sums over tokens are in float64. With a single window the standard error
        of the KL is taken over its tokens, for want of windows.

    Raises:
        InputError: the windows or the vocabulary are not the reference's, the reference's head was
            changed in place, or the network gives logits that are not finite.
    """
    tokens = checked_windows(module, architecture, windows)
    count, length = tokens.shape
    require_same(tokens, reference.windows)
    score = _scorer(module.get_submodule(architecture.head), reference)
    table = torch.empty(3, count, length - 1, dtype=torch.float64)
    own, batch = share.part(range(0, count, reference.batch)), reference.batch
    for start, state in _final_states(module, architecture, tokens, batch, precision, own):
        rows = slice(start, start + len(state))
        found = score(state.flatten(0, 1).float(), tokens[rows, 1:].flatten(), rows)
        for index, values in enumerate((found.kl, found.nll, found.agreement)):
            table[index, rows] = values.view(len(state), -1)
        if monitor is not None:
            monitor.step("evaluate", rows.stop, count)
    mine = {str(start): table[:, start : start + batch] for start in own}
    for first, part in share.joined(mine).items():
        table[:, int(first) : int(first) + batch] = part
    kl, nll, agreement = table
    if not bool(torch.isfinite(kl).all() and torch.isfinite(nll).all()):
        raise InputError("the network gives logits that are not finite on the evaluation text")
    reference_nll = reference.scores.nll.view(-1, length - 1)[:count]
    return _quality(kl, nll, agreement, reference_nll, text)


def _with_others(parts: Mapping[int, ReferenceScores], share: Share) -> list[ReferenceScores]:
    """The scores of all batches in order: of those of other processes only the cross-entropy."""
    every = share.joined({f"{start:09d}": one.nll for start, one in parts.items()})
    columns = max((one.expectation.shape[1] for one in parts.values()), default=0)
    return [
        parts[int(start)] if int(start) in parts else ReferenceScores.unknown(nll, columns)
        for start, nll in sorted(every.items())
    ]


def _quality(
    kl: Tensor, nll: Tensor, agreement: Tensor, reference_nll: Tensor, text: str
) -> Quality:
    """Means over windows of what was found at every token, all [windows, length - 1] float64."""
    count, scored = kl.shape
    window_kl, window_nll = kl.mean(dim=-1), nll.mean(dim=-1)
    return Quality(
        text=text,
        windows=count,
        window_length=scored + 1,
        perplexity=_exp(float(window_nll.mean())),
        reference_perplexity=_exp(float(reference_nll.mean(dim=-1).mean())),
        kl=float(window_kl.mean()),
        kl_stderr=standard_error(window_kl if count > 1 else kl[0]),
        top1=float(agreement.mean()),
        window_kl=tuple(window_kl.tolist()),
        window_nll=tuple(window_nll.tolist()),
    )


def paired(first: Quality, second: Quality) -> PairedDifference:
    """Difference of two measurements over the same windows, first minus second.

    The windows' difficulty cancels, so a far smaller difference is visible than the two standard
    errors would let one see. With a single window the standard errors are infinite: one difference
    says nothing of its spread.

    Raises:
        InputError: the two were not measured on the same number of windows of the same length.
    """
    shapes = [(len(q.window_kl), q.window_length) for q in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"cannot pair {shapes[0][0]} windows of {shapes[0][1]} tokens with "
            f"{shapes[1][0]} of {shapes[1][1]}; measure both on the same windows"
        )
    kl = torch.tensor(
        [a - b for a, b in zip(first.window_kl, second.window_kl, strict=True)], dtype=torch.float64
    )
    nll = torch.tensor(
        [a - b for a, b in zip(first.window_nll, second.window_nll, strict=True)],
        dtype=torch.float64,
    )
    return PairedDifference(
        kl=float(kl.mean()),
        kl_stderr=standard_error(kl),
        nll=float(nll.mean()),
        nll_stderr=standard_error(nll),
    )


def _scorer(
    head: nn.Module, reference: ReferenceOutputs
) -> Callable[[Tensor, Tensor, slice], TokenScores]:
    """How tokens are scored: through the one head both share, or each through its own."""
    if reference.head.weight._version != reference.head_version:
        raise InputError(
            "the reference's head was changed in place after it was collected; "
            "collect it with keep_head_copy=True"
        )
    linear, form = LinearHead(reference.head), reference.head.form
    if isinstance(head, nn.Linear) and form.cap is None and _same_head(head, reference.head):

        def shared(hidden: Tensor, following: Tensor, rows: slice) -> TokenScores:
            scores, _ = reference.rows(rows, hidden.device)
            return shared_head_scores(hidden, linear, following.to(hidden.device), scores)

        return shared
    own: AnyHead = ModuleHead(head, form)
    if isinstance(head, nn.Linear):
        own = LinearHead(Head(weight=head.weight, bias=head.bias, form=form))

    def separate(hidden: Tensor, following: Tensor, rows: slice) -> TokenScores:
        _, expected = reference.rows(rows, hidden.device)
        return own_head_scores(hidden, own, following.to(hidden.device), expected, linear)

    return separate


def _same_head(head: nn.Linear, reference: Head) -> bool:
    """Whether a head equals the reference's, bit for bit."""
    if (head.bias is None) != (reference.bias is None):
        return False
    pairs = [(head.weight, reference.weight)]
    if head.bias is not None and reference.bias is not None:
        pairs.append((head.bias, reference.bias))
    return all(
        own.device == expected.device
        and own.dtype == expected.dtype
        and (own.data_ptr() == expected.data_ptr() or torch.equal(own, expected))
        for own, expected in pairs
    )


@torch.no_grad()
def _final_states(
    module: nn.Module,
    architecture: Architecture,
    tokens: Tensor,
    batch: int,
    precision: Precision,
    starts: Sequence[int],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first window, final norm's output [windows, length - 1, hidden]) of some batches."""
    decoder = architecture.body(module)
    final_norm = module.get_submodule(architecture.final_norm)
    embedding = module.get_submodule(architecture.embedding)
    device = next(embedding.parameters(), next(module.parameters())).device
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handle = final_norm.register_forward_hook(keep)
    try:
        for start in starts:
            part = tokens[start : start + batch].to(device)
            with compute_in(precision, decoder, device):
                decoder(input_ids=part, use_cache=False)
            if len(seen) != 1:
                raise InputError(
                    f"{architecture.final_norm} ran {len(seen)} times in one forward pass of "
                    f"{type(module).__name__}, expected once; the architecture does not fit"
                )
            yield start, seen.pop()[:, :-1]
    finally:
        handle.remove()


@torch.no_grad()
def _checked_head(module: nn.Module, architecture: Architecture, tokens: Tensor) -> Head:
    """The head, which must give the network's logits when applied to the final norm's output."""
    head = architecture.output_head(module)
    few = tokens[:1, : min(8, tokens.shape[1])]
    _, state = next(_final_states(module, architecture, few, 1, "float32", [0]))
    expected = module(input_ids=few.to(state.device), use_cache=False).logits[:, :-1].float()
    require_finite(expected, f"the logits of {type(module).__name__}", OVERFLOW)
    difference = float((head.logits(state) - expected).abs().max())
    if not difference <= _HEAD_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise InputError(
            f"logits of {type(module).__name__} are not {architecture.head} applied to "
            f"{architecture.final_norm} (they differ by {difference:.2g}): the architecture "
            f"{architecture.name} does not say what else is done to them"
        )
    return head


def _exp(value: float) -> float:
    """e^value, infinite where a float cannot hold it (a destroyed network's perplexity)."""
    return math.exp(value) if value < 700 else math.inf
