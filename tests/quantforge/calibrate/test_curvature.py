"""Products with a tiny Llama's Hessian against dense ones, finite differences and measured KL."""

import threading
import weakref

import pytest
import torch

from quantforge.calibrate.curvature import LossHessian, activation_traces
from quantforge.capture import plain_attention
from quantforge.errors import CancelledError, InputError, UsageError
from quantforge.load.huggingface import from_module
from quantforge.methods.curvature.density import spectral_density
from quantforge.methods.curvature.eigen import extreme_eigenvalues
from quantforge.methods.curvature.heads import head_traces
from quantforge.methods.curvature.operator import draw_probe
from quantforge.progress import Monitor
from quantforge.testing import markov_tokens, tiny_llama, train

VOCABULARY = 11
DOUBLE = torch.float64
SHAPE = {"hidden": 8, "intermediate": 12, "blocks": 2, "heads": 2, "kv_heads": 1}


@pytest.fixture(scope="module")
def model():
    module = tiny_llama(vocabulary=VOCABULARY, **SHAPE)
    return from_module(train(module, steps=40, vocabulary=VOCABULARY).double())


@pytest.fixture(scope="module")
def tokens():
    return markov_tokens(5, 6, vocabulary=VOCABULARY, seed=3)


def some_layers(model):
    """Layers of both blocks, attention and feed-forward."""
    chosen = ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.mlp.down_proj")
    return [layer for layer in model.layers if layer.name.endswith(chosen)]


def flat_weights(model, layers):
    parts = [model.module.get_submodule(layer.name).weight.detach().flatten() for layer in layers]
    return torch.cat(parts)


def run(model, layers, flat, batch):
    """Logits of the network with the layers' weights taken from one flat vector."""
    parts = flat.split([layer.numel for layer in layers])
    weights = {
        f"{layer.name}.weight": part.view(layer.out_features, layer.in_features)
        for layer, part in zip(layers, parts, strict=True)
    }
    return torch.func.functional_call(model.module, weights, kwargs={"input_ids": batch}).logits


def dense(model, layers, loss):
    with plain_attention(model.module):
        return torch.autograd.functional.hessian(loss, flat_weights(model, layers))


def fisher(model, layers, tokens):
    """Jᵀ (diag p − p pᵀ) J a token, with J the Jacobian of the logits."""
    with plain_attention(model.module):
        flat = flat_weights(model, layers)
        jacobian = torch.autograd.functional.jacobian(
            lambda w: run(model, layers, w, tokens).flatten(0, 1), flat
        )
        probability = run(model, layers, flat, tokens).flatten(0, 1).softmax(-1)
    middle = torch.diag_embed(probability) - probability.unsqueeze(2) * probability.unsqueeze(1)
    total = torch.einsum("tvn,tvw,twm->nm", jacobian, middle, jacobian)
    return (total / tokens.numel()).detach()


@pytest.fixture(scope="module")
def expected_hessian(model, tokens):
    return fisher(model, some_layers(model), tokens)


