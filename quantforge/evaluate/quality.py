"""How far a network is from its float reference: perplexity, KL and top-1 on equal windows.

A text is cut into windows that do not overlap. At every position but the last of a window both
networks predict the next token, and with `p` the reference's and `q` the model's distribution

    KL = Σ_v p_v (log p_v − log q_v),    NLL = −log q_next,    top-1 = [argmax p = argmax q].

Tokens of a window are not independent, so the standard error of the mean KL is taken over windows.

A [tokens, vocabulary] matrix of a whole text is far too large to keep (2 GB for 10,000 tokens and a
vocabulary of 49,152). The reference is therefore kept as what enters its head, the final norm's
output, which is `vocabulary / hidden` times smaller; logits of both networks are formed for a few
hundred tokens at a time, and the log-softmax passes over them run in strips that stay in the cache.

The model's head may differ from the reference's (a quantized head does); each logit comes from its
own network's head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.models import Architecture
from quantforge.progress import Monitor
from quantforge.results import PairedDifference, Quality

Precision = Literal["float32", "bfloat16"]
TOKEN_CHUNK = 512
"""Most tokens whose logits exist at one time."""
STRIP_ROWS = 4
"""Rows a CPU's log-softmax passes handle together: 4 of 49,152 floats stay in a 1 MiB cache."""
_HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutputs:
    """What the float model says about a set of windows, from which its logits are recomputed.

    Attributes:
        windows: [windows, length] int64, the tokens, on the CPU.
        hidden: [windows, length - 1, hidden] output of the final norm at the scored positions, on
            the CPU, float32 or bfloat16.
        head: [vocabulary, hidden] weight of the reference's head (the model's own tensor, not a
            copy: a network whose head is then changed in place needs `keep_head_copy`).
        bias: [vocabulary] of the head, or None.
        batch: windows the decoder ran at one time; `measure` uses the same, so that the reference
            measured against itself gives exactly zero.
        precision: arithmetic the reference ran in.
    """

    windows: Tensor
    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    batch: int
    precision: Precision

    @classmethod
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
    ) -> ReferenceOutputs:
        """Run the float model once over all windows.

        Args:
            module: a causal language model in evaluation mode.
            architecture: its shape.
            windows: [windows, length] integer tokens, at least two a window.
            batch: windows the decoder runs at one time.
            precision: "float32" is exact; "bfloat16" rounds the operands of matrix products.
            storage: dtype in which hidden states are kept.
            keep_head_copy: copy the head's weight, because the module's will be changed in place.
            monitor: receives one step a batch.

        Raises:
            InputError: the windows are not [windows, length ≥ 2] tokens of the vocabulary, the head
                is not a plain linear, or the network does something between final norm and logits
                that the architecture does not describe.
        """
        tokens = _checked_windows(module, architecture, windows)
        head = module.get_submodule(architecture.head)
        if not isinstance(head, nn.Linear):
            kind = type(head).__name__
            raise InputError(f"{architecture.head} of the reference is a {kind}, expected a Linear")
        _check_head(module, architecture, tokens[:1, : min(8, tokens.shape[1])])
        count, length = tokens.shape
        hidden = torch.empty(count, length - 1, head.in_features, dtype=storage)
        states = _final_states(module, architecture, tokens, batch, precision)
        for start, state in states:
            hidden[start : start + len(state)] = state
            if monitor is not None:
                monitor.step("reference", min(start + batch, count), count)
        weight = head.weight.detach()
        bias = None if head.bias is None else head.bias.detach()
        if keep_head_copy:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return cls(
            windows=tokens, hidden=hidden, head=weight, bias=bias, batch=batch, precision=precision
        )


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
        precision: "float32" is exact; "bfloat16" rounds the operands of matrix products (the
            reference keeps its own precision).

    Returns:
        The measurement; sums over tokens are in float64. With a single window the standard error
        of the KL is taken over its tokens, for want of windows.

    Raises:
        InputError: the windows are not the reference's, or the network gives logits that are not
            finite.
    """
    tokens = _checked_windows(module, architecture, windows)
    count, length = tokens.shape
    if not torch.equal(tokens, reference.windows[:count]):
        raise InputError(
            "the windows are not those the reference was collected on; collect it anew"
        )
    heads = (
        _Head.of_reference(reference),
        _Head.of_module(module.get_submodule(architecture.head), precision),
    )
    # kl, nll, reference nll and top-1 agreement of every scored token
    scores = torch.empty(4, count, length - 1, dtype=torch.float64)
    for start, state in _final_states(module, architecture, tokens, reference.batch, precision):
        rows = slice(start, start + len(state))
        scores[:, rows] = _score(
            heads, reference.hidden[rows].to(state.device), state, tokens[rows, 1:]
        )
        if monitor is not None:
            monitor.step("evaluate", rows.stop, count)
    if not bool(torch.isfinite(scores).all()):
        raise InputError("the network gives logits that are not finite on the evaluation text")
    window = scores.mean(dim=-1)
    return Quality(
        text=text,
        windows=count,
        window_length=length,
        perplexity=_exp(float(window[1].mean())),
        reference_perplexity=_exp(float(window[2].mean())),
        kl=float(window[0].mean()),
        kl_stderr=_standard_error(window[0] if count > 1 else scores[0, 0]),
        top1=float(window[3].mean()),
        window_kl=tuple(window[0].tolist()),
        window_nll=tuple(window[1].tolist()),
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
        kl_stderr=_standard_error(kl),
        nll=float(nll.mean()),
        nll_stderr=_standard_error(nll),
    )


@dataclass(slots=True)
class _Head:
    """Forms logits of a token chunk, for a plain linear into a buffer that is used again."""

    module: nn.Module | None
    weight: Tensor
    bias: Tensor | None
    round_operands: bool
    buffer: Tensor | None = None

    @classmethod
    def of_reference(cls, reference: ReferenceOutputs) -> _Head:
        return cls._linear(reference.head, reference.bias, reference.precision)

    @classmethod
    def of_module(cls, head: nn.Module, precision: Precision) -> _Head:
        if isinstance(head, nn.Linear):
            return cls._linear(head.weight.detach(), head.bias, precision)
        return cls(head, torch.empty(0), None, precision == "bfloat16")

    @classmethod
    def _linear(cls, weight: Tensor, bias: Tensor | None, precision: Precision) -> _Head:
        round_operands = precision == "bfloat16"
        if round_operands:
            weight = weight.bfloat16()
        return cls(None, weight.float(), None if bias is None else bias.float(), round_operands)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] float32 → [tokens, vocabulary] float32, valid until the next call."""
        if self.round_operands:
            hidden = hidden.bfloat16().float()
        if self.module is not None:
            made: Tensor = self.module(hidden)
            return made.float()
        weight = self.weight.to(hidden.device)
        if self.buffer is None:
            self.buffer = torch.empty(TOKEN_CHUNK, len(weight), device=hidden.device)
        out = self.buffer[: len(hidden)]
        torch.mm(hidden, weight.t(), out=out)
        return out if self.bias is None else out.add_(self.bias.to(hidden.device))


