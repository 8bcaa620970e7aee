"""From what enters a network's head to its logits, and the way back.

    logits = cap · tanh(scale · (W h + b) / cap)

Most networks have W alone. Phi adds a bias, Granite and Cohere multiply by a constant, Gemma 2 has
a cap. Everything that forms logits from hidden states does it here, since a gradient at the head's
input that forgets one of them is wrong without looking so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import InputError


@dataclass(frozen=True, slots=True)
class LogitForm:
    """What happens between the projection and the logits.

    Attributes:
        scale: the projection is multiplied by it.
        cap: then x becomes cap · tanh(x / cap); None leaves it.
    """

    scale: float = 1.0
    cap: float | None = None

    def form_(self, projected: Tensor) -> Tensor:
        """Logits of a projection of any shape, in its place."""
        if self.scale != 1.0:
            projected.mul_(self.scale)
        if self.cap is not None:
            projected.div_(self.cap).tanh_().mul_(self.cap)
        return projected

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of every logit with respect to its projection, found from the logit."""
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


PLAIN = LogitForm()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEntries:
    """Entries of a network's configuration that say its form; empty where there is none.

    Attributes:
        multiplier: the head's output is multiplied by it.
        divisor: and divided by it.
        cap: of the logits; it may hold None.
    """

    multiplier: str = ""
    divisor: str = ""
    cap: str = ""

    def form(self, config: Any) -> LogitForm:
        """What `config` says.

        Raises:
            InputError: an entry is missing, zero or no number.
        """
        multiplier = _number(config, self.multiplier) if self.multiplier else 1.0
        divisor = _number(config, self.divisor) if self.divisor else 1.0
        capped = self.cap and getattr(config, self.cap, None) is not None
        return LogitForm(
            scale=multiplier / divisor, cap=_number(config, self.cap) if capped else None
        )


NO_ENTRIES = LogitEntries()


def _number(config: Any, name: str) -> float:
    """The entry `name` of a configuration, which has to be a number other than 0."""
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} in the configuration must be a number, got {value!r}")
    if not math.isfinite(value) or value == 0:
        raise InputError(f"{name} in the configuration must be finite and not 0, got {value}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A network's head, as arithmetic needs it.

    Attributes:
        weight: [vocabulary, hidden], in the dtype of the products.
        bias: [vocabulary] or None.
        form: what follows.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: LogitForm = PLAIN

    def rounded(self, dtype: torch.dtype) -> Head:
        """The same with products in `dtype`; the bias, which is added after them, stays."""
        return replace(self, weight=self.weight.to(dtype))

    def entering(self, states: Tensor) -> Tensor:
        """[tokens, hidden] in the dtype of the products, from [sequences, length, hidden]."""
        return states.flatten(0, 1).to(self.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, vocabulary] in float32 at least.

        Args:
            hidden: rounded to the dtype of the weight.
        """
        made = wide(hidden.to(self.weight.dtype) @ self.weight.T)
        if self.bias is not None:
            made += self.bias
        return self.form.form_(made)

    def distribution(self, hidden: Tensor) -> tuple[Tensor, Tensor | float]:
        """Probabilities [tokens, vocabulary] of what follows, and the slope of their logits.

        Args:
            hidden: [tokens, hidden].
        """
        logits = self.logits(hidden)
        return torch.softmax(logits, -1), self.form.slope(logits)

    def input_gradient(self, gradient: Tensor, slope: Tensor | float) -> Tensor:
        """[tokens, hidden] at the head's input, in the dtype of the weight.

        Args:
            gradient: [tokens, vocabulary] at the logits; changed in place.
            slope: `LogitForm.slope` of these logits.
        """
        if isinstance(slope, Tensor) or slope != 1.0:
            gradient.mul_(slope)
        return gradient.to(self.weight.dtype) @ self.weight


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return values if values.dtype == torch.float64 else values.float()