def random_vectors(size, count=3, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def assert_products(hessian, matrix):
    """The operator acts as the dense matrix does."""
    vectors = random_vectors(hessian.dimension)
    found = torch.stack([hessian.product(vector) for vector in vectors])
    assert float((found - vectors @ matrix).norm() / (vectors @ matrix).norm()) < 1e-6


@pytest.mark.parametrize("batch_size", [2, 5])
def test_products_equal_the_dense_hessian_of_true_labels(model, tokens, batch_size):
    """Batches of 2, 2 and 1 sequences must be weighted by their tokens."""
    layers = some_layers(model)

    def loss(flat):
        logits = run(model, layers, flat, tokens)[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="mean"
        )

    hessian = LossHessian.of(model, tokens, layers=layers, labels="true", batch_size=batch_size)
    assert hessian.sizes == [64, 32, 96]
    assert_products(hessian, dense(model, layers, loss))
    flat = flat_weights(model, layers).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat)
    torch.testing.assert_close(hessian.gradient(), gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("labels", ["true", "sampled", "expected"])
def test_hessian_of_the_head_is_gauss_newtons_whatever_the_labels(tokens, labels):
    """(identity 8) Logits are linear in it: Σ (diag p − p pᵀ) ⊗ h hᵀ a predicted token."""
    module = tiny_llama(vocabulary=VOCABULARY, tied=False, **SHAPE).double()
    model, seen = from_module(module), []
    hook = module.model.norm.register_forward_hook(lambda _, __, output: seen.append(output))
    logits = module(input_ids=tokens).logits.detach()
    hook.remove()
    predicting = slice(None, -1) if labels == "true" else slice(None)
    hidden = seen[0].detach()[:, predicting].flatten(0, 1)
    p = logits[:, predicting].flatten(0, 1).softmax(-1)
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    matrix = torch.einsum("tvw,ti,tj->viwj", middle, hidden, hidden) / len(hidden)
    (head,) = [x for x in model.architecture.vocabulary(module) if x.kind == "linear"]
    hessian = LossHessian.of(
        model, tokens, layers=[head], labels=labels, generator=torch.Generator().manual_seed(0)
    )
    assert_products(hessian, matrix.reshape(hessian.dimension, hessian.dimension))


@pytest.mark.parametrize("labels", ["true", "sampled", "expected"])
def test_products_of_all_layers_equal_finite_differences_of_gradients(model, tokens, labels):
    generator = torch.Generator().manual_seed(1)
    hessian = LossHessian.of(model, tokens, labels=labels, batch_size=5, generator=generator)
    vector = torch.randn(hessian.dimension, generator=generator, dtype=DOUBLE)
    exact = hessian.product(vector)
    weights = [model.module.get_submodule(layer.name).weight for layer in model.layers]
    steps = [
        part.view_as(weight)
        for part, weight in zip(vector.split(hessian.sizes), weights, strict=True)
    ]
    if labels == "expected":  # the labels must stay where they were, unlike the weights
        assert float(hessian.gradient().norm()) < 1e-6
        with torch.no_grad(), plain_attention(model.module):
            target = model.module(input_ids=tokens).logits.softmax(-1)

    def slope():
        if labels != "expected":
            return hessian.gradient()
        with plain_attention(model.module):
            logits = model.module(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)])

    ends = []
    for size in (1e-4, -2e-4):
        with torch.no_grad():
            for weight, step in zip(weights, steps, strict=True):
                weight.add_(step, alpha=size)
        ends.append(slope())
    with torch.no_grad():
        for weight, step in zip(weights, steps, strict=True):
            weight.add_(step, alpha=1e-4)
    found = (ends[0] - ends[1]) / 2e-4
    assert float((found - exact).norm() / exact.norm()) < 2e-4


def test_expected_labels_give_the_fisher_information_and_the_kl(model, tokens, expected_hessian):
    layers = some_layers(model)
    hessian = LossHessian.of(model, tokens, layers=layers, batch_size=2)
    assert_products(hessian, expected_hessian)
    assert float(hessian.gradient().norm()) < 1e-6
    step = random_vectors(192, 1)[0] * 2e-3
    flat = flat_weights(model, layers)
    with torch.no_grad():
        before = run(model, layers, flat, tokens).log_softmax(-1)
        after = run(model, layers, flat + step, tokens).log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 * float(step @ hessian.product(step)) == pytest.approx(kl, rel=0.02)


def test_sampled_labels_are_drawn_once_and_give_the_fisher_information_on_average(
    model, tokens, expected_hessian
):
    layers, one = some_layers(model), tokens[:1].expand(400, -1)
    generator = torch.Generator().manual_seed(0)
    hessian = LossHessian.of(
        model, one, layers=layers, labels="sampled", batch_size=400, generator=generator
    )
    vector = torch.randn(192, generator=generator, dtype=DOUBLE)
    first = hessian.product(vector)
    assert torch.equal(first, hessian.product(vector))
    exact = fisher(model, layers, tokens[:1])
    # by central limit: the residual's share falls with the root of 400 draws of 6 tokens
    assert float(vector @ first) == pytest.approx(float(vector @ exact @ vector), rel=0.1)
    single = LossHessian.of(model, tokens[:1], layers=layers, labels="sampled", generator=generator)
    assert float((single.product(vector) - exact @ vector).norm() / (exact @ vector).norm()) > 0.1


def test_of_layers_is_the_diagonal_block(model, tokens, expected_hessian):
    layers = some_layers(model)
    single = LossHessian.of(model, tokens, layers=layers).of_layers(layers[1:2])
    assert single.dimension == 32
    assert_products(single, expected_hessian[64:96, 64:96])


