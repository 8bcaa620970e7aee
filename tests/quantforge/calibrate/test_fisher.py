"""Gradients against plain autograd, predictions against measured KL."""

import math

import pytest
import torch

from quantforge.calibrate import fisher
from quantforge.calibrate.artefact import load_output_gram, save_output_gram
from quantforge.calibrate.candidates import quantize_candidates, weight_errors
from quantforge.calibrate.config import CalibrateConfig
from quantforge.calibrate.fisher import gradient_statistics
from quantforge.calibrate.sensitivity import exact_losses, factored_losses
from quantforge.calibrate.token_loss import (
    sampled_label_gradient,
    sampled_labels,
)
from quantforge.capture import BlockWalk, stage_grams
from quantforge.errors import InputError
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.evaluate.quality import measure as measure_quality
from quantforge.format.store import CandidateStore
from quantforge.load.huggingface import from_module
from quantforge.models import Head
from quantforge.numerics import draw_categorical, output_error
from quantforge.progress import Monitor
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import QuantSpec


@pytest.fixture(scope="module")
def model():
    return from_module(train(tiny_llama(blocks=2)))


def test_sampled_label_gradient_is_the_gradient_of_the_sampled_likelihood():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, generator=generator)
    found = sampled_label_gradient(
        hidden.detach(), Head(weight=head), torch.Generator().manual_seed(3)
    )
    logits = hidden @ head.T
    labels = draw_categorical(logits.softmax(-1).detach(), torch.Generator().manual_seed(3))
    torch.nn.functional.cross_entropy(logits, labels.squeeze(1), reduction="sum").backward()
    assert torch.allclose(found, hidden.grad, atol=1e-5)


