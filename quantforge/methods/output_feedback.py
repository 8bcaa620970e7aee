"""Error feedback between the rows of a weight: later outputs make up for what one gets wrong.

GPTQ treats rows alone, because it counts the error of every output alike and by itself. What the
loss feels is the Fisher information of the outputs. With x the layer's input and g the gradient of
the log-likelihood at its output, taken as independent (K-FAC), an error D costs

    ½ tr(G D H Dᵀ) a token,     H = E[x xᵀ] the gram,  G = E[g gᵀ] the output gram

and rows are coupled wherever G is not diagonal. If the rows before stand with the errors D₁, the
best later rows, were they free, have the error −G₂₂⁻¹ G₂₁ D₁, whatever H is. So rows are quantized
in panels, by any method that knows H alone, and after each panel what the rows still to come should
be moves by that: GPTQ's feedback once more, along the other axis. The exact solution of the
two-sided problem by elimination has this form (YAQA, Tseng et al. 2025, arXiv 2505.22988, as
two-sided LDL).

Errors are counted from an aim. For a layer that reads what quantized layers give it
(`compensation`) the optimum of that layer is not its weight W but T = W + α W C H⁻¹: with

    E |Ŵ x̃ − W x|²_G = tr(G (Ŵ − T) H (Ŵ − T)ᵀ) + constant    (α = 1)

an error counted from W takes the layer's own answer to its inputs' mismatch for an error, and has
the rows behind take it back, as far as G couples them. Alone, that costs the layer something. In a
network all later layers answer for the same mismatch, most in the directions that the loss feels
most, and taking part of it back there is better (`quantize.row_aim` has the figures).

What differs from the paper: rows of one panel do not answer for each other, so that they can be
quantized together by the fast column loop; G comes from gradients of sampled labels in one pass
rather than from power iterations, and is damped strongly, since the two-factor form and the few
tokens behind it are both rough (SmolLM2-135M at 3 bits in groups of 64, untuned, held-out KL: 0.238
without; 0.229, 0.212, 0.206 with 0.1, 0.4 and 1.0 of the diagonal's mean added).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantforge.numerics import Factor
from quantforge.types import QuantizedWeight

# Rows that are quantized together, as many as the column loop has lanes. With 64, queries and keys
# lose a tenth of the gain; with 8, all layers together gain a hundredth.
PANEL = 32


def compensate_rows(
    aim: Tensor,
    factors: Sequence[Factor],
    quantize: Callable[[Tensor, Tensor], QuantizedWeight],
    *,
    panel: int = PANEL,
) -> QuantizedWeight:
    """Quantize a weight panel by panel, each panel's error fed on to the rows behind it.

    Args:
        aim: [out, in] float32, what errors of rows are counted from.
        factors: of the output gram's diagonal blocks, which cover all rows in order; rows of
            different blocks do not answer for each other. Within a block, rows go in the factor's
            order.
        quantize: gives integers and scales to the rows of the weight at positions [rows], which
            earlier rows ask to be [rows, in] more than their aim.
        panel: rows that are quantized together.

    Raises:
        ValueError: the factors are not of `out` rows together.
    """
    sizes = [len(factor.order) for factor in factors]
    if sum(sizes) != len(aim):
        raise ValueError(f"factors of {sum(sizes)} rows, the weight has {len(aim)}")
    order: list[Tensor] = []
    made: list[QuantizedWeight] = []
    first = 0
    for factor, size in zip(factors, sizes, strict=True):
        rows = first + factor.order
        wanted, carried = aim[rows], torch.zeros(size, aim.shape[1], device=aim.device)
        for start in range(0, size, panel):
            stop = min(start + panel, size)
            made.append(quantize(rows[start:stop], carried[start:stop]))
            if stop < size:
                missing = wanted[start:stop] + carried[start:stop] - made[-1].dequantize()
                carried[stop:] -= _carried(factor.upper, start, stop, missing)
        order.append(rows)
        first += size
    return _in_order(made, torch.cat(order))


def _carried(upper: Tensor, start: int, stop: int, missing: Tensor) -> Tensor:
    """[later, in] what the rows behind a panel have to give up: −G₂₂⁻¹ G₂₁ D₁, D₁ = −missing.

    Args:
        upper: [out, out] U, UᵀU = G⁻¹.
        start: first row of the panel.
        stop: end of the panel.
        missing: [panel, in] what was to be quantized less what it became.
    """
    inside, behind = upper[start:stop, start:stop], upper[start:stop, stop:]
    carried: Tensor = behind.T @ torch.linalg.solve_triangular(inside.T, missing, upper=False)
    return carried


def _in_order(parts: Sequence[QuantizedWeight], rows: Tensor) -> QuantizedWeight:
    """One weight of all parts' rows; `rows` [out] says where each of them belongs."""
    place = torch.argsort(rows)
    zeros = [part.zero for part in parts if part.zero is not None]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts])[place],
        scale=torch.cat([part.scale for part in parts])[place],
        zero=torch.cat(zeros)[place] if zeros else None,
        spec=parts[0].spec,
    )
