"""Every estimator against closed forms, plain autograd, or the network it says it measures."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from quantforge.calibrate.artefact import load_evidence, save_evidence
from quantforge.calibrate.candidates import quantize_candidates, weight_errors
from quantforge.calibrate.config import CalibrateConfig, CurvatureLimits, EstimatorName
from quantforge.calibrate.curvature_scores import CurvatureConfig, measure_curvature
from quantforge.calibrate.estimators import ESTIMATORS, Extent, Network, estimate, probed
from quantforge.calibrate.evidence import Evidence
from quantforge.calibrate.fisher import diagonal_products, gradient_statistics
from quantforge.calibrate.token_loss import following_tokens, sampled_labels, toward
from quantforge.cli.options import Estimator
from quantforge.errors import InputError
from quantforge.format.store import CandidateStore
from quantforge.load.huggingface import from_module
from quantforge.models import Head
from quantforge.progress import Monitor
from quantforge.results import Quality
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import QuantSpec

SPECS = (QuantSpec(2, 32), QuantSpec(2), QuantSpec(3, 32), QuantSpec(3, 128), QuantSpec(4))
CONFIG = CalibrateConfig(
    precision="float32",
    gradient_sequences=6,
    gradient_batch=4,
    curvature=CurvatureLimits(sequences=2, tokens=5, products=6, layer_products=3, tolerance=1e-9),
)


@pytest.fixture(scope="module")
def model():
    return from_module(train(tiny_llama(blocks=2), steps=60))


@pytest.fixture(scope="module")
def tokens():
    return markov_tokens(8, 12, seed=1)


@pytest.fixture(scope="module")
def evidence(model, tokens, tmp_path_factory):
    """Of all candidates, and what gives their errors; gradients of six sequences."""
    store = CandidateStore(tmp_path_factory.mktemp("store"))
    errors, _ = quantize_candidates(model, tokens, SPECS, CONFIG, store=store, monitor=Monitor())
    differences = weight_errors(model, SPECS, store, torch.float32)
    gradients = gradient_statistics(
        model, tokens[:6], batch_size=4, precision="float32", monitor=Monitor(),
        head_gradient=sampled_labels(torch.Generator().manual_seed(0)),
        errors=differences, rows={one.layer.name: one.rows for one in errors},
    )  # fmt: skip
    return Evidence.of(errors, gradients, SPECS, 12), differences


@pytest.fixture
def network(model, tokens, evidence):
    def measure(assignments):
        raise AssertionError(f"nothing is to be measured, not {len(assignments)} networks")

    return Network(
        model=model, fitting=tokens, config=CONFIG, errors=evidence[1], measure=measure,
        seed=3, monitor=Monitor(),
    )  # fmt: skip


def with_config(network, **changes):
    fields = {name: getattr(network, name) for name in network.__slots__}
    return Network(**fields | changes)


def test_the_names_are_those_of_the_recipe_key_and_of_the_option():
    assert sorted(ESTIMATORS) == sorted(get_args(EstimatorName))
    assert sorted(ESTIMATORS) == sorted(one.value for one in Estimator)


def test_losses_at_the_head_have_the_gradients_of_plain_autograd():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    other = torch.randn(3, 5, 7, generator=generator)
    head = torch.randn(11, 7, generator=generator)
    tokens = torch.randint(11, (3, 5), generator=generator)
    rows = slice(1, 3)
    log_probability = (hidden @ head.T).log_softmax(-1)
    labels = tokens[rows, 1:].unsqueeze(-1)
    (expected,) = torch.autograd.grad(
        -log_probability[:, :-1].gather(-1, labels).sum(), hidden, retain_graph=True
    )
    flat = hidden.detach().flatten(0, 1)
    found = following_tokens(tokens)(rows, flat, Head(weight=head)).view_as(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    target = (other[rows] @ head.T).log_softmax(-1)
    divergence = (target.exp() * (target - log_probability)).sum()
    (expected,) = torch.autograd.grad(divergence, hidden)
    found = toward(other)(rows, flat, Head(weight=head)).view_as(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_diagonal_products_are_those_of_plain_weight_gradients(model, tokens, evidence):
    _, differences = evidence
    found = diagonal_products(
        model, tokens[:3], batch_size=2, precision="float32", monitor=Monitor(), errors=differences
    )
    for index, sequence in enumerate(tokens[:3].split(1)):
        model.module.zero_grad()
        logits = model.module(input_ids=sequence).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], sequence[0, 1:], reduction="sum").backward()
        for row, layer in enumerate(model.layers):
            gradient = model.module.get_submodule(layer.name).weight.grad
            expected = (gradient.square() * differences(layer).square()).sum((1, 2))
            torch.testing.assert_close(found[index, row].float(), expected, rtol=1e-3, atol=1e-9)
    model.module.zero_grad()


def test_evidence_agrees_with_itself_and_survives_the_disk(evidence, tmp_path):
    known, differences = evidence
    fits = known.fits
    assert fits[:, 3].logical_not().all()  # no row of 64 or 128 holds two groups of 128
    mean = known.energies.mean(0) / (2 * known.length)
    torch.testing.assert_close(mean[fits], known.factored[fits], rtol=1e-4, atol=0.0)
    assert not known.energies[:, :, 3].any()
    for row, layer in enumerate(known.layers):
        squares = differences(layer).double().square().sum((1, 2))
        torch.testing.assert_close(known.squared[row][fits[row]], squares[fits[row]])
    save_evidence(known, tmp_path / "e.safetensors")
    found = load_evidence(tmp_path / "e.safetensors")
    assert (found.layers, found.specs, found.length) == (known.layers, known.specs, 12)
    tables = "squared output relative factored energies products squares traces"
    for name in tables.split():
        assert torch.equal(getattr(found, name), getattr(known, name))
    (tmp_path / "e.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="missing or damaged"):
        load_evidence(tmp_path / "e.safetensors")


def test_tables_from_the_evidence_alone(evidence, network):
    known, _ = evidence
    fits = known.fits
    made = {
        name: estimate(name, known, network, "f")
        for name in ("fisher", "fisher-exact", "fisher-factored", "fisher-trace", "gram")
    }
    exact = known.products.square().mean(0) / 24
    torch.testing.assert_close(made["fisher-exact"].loss[fits], exact[fits])
    assert torch.equal(made["fisher-factored"].loss[fits], known.factored[fits])
    samples = known.energies / 24
    spread = samples.std(0) / 6**0.5
    torch.testing.assert_close(made["fisher-factored"].stderr[fits], spread[fits])
    # one mean square of all gradients in the place of every output's own
    outputs = sum(layer.out_features for layer in known.layers)
    common = float(known.squares.sum()) / (6 * 12 * outputs)
    torch.testing.assert_close(made["gram"].loss[fits], 0.5 * common * known.output[fits])
    for name, table in made.items():
        assert (table.estimator, table.fingerprint) == (name, "f")
        assert table.loss[~fits].isinf().all()
        assert table.stderr[~fits].isinf().all()
        assert (table.stderr[fits] > 0).all()
    sizes = torch.tensor([layer.numel for layer in known.layers])
    mean = known.traces.mean(0) / 12 / sizes
    expected = 0.5 * mean[:, None] * known.squared
    torch.testing.assert_close(made["fisher-trace"].loss[fits], expected[fits])
    assert len({float(table.loss[0, 0]) for table in made.values()}) == 5


def test_the_empirical_fisher_takes_weights_alone_and_true_labels(evidence, network, tokens):
    known, differences = evidence
    squares = diagonal_products(
        network.model, tokens[:6], batch_size=6, precision="float32", monitor=Monitor(),
        errors=differences,
    )  # fmt: skip
    found = estimate("empirical-fisher", known, network)
    samples = squares / (2 * 11)  # of 12 tokens 11 are predicted
    fits = known.fits
    torch.testing.assert_close(found.loss[fits], samples.mean(0)[fits], rtol=1e-4, atol=0.0)
    expected = samples.std(0) / 6**0.5
    torch.testing.assert_close(found.stderr[fits], expected[fits], rtol=1e-3, atol=0.0)
    assert found.loss[~fits].isinf().all()


@pytest.mark.parametrize(
    ("name", "method", "products", "limits"),
    [
        ("hawq-v2", "joint-trace", 6, {}),
        ("hawq-v2", "trace", 3, {"trace": "hutch++"}),
        ("hawq", "lanczos", 3, {}),
        ("hawq", "power", 3, {"eigenvalue": "power"}),
    ],
)
def test_curvature_estimators_are_half_of_the_mean_times_the_squared_error(
    evidence, network, tokens, name, method, products, limits
):
    known, _ = evidence
    limits = {"curvature": CONFIG.curvature.model_copy(update=limits)}
    network = with_config(network, config=CONFIG.model_copy(update=limits))
    before = network.model.module.config._attn_implementation
    curvature = measure_curvature(
        network.model,
        tokens[:2, :5],  # no more text than the limits allow
        CurvatureConfig(method=method, tolerance=1e-9, max_products=products),
        generator=torch.Generator().manual_seed(3),
    )
    found = estimate(name, known, network)
    assert network.model.module.config._attn_implementation == before
    sizes = torch.tensor([layer.numel for layer in known.layers])
    value = torch.maximum(curvature.values, curvature.errors) / sizes
    fits = known.fits
    expected = 0.5 * value[:, None] * known.squared
    torch.testing.assert_close(found.loss[fits], expected[fits])
    expected = 0.5 * (curvature.errors / sizes)[:, None] * known.squared
    torch.testing.assert_close(found.stderr[fits], expected[fits])
    assert found.loss[~fits].isinf().all()


def quality(kl, error):
    return Quality(
        text="", windows=2, window_length=4, perplexity=1.0, reference_perplexity=1.0, kl=kl,
        kl_stderr=error, top1=1.0, window_kl=(kl, kl), window_nll=(0.0, 0.0),
    )  # fmt: skip


def test_few_candidates_are_all_measured_and_many_one_a_layer(evidence, network):
    known, _ = evidence
    fits, asked = known.fits, []

    def measure(assignments):
        asked.extend(assignments)
        return [quality(0.01 * (index + 1), 0.002) for index in range(len(assignments))]

    every = with_config(network, measure=measure)
    found = estimate("measured", known, every)
    assert len(asked) == int(fits.sum()) == 56  # 14 layers, four specs that fit
    expected = 0.01 * torch.arange(1, 57).double()
    torch.testing.assert_close(found.loss[fits], expected)
    assert (found.stderr[fits] == 0.002).all()
    assert asked[0] == {known.layers[0].name: SPECS[0]}
    asked.clear()
    few = with_config(every, config=CONFIG.model_copy(update={"probes": 55}))
    found = estimate("measured", known, few)
    # of two bits, whichever loses less of the output
    finest = known.relative[:, :2].argmin(1).tolist()
    assert set(finest) == {0, 1}
    wanted = [{one.name: SPECS[i]} for one, i in zip(known.layers, finest, strict=True)]
    assert asked == wanted
    for row in range(len(known.layers)):
        ratio = known.relative[row] / known.relative[row, finest[row]]
        expected = 0.01 * (row + 1) * ratio
        torch.testing.assert_close(found.loss[row][fits[row]], expected[fits[row]])
    assert float(found.loss[2, finest[2]]) == pytest.approx(0.03)
    # what is not above its own error counts as that
    low = with_config(few, measure=lambda a: [quality(-1e-5, 1e-4) for _ in a])
    assert float(estimate("measured", known, low).loss[0, finest[0]]) == pytest.approx(1e-4)
    assert len(probed(known, 56)) == 56


def test_what_an_estimator_costs():
    extent = Extent(config=CONFIG, layers=14, candidates=56, length=12, held_out=100)
    costs = {name: ESTIMATORS[name].cost(extent) for name in ESTIMATORS}
    free = {"fisher", "fisher-exact", "fisher-factored", "fisher-trace", "gram"}
    assert {name for name, cost in costs.items() if not cost.what} == free
    assert costs["hawq-v2"].forward_tokens == 12 * 6 * 10
    assert costs["hawq"].forward_tokens == pytest.approx(14 * 1.4 * 3 * 10)
    assert "for each of 14 layers" in costs["hawq"].what
    alone = CONFIG.curvature.model_copy(update={"trace": "hutch++"})
    changed = replace(extent, config=CONFIG.model_copy(update={"curvature": alone}))
    assert ESTIMATORS["hawq-v2"].cost(changed) == ESTIMATORS["hawq"].cost(changed)
    assert costs["measured"].forward_tokens == 56 * 100
    assert costs["empirical-fisher"].forward_tokens == 3 * 6 * 12
