"""Feedback between rows: conditional least squares, no coupling, and the two-sided error."""

import pytest
import torch

from quantforge.methods.compensation import Feedback, cross_terms
from quantforge.methods.gptq import gptq
from quantforge.methods.output_feedback import compensate_rows
from quantforge.methods.rtn import minmax_scale, round_to_nearest
from quantforge.numerics import factorize
from quantforge.types import QuantSpec

SPEC = QuantSpec(3, 8)


def gram(size, seed, tokens=200, coupling=2.0):
    generator = torch.Generator().manual_seed(seed)
    common = coupling * torch.randn(tokens, 3, generator=generator)
    rows = torch.randn(tokens, size, generator=generator)
    rows += common @ torch.randn(3, size, generator=generator)
    return rows.T @ rows / tokens


def weights(out, inputs, seed=0):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def rounding(weight):
    return round_to_nearest(weight, minmax_scale(weight, SPEC), SPEC)


def rows_of(weight, quantize):
    """`quantize` of whole weights, as `compensate_rows` asks for rows."""
    return lambda rows, carried: quantize(weight[rows] + carried)


@pytest.mark.parametrize("panel", [1, 2, 3])
def test_every_panel_sees_the_least_squares_optimum_of_the_rows_before_it(panel):
    weight, outputs = weights(7, 16), gram(7, 1)
    factor = factorize(outputs, damping=0.05)
    seen = []

    def quantize(target):
        seen.append(target.clone())
        return rounding(target)

    result = compensate_rows(weight, [factor], rows_of(weight, quantize), panel=panel)
    ordered = factor.order
    damped = outputs.double() + 0.05 * outputs.diagonal().double().mean() * torch.eye(7)
    damped = damped[ordered][:, ordered]
    error = (result.dequantize() - weight)[ordered].double()
    for index, target in enumerate(seen):
        done = index * panel
        free = torch.linalg.solve(damped[done:, done:], damped[done:, :done] @ error[:done])
        expected = weight[ordered].double()[done:] - free
        torch.testing.assert_close(target.double(), expected[: len(target)], rtol=0, atol=2e-5)


def test_outputs_that_are_not_coupled_change_nothing():
    weight = weights(12, 16)
    factor = factorize(torch.diag(torch.arange(1.0, 13.0)), damping=0.1)
    result = compensate_rows(weight, [factor], rows_of(weight, rounding), panel=4)
    assert torch.equal(result.codes, rounding(weight).codes)
    assert torch.equal(result.scale, rounding(weight).scale)


@pytest.mark.parametrize("panel", [1, 5, 12])
def test_two_sided_feedback_on_outputs_that_are_all_alike_is_gptq(panel):
    """(identity 20) H_O = 1."""
    weight, factor = weights(12, 16), factorize(gram(16, 4))
    same = factorize(torch.eye(12))
    result = compensate_rows(
        weight, [same], rows_of(weight, lambda w: gptq(w, factor, SPEC)), panel=panel
    )
    expected = gptq(weight, factor, SPEC)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.scale, expected.scale)


def test_blocks_are_the_layers_of_their_rows():
    weight, outputs = weights(12, 16), gram(12, 2)
    blocks = [factorize(outputs[:5, :5]), factorize(outputs[5:, 5:])]
    together = compensate_rows(weight, blocks, rows_of(weight, rounding), panel=2)
    apart = [
        compensate_rows(weight[:5], blocks[:1], rows_of(weight[:5], rounding), panel=2),
        compensate_rows(weight[5:], blocks[1:], rows_of(weight[5:], rounding), panel=2),
    ]
    assert torch.equal(together.codes, torch.cat([part.codes for part in apart]))
    with pytest.raises(ValueError, match="factors of 5 rows, the weight has 12"):
        compensate_rows(weight, blocks[:1], rows_of(weight, rounding))