def test_sampled_gradients_have_the_second_moment_of_the_softmax():
    """(identity 8) Mean of (p − onehot)(p − onehot)ᵀ is diag p − p pᵀ, its diagonal p − p²."""
    count, logits = 200_000, torch.randn(6, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(0)
    found = sampled_label_gradient(
        logits.expand(count, -1), Head(weight=torch.eye(6)), torch.Generator().manual_seed(2)
    ).double()
    residuals = (p - torch.eye(6)).double()
    products = residuals.unsqueeze(2) * residuals.unsqueeze(1)
    exact = torch.diag(p) - torch.outer(p, p)
    variance = (p.view(-1, 1, 1) * (products - exact).square()).sum(0)
    allowed = 4 * (variance / count).sqrt()
    assert ((found.T @ found / count - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("whole", "batch_size", "on_disk"), [(True, 2, True), (False, 1, False)])
def test_a_backward_pass_block_by_block_equals_plain_autograd(
    model, whole, batch_size, on_disk, tmp_path
):
    """Moments, channels, output grams and inner products with errors."""
    tokens = markov_tokens(4, 12)
    generator = torch.Generator().manual_seed(1)
    errors = {
        layer.name: torch.randn(3, layer.out_features, layer.in_features, generator=generator)
        for layer in model.layers
    }
    names, grams = [layer.name for layer in model.layers], {}
    found = gradient_statistics(
        model, tokens, batch_size=batch_size, precision="float32",
        head_gradient=sampled_labels(torch.Generator().manual_seed(7)), monitor=Monitor(),
        keep_gram=grams.__setitem__ if whole else None, errors=lambda layer: errors[layer.name],
        scratch=tmp_path if on_disk else None,
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
    assert grams.keys() == set(names if whole else ())
    blocks = model.architecture.block_names(model.module)
    watched, totals = [*names, *blocks], {}
    generator = torch.Generator().manual_seed(7)
    for index, sequence in enumerate(tokens.split(1)):
        outputs, hooks = {}, []
        for name in watched:

            def keep(module, args, output, name=name, outputs=outputs):
                states = output[0] if isinstance(output, tuple) else output
                states.retain_grad()
                outputs[name] = states

            hooks.append(model.module.get_submodule(name).register_forward_hook(keep))
        logits = model.module(input_ids=sequence).logits[0]
        labels = draw_categorical(logits.detach().softmax(-1), generator)
        model.module.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels.squeeze(1), reduction="sum").backward()
        for name, output in outputs.items():
            totals[name] = totals.get(name, 0.0) + output.grad[0].T @ output.grad[0]
            if name in names:
                felt = output.grad[0].square().sum(1)
                torch.testing.assert_close(found.tokens[name][index], felt, rtol=1e-5, atol=1e-9)
        for hook in hooks:
            hook.remove()
        for position, name in enumerate(names):
            gradient = model.module.get_submodule(name).weight.grad
            expected = (errors[name] * gradient).sum((1, 2))
            torch.testing.assert_close(
                found.products[index, position].float(),
                expected,
                rtol=1e-5,
                atol=1e-5 * float(gradient.norm() * errors[name][0].norm()),
            )
            expected = gradient.double().square().sum()
            torch.testing.assert_close(found.traces[index, position], expected, rtol=1e-4, atol=0.0)
    for name, total in totals.items():
        mean = total / tokens.numel()
        moments = found.channels[blocks.index(name)] if name in blocks else found.moments[name]
        torch.testing.assert_close(moments, mean.diagonal(), rtol=1e-5, atol=1e-9)
        if whole and name not in blocks:
            (gram,) = grams[name]
            assert torch.allclose(gram, mean, rtol=1e-3, atol=1e-4 * float(mean.diagonal().max()))
    assert all(p.requires_grad for p in model.module.parameters())
    model.module.zero_grad()


def test_output_grams_of_many_rows_are_cut_stored_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr(fisher, "LARGEST_OUTPUT_BLOCK", 4)
    gradients = torch.randn(2, 15, 10, generator=torch.Generator().manual_seed(0))
    total = fisher.OutputGram(10, torch.device("cpu"))
    for part in gradients:
        total.add(part, torch.float32)
    rows = gradients.flatten(0, 1)
    whole = rows.T @ rows / 30
    expected = [whole[:4, :4], whole[4:7, 4:7], whole[7:, 7:]]
    torch.testing.assert_close(total.mean(), expected)
    torch.testing.assert_close(total.squares(), whole.diagonal())
    save_output_gram(tmp_path / "grams", "a.b", total.mean())
    save_output_gram(tmp_path / "grams", "a.bc", [torch.ones(2, 2)])
    found = load_output_gram(tmp_path / "grams", "a.b")
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(found, expected, strict=True))
    assert torch.equal(load_output_gram(tmp_path / "grams", "a.bc")[0], torch.ones(2, 2))
    (tmp_path / "grams" / "a.b.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="missing or damaged"):
        load_output_gram(tmp_path / "grams", "a.b")


def test_predictions_are_near_the_kl_that_small_errors_cause(model):
    """The factored form drops correlations, so it is off by a factor; the exact one is not."""
    tokens = markov_tokens(192, 24, seed=1)
    held_out = markov_tokens(96, 24, seed=2)
    reference = ReferenceOutputs.collect(model.module, model.architecture, held_out)
    noise = {}
    for layer in model.layers:
        weight = model.module.get_submodule(layer.name).weight.detach()
        generator = torch.Generator().manual_seed(len(noise))
        noise[layer.name] = torch.randn(4, *weight.shape, generator=generator) * 0.15 * weight.std()
    found = gradient_statistics(
        model, tokens, batch_size=32, precision="float32",
        head_gradient=sampled_labels(torch.Generator().manual_seed(0)), monitor=Monitor(),
        errors=lambda layer: noise[layer.name],
    )  # fmt: skip
    exact, exact_error = exact_losses(found.products, 24)
    walk = BlockWalk(model.module, model.architecture, tokens, precision="float32")
    grams = [
        [stage.mean() for stage in stage_grams(walk, one, model.architecture, advance=True)]
        for one in walk.blocks
    ]
    logs = {"factored": [], "exact": []}
    for index, layer in enumerate(model.layers):
        weight = model.module.get_submodule(layer.name).weight
        measured = 0.0
        for one in noise[layer.name]:  # a single direction says little of the average one
            with torch.no_grad():
                weight += one
                measured += measure_quality(
                    model.module, model.architecture, held_out, reference, text=""
                ).kl
                weight -= one
        rows = torch.stack(
            [output_error(one, grams[layer.block][layer.stage]) for one in noise[layer.name]]
        )
        factored = float(factored_losses(rows, found.moments[layer.name]).sum())
        logs["factored"].append(math.log(factored / measured))
        logs["exact"].append(math.log(float(exact[index].sum()) / measured))
    assert float((exact_error / exact).mean()) < 0.15
    spread = {name: torch.tensor(values).square().mean().sqrt() for name, values in logs.items()}
    assert float(spread["factored"]) < 0.6
    assert float(spread["exact"]) < 0.2


def test_table_rises_with_fewer_bits_and_the_store_gives_back_what_was_measured(model, tmp_path):
    tokens = markov_tokens(16, 32, seed=1)
    specs = (QuantSpec(2, 32), QuantSpec(3, 32), QuantSpec(4, 32), QuantSpec(4, 128), QuantSpec(8))
    store = CandidateStore(tmp_path / "store")
    errors, final = quantize_candidates(
        model, tokens, specs, CalibrateConfig(precision="float32"), store=store, monitor=Monitor()
    )
    assert [one.layer.name for one in errors] == [one.name for one in model.layers]
    for one in errors:
        assert (one.rows.sum(1).diff()[:2] < 0).all()
        # rows of 64 hold no two groups of 128, nor do rows of 128
        assert torch.isinf(one.rows[3]).all()
        assert float(one.relative[3]) == torch.inf
    with torch.no_grad():
        logits = model.module(input_ids=tokens).logits
        assert torch.allclose(model.module.lm_head(final.float()), logits, atol=0.02)
    walk = BlockWalk(model.module, model.architecture, tokens, precision="float32")
    grams = [one.mean() for one in stage_grams(walk, walk.blocks[0], model.architecture)]
    layer = errors[3].layer
    weight = model.module.get_submodule(layer.name).weight.detach()
    difference = store.get(layer.name, QuantSpec(3, 32)).dequantize() - weight
    expected = ((difference @ grams[layer.stage]) * difference).sum(1)
    torch.testing.assert_close(errors[3].rows[1], expected, rtol=1e-4, atol=1e-7)
    found = weight_errors(model, specs, store, torch.float32)(layer)
    torch.testing.assert_close(found[1], difference, rtol=0, atol=0)
    assert not found[3].any()
