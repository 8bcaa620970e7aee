"""`quantforge curvature`: against dense Hessians of single layers, and as a caller uses it."""

import json
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantforge
from quantforge.calibrate import curvature as hessians
from quantforge.calibrate.curvature import LossHessian
from quantforge.calibrate.fisher import gradient_statistics
from quantforge.calibrate.token_loss import sampled_labels
from quantforge.cli.options import Labels
from quantforge.errors import UsageError
from quantforge.load.huggingface import from_module
from quantforge.methods.rtn import minmax_scale, round_to_nearest
from quantforge.progress import Monitor
from quantforge.spectra import measure_layers, with_input_traces
from quantforge.testing import markov_tokens, save_tiny_checkpoint, tiny_llama, train
from quantforge.types import QuantSpec

TEXT = "the quick brown fox jumps over the lazy dog " * 60


@pytest.fixture(scope="module")
def model():
    shape = {"hidden": 16, "intermediate": 16, "blocks": 1, "heads": 2, "kv_heads": 1}
    return from_module(train(tiny_llama(**shape), steps=20))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape")
    (folder / "text.txt").write_text(TEXT)
    return save_tiny_checkpoint(folder / "model", blocks=2)


def dense(model, layer, tokens, labels):
    """[n, n] float64 the layer's diagonal block, a column a product."""
    hessian = LossHessian.of(model, tokens, layers=[layer], labels=labels)
    return torch.stack([hessian.product(unit) for unit in torch.eye(layer.numel)]).double()


def measure(model, layers, tokens, **options):
    settings = {"labels": "true", "steps": 24, "starts": 8, "heads": False} | options
    return measure_layers(
        model, tokens, layers, **settings, generator=torch.Generator().manual_seed(2),
        monitor=Monitor(),
    )  # fmt: skip


@pytest.mark.parametrize("labels", ["true", "expected"])
def test_ends_trace_and_criteria_are_those_of_the_dense_hessian(model, labels):
    tokens = markov_tokens(2, 12, seed=3)
    layers = [one for one in model.layers if one.name.endswith(("k_proj", "down_proj"))]
    found, products = measure(model, layers, tokens, labels=labels)
    assert products == 2 * 24 * 8
    for layer, one in zip(layers, found, strict=True):
        exact = torch.linalg.eigvalsh(dense(model, layer, tokens, labels))
        assert one.highest == pytest.approx(float(exact[-1]), rel=1e-3)
        assert abs(one.trace - float(exact.sum())) < 4 * one.trace_error
        assert one.trace_error < 0.3 * abs(one.trace)
        assert one.weights == layer.numel
        assert one.mean_trace == one.trace / layer.numel
        if labels == "expected":
            assert one.lowest > -1e-5 * one.highest
            assert one.extreme_ratio < 1e-5
            assert one.negative_weight < 0.05
        else:
            assert one.lowest == pytest.approx(float(exact[0]), rel=1e-2)
            assert one.extreme_ratio == pytest.approx(abs(float(exact[0] / exact[-1])), rel=1e-2)
            assert one.negative_weight > 0.05


def test_head_shares_are_those_of_the_dense_hessian(model):
    tokens = markov_tokens(2, 12, seed=3)
    query = [one for one in model.layers if one.name.endswith("q_proj")]
    (found,), products = measure(model, query, tokens, labels="expected", heads=True, steps=12)
    diagonal = dense(model, query[0], tokens, "expected").diagonal()
    exact = diagonal.view(2, -1).sum(1) / diagonal.sum()
    assert sum(found.heads) == pytest.approx(1.0)
    for share, error, expected in zip(found.heads, found.head_errors, exact, strict=True):
        assert abs(share - float(expected)) < 4 * error + 0.01
    assert products > 12 * 8


def test_the_report_is_written_and_layers_are_ranked_by_mean_trace(source, tmp_path):
    path = tmp_path / "curvature.json"
    report = quantforge.curvature(
        str(source), calibration=source.parent / "text.txt", layers="*.self_attn.*", output=path,
        tokens=24, steps=3, heads=True, labels="expected",
    )  # fmt: skip
    assert [one.name.split(".")[2] for one in report.layers] == ["0"] * 4 + ["1"] * 4
    assert (report.sequences, report.length) == (1, 24)
    means = [one.mean_trace for one in report.ranked()]
    assert means == sorted(means, reverse=True)
    document = json.loads(path.read_text())
    assert document["format_version"] == 1
    assert [one["name"] for one in document["layers"]] == [one.name for one in report.layers]
    assert len(document["layers"][0]["heads"]) == 4
    again = quantforge.curvature(
        str(source), calibration=source.parent / "text.txt", layers="*.self_attn.*", tokens=24,
        steps=3, heads=True, labels="expected",
    )  # fmt: skip
    assert again.layers == report.layers  # the same seed


