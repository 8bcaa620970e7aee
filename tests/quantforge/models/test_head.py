"""Heads with a bias, a factor and a cap: their logits, and every analytic gradient through them."""

import math
import types

import pytest
import torch
import transformers
from torch import nn

import quantforge
from quantforge.calibrate import token_loss
from quantforge.calibrate.token_loss import following_tokens, sampled_label_gradient, toward
from quantforge.errors import InputError
from quantforge.evaluate.quality import ReferenceOutputs, measure
from quantforge.methods import head_loss
from quantforge.models import Head, LogitForm
from quantforge.models.architecture import architecture_of
from quantforge.models.head import LogitEntries
from quantforge.numerics import draw_categorical
from quantforge.testing import markov_tokens, write_quantized
from quantforge.types import QuantSpec

from .test_architectures import CONFIGS, network

FORMS = pytest.mark.parametrize(
    ("form", "biased"),
    [
        (LogitForm(), False),
        (LogitForm(), True),
        (LogitForm(scale=0.3), False),
        (LogitForm(cap=2.0), False),
        (LogitForm(scale=-1.7, cap=2.5), True),
    ],
)


def head_of(form, biased):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    return Head(weight=weight, bias=bias if biased else None, form=form)


def states(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 7, generator=generator, dtype=torch.float64)


def logits_of(hidden, head):
    """The definition, out of place."""
    made = hidden @ head.weight.T
    if head.bias is not None:
        made = made + head.bias
    made = made * head.form.scale
    return made if head.form.cap is None else head.form.cap * torch.tanh(made / head.form.cap)


def test_one_logit_by_hand():
    weight, bias = torch.tensor([[2.0, 1.0]]), torch.tensor([0.5])
    head = Head(weight=weight, bias=bias, form=LogitForm(scale=0.5, cap=3.0))
    found = head.logits(torch.tensor([[1.0, -0.5]]))
    assert float(found) == pytest.approx(3 * math.tanh(0.5 * (2.0 - 0.5 + 0.5) / 3), rel=1e-6)
    slope = head.form.slope(found)
    assert float(slope) == pytest.approx(0.5 / math.cosh(1 / 3) ** 2, rel=1e-6)


@FORMS
def test_gradients_of_all_losses_are_those_of_autograd(form, biased, monkeypatch):
    monkeypatch.setattr(token_loss, "HEAD_CHUNK", 3)  # several chunks, the last one smaller
    monkeypatch.setattr(head_loss, "HEAD_CHUNK", 4)
    head, hidden, other = head_of(form, biased), states(1, 2, 5), states(2, 3, 5)
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(3))
    rows = slice(1, 3)
    variable = hidden.clone().requires_grad_()
    log_probability = logits_of(variable, head).log_softmax(-1)
    target = logits_of(other[rows], head).log_softmax(-1)
    chunks = torch.split(log_probability.detach().exp().flatten(0, 1), 3)
    generator = torch.Generator().manual_seed(4)
    labels = torch.cat([draw_categorical(one, generator) for one in chunks])
    following = tokens[rows, 1:].unsqueeze(-1)
    divergence = (target.exp() * (target - log_probability)).sum()
    flat, wanted = hidden.flatten(0, 1), other[rows].flatten(0, 1)
    teacher = head_loss.FullTeacher(hidden=wanted, head=head)
    pairs = [
        (
            -log_probability.flatten(0, 1).gather(-1, labels).sum(),
            sampled_label_gradient(flat, head, torch.Generator().manual_seed(4)),
        ),
        (
            -log_probability[:, :-1].gather(-1, following).sum(),
            following_tokens(tokens)(rows, flat, head),
        ),
        (divergence, toward(other)(rows, flat, head)),
        (divergence, head_loss.distillation_gradient(flat, wanted, head)),
        (divergence, head_loss.head_gradient(flat, head, teacher)[1]),
    ]
    for loss, found in pairs:
        (expected,) = torch.autograd.grad(loss, variable, retain_graph=True)
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", ["four", None, True, 0.0, math.inf])
def test_an_entry_that_is_no_number_is_one_line(value):
    config = types.SimpleNamespace(logits_scaling=value, cap=4)
    with pytest.raises(InputError, match="logits_scaling in the configuration must be"):
        LogitEntries(divisor="logits_scaling").form(config)
    assert LogitEntries(cap="cap").form(config) == LogitForm(cap=4.0)


def test_a_rounded_head_keeps_its_bias_and_its_form():
    head = head_of(LogitForm(scale=2.0, cap=5.0), True)
    rounded = head.rounded(torch.bfloat16)
    assert rounded.weight.dtype == torch.bfloat16
    assert rounded.bias is head.bias
    assert rounded.form == head.form


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "cohere", "phi"])
def test_quality_is_that_of_the_network_s_own_logits(name):
    """Also with a head that is another module, and for the network against itself."""
    module, changed = network(name), network(name)
    architecture = architecture_of(module)
    windows = markov_tokens(3, 12, seed=5)
    with torch.no_grad():
        for one in (module, changed):
            one.get_submodule(architecture.final_norm).weight.mul_(12.0).add_(2.0)
        generator = torch.Generator().manual_seed(6)
        for layer in architecture.layers(changed):
            weight = changed.get_submodule(layer.name).weight
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
        log_p, log_q = (
            one(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
            for one in (module, changed)
        )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
        nll = -log_q.gather(-1, windows[:, 1:, None]).squeeze(-1).mean(-1)
    reference = ReferenceOutputs.collect(module, architecture, windows, batch=2)
    itself = measure(module, architecture, windows, reference, text="")
    assert (itself.kl, itself.top1) == (0.0, 1.0)
    assert itself.perplexity == pytest.approx(itself.reference_perplexity, rel=1e-6)
    found = [measure(changed, architecture, windows, reference, text="")]
    changed.lm_head = nn.Sequential(changed.lm_head)  # equal, but not known to be
    found.append(measure(changed, architecture, windows, reference, text=""))
    assert float(kl.mean()) > 1e-3
    for one in found:
        assert one.window_kl == pytest.approx(kl.tolist(), rel=3e-6, abs=2e-6)
        assert one.window_nll == pytest.approx(nll.tolist(), rel=3e-6, abs=2e-6)


def test_a_head_that_shares_a_packed_embedding_keeps_its_bias(tmp_path):
    torch.manual_seed(0)
    config = CONFIGS["phi"]()
    config.tie_word_embeddings = True
    module = transformers.PhiForCausalLM(config).eval()
    nn.init.normal_(module.lm_head.bias)
    with torch.no_grad():
        for parameter in module.parameters():  # what is kept is stored in 16 bits
            parameter.copy_(parameter.bfloat16())
    spec, tokens = QuantSpec(8, 16), markov_tokens(2, 12)
    packed = write_quantized(tmp_path, module, {"model.embed_tokens": spec}, stock_readable=False)
    with torch.no_grad():
        module.model.embed_tokens.weight.copy_(packed["model.embed_tokens"].dequantize())
        expected = module(input_ids=tokens).logits
        found = quantforge.load(tmp_path)(input_ids=tokens).logits
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.allclose(found, expected, atol=1e-5)