@pytest.mark.parametrize("panel", [1, 8])
def test_the_two_sided_error_falls(panel):
    """With gram and output gram both coupled, against GPTQ, which knows the first alone."""
    gains = []
    for seed in range(4):
        weight, inputs, outputs = weights(48, 32, seed), gram(32, seed), gram(48, seed + 9)
        factor, rows = factorize(inputs), factorize(outputs, damping=0.01)
        plain = gptq(weight, factor, SPEC)
        quantize = rows_of(weight, lambda w, f=factor: gptq(w, f, SPEC))
        made = compensate_rows(weight, [rows], quantize, panel=panel)

        def cost(quantized, weight=weight, inputs=inputs, outputs=outputs):
            difference = quantized.dequantize() - weight
            return float(((outputs @ difference @ inputs) * difference).sum())

        gains.append(cost(made) / cost(plain))
    assert max(gains) < (0.6 if panel == 1 else 0.75)


def test_asymmetric_grids_keep_their_zeros_in_order():
    weight = weights(10, 16) + 0.5
    spec = QuantSpec(3, 8, symmetric=False)
    factor = factorize(gram(10, 3), damping=0.1)

    def quantize(target):
        groups = target.view(len(target), 2, 8)
        scale = ((groups.amax(-1) - groups.amin(-1)) / 7).bfloat16().float()
        zero = (-groups.amin(-1) / scale).round().clamp(0, 7)
        return round_to_nearest(target, scale, spec, zero)

    made = compensate_rows(weight, [factor], rows_of(weight, quantize), panel=3)
    first = quantize(weight[factor.order[:3]])
    assert torch.equal(made.zero[factor.order[:3]], first.zero)
    assert torch.equal(made.codes[factor.order[:3]], first.codes)
    assert float((made.dequantize() - weight).abs().max()) < 1.5


@pytest.mark.parametrize("panel", [1, 3])
def test_rows_that_read_quantized_layers_see_the_optimum_of_the_whole_asymmetric_error(panel):
    """Later rows, were they free, minimise tr G (Ŵx̃ − Wx)(Ŵx̃ − Wx)ᵀ, found here by brute force."""
    rows, inputs, tokens = 7, 16, 60
    generator = torch.Generator().manual_seed(3)
    weight, outputs = weights(rows, inputs), gram(rows, 1).double()
    native = torch.randn(inputs, tokens, generator=generator)
    noisy = native + 0.4 * torch.randn(inputs, tokens, generator=generator)
    factor = factorize(noisy @ noisy.T / tokens, damping=1e-7)
    cross = (native - noisy) @ noisy.T / tokens
    aim = cross_terms(cross, factor, Feedback(target=1.0)).target(weight)
    between = factorize(outputs.float(), damping=1e-7)
    seen, made = [], []

    def quantize(positions, carried):
        seen.append((positions, aim[positions] + carried))
        made.append(rounding(seen[-1][1]))
        return made[-1]

    compensate_rows(aim, [between], quantize, panel=panel)
    # |L (Ŵ x̃ − W x)|² over the free rows alone, L Lᵀ = G, as one least-squares problem
    root, wanted = torch.linalg.cholesky(outputs).T, (weight @ native).double()
    fixed = torch.zeros(rows, inputs, dtype=torch.float64)
    for (positions, target), quantized in zip(seen, made, strict=True):
        done = [int(one) for earlier, _ in seen for one in earlier]
        free = [row for row in range(rows) if row not in done[: done.index(int(positions[0]))]]
        rest = root @ (wanted - fixed @ noisy.double())
        design = torch.kron(root[:, free].contiguous(), noisy.T.contiguous().double())
        best = torch.linalg.lstsq(design, rest.flatten()).solution.view(len(free), inputs)
        found = best[[free.index(int(row)) for row in positions]]
        torch.testing.assert_close(target.double(), found, rtol=0, atol=2e-3)
        fixed[positions] = quantized.dequantize().double()