def test_traces_of_heads_are_those_of_their_rows(model, tokens, expected_hessian):
    single = LossHessian.of(model, tokens, layers=some_layers(model)[:1], batch_size=5)
    traces = head_traces(
        single.product, 2, 8, 8, generator=torch.Generator().manual_seed(0), tolerance=1e-9,
        max_probes=60, dtype=DOUBLE,
    )  # fmt: skip
    exact = expected_hessian.diagonal()[:64].view(2, 32).sum(1)
    assert ((traces.values - exact).abs() < 3.5 * traces.standard_errors).all()
    assert (traces.standard_errors < 0.25 * exact).all()


def test_spectrum_of_one_layer(model, tokens, expected_hessian):
    """Of the Fisher information, which has no negative part, and of true labels, which has one."""
    layers = some_layers(model)[:1]
    options = {"generator": torch.Generator().manual_seed(0), "starts": 2, "dtype": DOUBLE}
    exact = torch.linalg.eigvalsh(expected_hessian[:64, :64])
    hessian = LossHessian.of(model, tokens, layers=layers, batch_size=5)
    found = spectral_density(hessian.product, 64, steps=20, **options)
    assert float(found.nodes.max()) == pytest.approx(float(exact[-1]), rel=1e-5)
    true = LossHessian.of(model, tokens, layers=layers, labels="true", batch_size=5)
    rough = spectral_density(true.product, 64, steps=20, **options).criteria()
    ends = extreme_eigenvalues(
        true.product, 64, generator=torch.Generator().manual_seed(1), tolerance=1e-6, dtype=DOUBLE
    )
    assert [rough.lowest, rough.highest] == pytest.approx(ends.values.tolist(), rel=1e-4)
    assert rough.lowest < 0
    assert rough.negative_weight > 10 * found.criteria().negative_weight
    assert rough.extreme_ratio == pytest.approx(-rough.lowest / rough.highest)


def test_nothing_of_the_model_changes_even_where_it_fails(tokens):
    module = tiny_llama(vocabulary=VOCABULARY, **SHAPE)
    module.set_attn_implementation("sdpa")
    module.model.norm.weight.requires_grad_(False)
    module.lm_head.weight.grad = torch.full_like(module.lm_head.weight, 7.0)
    model = from_module(module)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    needs = {name: value.requires_grad for name, value in module.named_parameters()}
    cancel = threading.Event()
    hessian = LossHessian.of(model, tokens, monitor=Monitor(cancel=cancel))
    vector = torch.ones(hessian.dimension)
    before = vector.clone()
    assert torch.isfinite(hessian.product(vector)).all()
    assert torch.equal(vector, before)
    hessian.gradient()
    generator = torch.Generator().manual_seed(0)
    activation_traces(model, ["model.layers.0.mlp.down_proj"], tokens, generator=generator)
    cancel.set()
    with pytest.raises(CancelledError, match="during curvature"):
        hessian.product(vector)
    with pytest.raises(AttributeError):
        activation_traces(model, ["model.layers.0.nothing"], tokens, generator=generator)
    assert module.config._attn_implementation == "sdpa"
    assert needs == {name: value.requires_grad for name, value in module.named_parameters()}
    assert (module.lm_head.weight.grad == 7.0).all()
    others = [p.grad for p in module.parameters() if p is not module.lm_head.weight]
    assert others == [None] * len(others)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_no_graph_outlives_a_product(model, tokens):
    """Without collecting cycles, every activation of a pass is gone after it."""
    alive = []
    down = model.module.get_submodule("model.layers.0.mlp.down_proj")
    handle = down.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    try:
        hessian = LossHessian.of(model, tokens, batch_size=5)
        product = hessian.product(torch.ones(hessian.dimension, dtype=DOUBLE))
        generator = torch.Generator().manual_seed(0)
        names = [layer.name for layer in some_layers(model)]
        activation_traces(model, names, tokens, generator=generator, batch_size=5)
    finally:
        handle.remove()
    assert len(alive) == 2
    assert [one() for one in alive] == [None, None]
    assert not product.requires_grad


@pytest.mark.parametrize("labels", ["true", "expected"])
def test_an_activation_probe_is_the_dense_quadratic_form(model, tokens, labels):
    name, batch = "model.layers.0.self_attn.o_proj", tokens[:3]
    found = activation_traces(
        model, [name], batch, generator=torch.Generator().manual_seed(0), labels=labels,
        batch_size=3,
    )  # fmt: skip
    assert found.samples.shape == (3, 1)
    generator = torch.Generator().manual_seed(0)
    probes = draw_probe(3 * 6 * 8, generator, dtype=DOUBLE).view(3, -1)
    for row, sequence in enumerate(batch):
        matrix = dense_activation(model, name, sequence[None], labels)
        exact = float(probes[row] @ matrix @ probes[row])
        assert float(found.samples[row]) == pytest.approx(exact, rel=1e-5)


