"""What reaches a compiler in practice: dead inputs, too few tokens, broken numbers, odd grids."""

import pytest
import torch

from quantforge.errors import InputError
from quantforge.methods.compensation import FEEDBACKS, Feedback, compensate
from quantforge.methods.gptq import fit_grid, gptq
from quantforge.methods.rtn import round_to_nearest
from quantforge.numerics import factorize, output_error
from quantforge.types import QuantSpec

SPEC, ASYMMETRIC = QuantSpec(3, 8), QuantSpec(3, 8, symmetric=False)
EVERY = {
    **FEEDBACKS,
    "foem-A": Feedback(pull=0.005, pull_form="A", mismatch=0.25),
    "foem-B": Feedback(pull=0.05, pull_form="B"),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(x, noisy):
    return noisy @ noisy.T / x.shape[1], (x - noisy) @ noisy.T / x.shape[1]


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_dead_columns_become_zero_and_disturb_nobody(name, spec):
    x = normal(24, 60)
    noisy = x + 0.3 * normal(24, 60, seed=1)
    dead = [3, 8, 9, 23]
    noisy[dead] = 0  # x is alive there: only the quantized stream has lost the input
    gram, cross = moments(x, noisy)
    weight = normal(6, 24, seed=2)
    scale = torch.full((6, 3), 0.5)
    zero = None if spec.symmetric else torch.full((6, 3), 3.0)
    factor = factorize(gram)
    options = {"zero": zero, "feedback": EVERY[name]}
    found = compensate(weight, factor, spec, scale, cross=cross, **options)
    values = found.dequantize()
    assert not values[:, dead].any()
    # the same layer without those columns, in a spec that has one scale a row
    live = [j for j in range(24) if j not in dead]
    if not EVERY[name].needs_cross:
        row = QuantSpec(3, -1, spec.symmetric)
        options["zero"] = None if zero is None else zero[:, :1]
        smaller = compensate(
            weight[:, live], factorize(gram[live][:, live]), row, scale[:, :1], **options
        )
        assert torch.equal(values[:, live], smaller.dequantize())


def test_a_weight_on_a_dead_input_still_counts_in_the_target():
    """x̃ has lost an input that x has: QEP makes the others carry it as far as they can."""
    x = normal(8, 400)
    x[7] = x[0] + 0.05 * x[7]
    noisy = x.clone()
    noisy[7] = 0
    gram, cross = moments(x, noisy)
    weight, scale = normal(5, 8, seed=3), torch.full((5, 1), 0.02)
    errors = [
        (compensate(
            weight, factorize(gram), QuantSpec(8), scale, cross=cross, feedback=feedback
        ).dequantize() @ noisy - weight @ x).square().mean()
        for feedback in (Feedback(), Feedback(target=1.0))
    ]  # fmt: skip
    assert errors[1] < 0.02 * errors[0]


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
def test_dead_weights_do_not_widen_the_grid(spec):
    inputs = normal(16, 60)
    inputs[5] = 0
    factor = factorize(inputs @ inputs.T / 60)
    weight = normal(4, 16, seed=1)
    for grid in ("minmax", "mse", "positive", "diagonal", "conditional"):
        scale, zero = fit_grid(weight, factor, spec, grid)
        outlier = weight.clone()
        outlier[:, 5] = 1000.0
        again, zero_again = fit_grid(outlier, factor, spec, grid)
        assert torch.equal(again, scale)
        assert (zero is None) == spec.symmetric
        assert zero is None or torch.equal(zero_again, zero)


@pytest.mark.parametrize("spec", [SPEC, ASYMMETRIC], ids=str)
def test_every_grid_is_the_best_for_what_it_says_it_minimises(spec):
    """Of all four kinds, each has the least weighted rounding error with its own weights."""
    inputs = normal(16, 16, seed=4) @ (normal(16, 90) * torch.logspace(0, -1, 16).unsqueeze(1))
    factor = factorize(inputs @ inputs.T / 90)
    weight = normal(300, 16, seed=1) + 0.5
    importances = {
        "mse": torch.ones(16),
        "diagonal": factor.diagonal,
        "conditional": factor.conditional_importance(),
    }
    differences = {}
    for grid in ("minmax", *importances):
        scale, zero = fit_grid(weight, factor, spec, grid)
        differences[grid] = round_to_nearest(weight, scale, spec, zero).dequantize() - weight
    for kind, importance in importances.items():
        errors = {n: float((importance * d.square()).sum()) for n, d in differences.items()}
        assert min(errors, key=errors.__getitem__) == kind, (kind, errors)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("name", EVERY)
def test_a_gram_of_few_tokens_is_survived_and_used(name, tokens):
    x = normal(32, tokens)
    noisy = x + 0.1 * normal(32, tokens, seed=1)
    gram, cross = moments(x, noisy)
    factor = factorize(gram)
    assert not factor.fallback
    weight = normal(50, 32, seed=2)
    scale, _ = fit_grid(weight, factor, SPEC, "mse")
    found = compensate(weight, factor, SPEC, scale, cross=cross, feedback=EVERY[name])
    rounded = round_to_nearest(weight, scale, SPEC)
    error = [(q.dequantize() @ noisy - weight @ x).square().sum() for q in (found, rounded)]
    assert error[0] < error[1]


def test_duplicate_inputs_share_their_error():
    """Of a pair only the second's rounding error is left, of uncorrelated inputs both: half."""
    gram = torch.eye(8).repeat(2, 2)
    weight = normal(2000, 16, seed=1)
    found = gptq(weight, factorize(gram), QuantSpec(8), grid="minmax")
    rounded = round_to_nearest(weight, found.scale.float(), QuantSpec(8))
    errors = [output_error(q.dequantize() - weight, gram).sum() for q in (found, rounded)]
    assert float(errors[0] / errors[1]) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("name", EVERY)
def test_a_gram_that_cannot_be_factored_means_rounding(name):
    gram = torch.eye(24) + 1e12 * (normal(24, 24) + normal(24, 24).T).fill_diagonal_(0)
    factor = factorize(gram)
    assert factor.fallback
    weight = normal(6, 24, seed=1)
    scale, _ = fit_grid(weight, factor, SPEC, "conditional")
    found = compensate(weight, factor, SPEC, scale, cross=gram, feedback=EVERY[name])
    assert torch.equal(found.codes, round_to_nearest(weight, scale, SPEC).codes)


def test_a_layer_that_saw_only_zeros_is_rounded_not_erased():
    factor = factorize(torch.zeros(16, 16))
    assert factor.fallback
    assert not factor.dead.any()
    weight = normal(4, 16)
    found = gptq(weight, factor, SPEC)
    scale, _ = fit_grid(weight, factor, SPEC, "mse")
    assert torch.equal(found.codes, round_to_nearest(weight, scale, SPEC).codes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_and_moments_that_are_not_finite_are_refused_in_one_line(value):
    factor, weight, cross = factorize(torch.eye(16)), normal(4, 16), torch.zeros(16, 16)
    scale, _ = fit_grid(weight, factor, SPEC, "mse")
    cross[2, 3] = value
    with pytest.raises(InputError, match=r"cross moment.* 1 of 256 values .*NaN or Inf"):
        compensate(weight, factor, SPEC, scale, cross=cross, feedback=FEEDBACKS["qep"])
    weight[1, 2:4] = value
    for call in (
        lambda: compensate(weight, factor, SPEC, scale),
        lambda: fit_grid(weight, factor, SPEC, "diagonal"),
        lambda: gptq(weight.half(), factor, SPEC),
    ):
        with pytest.raises(InputError, match="weight: 2 of 64 values are NaN or Inf; ") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_groups_of_zeros_stay_zero():
    inputs = normal(16, 40)
    weight = normal(5, 16, seed=1)
    weight[:, 8:] = 0
    factor = factorize(torch.eye(16))
    found = gptq(weight, factor, SPEC)
    assert torch.equal(found.scale[:, 1], torch.ones(5).bfloat16())
    assert not found.dequantize()[:, 8:].any()
    weight.zero_()
    assert not gptq(weight, factorize(inputs @ inputs.T), SPEC).dequantize().any()


def test_static_groups_follow_the_original_columns_whatever_the_order():
    """Columns 8..15 have tiny inputs, so go last; their scale is still that of their group."""
    inputs = normal(16, 60) * torch.cat((torch.ones(8), torch.full((8,), 1e-3))).unsqueeze(1)
    factor = factorize(inputs.flip(0) @ inputs.flip(0).T / 60)
    assert sorted(factor.order[:8].tolist()) == list(range(8, 16))
    scale = torch.tensor([[1.0, 0.125]])
    values = compensate(normal(1, 16, seed=1), factor, SPEC, scale).dequantize()
    assert torch.equal(values[:, :8] % 1.0, torch.zeros(1, 8))
    assert (values[:, 8:].abs() <= 0.5).all()
    assert (values[:, 8:] % 1.0).any()


def test_feedback_answers_for_the_scales_that_are_stored():
    inputs = normal(16, 60)
    factor, weight = factorize(inputs @ inputs.T / 60), normal(20, 16, seed=1)
    scale = torch.rand(20, 2, generator=torch.Generator().manual_seed(2)) + 0.2
    found = compensate(weight, factor, SPEC, scale)
    assert found.scale.dtype == torch.bfloat16
    assert torch.equal(found.codes, compensate(weight, factor, SPEC, found.scale.float()).codes)
    half = compensate(weight, factor, SPEC, scale.half())
    assert half.scale.dtype == torch.float16
    assert torch.equal(half.scale, scale.half())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mismatch": 0.25, "target": 0.5}, "use one"),
        ({"pull": 1.5}, "pull must be in 0..1"),
        ({"mismatch": -0.1}, "mismatch must be in 0..1"),
        ({"target": float("nan")}, "target must be in 0..1"),
        ({"pull_form": "D"}, "pull_form"),
        ({"first_column": True}, "needs a target"),
    ],
)
def test_contradicting_coefficients_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Feedback(**options)


