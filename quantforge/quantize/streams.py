"""The hidden states a block is fitted on: behind the quantized prefix, and in the float network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantforge.capture import BlockWalk
from quantforge.models import Model
from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.refine import BlockTask
from quantforge.types import CalibrationSet


class Streams:
    """Both streams of hidden states, moved from block to block together.

    The float stream, and the held-out sequences behind the fitting ones, are only there when
    learned rounding needs them.

    Attributes:
        quantized: walks behind the quantized blocks.
        native: walks the float network, or None.
        fitting_batches: number of batches at the front that are fitted on.
        precision: of matrix products.
    """

    def __init__(self, model: Model, calibration: CalibrationSet, config: QuantizeConfig) -> None:
        learned = config.rounding.steps > 0
        pieces = [calibration.fitting, calibration.held_out] if learned else [calibration.fitting]
        # Batches must not mix fitting and held-out sequences.
        batches = [part for piece in pieces for part in torch.split(piece, config.batch_size)]
        self._lengths = [len(batch) for batch in batches]
        self.fitting_batches = -(-len(calibration.fitting) // config.batch_size)
        self.precision = config.precision

        def walk() -> BlockWalk:
            return BlockWalk(
                model.module,
                model.architecture,
                torch.cat(pieces),
                batch_size=self._lengths,
                precision=config.precision,
            )

        self.quantized = walk()
        self.native = walk() if learned else None

    def targets(self, block: nn.Module) -> list[Tensor] | None:
        """What the float network has at the exit of `block`, whose weights must still be float."""
        return None if self.native is None else list(self.native.outputs(block))

    def task(self, block: nn.Module, targets: list[Tensor], channel_weight: Tensor) -> BlockTask:
        """The block's inputs and targets, for learned rounding."""
        return BlockTask(
            block,
            self.quantized.hidden,
            targets,
            self.quantized.kwargs,
            channel_weight=channel_weight,
            held_out=len(self._lengths) - self.fitting_batches,
            precision=self.precision,
        )

    def advance(self, block: nn.Module, targets: list[Tensor] | None) -> None:
        """Move both streams to the exit of `block`, whose weights are now quantized."""
        self.quantized.advance(block)
        if self.native is not None and targets is not None:
            self.native.hidden = targets
