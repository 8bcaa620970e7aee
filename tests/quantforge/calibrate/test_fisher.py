"""Gradient moments against plain autograd, predictions against measured KL."""

import pytest
import torch

from quantforge.calibrate import fisher
from quantforge.calibrate.artefact import load_output_gram, save_output_grams
from quantforge.calibrate.candidates import measure, predicted_loss
from quantforge.calibrate.config import CalibrateConfig
from quantforge.calibrate.fisher import output_gradient_moments, sampled_label_gradient
from quantforge.capture import BlockWalk, stage_grams
from quantforge.errors import InputError
from quantforge.evaluate.quality import ReferenceOutputs
from quantforge.evaluate.quality import measure as measure_quality
from quantforge.format.store import CandidateStore
from quantforge.load.huggingface import from_module
from quantforge.numerics import output_error
from quantforge.progress import Monitor
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import QuantSpec


@pytest.fixture(scope="module")
def model():
    return from_module(train(tiny_llama(blocks=2)))


def features(model):
    return {layer.name: layer.out_features for layer in model.layers}


def test_sampled_label_gradient_is_the_gradient_of_the_sampled_likelihood():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, generator=generator)
    found = sampled_label_gradient(hidden.detach(), head, torch.Generator().manual_seed(3))
    logits = hidden @ head.T
    labels = torch.multinomial(
        logits.softmax(-1).detach(), 1, generator=torch.Generator().manual_seed(3)
    )
    torch.nn.functional.cross_entropy(logits, labels.squeeze(1), reduction="sum").backward()
    assert torch.allclose(found, hidden.grad, atol=1e-5)


@pytest.mark.parametrize(("whole", "recompute"), [(True, 0), (True, 1), (False, 0), (False, 2)])
def test_moments_equal_a_plain_loop(model, whole, recompute):
    tokens = markov_tokens(4, 12)
    coupled = set(features(model)) if whole else ()
    found, grams = output_gradient_moments(
        model, features(model), tokens, batch_size=2, precision="float32",
        generator=torch.Generator().manual_seed(7), monitor=Monitor(), coupled=coupled,
        recompute=recompute,
    )  # fmt: skip
    assert grams.keys() == set(coupled)
    generator = torch.Generator().manual_seed(7)
    totals = {layer.name: 0.0 for layer in model.layers}
    for batch in tokens.split(2):
        outputs = {}
        hooks = []
        for layer in model.layers:

            def keep(module, args, output, name=layer.name, outputs=outputs):
                output.retain_grad()
                outputs[name] = output

            hooks.append(model.module.get_submodule(layer.name).register_forward_hook(keep))
        logits = model.module(input_ids=batch).logits
        labels = torch.multinomial(
            logits.detach().flatten(0, 1).softmax(-1), 1, generator=generator
        )
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.squeeze(1), reduction="sum"
        ).backward()
        for name, output in outputs.items():
            gradient = output.grad.flatten(0, 1)
            totals[name] = totals[name] + gradient.T @ gradient
        for hook in hooks:
            hook.remove()
    for name, total in totals.items():
        mean = total / tokens.numel()
        assert torch.allclose(found[name], mean.diagonal(), rtol=1e-3, atol=1e-8)
        if whole:
            (gram,) = grams[name].mean()
            assert torch.allclose(gram, mean, rtol=1e-3, atol=1e-4 * float(mean.diagonal().max()))
    assert all(p.requires_grad for p in model.module.parameters())


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
    grams, path = {"a.b": total, "a.bc": fisher.OutputGram(2, torch.device("cpu"))}, tmp_path / "x"
    grams["a.bc"].add(torch.ones(1, 2), torch.float32)
    save_output_grams(grams, path)
    assert not grams
    found = load_output_gram(path, "a.b")
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(found, expected, strict=True))
    assert torch.equal(load_output_gram(path, "a.bc")[0], torch.ones(2, 2))
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="missing or damaged"):
        load_output_gram(path, "a.b")


def test_prediction_is_near_the_kl_that_small_errors_cause(model):
    """The factored form drops correlations, so it is near, not equal: within a factor of three."""
    tokens = markov_tokens(64, 48, seed=1)
    moments, _ = output_gradient_moments(
        model, features(model), tokens, batch_size=16, precision="float32",
        generator=torch.Generator().manual_seed(0), monitor=Monitor(),
    )  # fmt: skip
    held_out = markov_tokens(48, 48, seed=2)
    reference = ReferenceOutputs.collect(model.module, model.architecture, held_out)
    walk = BlockWalk(model.module, model.architecture, tokens, precision="float32")
    ratios = []
    for index, block in enumerate(walk.blocks):
        grams = stage_grams(walk, block, model.architecture, advance=True)
        for layer in (one for one in model.layers if one.block == index):
            weight = model.module.get_submodule(layer.name).weight
            predicted = measured = 0.0
            for seed in range(4):  # a single direction says little of the average one
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                noise *= 0.2 * weight.detach().std()
                with torch.no_grad():
                    weight += noise
                    measured += measure_quality(
                        model.module, model.architecture, held_out, reference, text=""
                    ).kl
                    weight -= noise
                error = output_error(noise, grams[layer.stage])
                predicted += predicted_loss(error, moments[layer.name])
            ratios.append(predicted / measured)
    ratios = torch.tensor(ratios)
    assert 0.6 < float(ratios.log().mean().exp()) < 1.6
    assert float(ratios.log().abs().max()) < 1.1


def test_table_rises_with_fewer_bits_and_the_store_gives_back_what_was_measured(model, tmp_path):
    tokens = markov_tokens(16, 32, seed=1)
    moments = {layer.name: torch.ones(layer.out_features) for layer in model.layers}
    specs = (QuantSpec(2, 32), QuantSpec(3, 32), QuantSpec(4, 32), QuantSpec(4, 128), QuantSpec(8))
    store = CandidateStore(tmp_path / "store")
    sensitivity, final = measure(
        model, tokens, moments, specs, CalibrateConfig(precision="float32"),
        store=store, fingerprint="f", monitor=Monitor(),
    )  # fmt: skip
    assert [layer.name for layer in sensitivity.layers] == [one.name for one in model.layers]
    for column in (0, 1):
        assert (sensitivity.loss[:, column] > sensitivity.loss[:, column + 1]).all()
    # rows of 64 hold no two groups of 128, nor do rows of 128
    assert torch.isinf(sensitivity.loss[:, 3]).all()
    with torch.no_grad():
        logits = model.module(input_ids=tokens).logits
        assert torch.allclose(model.module.lm_head(final.float()), logits, atol=0.02)
    walk = BlockWalk(model.module, model.architecture, tokens, precision="float32")
    grams = stage_grams(walk, walk.blocks[0], model.architecture)
    layer = sensitivity.layers[3]
    weight = model.module.get_submodule(layer.name).weight.detach()
    difference = store.get(layer.name, QuantSpec(3, 32)).dequantize() - weight
    expected = 0.5 * ((difference @ grams[layer.stage]) * difference).sum()
    assert float(sensitivity.loss[3, 1]) == pytest.approx(float(expected), rel=1e-4)
