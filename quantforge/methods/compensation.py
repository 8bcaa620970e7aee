"""Error feedback: GPTQ and the methods that grew out of it, as one function with coefficients.

A layer that read x in the float network reads x̃ once the layers before it are quantized. With

    gram = E[x̃ x̃ᵀ],   cross C = E[(x − x̃) x̃ᵀ],   UᵀU = H⁻¹, H the damped gram,

the error of a weight W + D is E|(W + D) x̃ − W x|² = tr(D gram Dᵀ) − 2 tr(W C Dᵀ) + constant
(`asymmetric_error`). The members differ in how much of the second term they answer for, and in how
far they trust the calibration inputs:

    GPTQ    none of it: fits W x̃, as if the float network had read x̃ too      arXiv 2210.17323
    GPTAQ   a column's share once that is fixed: P = α triu(C Uᵀ, 1) U        arXiv 2504.02692
    QEP     all columns' share at once, by a new target W + α W C H⁻¹         arXiv 2504.09629
    Qronos  QEP with α = 1, but for the choice of the first code, which is
            made with the other columns still at W                           in Brevitas
    FOEM    GPTQ, with the compensated weights pulled back to the float ones  arXiv 2507.11017

With α = 1 and no damping QEP followed by GPTQ is the conditional least-squares solution of the full
asymmetric error. FOEM's first-order term vanishes where GPTQ stands, since a compensated weight is
the minimiser given the columns already fixed; what its formulas do is regularise, so their
coefficient, like α, belongs to held-out tokens.

What differs from the published code: results do not depend on a block size. GPTAQ's code charges
the latent weight inside a block and the quantized one behind it; here it is the float weight
everywhere, as its derivation has it. Qronos's code damps by a millionth of the gram's largest
eigenvalue, here by what all members take (`damping`). FOEM's form C forgets the first column of
each block there; its form A pulls the columns behind a block once a block and in units of the gram,
here once a column and relative to the mean of the gram's diagonal, so that scaling the inputs
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from quantforge_kernels.compensate import PullForm, column_loop
from torch import Tensor

from quantforge.numerics import OVERFLOW, Factor, require_finite
from quantforge.types import QuantizedWeight, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """One member of the family. All coefficients are in 0..1; all zero is GPTQ.

    Attributes:
        mismatch: GPTAQ's coefficient α: share of the input mismatch charged for fixed columns.
        target: QEP's coefficient α: share of the way to the least-squares target.
        pull: FOEM's β.
        pull_form: which of FOEM's three rules: "C" pulls each column before it is quantized (the
            one with a fast loop); "B" and "A" pull all remaining columns at each step, in torch,
            and "A" costs a product of [out, in] and [in, in] a column. In B a correction made k
            columns ago has decayed to (1 − β)^k; A is stable for β below the relative damping.
        first_column: choose the first code with the other columns at their float weights (Qronos).
    """

    mismatch: float = 0.0
    target: float = 0.0
    pull: float = 0.0
    pull_form: PullForm = "C"
    first_column: bool = False

    def __post_init__(self) -> None:
        for name in ("mismatch", "target", "pull"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        if self.pull_form not in ("A", "B", "C"):
            raise ValueError(f"pull_form must be 'A', 'B' or 'C', got {self.pull_form!r}")
        if self.mismatch and self.target:
            raise ValueError("mismatch and target both answer for the input mismatch: use one")
        if self.first_column and not self.target:
            raise ValueError("first_column needs a target (1 for Qronos)")

    @property
    def needs_cross(self) -> bool:
        """Whether the float stream's inputs are needed, as `cross`."""
        return self.mismatch > 0.0 or self.target > 0.0


GPTQ = Feedback()

# FOEM's β where none is given, by form: the paper's, and for A that of the authors' code.
PULLS: Mapping[PullForm, float] = MappingProxyType({"A": 3e-4, "B": 0.1, "C": 0.1})

FEEDBACKS: Mapping[str, Feedback] = MappingProxyType(
    {
        "gptq": GPTQ,
        "gptaq": Feedback(mismatch=0.25),
        "foem": Feedback(pull=PULLS["C"]),
        "foem-gptaq": Feedback(pull=PULLS["C"], mismatch=0.25),
        "qep": Feedback(target=0.5),
        "qronos": Feedback(target=1.0, first_column=True),
    }
)


def require_usable(weight: Tensor) -> None:
    """Refuse a weight that holds NaN or Inf.

    Raises:
        InputError: it does.
    """
    require_finite(weight, "the layer's weight", "get the checkpoint again, or keep the layer")