def _score(
    heads: tuple[_Head, _Head], reference: Tensor, model: Tensor, following: Tensor
) -> Tensor:
    """[4, windows, positions] float64: KL, NLL, reference NLL and agreement of every token."""
    shape = following.shape
    flat_reference = reference.float().flatten(0, 1)
    flat_model = model.float().flatten(0, 1)
    labels = following.reshape(-1, 1).to(model.device)
    pieces = []
    for start in range(0, len(labels), TOKEN_CHUNK):
        rows = slice(start, start + TOKEN_CHUNK)
        expected = heads[0].logits(flat_reference[rows])
        actual = heads[1].logits(flat_model[rows])
        if actual.shape != expected.shape:
            raise InputError(
                f"the model has a vocabulary of {actual.shape[1]}, "
                f"the reference of {expected.shape[1]}"
            )
        strip = STRIP_ROWS if expected.device.type == "cpu" else len(expected)
        for top in range(0, len(expected), strip):
            part = slice(top, top + strip)
            pieces.append(_compare(expected[part], actual[part], labels[rows][part]))
    return torch.cat(pieces, dim=1).cpu().view(4, *shape)


def _compare(expected: Tensor, actual: Tensor, labels: Tensor) -> Tensor:
    """[4, rows] float64 from the logits [rows, vocabulary] of both networks."""
    agreement = expected.argmax(-1) == actual.argmax(-1)
    log_p = torch.log_softmax(expected, dim=-1)
    log_q = torch.log_softmax(actual, dim=-1)
    reference_nll = -log_p.gather(1, labels).squeeze(1)
    nll = -log_q.gather(1, labels).squeeze(1)
    difference = torch.sub(log_p, log_q, out=log_q)
    kl = log_p.exp_().mul_(difference).sum(dim=-1, dtype=torch.float64)
    return torch.stack([kl, nll.double(), reference_nll.double(), agreement.double()])


