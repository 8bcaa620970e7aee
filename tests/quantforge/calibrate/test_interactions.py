"""c_ij = D_iᵀ F_ij D_j three ways: finite differences, products with the Hessian, the Gram."""

import copy

import pytest
import torch

from quantforge.calibrate.curvature import LossHessian
from quantforge.calibrate.fisher import gradient_statistics
from quantforge.calibrate.token_loss import toward
from quantforge.load.huggingface import from_module
from quantforge.methods.mfac import interaction_matrix
from quantforge.progress import Monitor
from quantforge.search.interactions import pair_loss
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import Interactions

VOCABULARY, LENGTH = 11, 6
SHAPE = {"hidden": 8, "intermediate": 12, "blocks": 2, "heads": 2, "kv_heads": 1}
STEP = 1e-2


@pytest.fixture(scope="module")
def module():
    return train(tiny_llama(vocabulary=VOCABULARY, **SHAPE), steps=40, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def tokens():
    return markov_tokens(1, LENGTH, vocabulary=VOCABULARY, seed=3)


@pytest.fixture(scope="module")
def errors(module):
    """Layer name → [2, out, in] errors of two candidates, of the size of the weights' spread."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in from_module(module).layers:
        weight = module.get_submodule(layer.name).weight.detach()
        noise = torch.randn(2, *weight.shape, generator=generator)
        found[layer.name] = noise * weight.std()
    return found


def by_finite_differences(module, tokens, errors):
    """[layers · 2, layers · 2] second differences of KL(float ‖ moved) a token."""
    double = copy.deepcopy(module).double()
    with torch.no_grad():
        reference = double(input_ids=tokens).logits.log_softmax(-1)
    names = list(errors)
    moves = [(name, errors[name][c].double()) for name in names for c in range(2)]

    @torch.no_grad()
    def kl(*steps):
        for sign, (name, error) in steps:
            double.get_submodule(name).weight.add_(error, alpha=sign * STEP)
        moved = double(input_ids=tokens).logits.log_softmax(-1)
        for sign, (name, error) in steps:
            double.get_submodule(name).weight.sub_(error, alpha=sign * STEP)
        return float((reference.exp() * (reference - moved)).sum()) / LENGTH

    table = torch.zeros(len(moves), len(moves), dtype=torch.float64)
    for i, first in enumerate(moves):
        for j, second in enumerate(moves[:i]):
            signs = [(a, b) for a in (1, -1) for b in (1, -1)]
            cross = sum(a * b * kl((a, first), (b, second)) for a, b in signs)
            table[i, j] = table[j, i] = cross / (4 * STEP**2)
    return table


def by_products(module, tokens, errors):
    """The same from one product with the Hessian for every candidate."""
    model = from_module(copy.deepcopy(module).double())
    hessian = LossHessian.of(model, tokens)
    moves = []
    for name, both in errors.items():
        for error in both:
            parts = {n: torch.zeros(e[0].numel(), dtype=torch.float64) for n, e in errors.items()}
            parts[name] = error.double().flatten()
            moves.append(torch.cat(list(parts.values())))
    stacked = torch.stack(moves)
    return stacked @ torch.stack([hessian.product(move) for move in moves]).T


def by_gradients(module, tokens, errors):
    """Products of calibration's own backward pass, with every label at every position, weighted.

    Sampled labels have the same expectation; with all of them the Gram is exact.
    """
    rows = tokens.repeat(LENGTH * VOCABULARY, 1)

    def one_label(batch, hidden, head):
        sequences = range(batch.start, batch.stop)
        gradient = torch.zeros_like(hidden).view(len(sequences), LENGTH, -1)
        inputs = hidden.view_as(gradient)
        for index, row in enumerate(sequences):
            position, label = divmod(row, VOCABULARY)
            p = torch.softmax(inputs[index, position] @ head.weight.T, -1)
            residual = p - torch.nn.functional.one_hot(torch.tensor(label), VOCABULARY)
            gradient[index, position] = p[label].sqrt() * residual @ head.weight
        return gradient.view_as(hidden)

    model = from_module(module)
    found = gradient_statistics(
        model, rows, batch_size=33, precision="float32", head_gradient=one_label,
        monitor=Monitor(), errors=lambda layer: errors[layer.name],
    )  # fmt: skip
    return found.products


def test_three_ways_agree(module, tokens, errors):
    differences = by_finite_differences(module, tokens, errors)
    products = by_products(module, tokens, errors)
    samples = by_gradients(module, tokens, errors)
    gram = interaction_matrix(samples).flatten(2).flatten(0, 1) * len(samples) / LENGTH
    assert gram.shape == differences.shape == (28, 28)
    off = ~torch.eye(28).bool()
    size = float(products[off].square().mean().sqrt())
    assert size > 1e-4
    torch.testing.assert_close(products[off], differences[off], rtol=2e-3, atol=1e-3 * size)
    torch.testing.assert_close(gram[off], products[off], rtol=0, atol=1e-3 * size)
    # and what a search adds for a pair of layers is c_ij
    count = len(samples)
    projections = samples * (count / (2 * LENGTH)) ** 0.5
    weights = 1.0 - torch.eye(14).double()
    pairs = Interactions(projections=projections, weights=weights)
    columns = [None] * 14
    columns[3], columns[9] = 1, 0
    assert pair_loss(pairs, columns) == pytest.approx(float(products[7, 18]), abs=1e-3 * size)


def test_gradients_toward_the_network_itself_vanish(module, tokens):
    """The way in which refinement differentiates: at the float network nothing is left to gain."""
    model = from_module(module)
    norm = {}
    hook = model.module.model.norm.register_forward_hook(
        lambda _, __, output: norm.setdefault("h", output.detach())
    )
    model.module(input_ids=tokens)
    hook.remove()
    found = gradient_statistics(
        model, tokens, batch_size=1, precision="float32", head_gradient=toward(norm["h"]),
        monitor=Monitor(),
    )  # fmt: skip
    assert float(found.squares.max()) < 1e-9
