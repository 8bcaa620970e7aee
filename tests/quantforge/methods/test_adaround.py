"""AdaRound: where it starts, what it can commit to, and its schedule (identity 24)."""

import pytest
import torch

from quantforge.methods.adaround import RelaxedWeight, annealed_beta, rectified_sigmoid
from quantforge.methods.rounding import CELL
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.types import QuantSpec

SPECS = [QuantSpec(2, 16), QuantSpec(4), QuantSpec(3, 16, symmetric=False)]


def started(spec):
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = minmax_grid(weight, spec)
    quantized = round_to_nearest(weight, scale, spec, zero)
    return weight, quantized, RelaxedWeight.start(weight, quantized)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_identity_24_the_start_reproduces_the_weight_and_commits_to_its_codes(spec):
    weight, quantized, made = started(spec)
    steps = weight.view(*quantized.scale.shape, -1) / quantized.scale.float().unsqueeze(-1)
    away = (steps + quantized.centre()).view_as(weight) - quantized.codes
    inside = away.abs() <= CELL
    inside &= (quantized.codes > 0) | (away >= 0)  # below the grid there is no lower neighbour
    inside &= (quantized.codes < spec.top) | (away <= 0)
    assert inside.float().mean() > 0.65
    assert torch.allclose(made.weight()[inside], weight[inside], atol=1e-5)
    assert torch.equal(made.finish().codes, quantized.codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("logit", "up"), [(-9.0, 0), (-0.01, 0), (0.01, 1), (9.0, 1)])
def test_identity_24_h_of_0_is_floor_and_of_1_ceiling(spec, logit, up):
    weight, quantized, made = started(spec)
    steps = weight.view(*quantized.scale.shape, -1) / quantized.scale.float().unsqueeze(-1)
    latent = (steps + quantized.centre()).view_as(weight)
    floor = latent.floor().clamp(0, spec.top - 1)
    with torch.no_grad():
        made.logits.fill_(logit)
    committed = made.finish()
    near = (latent - quantized.codes).abs() < CELL
    assert torch.equal(committed.codes[near], (floor + up).to(torch.uint8)[near])
    if abs(logit) > 1.0:
        assert torch.equal(made.weight(), committed.dequantize())
        assert made.undecided(2.0).item() == 0.0


def test_gradients_reach_the_logits_between_the_ends_only():
    _, _, made = started(QuantSpec(3))
    with torch.no_grad():
        made.logits[0, 0], made.logits[0, 1] = 9.0, 0.0
    made.weight().sum().backward()
    scale = float(made.initial.scale[0, 0])
    assert float(made.logits.grad[0, 0]) == 0.0
    assert float(made.logits.grad[0, 1]) == pytest.approx(1.2 * 0.25 * scale)


def test_the_regulariser_is_its_formula_and_beta_falls_after_the_warm_up():
    _, _, made = started(QuantSpec(3))
    h = rectified_sigmoid(made.logits)
    expected = (1.0 - (2.0 * h - 1.0).abs() ** 6.0).mean()
    assert made.undecided(6.0).item() == pytest.approx(expected.item(), rel=1e-5)
    betas = [annealed_beta(step, 101) for step in range(101)]
    assert betas[:20] == [None] * 20
    assert betas[21] == pytest.approx(20.0, abs=0.3)
    assert betas[100] == 2.0
    assert betas[61] == pytest.approx(11.0, abs=0.3)
