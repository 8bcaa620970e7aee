"""Windows of tokens that networks are compared on, and errors over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.models import Architecture


def checked_windows(module: nn.Module, architecture: Architecture, windows: Tensor) -> Tensor:
    """[windows, length] int64 on the CPU.

    Raises:
        InputError: these are no windows of two tokens or more of the network's vocabulary.
    """
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


def require_same(tokens: Tensor, collected: Tensor) -> None:
    """Refuse windows that are not the first ones of those a reference was collected on.

    Args:
        tokens: [windows, length].
        collected: likewise, at least as many.

    Raises:
        InputError: they are others.
    """
    if not torch.equal(tokens, collected[: len(tokens)]):
        raise InputError(
            "the windows are not those the reference was collected on; collect it anew"
        )


def standard_error(samples: Tensor) -> float:
    """Standard error of the mean of independent samples; infinite for a single one."""
    if len(samples) < 2:
        return math.inf
    return float(samples.std(correction=1)) / math.sqrt(len(samples))