def test_omega_and_traces_of_what_layers_read(source):
    report = quantforge.curvature(
        str(source), calibration=source.parent / "text.txt", layers="*.0.*", spec="3b-g32",
        tokens=24, sequences=3, steps=3, activations=True, labels="expected",
    )  # fmt: skip
    module = AutoModelForCausalLM.from_pretrained(source)
    spec, omegas = QuantSpec.parse("3b-g32"), {}
    for one in report.layers:
        weight = module.get_submodule(one.name).weight.detach()
        rounded = round_to_nearest(weight, minmax_scale(weight, spec), spec).dequantize()
        squared = float((rounded - weight).square().sum())
        assert one.squared_error == pytest.approx(squared, rel=1e-4)
        omegas[one.name] = one.highest * squared
        assert one.fine_tuning == pytest.approx(omegas[one.name], rel=1e-4)
    assert report.fine_tuning_order() == sorted(omegas, key=omegas.get, reverse=True)
    by_name = {one.name.rpartition(".")[2]: one.input_trace for one in report.layers}
    assert by_name["q_proj"] == by_name["k_proj"] == by_name["v_proj"] > 0
    assert by_name["gate_proj"] == by_name["up_proj"]
    assert len(set(by_name.values())) == 4
    assert all(one.input_trace_error > 0 for one in report.layers)


def test_layers_of_one_input_get_its_trace_a_number(model):
    tokens = markov_tokens(2, 6, seed=3)
    layers = [one for one in model.layers if one.name.endswith(("k_proj", "v_proj"))]
    found, _ = measure(model, layers, tokens, labels="expected", steps=2, starts=2)
    traces = hessians.activation_traces(
        model, [layers[0].name], tokens, generator=torch.Generator().manual_seed(5)
    )
    known = with_input_traces(
        model, layers, found, tokens, "expected", torch.Generator().manual_seed(5), Monitor()
    )
    for one in known:
        assert one.input_trace == pytest.approx(float(traces.values[0]) / (6 * 16))
        assert one.input_trace_error == pytest.approx(float(traces.standard_errors[0]) / (6 * 16))


def test_wrong_arguments_are_named_before_anything_is_loaded(source, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    for options, said in (
        ({"output": tmp_path / "there.json"}, "exists; give another file"),
        ({"output": tmp_path / "x.txt"}, r"is no \.json file"),
        ({"starts": 1}, "starts must be 2 or more, got 1"),
        ({"tokens": 1}, "tokens must be 2 or more"),
        ({"steps": 1}, "steps must be 2 or more"),
        ({"output": tmp_path}, r"is no \.json file"),
        ({"labels": "fisher"}, "unknown labels 'fisher'; known: true, sampled, expected"),
        ({"heads": True}, "give --labels expected or sampled"),
        ({"activations": True}, "sequences must be 2 or more with activations, got 1"),
        ({"spec": "3bit"}, "not a spec: '3bit'"),
    ):
        with pytest.raises(UsageError, match=said):
            quantforge.curvature("llama", **options)


def test_wrong_layers_are_named_before_a_text_is_read(source, tmp_path):
    nowhere = tmp_path / "missing.txt"
    with pytest.raises(UsageError, match=r"no layer matches 'x\*'; one is model.layers.0"):
        quantforge.curvature(str(source), calibration=nowhere, layers="x*")
    with pytest.raises(UsageError, match="3b-g7 divides no row of the chosen layers"):
        quantforge.curvature(str(source), calibration=nowhere, spec="3b-g7")
    with pytest.raises(UsageError, match=r"no layer of '\*\.mlp\.\*' is a query projection"):
        quantforge.curvature(
            str(source), calibration=nowhere, layers="*.mlp.*", heads=True, labels="sampled"
        )


def test_the_option_s_labels_are_the_function_s():
    assert sorted(one.value for one in Labels) == sorted(get_args(hessians.Labels))


def test_drawn_labels_give_the_trace_of_the_expected_hessian(model):
    """E‖G‖² over labels drawn from the network is the Fisher trace, which HAWQ-V2 needs a Hessian
    for: what `fisher-trace` rests on."""
    tokens = markov_tokens(2, 6, seed=3)
    layer = next(one for one in model.layers if one.name.endswith("k_proj"))
    exact = float(dense(model, layer, tokens, "expected").diagonal().sum())
    row = model.layers.index(layer)
    draws = torch.cat([
        gradient_statistics(
            model, tokens, batch_size=2, precision="float32", monitor=Monitor(),
            head_gradient=sampled_labels(torch.Generator().manual_seed(seed)),
            errors=lambda one: torch.zeros(1, one.out_features, one.in_features),
        ).traces.mean(0)[row, None] / 6
        for seed in range(200)
    ])  # fmt: skip
    error = float(draws.std() / len(draws) ** 0.5)
    assert abs(float(draws.mean()) - exact) < 3 * error
    assert error < 0.1 * exact
