"""What is known of every candidate of every layer: tables on which all estimators rest.

They come out of the two passes that calibration makes anyway, one forward that quantizes every
candidate and one backward, so every estimator that needs no pass of its own is arithmetic on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.calibrate.candidates import CandidateErrors
from quantforge.calibrate.fisher import GradientStatistics
from quantforge.calibrate.sensitivity import factored_losses
from quantforge.types import LayerInfo, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Tables over layers and candidates, float64; +inf where a candidate does not fit a layer.

    D is a candidate's error Q(W) − W, x what its layer reads, g the gradient of a sequence's loss
    at the layer's output, with labels drawn from the network.

    Attributes:
        layers: in forward order.
        specs: the candidates.
        length: tokens a sequence.
        squared: [layers, specs] ‖D‖².
        output: [layers, specs] E‖D x‖² a token.
        relative: [layers, specs] the same over E‖W x‖².
        factored: [layers, specs] ½ Σ_o E[g_o²] E[(D x)_o²] in nats a token.
        energies: [sequences, layers, specs] Σ_t Σ_o g_to² E[(D x)_o²] in nats², whose mean makes
            `factored`; 0 where a candidate does not fit.
        products: [sequences, layers, specs] Σ_t g_tᵀ D x_t in nats; likewise.
        squares: [sequences, layers] Σ_t ‖g_t‖².
        traces: [sequences, layers] ‖Σ_t g_t x_tᵀ‖² in (nats / weight)².
    """

    layers: tuple[LayerInfo, ...]
    specs: tuple[QuantSpec, ...]
    length: int
    squared: Tensor
    output: Tensor
    relative: Tensor
    factored: Tensor
    energies: Tensor
    products: Tensor
    squares: Tensor
    traces: Tensor

    @property
    def fits(self) -> Tensor:
        """[layers, specs] bool."""
        return self.squared.isfinite()

    @property
    def kinds(self) -> list[str]:
        """Kind of every layer, e.g. "q_proj"."""
        return [layer.name.rpartition(".")[2] for layer in self.layers]

    @classmethod
    def of(
        cls,
        errors: Sequence[CandidateErrors],
        gradients: GradientStatistics,
        specs: Sequence[QuantSpec],
        length: int,
    ) -> Evidence:
        """Put together what the two passes left.

        Args:
            errors: of all layers, in forward order.
            gradients: with products and energies.
            specs: the candidates.
            length: tokens a sequence.

        Raises:
            ValueError: the gradients were taken without candidates.
        """
        products, energies, traces = gradients.products, gradients.energies, gradients.traces
        if products is None or energies is None or traces is None:
            raise ValueError("the gradients were taken without candidates")
        return cls(
            layers=tuple(one.layer for one in errors),
            specs=tuple(specs),
            length=length,
            squared=torch.stack([one.squared for one in errors]),
            output=torch.stack([one.rows.double().sum(1) for one in errors]),
            relative=torch.stack([one.relative for one in errors]),
            factored=torch.stack(
                [factored_losses(one.rows, gradients.moments[one.layer.name]) for one in errors]
            ),
            energies=energies,
            products=products,
            squares=gradients.squares,
            traces=traces,
        )
