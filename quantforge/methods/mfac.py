"""M-FAC (Frantar et al. 2021, arXiv 2107.03356): the inverse of an empirical Fisher matrix.

The matrix of m gradients is never formed:

    F = λ I + (1/m) Σ_k g_k g_kᵀ,      k = 1..m, gradients of single samples, d weights.

Adding one gradient after the other by Sherman–Morrison, with v_k = F_{k-1}⁻¹ g_k, gives

    F⁻¹ x = x/λ - Σ_k v_k (v_kᵀ x) / (m + g_kᵀ v_k),

which also reads off the diagonal. Woodbury's form needs one m × m factor and no v at all:

    F⁻¹ x = (x - Gᵀ (m λ I + G Gᵀ)⁻¹ G x) / λ,      G [m, d].

Both cost O(d m²) to set up and O(d m) a product. Saliencies are those of the optimal brain surgeon:
what the loss must rise when one weight moves and all others answer.

The same gradients give the interactions of layers: D_iᵀ F_ij D_j = (1/m) Σ_k (g_k,i · D_i)(g_k,j ·
D_j), a Gram matrix of m numbers a layer and error, where CLADO evaluates the network once a pair.

What differs from the authors' code: sums are float64, there is no limit on m, and gradients are
kept as they come (no ring buffer for optimizers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseFisher:
    """The recursion's result: F⁻¹ as λ⁻¹ I minus m rank-one terms.

    Attributes:
        directions: [m, d] float64, v_k.
        denominators: [m] float64, m + g_kᵀ v_k.
        damping: λ.
    """

    directions: Tensor
    denominators: Tensor
    damping: float

    def product(self, vectors: Tensor) -> Tensor:
        """[..., d] float64 F⁻¹ x for every x of `vectors` [..., d]."""
        wide = vectors.double()
        along = (wide @ self.directions.T) / self.denominators
        return wide / self.damping - along @ self.directions

    def diagonal(self) -> Tensor:
        """[d] float64 diagonal of F⁻¹."""
        taken = (self.directions.square() / self.denominators[:, None]).sum(dim=0)
        return 1.0 / self.damping - taken


def invert_fisher(gradients: Tensor, damping: float) -> InverseFisher:
    """Run the recursion over gradients [m, d] of single samples.

    Args:
        gradients: [m, d], any float dtype.
        damping: λ, positive.

    Raises:
        ValueError: there is no gradient, or the damping is not positive.
    """
    rows = _checked(gradients, damping)
    count = len(rows)
    # Row k starts as g_k / λ and loses its part along every v before it.
    directions = rows / damping
    denominators = torch.empty(count, dtype=torch.float64, device=rows.device)
    for k in range(count):
        denominators[k] = count + rows[k] @ directions[k]
        along = (rows[k + 1 :] @ directions[k]) / denominators[k]
        directions[k + 1 :] -= along[:, None] * directions[k]
    return InverseFisher(directions=directions, denominators=denominators, damping=damping)


def woodbury_product(gradients: Tensor, damping: float, vectors: Tensor) -> Tensor:
    """[..., d] float64 F⁻¹ x for every x of `vectors` [..., d], by one Cholesky factor of m × m.

    Args:
        gradients: [m, d], any float dtype.
        damping: λ, positive.
        vectors: [..., d].

    Raises:
        ValueError: there is no gradient, or the damping is not positive.
    """
    rows, wide = _checked(gradients, damping), vectors.double()
    small = rows @ rows.T
    small.diagonal().add_(len(rows) * damping)
    along = torch.cholesky_solve(
        (wide @ rows.T).reshape(-1, len(rows)).T, torch.linalg.cholesky(small)
    )
    return (wide - (along.T @ rows).reshape(wide.shape)) / damping


def saliency(change: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """[d] float64 least rise of the quadratic loss when a weight moves: change² / (2 F⁻¹_jj).

    Args:
        change: [d] of every weight on its own: the weight itself for pruning, w - q for rounding.
        inverse_diagonal: [d] diagonal of F⁻¹.
    """
    return change.double().square() / (2.0 * inverse_diagonal)


def project_errors(gradients: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    """[m, layers, candidates] float64 dot products of every sample's gradient with every error.

    Args:
        gradients: per layer [m, ...], gradients of single samples.
        errors: per layer [candidates, ...], errors of its weight, of the gradient's shape.

    Raises:
        ValueError: layers, samples, candidates or weights differ in number.
    """
    if len(gradients) != len(errors):
        raise ValueError(f"{len(gradients)} layers of gradients but {len(errors)} of errors")
    products = []
    for layer, (gradient, error) in enumerate(zip(gradients, errors, strict=True)):
        if gradient.shape[1:] != error.shape[1:]:
            raise ValueError(
                f"layer {layer}: gradients of {tuple(gradient.shape[1:])} weights, errors of "
                f"{tuple(error.shape[1:])}"
            )
        products.append(gradient.flatten(1).double() @ error.flatten(1).double().T)
    if len({tuple(product.shape) for product in products}) > 1:
        raise ValueError("every layer needs the same number of samples and of candidates")
    return torch.stack(products, dim=1)


def interaction_matrix(projections: Tensor) -> Tensor:
    """[layers, candidates, layers, candidates] float64 D_iᵀ F_ij D_j, undamped.

    As a matrix of [layers · candidates] rows it is a Gram matrix, so positive semi-definite.

    Args:
        projections: [m, layers, candidates] from `project_errors`.
    """
    flat = projections.double().flatten(1)
    shape = projections.shape[1:]
    return (flat.T @ flat / len(flat)).reshape(*shape, *shape)


def _checked(gradients: Tensor, damping: float) -> Tensor:
    if gradients.ndim != 2 or len(gradients) == 0:
        raise ValueError(f"gradients must be [m, d] with m > 0, got {tuple(gradients.shape)}")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    return gradients.double()
