"""The table of curvature sensitivities against a dense Hessian of a tiny Llama."""

import math

import pytest
import torch
from pydantic import ValidationError

from quantforge.calibrate.curvature import LossHessian
from quantforge.calibrate.curvature_scores import (
    CurvatureConfig,
    LayerCurvature,
    curvature_scores,
    measure_curvature,
)
from quantforge.load.huggingface import from_module
from quantforge.progress import Monitor
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import QuantSpec

SPECS = (QuantSpec(2, 4), QuantSpec(3, 4), QuantSpec(4))


@pytest.fixture(scope="module")
def model():
    module = tiny_llama(vocabulary=11, hidden=8, intermediate=12, blocks=2, heads=2, kv_heads=1)
    return from_module(train(module, steps=40, vocabulary=11))


@pytest.fixture(scope="module")
def tokens():
    return markov_tokens(4, 6, vocabulary=11, seed=3)


@pytest.fixture(scope="module")
def layers(model):
    return [one for one in model.layers if one.block == 1 and "mlp" not in one.name]


@pytest.fixture(scope="module")
def blocks(model, tokens, layers):
    """Dense diagonal blocks of the Fisher information."""
    whole = LossHessian.of(model, tokens, batch_size=4)
    found = []
    for layer in layers:
        single = whole.of_layers([layer])
        rows = [single.product(unit) for unit in torch.eye(layer.numel)]
        found.append(torch.stack(rows).double())
    return found


def measure(model, tokens, layers, **options):
    config = CurvatureConfig(batch_size=4, **options)
    generator = torch.Generator().manual_seed(0)
    return measure_curvature(model, tokens, config, generator=generator, layers=layers)


def test_joint_traces_are_within_their_errors(model, tokens, layers, blocks):
    found = measure(model, tokens, layers, tolerance=0.2, max_products=100)
    assert found.kind == "trace"
    assert found.converged
    exact = torch.stack([block.trace() for block in blocks])
    assert (found.errors <= 0.2 * found.values).all()
    assert ((found.values - exact).abs() < 3.5 * found.errors).all()
    assert not measure(model, tokens, layers, tolerance=1e-6, max_products=9).converged


def test_traces_by_layer_need_fewer_probes(model, tokens, layers, blocks):
    found = measure(
        model, tokens, layers, method="trace", tolerance=0.02, max_products=60, sketch=20
    )
    exact = torch.stack([block.trace() for block in blocks])
    assert ((found.values - exact).abs() <= 3.5 * found.errors + 1e-5 * exact).all()
    assert (found.errors <= 0.02 * found.values).all()
    assert found.products <= 60 * len(layers)
    # a sketch that would leave no probe is cut
    assert measure(model, tokens, layers, method="trace", max_products=4).products <= 16


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_top_eigenvalues(model, tokens, layers, blocks, method):
    found = measure(model, tokens, layers, method=method, tolerance=1e-3, max_products=200)
    exact = torch.stack([torch.linalg.eigvalsh(block)[-1] for block in blocks])
    assert found.kind == "eigenvalue"
    assert found.converged
    torch.testing.assert_close(found.values, exact, rtol=1e-3, atol=0)
    assert (found.errors <= 1.01e-3 * exact).all()


def test_losses_are_half_of_omega_and_a_bound_of_the_quadratic(model, tokens, layers, blocks):
    """On average over directions the trace is right; the eigenvalue bounds every direction."""
    norms = {(layer.name, spec): 0.1 * spec.bits for layer in layers for spec in SPECS}

    def squared_error(layer, spec):
        if layer is layers[0] and spec == SPECS[2]:
            return math.inf
        return norms[layer.name, spec] ** 2

    tables = {}
    for method in ("trace", "lanczos"):
        config = CurvatureConfig(
            batch_size=4, method=method, tolerance=1e-3, max_products=150, sketch=70
        )
        generator = torch.Generator().manual_seed(0)
        tables[method] = curvature_scores(
            model, tokens, SPECS, squared_error, config, generator=generator, layers=layers
        )
    assert tables["trace"].values.shape == (4, 3)
    for table in tables.values():
        assert table.values[0, 2] == math.inf
        assert table.standard_errors[0, 2] == 0.0
    generator = torch.Generator().manual_seed(1)
    for row, block in enumerate(blocks):
        errors = torch.randn(4000, len(block), generator=generator, dtype=torch.float64)
        errors *= 0.2 / errors.norm(dim=1, keepdim=True)
        costs = 0.5 * ((errors @ block) * errors).sum(1)
        assert float(tables["trace"].values[row, 0]) == pytest.approx(float(costs.mean()), rel=0.05)
        bound = float(tables["lanczos"].values[row, 0])
        assert bound >= float(costs.max())
        assert bound == pytest.approx(
            0.5 * float(torch.linalg.eigvalsh(block)[-1]) * 0.04, rel=2e-3
        )
        ratio = tables["trace"].values[row, 1] / tables["trace"].values[row, 0]
        assert float(ratio) == pytest.approx((3 / 2) ** 2)


def test_a_trace_below_its_error_is_not_a_gain(model, layers):
    curvature = LayerCurvature(
        layers=tuple(layers[:2]),
        kind="trace",
        values=torch.tensor([-64.0, 64.0], dtype=torch.float64),
        errors=torch.tensor([6.4, 3.2], dtype=torch.float64),
        products=8,
        converged=False,
    )
    scores = curvature.losses(SPECS[:1], lambda layer, spec: 2.0)
    sizes = [layer.numel for layer in layers[:2]]
    assert scores.values.flatten().tolist() == pytest.approx([6.4 / sizes[0], 64.0 / sizes[1]])
    errors = scores.standard_errors.flatten().tolist()
    assert errors == pytest.approx([6.4 / sizes[0], 3.2 / sizes[1]])


def test_steps_are_reported(model, tokens, layers):
    events = []
    monitor = Monitor(progress=events.append)
    for method, count in (("joint-trace", 8), ("power", 4)):
        events.clear()
        config = CurvatureConfig(method=method, tolerance=100.0, max_products=9, batch_size=4)
        generator = torch.Generator().manual_seed(0)
        measure_curvature(
            model, tokens, config, generator=generator, layers=layers, monitor=monitor
        )
        assert [event.done for event in events] == list(range(1, count + 1))
        assert {event.stage for event in events} == {"curvature"}


def test_same_seed_same_numbers_and_all_layers_by_default(model, tokens):
    first = measure(model, tokens, None, max_products=8)
    second = measure(model, tokens, None, max_products=8)
    assert torch.equal(first.values, second.values)
    assert [layer.name for layer in first.layers] == [layer.name for layer in model.layers]


def test_unknown_options_are_refused():
    with pytest.raises(ValidationError):
        CurvatureConfig(method="magic")
    with pytest.raises(ValidationError):
        CurvatureConfig(tolerance=0.0)