def target_shift(cross: Tensor, factor: Factor, coefficient: float) -> Tensor:
    """[in, in] α C H⁻¹, in the original order and the dtype of `cross`.

    QEP's target is W + W · shift: it outputs on x̃ what W outputs on x, as far as W can.

    Args:
        cross: [in, in] C, original column order, float32 or float64.
        factor: of the gram of x̃; H is the damped one.
        coefficient: α.
    """
    upper = factor.upper.to(cross.dtype)
    shift = torch.empty_like(cross)
    shift[:, factor.order] = coefficient * (cross[:, factor.order] @ upper.T) @ upper
    return shift


def mismatch_matrix(cross: Tensor, factor: Factor, coefficient: float) -> Tensor:
    """[in, in] float32 GPTAQ's P = α triu(C Uᵀ, 1) U, strictly upper, in the factor's order.

    Row i is α C[i, i+1:] H[i+1:, i+1:]⁻¹: where the columns still free should go to make up for the
    mismatch of input i, once its weight is fixed.

    Args:
        cross: [in, in] C, original column order.
        factor: of the gram of x̃.
        coefficient: α.
    """
    ordered = cross.float()[factor.order][:, factor.order]
    return coefficient * torch.triu(ordered @ factor.upper.T, 1) @ factor.upper


def asymmetric_error(
    difference: Tensor,
    weight: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    coupled: Tensor | None = None,
) -> Tensor:
    """[out] mean squared error of (W + D) x̃ against W x, without the part that D cannot change.

    That part is E|W (x − x̃)|², the error of D = 0; the result is negative where D is better.

    Args:
        difference: [out, in] D.
        weight: [out, in] W.
        gram: [in, in] mean of x̃ x̃ᵀ.
        cross: [in, in] C, mean of (x − x̃) x̃ᵀ; None where x̃ is x.
        coupled: [out, in] G D, if outputs are weighed by a matrix G and not alike; the sum over
            rows is then the weighted error.
    """
    felt = difference @ gram
    if cross is not None:
        felt -= 2.0 * (weight @ cross)
    return (felt * (difference if coupled is None else coupled)).sum(1)


def first_shift(cross: Tensor, factor: Factor, coefficient: float) -> Tensor:
    """[in] α C₁ / h₁₁, h₁₁ damped: w₁ + W · shift is the best first column if the others stay at W.

    Args:
        cross: [in, in] C, original column order, float32 or float64.
        factor: of the gram of x̃.
        coefficient: α.
    """
    unit = torch.zeros_like(factor.upper[:, :1])
    unit[0] = 1.0
    root = torch.linalg.solve_triangular(factor.upper.T, unit, upper=False)  # |root|² = h₁₁
    shift: Tensor = coefficient * cross[:, factor.order[0]] / root.square().sum()
    return shift


