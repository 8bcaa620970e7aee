"""The compensation family against definitions written out in float64: inverses, least squares."""

from dataclasses import dataclass, replace

import pytest
import torch
from quantforge_kernels.compensate import column_loop_reference

from quantforge.methods.compensation import (
    FEEDBACKS,
    GPTQ,
    CrossTerms,
    Feedback,
    asymmetric_error,
    compensate,
    cross_terms,
    mismatch_matrix,
    target_shift,
)
from quantforge.numerics import factorize, output_error
from quantforge.types import QuantSpec

SYMMETRIC, ASYMMETRIC = QuantSpec(3, 8), QuantSpec(2, 12, symmetric=False)
WITH_CROSS = {name: one for name, one in FEEDBACKS.items() if one.needs_cross}


@dataclass
class Layer:
    """x [in, tokens] is the float stream, noisy is x~; everything but `weight` is float64."""

    weight: torch.Tensor
    x: torch.Tensor
    noisy: torch.Tensor
    damping: float = 0.01

    @property
    def gram(self):
        return self.noisy @ self.noisy.T / self.noisy.shape[1]

    @property
    def cross(self):
        return (self.x - self.noisy) @ self.noisy.T / self.noisy.shape[1]

    @property
    def damped(self):
        return self.gram + self.damping * self.gram.diagonal().mean() * torch.eye(len(self.gram))

    def factor(self, act_order=True):
        return factorize(self.gram, damping=self.damping, act_order=act_order)


def layer(columns=24, rows=9, tokens=90, seed=0, noise=0.3, damping=0.01):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = normal(columns, columns) / columns**0.5 + 0.5 * torch.eye(columns)
    x = mixing @ normal(columns, tokens)
    noisy = x + noise * normal(columns, tokens)
    return Layer(normal(rows, columns).float(), x, noisy, damping)


def grid(weight, spec):
    """Scales of both signs, or scales with zeros in an asymmetric spec."""
    groups = weight.view(len(weight), spec.groups(weight.shape[1]), -1)
    if spec.symmetric:
        scale = (groups.abs().amax(-1) / (1 << (spec.bits - 1))).bfloat16()
        scale[::2] *= -1
        return scale, None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / ((1 << spec.bits) - 1)).bfloat16()
    return scale, (-low / scale.float()).round().to(torch.uint8)


def nearest(values, column, spec, scale, zero, columns):
    """Codes and values of the grid points of `column` nearest to `values` [out]."""
    group = column // spec.width(columns)
    s = scale[:, group].double()
    centre = float(-spec.code_min) if zero is None else zero[:, group].double()
    codes = (values / s + centre).round().clamp(0, (1 << spec.bits) - 1)
    return codes, (codes - centre) * s


def first_values(one, order, coefficient):
    """Qronos: (G w − H w without the first column) / h_11, where G = α Cᵀ + H."""
    mixed = coefficient * one.cross.T + one.damped
    others = one.damped[order[0]].clone()
    others[order[0]] = 0
    weight = one.weight.double()
    return weight @ (mixed[order[0]] - others) / one.damped[order[0], order[0]]


