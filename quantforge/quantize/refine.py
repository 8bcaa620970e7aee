"""Block-wise learned rounding: the block's output on quantized inputs, against the float network's.

After a block has been compensated layer by layer, its rounding and scales are trained together so
that the whole block's output is near what the float block gives in the float network. Updates to
the latents are signed with a step that falls linearly (SignRound), so a latent travels a bounded
way whatever the gradient's size; scales take Adam steps relative to their own size.

The outputs' channels differ by orders of magnitude in how much the loss depends on them, and a few
carry most of the energy, so the squared error is weighted by the mean squared gradient of the
log-likelihood in each channel (`calibrate.fisher`): the weighted error is the increase in KL to
second order, up to correlations.

The state with the least error on sequences that are not trained on is kept, the starting point
included: this never makes a block worse on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.capture import Precision, compute_in, run_block
from quantforge.methods.rounding import TrainableWeight
from quantforge.quantize.config import RoundingConfig
from quantforge.types import QuantizedWeight


class BlockData:
    """What a block is trained on.

    Attributes:
        inputs: per batch [batch, length, hidden], from the quantized blocks before.
        targets: per batch, what the float network has at the block's exit.
        kwargs: per batch, the block's other arguments.
        channel_weight: [hidden] importance of an output channel.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        kwargs: Sequence[dict[str, Any]],
        channel_weight: Tensor,
    ) -> None:
        self.inputs, self.targets, self.kwargs = inputs, targets, kwargs
        self.channel_weight = channel_weight / channel_weight.mean()


def block_error(
    block: nn.Module, weights: Mapping[str, Tensor], data: BlockData, index: int, precision: Precision
) -> Tensor:
    """Weighted mean squared error of the block's output on one batch, a scalar."""
    hidden = data.inputs[index]
    with compute_in(precision, hidden.device):
        output = torch.func.functional_call(
            block, dict(weights), args=(hidden,), kwargs=data.kwargs[index]
        )
    output = output[0] if isinstance(output, tuple) else output
    difference = output.float() - data.targets[index]
    return (difference.square() * data.channel_weight).mean()