@pytest.mark.parametrize(
    ("scale", "options", "message"),
    [
        (torch.ones(4, 1), {}, "must be"),
        (torch.zeros(4, 2), {}, "not zero"),
        (torch.full((4, 2), torch.nan), {}, "finite"),
        (torch.ones(4, 2), {"zero": torch.ones(4, 2)}, "takes no zero"),
        (torch.ones(4, 2), {"feedback": FEEDBACKS["qep"]}, "needs cross"),
        (torch.ones(4, 2), {"feedback": FEEDBACKS["gptaq"], "cross": torch.eye(8)}, "needs cross"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(scale, options, message):
    with pytest.raises(ValueError, match=message):
        compensate(normal(4, 16), factorize(torch.eye(16)), SPEC, scale, **options)


def test_zeros_must_be_storable():
    factor, scale = factorize(torch.eye(16)), torch.ones(4, 2)
    for zero in (torch.full((4, 2), 1.5), torch.full((4, 2), 8.0), torch.full((4, 2), -1.0)):
        with pytest.raises(ValueError, match="integers"):
            compensate(normal(4, 16), factor, ASYMMETRIC, scale, zero=zero)
    with pytest.raises(ValueError, match="8 inputs"):
        compensate(normal(4, 16), factorize(torch.eye(8)), SPEC, scale)


def test_registry_holds_the_published_members_and_cannot_be_changed():
    assert list(FEEDBACKS) == ["gptq", "gptaq", "foem", "foem-gptaq", "qep", "qronos"]
    assert FEEDBACKS["foem-gptaq"] == Feedback(pull=0.1, mismatch=0.25, pull_form="C")
    with pytest.raises(TypeError):
        FEEDBACKS["gptq"] = Feedback(pull=1.0)