def blocked(one, spec, scale, zero, feedback, order, block):
    """The family with lazy updates behind blocks of `block` columns, from explicit inverses."""
    columns = len(order)
    inverse = torch.linalg.inv(one.damped[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    cross, weight = one.cross[order][:, order], one.weight.double()
    mismatch = torch.zeros_like(upper)
    for i in range(columns - 1):
        rest = slice(i + 1, columns)
        solved = torch.linalg.inv(one.damped[order][:, order][rest, rest])
        mismatch[i, rest] = feedback.mismatch * cross[i, rest] @ solved
    target = weight[:, order] + feedback.target * weight[:, order] @ cross @ inverse
    w, codes = target.clone(), torch.empty(weight.shape, dtype=torch.float64)
    beta = feedback.pull
    decay = 1 - beta if feedback.pull_form == "B" else 1.0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = []
        for j in range(start, stop):
            if j > 0 and feedback.pull_form == "C":
                w[:, j] -= beta * (w[:, j] - target[:, j])
            wanted = w[:, j]
            if j == 0 and feedback.first_column:
                wanted = first_values(one, order, feedback.target)
            codes[:, order[j]], q = nearest(wanted, int(order[j]), spec, scale, zero, columns)
            errors.append((w[:, j] - q - beta * (w[:, j] - target[:, j])) / upper[j, j])
            now = slice(j + 1, stop)
            w[:, now] = target[:, now] + decay * (w[:, now] - target[:, now])
            w[:, now] -= torch.outer(errors[-1], upper[j, now])
            w[:, now] += torch.outer(target[:, j], mismatch[j, now])
        lazy = slice(stop, columns)
        late = torch.tensor([decay ** (stop - 1 - j) for j in range(start, stop)]).double()
        here = slice(start, stop)
        w[:, lazy] = target[:, lazy] + decay ** (stop - start) * (w[:, lazy] - target[:, lazy])
        w[:, lazy] -= (torch.stack(errors, 1) * late) @ upper[here, lazy]
        w[:, lazy] += (target[:, here] * late) @ mismatch[here, lazy]
    return codes.to(torch.uint8)


MEMBERS = {**FEEDBACKS, "foem-B": Feedback(pull=0.02, pull_form="B")}
MEMBERS["foem-qep"] = Feedback(pull=0.2, target=0.5)
MEMBERS["foem-B-gptaq"] = Feedback(pull=0.02, pull_form="B", mismatch=1.0)


@pytest.mark.parametrize("block", [1, 3, 4, 24])
@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_equals_its_blocked_definition_with_any_block(name, spec, block):
    one = layer()
    factor = one.factor()
    scale, zero = grid(one.weight, spec)
    found = compensate(
        one.weight, factor, spec, scale, zero=zero, cross=one.cross, feedback=MEMBERS[name]
    )
    expected = blocked(one, spec, scale, zero, MEMBERS[name], factor.order, block)
    assert torch.equal(found.codes, expected)
    assert torch.equal(found.scale, scale)


def test_members_differ_so_that_equality_means_something():
    one = layer(columns=48, rows=32)
    scale, _ = grid(one.weight, SYMMETRIC)
    codes = [
        compensate(
            one.weight, one.factor(), SYMMETRIC, scale, cross=one.cross, feedback=feedback
        ).codes
        for feedback in MEMBERS.values()
    ]
    different = [(a != b).float().mean() for i, a in enumerate(codes) for b in codes[:i]]
    assert min(different) > 0.005


@pytest.mark.parametrize("coefficient", [0.25, 1.0])
@pytest.mark.parametrize("name", WITH_CROSS)
def test_equal_streams_give_the_same_without_cross_bit_for_bit(name, coefficient):
    one = layer(columns=96, rows=70, tokens=300, noise=0.0)
    assert not one.cross.any()
    chosen = WITH_CROSS[name]
    changed = replace(
        chosen,
        mismatch=coefficient if chosen.mismatch else 0.0,
        target=coefficient if chosen.target else 0.0,
    )
    scale, _ = grid(one.weight, SYMMETRIC)
    found = compensate(
        one.weight, one.factor(), SYMMETRIC, scale, cross=one.cross, feedback=changed
    )
    expected = compensate(
        one.weight, one.factor(), SYMMETRIC, scale, feedback=Feedback(pull=chosen.pull)
    )
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("mismatch", [0.0, 0.25])
@pytest.mark.parametrize("form", ["A", "B", "C"])
def test_no_pull_is_gptq_or_gptaq(form, mismatch):
    one = layer(columns=32, rows=40)
    scale, _ = grid(one.weight, SYMMETRIC)
    base = FEEDBACKS["gptaq" if mismatch else "gptq"]
    arguments = (one.weight, one.factor(), SYMMETRIC, scale)
    expected = compensate(*arguments, cross=one.cross, feedback=base)
    still = Feedback(pull=0.0, pull_form=form, mismatch=mismatch)
    barely = Feedback(pull=1e-9, pull_form=form, mismatch=mismatch)
    for feedback in (still, barely):
        found = compensate(*arguments, cross=one.cross, feedback=feedback)
        assert torch.equal(found.codes, expected.codes)


def test_full_pull_in_form_c_is_rounding():
    one = layer()
    scale, _ = grid(one.weight, SYMMETRIC)
    feedback = Feedback(pull=1.0)
    found = compensate(one.weight, one.factor(), SYMMETRIC, scale, feedback=feedback).codes
    for column in range(24):
        expected, _ = nearest(one.weight[:, column].double(), column, SYMMETRIC, scale, None, 24)
        assert torch.equal(found[:, column].double(), expected)


def test_pull_costs_on_calibration_tokens_and_gains_on_others_where_they_are_few():
    """(identity 17) Means over layers: no single one has to follow them."""
    pulls = (0.0, 0.1, 0.2, 0.4, 1.0)
    seen, unseen = torch.zeros(2, len(pulls), dtype=torch.float64).unbind()
    for seed in range(20):
        whole = layer(rows=40, tokens=4000, seed=seed)
        one, other = (replace(whole, noisy=x) for x in whole.x.split((60, 3940), dim=1))
        factor = one.factor()
        scale, _ = grid(one.weight, SYMMETRIC)
        for index, pull in enumerate(pulls):
            made = compensate(one.weight, factor, SYMMETRIC, scale, feedback=Feedback(pull=pull))
            difference = made.dequantize().double() - one.weight.double()
            seen[index] += output_error(difference, one.gram).sum()
            unseen[index] += output_error(difference, other.gram).sum()
    assert (seen.diff() > 0).all()
    assert unseen[1] < 0.98 * unseen[0]
    assert unseen[-1] > unseen[0]


def test_form_a_follows_the_inverse_of_the_remaining_gram():
    one, beta = layer(), 0.004
    factor = one.factor()
    order = factor.order
    scale, _ = grid(one.weight, SYMMETRIC)
    feedback = Feedback(pull=beta, pull_form="A")
    found = compensate(one.weight, factor, SYMMETRIC, scale, feedback=feedback).codes
    plain = compensate(one.weight, factor, SYMMETRIC, scale).codes
    assert (found != plain).any()
    hessian, original = one.damped[order][:, order], one.weight.double()[:, order]
    w = original.clone()
    for j in range(24):
        inverse = torch.linalg.inv(hessian[j:, j:])
        codes, q = nearest(w[:, j], int(order[j]), SYMMETRIC, scale, None, 24)
        assert torch.equal(found[:, order[j]].double(), codes)
        pulled = beta * one.gram.diagonal().mean() * (w[:, j:] - original[:, j:]) @ inverse
        w[:, j:] -= torch.outer((w[:, j] - q) / inverse[0, 0], inverse[0]) + pulled


@pytest.mark.parametrize("scaling", [2.0**-9, 2.0**7])
@pytest.mark.parametrize("name", [*MEMBERS, "foem-A"])
def test_scaling_the_inputs_changes_nothing(name, scaling):
    one = layer()
    feedback = MEMBERS.get(name, Feedback(pull=0.004, pull_form="A"))
    scale, _ = grid(one.weight, SYMMETRIC)
    codes = [
        compensate(
            one.weight, each.factor(), SYMMETRIC, scale, cross=each.cross, feedback=feedback
        ).codes
        for each in (one, replace(one, x=scaling * one.x, noisy=scaling * one.noisy))
    ]
    assert torch.equal(*codes)


def least_squares(one, spec, scale, first=None):
    """Columns fixed one by one; the free ones solve W x = Q x~ on the tokens, from scratch."""
    columns, weight = len(one.x), one.weight.double()
    wanted, fixed = weight @ one.x, torch.empty(weight.shape, dtype=torch.float64)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for j in range(columns):
        left = wanted - fixed[:, :j] @ one.noisy[:j]
        value = torch.linalg.lstsq(one.noisy[j:].T, left.T).solution[0]
        if j == 0 and first is not None:
            value = first
        found, fixed[:, j] = nearest(value, j, spec, scale, None, columns)
        codes[:, j] = found.to(torch.uint8)
    return codes


@pytest.mark.parametrize("seed", range(3))
def test_qep_of_one_then_gptq_is_full_asymmetric_least_squares(seed):
    one = layer(columns=16, seed=seed, damping=0.0)
    scale, _ = grid(one.weight, SYMMETRIC)
    arguments = (one.weight, one.factor(act_order=False), SYMMETRIC, scale)
    found = compensate(*arguments, cross=one.cross, feedback=Feedback(target=1.0))
    assert torch.equal(found.codes, least_squares(one, SYMMETRIC, scale))


@pytest.mark.parametrize("seed", range(3))
def test_qronos_is_the_same_with_another_first_column(seed):
    one = layer(columns=16, seed=seed, damping=0.0, noise=1.0, rows=40)
    scale, _ = grid(one.weight, SYMMETRIC)
    arguments = (one.weight, one.factor(act_order=False), SYMMETRIC, scale)
    found = compensate(*arguments, cross=one.cross, feedback=FEEDBACKS["qronos"]).codes
    # the first column that is best while all others stay at the float weights, on the tokens
    left = one.weight.double() @ one.x - one.weight[:, 1:].double() @ one.noisy[1:]
    first = left @ one.noisy[0] / one.noisy[0].square().sum()
    assert torch.equal(found, least_squares(one, SYMMETRIC, scale, first))
    qep = compensate(*arguments, cross=one.cross, feedback=Feedback(target=1.0)).codes
    assert (found[:, 0] != qep[:, 0]).any()


def test_gptaq_of_one_charges_the_mismatch_of_fixed_columns_only():
    one = layer(columns=16, rows=30, damping=0.0)
    scale, _ = grid(one.weight, SYMMETRIC)
    arguments = (one.weight, one.factor(act_order=False), SYMMETRIC, scale)
    found = compensate(*arguments, cross=one.cross, feedback=Feedback(mismatch=1.0)).codes
    weight, fixed = one.weight.double(), torch.empty(30, 16, dtype=torch.float64)
    for j in range(16):
        # fixed columns answer for x, columns still free for the x~ they will read
        wanted = weight[:, :j] @ one.x[:j] + weight[:, j:] @ one.noisy[j:]
        left = wanted - fixed[:, :j] @ one.noisy[:j]
        value = torch.linalg.lstsq(one.noisy[j:].T, left.T).solution[0]
        codes, fixed[:, j] = nearest(value, j, SYMMETRIC, scale, None, 16)
        assert torch.equal(found[:, j].double(), codes)


def shifted_target(weight, cross, factor, coefficient):
    return weight + weight @ target_shift(cross.to(weight.dtype), factor, coefficient)


def test_the_target_solves_the_normal_equations():
    one = layer(damping=0.0)
    weight = one.weight.double()
    target = shifted_target(weight, one.cross, one.factor(), 1.0)
    assert torch.allclose(target @ one.gram, weight @ (one.x @ one.noisy.T) / 90, atol=1e-5)
    exact = torch.linalg.lstsq(one.noisy.T, (weight @ one.x).T).solution.T
    assert torch.allclose(target, exact, atol=1e-4)


def test_the_target_with_damping_and_a_coefficient_and_its_identities():
    one = layer(damping=0.05)
    weight = one.weight.double()
    target = shifted_target(weight, one.cross, one.factor(), 0.3)
    shift = 0.3 * weight @ one.cross @ torch.linalg.inv(one.damped)
    assert torch.allclose(target - weight, shift, atol=1e-6)
    assert torch.equal(shifted_target(weight, one.cross, one.factor(), 0.0), weight)
    assert torch.equal(shifted_target(weight, 0 * one.cross, one.factor(), 1.0), weight)


def test_terms_are_shared_by_the_weights_of_an_input_and_none_where_the_gram_is_of_no_use():
    one = layer()
    factor = one.factor()
    scale, _ = grid(one.weight, SYMMETRIC)
    for feedback in (*FEEDBACKS.values(), GPTQ):
        terms = cross_terms(one.cross, factor, feedback)
        found = compensate(one.weight, factor, SYMMETRIC, scale, terms=terms, feedback=feedback)
        made = compensate(one.weight, factor, SYMMETRIC, scale, cross=one.cross, feedback=feedback)
        assert torch.equal(found.codes, made.codes)
        given = [terms.shift, terms.mismatch, terms.first]
        needed = [feedback.target, feedback.mismatch, feedback.first_column]
        assert [part is not None for part in given] == [bool(need) for need in needed]
    useless = factorize(torch.zeros_like(one.gram).float())
    assert useless.fallback
    assert cross_terms(one.cross, useless, FEEDBACKS["qep"]) == CrossTerms()


def test_mismatch_rows_solve_the_remaining_gram():
    one = layer()
    factor = one.factor()
    found = mismatch_matrix(one.cross, factor, 0.7).double()
    hessian = one.damped[factor.order][:, factor.order]
    cross = one.cross[factor.order][:, factor.order]
    assert torch.equal(found, found.triu(1))
    for i in range(23):
        solved = torch.linalg.solve(hessian[i + 1 :, i + 1 :], cross[i, i + 1 :])
        assert torch.allclose(found[i, i + 1 :], 0.7 * solved, atol=1e-5)


def test_asymmetric_error_is_the_measured_one_up_to_a_constant():
    one = layer()
    weight = one.weight.double()
    generator = torch.Generator().manual_seed(4)
    difference = 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    measured = ((weight + difference) @ one.noisy - weight @ one.x).square().mean(1)
    constant = (weight @ (one.x - one.noisy)).square().mean(1)
    found = asymmetric_error(difference, weight, one.gram, one.cross)
    assert torch.allclose(found, measured - constant)
    best = shifted_target(weight, one.cross, replace(one, damping=0.0).factor(), 1.0) - weight
    lowest = asymmetric_error(best, weight, one.gram, one.cross)
    assert (lowest < 0).all()
    assert (lowest <= found).all()


def test_ldlq_and_two_sided_feedback_without_output_correlation_are_gptq():
    one = layer()
    scale, _ = grid(one.weight, SYMMETRIC)
    found = compensate(one.weight, one.factor(act_order=False), SYMMETRIC, scale).codes
    # H = (1 + S) D (1 + S)ᵀ with S strictly upper; the output side's factor is that of H_O = 1
    root = torch.linalg.cholesky(one.damped.flip(0, 1)).flip(0, 1)
    strict = root / root.diagonal() - torch.eye(24)
    outer = torch.linalg.cholesky(torch.eye(9).double()) - torch.eye(9)
    weight = one.weight.double()
    left = torch.zeros_like(weight)  # W − Ŵ on what is fixed
    for j in range(24):
        both = outer.T @ left[:, j] + outer.T @ (left @ strict[:, j])
        codes, q = nearest(weight[:, j] + left @ strict[:, j] + both, j, SYMMETRIC, scale, None, 24)
        left[:, j] = weight[:, j] - q
        assert torch.equal(found[:, j].double(), codes)


def test_reference_in_float64_returns_the_loss_of_the_damped_gram_and_its_bound():
    """Without clipping the loss is at most a quarter of Σ s² / U_jj², and near a twelfth of it."""
    one = layer(columns=40, rows=200, tokens=400)
    factor = one.factor()
    scale = torch.full((200, 1), 0.05, dtype=torch.float64)
    codes, loss = column_loop_reference(
        one.weight.double(), factor.upper.double(), factor.order, scale, bits=8, width=40
    )
    assert not ((codes == 0) | (codes == 255)).any()  # nothing was clipped
    difference = (codes.double() - 128) * 0.05 - one.weight.double()
    assert torch.allclose(loss, ((difference @ one.damped) * difference).sum(1), rtol=1e-5)
    bound = (0.05**2 / factor.upper.double().diagonal().square()).sum() / 4
    assert (loss <= bound).all()
    assert float(loss.mean() / bound) == pytest.approx(1 / 3, rel=0.05)
