"""AdaRound (Nagel et al. 2020, arXiv 2004.10568): rounding as a relaxed choice between neighbours.

    ŵ = s (clip(⌊w / s⌋ + h(V), 0, top) − zero),   h(V) = clip(1.2 σ(V) − 0.1, 0, 1)

with V learned, and Σ 1 − |2 h − 1|^β added to the loss, whose β falls from 20 to 2 so that h is
free at first and ends at 0 or 1. Scales stay as they are.

What differs from the published code: V starts where h makes the float weight as far as that lies in
the cell of its code, so training begins at the codes that error feedback found and not at plain
rounding (see `rounding`). The regulariser is a mean over weights, and the loss beside it is taken
relative to its start, so one coefficient serves layers of all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.methods.rounding import CELL, within_cells
from quantforge.types import QuantizedWeight

STRETCH, SHIFT = 1.2, -0.1  # ζ − γ and γ, for ζ = 1.1 and γ = −0.1
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2  # of the steps, without the regulariser


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(V), in 0..1."""
    return (torch.sigmoid(logits) * STRETCH + SHIFT).clamp(0.0, 1.0)


def annealed_beta(step: int, steps: int) -> float | None:
    """β of a step; None during the warm-up, when nothing is asked of h."""
    start = WARM_UP * steps
    if step < start:
        return None
    share = (step - start) / max(steps - 1 - start, 1.0)
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * min(share, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaxedWeight:
    """One layer's weight while its rounding is a matter of degree.

    Attributes:
        logits: [out, in] V, a leaf that requires gradients.
        base: [out, in] float32 the lower of the two codes, less the zero.
        initial: what it starts from.
    """

    logits: Tensor
    base: Tensor
    initial: QuantizedWeight

    @classmethod
    def start(cls, weight: Tensor, quantized: QuantizedWeight, cell: float = CELL) -> RelaxedWeight:
        """From the float weight [out, in] and the codes it starts from, see `within_cells`."""
        latent = within_cells(weight, quantized, cell)
        lower = latent.floor().clamp(0, quantized.spec.top - 1)
        share = ((latent - lower).clamp(0.0, 1.0) - SHIFT) / STRETCH
        logits = torch.logit(share).requires_grad_()
        groups = lower.view(*quantized.scale.shape, -1)
        base = (groups - quantized.centre().float()).view_as(lower)
        return cls(logits=logits, base=base, initial=quantized)

    def weight(self) -> Tensor:
        """[out, in] float32 relaxed weight, with gradients to V."""
        scale = self.initial.scale.float()
        code = (self.base + rectified_sigmoid(self.logits)).view(*scale.shape, -1)
        return (code * scale.unsqueeze(-1)).view_as(self.base)

    def undecided(self, beta: float) -> Tensor:
        """[] mean of 1 − |2 h − 1|^β: 0 where every weight has chosen."""
        distance = (2.0 * rectified_sigmoid(self.logits) - 1.0).abs()
        return 1.0 - distance.pow(beta).mean()

    @torch.no_grad()
    def finish(self) -> QuantizedWeight:
        """The integers that were chosen: the upper one from h = 1/2 on."""
        up = (rectified_sigmoid(self.logits) >= 0.5).float()
        groups = (self.base + up).view(*self.initial.scale.shape, -1)
        codes = (groups + self.initial.centre().float()).view_as(self.base)
        return replace(self.initial, codes=codes.to(torch.uint8))
