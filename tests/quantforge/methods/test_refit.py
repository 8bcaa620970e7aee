"""Closed-form scales against least squares on the outputs themselves."""

import pytest
import torch
from quantforge_kernels.grid import search_grid

from quantforge.methods import refit
from quantforge.methods.gptq import gptq
from quantforge.methods.refit import refit_scales
from quantforge.methods.rtn import minmax_scale, nearest_codes, round_to_nearest
from quantforge.numerics import factorize
from quantforge.types import QuantSpec


def streams(columns, tokens=None, drift=0.0, seed=0):
    """Correlated inputs [in, tokens] of the float network and of the quantized one, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    tokens = tokens or 6 * columns
    native = mixing @ torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    noise = torch.randn(columns, tokens, generator=generator, dtype=torch.float64)
    shift = 0.3 * native.roll(1, 0)  # what earlier layers did is correlated with the inputs
    return native, native + drift * (shift + noise * native.std())


def weights(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(codes, scale, zero, weight, native, quantized):
    """[out] float64 mean (ŵ x̃ − w x)² over the tokens."""
    made = dequantized(codes, scale, zero)
    return (made @ quantized - weight.double() @ native).square().mean(1)


def dequantized(codes, scale, zero):
    integers = codes.double().view(*scale.shape, -1) - zero.double().unsqueeze(-1)
    return (integers * scale.double().unsqueeze(-1)).flatten(1)


def least_squares(codes, zero, weight, native, quantized):
    """[out, groups] float64 scales by a general solver, one row at a time."""
    groups = zero.shape[1]
    solutions = []
    for row in range(len(codes)):
        integers = codes[row].double().view(groups, -1) - zero[row].double().unsqueeze(-1)
        design = torch.einsum(
            "gw,gwt->tg", integers, quantized.view(groups, -1, quantized.shape[1])
        )
        target = (weight[row].double() @ native).unsqueeze(1)
        solutions.append(torch.linalg.lstsq(design, target).solution.squeeze(1))
    return torch.stack(solutions)


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 16), (3, -1)])
def test_refit_is_least_squares_on_the_outputs(bits, group_size, kind, drift):
    native, quantized = streams(48, drift=drift)
    weight = weights(10, 48)
    spec = QuantSpec(bits, group_size, symmetric=kind == "symmetric")
    width = spec.width(48)
    if kind == "symmetric":
        scale = minmax_scale(weight, spec)
        zero = torch.full_like(scale, float(1 << (bits - 1)))
    else:
        scale, zero = search_grid(weight, torch.ones(48), bits=bits, width=width, zero=kind)
    codes = nearest_codes(weight, scale, zero, bits)
    gram = quantized @ quantized.T / quantized.shape[1]
    mismatch = (native - quantized) @ quantized.T / quantized.shape[1]
    found = refit_scales(
        codes, weight, gram, scale, spec,
        zero=None if kind == "symmetric" else zero,
        cross_term=(weight.double() @ mismatch).float() if drift else None,
    )  # fmt: skip
    exact = least_squares(codes, zero, weight, native, quantized)
    assert torch.equal(found, found.bfloat16().float())
    assert torch.allclose(found.double(), exact, rtol=2**-8)
    arguments = (zero, weight, native, quantized)
    best = output_error(codes, exact, *arguments)
    before = output_error(codes, scale, *arguments)
    after = output_error(codes, found, *arguments)
    assert (after <= before).all()
    assert after.sum() - best.sum() <= 1e-3 * best.sum()
    assert after.sum() < 0.985 * before.sum()


def test_the_sign_of_the_cross_term():
    """Towards the targets it helps, away from them it hurts."""
    native, quantized = streams(32, drift=0.5)
    weight, spec = weights(8, 32), QuantSpec(3, 8)
    found = round_to_nearest(weight, minmax_scale(weight, spec), spec)
    gram = (quantized @ quantized.T / quantized.shape[1]).float()
    cross = weight.double() @ (native - quantized) @ quantized.T / quantized.shape[1]
    zero = torch.full((8, 4), 4.0)
    losses = {}
    for sign in (-1, 0, 1):
        scale = refit_scales(
            found.codes, weight, gram, found.scale, spec, cross_term=sign * cross.float()
        )
        losses[sign] = output_error(found.codes, scale, zero, weight, native, quantized).sum()
    assert losses[1] < 0.97 * losses[0] < losses[-1]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_compensated_weights_gain_and_no_row_loses(bits):
    native, _ = streams(96, seed=4)
    weight, spec = weights(40, 96), QuantSpec(bits, 16)
    gram = (native @ native.T / native.shape[1]).float()
    start = gptq(weight, factorize(gram), spec)
    found = refit_scales(start.codes, weight, gram, start.scale, spec)
    zero = torch.full((40, 6), float(1 << (bits - 1)))
    arguments = (zero, weight, native, native)
    before = output_error(start.codes, start.scale, *arguments)
    after = output_error(start.codes, found, *arguments)
    assert (after <= before * (1 + 1e-6)).all()
    if bits < 8:  # at 8 bits the rounding of the scales is all there is
        assert after.sum() < 0.97 * before.sum()


def test_singular_systems_and_groups_of_zeros_keep_their_scales():
    inputs = streams(24, tokens=2)[0]  # two tokens cannot tell three scales apart
    gram = (inputs @ inputs.T / 2).float()
    gram[8:16] = gram[:, 8:16] = 0.0  # inputs that are always zero
    weight, spec = weights(5, 24), QuantSpec(2, 8)
    scale = minmax_scale(weight, spec)
    start = round_to_nearest(weight, scale, spec)
    found = refit_scales(start.codes, weight, gram, scale, spec)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 1], scale[:, 1])
    centred = torch.full_like(start.codes, 2)
    assert torch.equal(refit_scales(centred, weight, gram, scale, spec), scale)


def test_exact_scales_stay():
    weight, spec = weights(6, 32), QuantSpec(3, 8)
    start = round_to_nearest(weight, minmax_scale(weight, spec), spec)
    found = refit_scales(start.codes, start.dequantize(), torch.eye(32), start.scale, spec)
    assert torch.equal(found, start.scale.float())


def test_chunks_of_rows_change_nothing(monkeypatch):
    native, _ = streams(32)
    weight, spec = weights(11, 32), QuantSpec(2, 8)
    start = round_to_nearest(weight, minmax_scale(weight, spec), spec)
    arguments = (start.codes, weight, (native @ native.T).float(), start.scale, spec)
    whole = refit_scales(*arguments)
    monkeypatch.setattr(refit, "CHUNK_NUMBERS", 3 * (4 * 32 + 6 * 16))
    assert torch.equal(refit_scales(*arguments), whole)