def test_activation_traces_of_several_layers_are_right_on_average(model, tokens):
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"]
    watched = [names[0], "model.layers.1.post_attention_layernorm"]  # gate and up read this
    one = tokens[:1]
    found = activation_traces(
        model, names, one.expand(600, -1), generator=torch.Generator().manual_seed(0),
        batch_size=600,
    )  # fmt: skip
    assert found.products == 1
    for column, name in enumerate(watched):
        exact = float(dense_activation(model, name, one, "expected").trace())
        assert abs(float(found.values[column]) - exact) < 3 * float(found.standard_errors[column])
        assert float(found.standard_errors[column]) < 0.2 * exact


def dense_activation(model, name, sequence, labels):
    """Hessian of one sequence's mean loss over the input of a linear or the output of a norm."""
    layer = model.module.get_submodule(name)
    seen = []

    def run_with(inputs):
        def before(_, args):
            seen.append(args[0].detach())
            return args if inputs is None else (inputs,)

        def after(_, __, output):
            seen.append(output.detach())
            return output if inputs is None else inputs

        watch = layer.register_forward_hook if "norm" in name else layer.register_forward_pre_hook
        handle = watch(after if "norm" in name else before)
        try:
            return model.module(input_ids=sequence).logits[0]
        finally:
            handle.remove()

    def loss(inputs):
        logits = run_with(inputs)
        if labels == "expected":
            return torch.nn.functional.cross_entropy(logits, target)
        return torch.nn.functional.cross_entropy(logits[:-1], sequence[0, 1:])

    with plain_attention(model.module):
        target = run_with(None).detach().softmax(-1)
        hessian = torch.autograd.functional.hessian(loss, seen[0])
    size = seen[0].numel()
    return hessian.reshape(size, size)


def test_activation_probe_of_a_batch_is_the_sum_over_its_sequences(model, tokens):
    """The Hessian over a batch has no entries between sequences, so their values do not mix."""
    names = ["model.layers.1.mlp.down_proj"]
    options = {"labels": "true", "probes": 2}
    together = activation_traces(
        model, names, tokens, generator=torch.Generator().manual_seed(0), batch_size=5, **options
    )
    assert together.products == 2
    changed = tokens.clone()
    changed[4] = changed[4].flip(0)
    other = activation_traces(
        model, names, changed, generator=torch.Generator().manual_seed(0), batch_size=5, **options
    )
    torch.testing.assert_close(together.samples[:4], other.samples[:4], rtol=1e-5, atol=1e-9)
    assert abs(float(together.samples[4] - other.samples[4])) > 1e-6


def test_bad_input_is_refused(model, tokens):
    with pytest.raises(InputError, match="no calibration tokens"):
        LossHessian.of(model, tokens[:0])
    with pytest.raises(InputError, match="one token predict nothing"):
        LossHessian.of(model, tokens[:, :1], labels="true")
    with pytest.raises(UsageError, match="need a generator"):
        LossHessian.of(model, tokens, labels="sampled")
    with pytest.raises(UsageError, match="two sequences and one probe"):
        activation_traces(model, ["x"], tokens[:1], generator=torch.Generator())
    half = from_module(tiny_llama(vocabulary=VOCABULARY, **SHAPE).bfloat16())
    hessian = LossHessian.of(half, tokens)
    with pytest.raises(InputError, match="q_proj is in bfloat16: curvature needs float32"):
        hessian.product(torch.ones(hessian.dimension))


@pytest.mark.parametrize("batch_size", [2, 5])
def test_kept_graphs_give_every_layers_own_block(model, tokens, batch_size):
    layers = some_layers(model)
    hessian = LossHessian.of(model, tokens, layers=layers, batch_size=batch_size)
    before = [p.requires_grad for p in model.module.parameters()]
    with hessian.layer_blocks() as blocks:
        for layer, product in zip(layers, blocks, strict=True):
            single = hessian.of_layers([layer])
            for vector in random_vectors(layer.numel, 2):
                torch.testing.assert_close(product(vector), single.product(vector))
                torch.testing.assert_close(product(-2 * vector), -2 * product(vector))
    assert [p.requires_grad for p in model.module.parameters()] == before