@torch.no_grad()
def _final_states(
    module: nn.Module,
    architecture: Architecture,
    tokens: Tensor,
    batch: int,
    precision: Precision,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first window, final norm's output [windows, length - 1, hidden]) batch by batch."""
    decoder = module.get_submodule(architecture.blocks.rpartition(".")[0])
    final_norm = module.get_submodule(architecture.final_norm)
    embedding = module.get_submodule(architecture.embedding)
    device = next(embedding.parameters(), next(module.parameters())).device
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    handle = final_norm.register_forward_hook(keep)
    try:
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch].to(device)
            with _arithmetic(device, precision):
                decoder(input_ids=part, use_cache=False)
            if len(seen) != 1:
                raise InputError(
                    f"{architecture.final_norm} ran {len(seen)} times in one forward pass of "
                    f"{type(module).__name__}, expected once; the architecture does not fit"
                )
            yield start, seen.pop()[:, :-1]
    finally:
        handle.remove()


def _arithmetic(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def _check_head(module: nn.Module, architecture: Architecture, tokens: Tensor) -> None:
    """Raise unless the head applied to the final norm's output gives the network's logits."""
    _, state = next(_final_states(module, architecture, tokens, 1, "float32"))
    head = module.get_submodule(architecture.head)
    expected = module(input_ids=tokens.to(state.device), use_cache=False).logits[:, :-1].float()
    difference = float((head(state).float() - expected).abs().max())
    if not difference <= _HEAD_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise InputError(
            f"logits of {type(module).__name__} are not {architecture.head} applied to "
            f"{architecture.final_norm} (they differ by {difference:.2g}); networks that scale or "
            "cap their logits cannot be evaluated"
        )


def _checked_windows(module: nn.Module, architecture: Architecture, windows: Tensor) -> Tensor:
    """[windows, length] int64 on the CPU."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(
            f"windows must be [windows, length >= 2] tokens, got shape {tuple(windows.shape)}"
        )
    tokens = windows.detach().to("cpu", torch.int64)
    embedding = module.get_submodule(architecture.embedding)
    vocabulary = getattr(embedding, "num_embeddings", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise InputError(
            f"tokens {low}..{high} are outside the model's vocabulary of {vocabulary}; "
            "is this another model's tokenizer?"
        )
    return tokens


def _standard_error(samples: Tensor) -> float:
    """Standard error of the mean of independent samples; infinite for a single one."""
    if len(samples) < 2:
        return math.inf
    return float(samples.std(correction=1)) / math.sqrt(len(samples))


def _exp(value: float) -> float:
    """e^value, infinite where a float cannot hold it (a destroyed network's perplexity)."""
    return math.exp(value) if value < 700 else math.inf