def _checked_scale(
    weight: Tensor, factor: Factor, spec: QuantSpec, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """The scales as they will be stored; ValueError where an argument does not fit the others."""
    rows, columns = weight.shape
    shape = (rows, spec.groups(columns))
    if columns != len(factor.order):
        raise ValueError(f"the factor is of {len(factor.order)} inputs, the weight has {columns}")
    if (zero is None) != spec.symmetric:
        raise ValueError("a symmetric spec takes no zero, an asymmetric one needs it")
    if tuple(scale.shape) != shape or (zero is not None and tuple(zero.shape) != shape):
        raise ValueError(f"scale and zero must be {shape}, got {tuple(scale.shape)}")
    if zero is not None:
        integers = zero.float()
        top = (1 << spec.bits) - 1
        if not bool(((integers >= 0) & (integers <= top) & (integers == integers.round())).all()):
            raise ValueError(f"zero must hold integers in 0..{top}")
    narrow = scale.dtype in (torch.bfloat16, torch.float16)
    stored = scale if narrow else scale.bfloat16()
    if not bool((torch.isfinite(stored) & (stored != 0)).all()):
        raise ValueError("scales must be finite and not zero")
    return stored


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossTerms:
    """What a feedback makes of C, whatever the weight; all None where it does not ask for C.

    Attributes:
        shift: [in, in] from `target_shift`.
        mismatch: [in, in] from `mismatch_matrix`.
        first: [in] from `first_shift`.
    """

    shift: Tensor | None = None
    mismatch: Tensor | None = None
    first: Tensor | None = None

    def target(self, weight: Tensor) -> Tensor:
        """[out, in] what a weight becomes before it is rounded."""
        return weight if self.shift is None else weight + weight @ self.shift


def cross_terms(cross: Tensor | None, factor: Factor, feedback: Feedback) -> CrossTerms:
    """The part of `compensate` that all weights which read one input share.

    Args:
        cross: [in, in] C, mean of (x − x̃) x̃ᵀ over tokens, original column order; needed by
            `mismatch` and `target`.
        factor: of the gram of x̃; nothing is made up for where it is a fallback.
        feedback: which member of the family.

    Raises:
        InputError: `cross` holds NaN or Inf.
        ValueError: `cross` is missing or of another size.
    """
    if factor.fallback or not feedback.needs_cross:
        return CrossTerms()
    if cross is None or cross.shape != factor.upper.shape:
        raise ValueError("this feedback needs cross, the [in, in] mean of (x - x~) x~^T")
    require_finite(cross, "the cross moment of the layer's inputs", OVERFLOW)
    cross, mismatch, target = cross.float(), feedback.mismatch, feedback.target
    return CrossTerms(
        shift=target_shift(cross, factor, target) if target else None,
        mismatch=mismatch_matrix(cross, factor, mismatch) if mismatch else None,
        first=first_shift(cross, factor, target) if feedback.first_column else None,
    )


def compensate(
    weight: Tensor,
    factor: Factor,
    spec: QuantSpec,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    cross: Tensor | None = None,
    terms: CrossTerms | None = None,
    feedback: Feedback = GPTQ,
    carried: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize `weight` on a given grid, pushing each column's error onto those still to come.

    Weights of dead inputs become zero. Where the factor is a fallback, this is plain rounding.

    Args:
        weight: [out, in], any float dtype.
        factor: of the gram of the inputs x̃ that the quantized layer will read.
        spec: width and grouping.
        scale: [out, groups] non-zero; rounded to bfloat16 unless it has 16 bits already, and the
            feedback answers for the rounded scales.
        zero: [out, groups] integers in 0..2^bits − 1; None for a symmetric spec.
        cross: [in, in] C, as for `cross_terms`.
        terms: what `cross_terms` made of it for this factor and feedback, where several weights
            share that; made here if None.
        feedback: which member of the family.
        carried: [out, in] float32 by how much the result should differ from what is best for these
            rows alone, for the sake of other rows (`output_feedback`). Inputs' mismatch is charged
            for the weight without it, FOEM's pull goes towards the weight with it; the two together
            charge the mismatch for the latter.

    Raises:
        InputError: the weight or `cross` holds NaN or Inf.
        ValueError: shapes do not fit, or `cross` is missing.
    """
    stored = _checked_scale(weight, factor, spec, scale, zero)
    require_usable(weight)
    feedback = GPTQ if factor.fallback else feedback
    width = spec.width(weight.shape[1])
    original = weight.float()
    if terms is None:
        terms = cross_terms(cross, factor, feedback)
    target = terms.target(original)
    fixed = target
    first = None
    if terms.first is not None:
        first = original[:, factor.order[0]] + original @ terms.first
    if carried is not None:
        target = target + carried
        fixed = target if feedback.pull else fixed
        first = None if first is None else first + carried[:, factor.order[0]]
    centre = None if zero is None else zero.float()
    if spec.grid != "uniform":
        centre = torch.full(stored.shape, spec.middle, device=weight.device)
    pull = feedback.pull
    if feedback.pull_form == "A":
        pull *= float(factor.diagonal[~factor.dead].mean())
    codes, _ = column_loop(
        target,
        factor.upper,
        factor.order,
        stored.float(),
        bits=spec.bits,
        width=width,
        zero=centre,
        top=spec.top,
        original=fixed,
        mismatch=terms.mismatch,
        pull=pull,
        pull_form=feedback.pull_form,
        first=first,
    )
    kept_zero = None if zero is None else zero.to(torch.uint8)
    made = QuantizedWeight(codes=codes, scale=stored, zero=kept_zero, spec=spec)
    return _without_dead(made, factor.dead)


def _without_dead(made: QuantizedWeight, dead: Tensor) -> QuantizedWeight:
    """The same with weights of dead inputs at zero, or half a step from it where there is none.

    U has no entries between them and live inputs, so nothing else depends on what they were.
    """
    if not dead.any():
        return made
    groups = made.codes.view(*made.scale.shape, -1)
    centre = made.centre().to(torch.uint8).expand_as(groups).reshape(made.codes.shape)
    return replace(made, codes=torch.where(dead, centre, made.codes))
