"""Encoders: walked, differentiated, measured by their pooled output; what they cannot be asked."""

import io
import json
import math
import warnings

import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity

import quantforge
from quantforge.calibrate.backward import backward_blocks
from quantforge.calibrate.curvature import LossHessian
from quantforge.calibrate.fisher import gradient_statistics
from quantforge.calibrate.token_loss import following_tokens, sampled_labels, toward
from quantforge.capture import BlockWalk
from quantforge.cli import drawing, render
from quantforge.errors import InputError, UsageError
from quantforge.evaluate import reference as measuring
from quantforge.export.servers import SERVERS, fused_group, refusal
from quantforge.load.frame import frame_of
from quantforge.load.huggingface import from_module
from quantforge.load.text import CalibrationConfig, calibration_set, evaluation_windows
from quantforge.models import PooledOutput
from quantforge.models.pooled import direction, mean_over_tokens
from quantforge.models.sizes import context_length
from quantforge.progress import Monitor
from quantforge.quantize.scale import fold
from quantforge.results import PooledQuality
from quantforge.testing import markov_tokens, save_tiny_encoder, sharpen, tiny_llama
from quantforge.types import LayerInfo, QuantSpec

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 96, "max_position_embeddings": 66,
}  # fmt: skip
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SHAPE),
    "roberta": lambda: transformers.RobertaConfig(**SHAPE),
    "mpnet": lambda: transformers.MPNetConfig(**SHAPE),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=3, n_heads=4, vocab_size=96, max_position_embeddings=66
    ),
}
EVERY = pytest.mark.parametrize("name", list(ENCODERS))
LENGTH = 24
QUICK = {
    "search.group_sizes": [16, -1], "search.bits": [2, 4, 8], "quantize.tuning.steps": 2,
    "evaluate.curve_bits": [2, 4],
}  # fmt: skip
SHORT = {"calibration.sequences": 32, "calibration.sequence_length": 32}


def network(name):
    torch.manual_seed(0)
    module = transformers.AutoModel.from_config(ENCODERS[name](), dtype=torch.float32).eval()
    sharpen(module)
    return module


def states_of(module, tokens, **more):
    return module(input_ids=tokens, **more).last_hidden_state


def noisy(module, seed=1, scale=0.02):
    """The same network with other weights in its blocks."""
    other = type(module)(module.config).eval()
    other.load_state_dict(module.state_dict())
    torch.manual_seed(seed)
    for name, one in other.named_parameters():
        if ".layer." in name and one.ndim == 2:
            one.data += scale * one.std() * torch.randn_like(one)
    return other


@EVERY
def test_blocks_walked_one_by_one_give_what_the_network_gives(name):
    model = from_module(network(name))
    assert (model.architecture.name, model.architecture.encodes) == (name, True)
    assert len(model.layers) == 3 * 6
    assert [one.name for one in model.architecture.vocabulary(model.module)] == [
        "embeddings.word_embeddings"
    ]
    tokens = markov_tokens(5, LENGTH)
    walk = BlockWalk(model.module, model.architecture, tokens, batch_size=2, precision="float32")
    for block in walk.blocks:
        walk.advance(block)
    with torch.no_grad():
        expected = states_of(model.module, tokens)
    assert torch.allclose(torch.cat(walk.hidden), expected, atol=1e-5)


@EVERY
def test_gradients_taken_block_by_block_are_those_of_the_whole_network(name):
    model = from_module(network(name))
    tokens, outputs = markov_tokens(3, LENGTH), {}
    handles = [
        model.module.get_submodule(layer.name).register_forward_hook(
            lambda _, __, output, key=layer.name: outputs.__setitem__(key, output)
        )
        for layer in model.layers
    ]
    target = torch.randn(3, LENGTH, 64, generator=torch.Generator().manual_seed(0))
    pooled = states_of(model.module, tokens).mean(1)
    loss = LENGTH * (1 - cosine_similarity(pooled, target.mean(1))).sum()
    expected = torch.autograd.grad(loss, list(outputs.values()))
    for handle in handles:
        handle.remove()
    model.module.requires_grad_(False)
    found = {layer: [] for layer in outputs}
    for part in backward_blocks(
        model, tokens, batch_size=2, precision="float32", head_gradient=toward(target)
    ):
        for layer, gradient in part.gradients.items():
            found[layer].append(gradient)
    for layer, wanted in zip(outputs, expected, strict=True):
        scale = wanted.abs().max()
        assert torch.allclose(torch.cat(found[layer]) / scale, wanted / scale, atol=1e-5), layer


@EVERY
def test_folding_a_scale_changes_nothing(name):
    module, tokens = network(name), markov_tokens(2, LENGTH)
    shape = from_module(module).architecture
    with torch.no_grad():
        expected = states_of(module, tokens)
        for block in shape.block_list(module):
            for path, stage in shape.folds:
                readers = [block.get_submodule(one) for one in shape.stages[stage]]
                fold(block.get_submodule(path), readers, 0.5 + torch.rand(64))
        assert torch.allclose(states_of(module, tokens), expected, atol=1e-5)


def test_the_gradient_toward_another_output_is_autograd_s_of_one_minus_cosine():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 7, 16, generator=generator, dtype=torch.float64)
    losses, gradient = PooledOutput().toward(hidden.detach(), target)
    expected = 7 * (1 - cosine_similarity(hidden.mean(1), target.mean(1)))
    assert torch.allclose(losses, expected.detach())
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), hidden)[0])


def test_drawn_labels_have_the_gradient_of_their_likelihood():
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    found = PooledOutput().sampled_gradient(hidden.detach(), torch.Generator().manual_seed(3))
    drawn = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # One label a token: the sum of five is as one with sqrt(5) the deviation.
    likelihood = (direction(hidden.mean(1)) * drawn * math.sqrt(5)).sum()
    assert torch.allclose(found, torch.autograd.grad(likelihood, hidden)[0])


def test_half_the_mean_square_of_drawn_gradients_is_the_loss_of_a_small_error():
    module = network("bert")
    model, tokens = from_module(module), markov_tokens(4, LENGTH)
    layer = model.layers[9]
    weight = module.get_submodule(layer.name).weight.detach()
    error = (
        0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    )
    with torch.no_grad():
        before = mean_over_tokens(states_of(module, tokens))
        weight += error
        after = mean_over_tokens(states_of(module, tokens))
        weight -= error
    measured = float((1 - cosine_similarity(before.double(), after.double())).mean())
    zeros = {one.name: torch.zeros(1, one.out_features, one.in_features) for one in model.layers}
    found = gradient_statistics(
        model, tokens.repeat(200, 1), batch_size=100, precision="float32",
        head_gradient=sampled_labels(torch.Generator().manual_seed(0)), monitor=Monitor(),
        errors=lambda one: error[None] if one is layer else zeros[one.name],
    )  # fmt: skip
    squares = found.products[:, 9, 0].square() / (2 * LENGTH)
    spread = float(squares.std()) / math.sqrt(len(squares))
    assert spread < 0.08 * measured
    assert abs(float(squares.mean()) - measured) < 3 * spread + 0.05 * measured


def test_the_curvature_of_the_pooled_output_is_that_of_one_minus_cosine():
    module = network("bert")
    model, tokens = from_module(module), markov_tokens(2, LENGTH)
    layer = model.layers[4]
    weight = module.get_submodule(layer.name).weight.detach()
    error = (
        0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    )
    hessian = LossHessian.of(model, tokens, layers=[layer])
    curved = 0.5 * float(error.flatten() @ hessian.product(error.flatten()))
    with torch.no_grad():
        before = mean_over_tokens(states_of(module, tokens))
        weight += error
        after = mean_over_tokens(states_of(module, tokens))
    measured = float((1 - cosine_similarity(before.double(), after.double())).mean())
    assert curved == pytest.approx(measured, rel=0.1)


@EVERY
def test_what_is_measured_is_cosine_and_squared_error_of_the_mean(name):
    module = network(name)
    other, shape = noisy(module), from_module(module).architecture
    windows = markov_tokens(6, LENGTH)
    float_outputs = measuring.collect(module, shape, windows)
    same = measuring.measure(module, shape, windows, float_outputs, text="t")
    assert (same.loss, same.mse, same.cosine) == (0.0, 0.0, 1.0)
    found = measuring.measure(other, shape, windows, float_outputs, text="t")
    with torch.no_grad():
        expected, actual = (states_of(one, windows).mean(1).double() for one in (module, other))
    assert isinstance(found, PooledQuality)
    cosines = cosine_similarity(expected, actual)
    assert torch.allclose(
        1 - torch.tensor(found.window_distance, dtype=torch.float64), cosines, atol=1e-6
    )
    assert found.loss == pytest.approx(float((1 - cosines).mean()), rel=1e-3)
    errors = (expected - actual).square().sum(1) / expected.square().sum(1)
    assert found.mse == pytest.approx(float(errors.mean()), rel=1e-4)
    assert found.loss_stderr == pytest.approx(float(cosines.std()) / math.sqrt(6), rel=1e-3)
    gap = measuring.paired(found, same)
    assert (gap.distance, gap.lower) == (pytest.approx(found.loss), False)


@EVERY
def test_a_sequence_in_a_padded_batch_has_the_same_pooled_output(name):
    module, tokens = network(name), markov_tokens(2, LENGTH, vocabulary=90) + 5
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    padded = torch.where(mask == 1, tokens, torch.tensor(module.config.pad_token_id or 0))
    with torch.no_grad():
        alone = mean_over_tokens(states_of(module, tokens[:1, :15]))
        batch = mean_over_tokens(states_of(module, padded, attention_mask=mask), mask)
    assert torch.allclose(batch[:1], alone, atol=1e-5)


def test_positions_of_a_padding_token_are_no_context():
    assert {name: context_length(network(name)) for name in ENCODERS} == {
        "bert": 66, "roberta": 64, "mpnet": 64, "distilbert": 66,
    }  # fmt: skip


def test_a_server_slices_outputs_of_the_widening_layer_and_inputs_of_the_others():
    def why(name):
        layer = LayerInfo(
            name=f"encoder.layer.0.{name}", out_features=128, in_features=64, block=0, stage=0,
            fused_group=name,
        )  # fmt: skip
        return refusal(SERVERS["vllm"], layer, QuantSpec(4, 64), 2)

    assert why("intermediate.dense") == ""
    assert why("output.dense") != ""
    groups = {fused_group(f"encoder.layer.0.attention.self.{x}") for x in ("query", "key", "value")}
    assert len(groups) == 1


def test_one_window_tells_no_spread():
    model = from_module(network("bert"))
    with pytest.raises(InputError, match="errors need two windows or more"):
        measuring.collect(model.module, model.architecture, markov_tokens(1, LENGTH))


def test_an_encoder_with_a_head_is_refused_with_the_remedy(tmp_path):
    transformers.BertForMaskedLM(ENCODERS["bert"]()).save_pretrained(tmp_path)
    said = "is a BertForMaskedLM, an encoder with a head: give the encoder alone"
    with pytest.raises(InputError, match=said):
        quantforge.plan(tmp_path, budget="4bit", calibration=markov_tokens(8, LENGTH))


def test_a_decoder_and_an_encoder_are_not_compared():
    encoder, decoder = from_module(network("bert")), from_module(tiny_llama())
    windows = markov_tokens(2, LENGTH)
    outputs = measuring.collect(encoder.module, encoder.architecture, windows)
    with pytest.raises(InputError, match="are of two kinds"):
        measuring.measure(decoder.module, decoder.architecture, windows, outputs, text="t")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "out"
    report = quantforge.quantize(
        folder, budget="4bit", output=output,
        settings=QUICK | SHORT | {"quantize.rounding.steps": 2},
    )  # fmt: skip
    return report, output


def test_a_folder_goes_through_every_stage_and_names_what_is_measured(folder, made):
    report, output = made
    assert report.plan.stored_bits <= 4.0
    assert len({str(spec) for spec in report.plan.assignment.values()}) > 1
    assert isinstance(report.quality, PooledQuality)
    assert 0 < report.quality.loss < 0.05
    assert report.quality.loss == pytest.approx(1 - report.quality.cosine, abs=1e-9)
    assert report.generations == ()
    assert all(isinstance(point.quality, PooledQuality) for point in report.curve)
    two, four = (
        next(p.quality.loss for p in report.curve if p.name == f"uniform {bits}b-pc")
        for bits in (2, 4)
    )
    assert two > 3 * four
    for name in ("report.html", "README.md"):
        text = (output / name).read_text()
        assert "1 - cosine" in text
        assert "elative" in text
        for wrong in ("KL", " nats", "erplexity", "CausalLM"):
            assert wrong not in text, (name, wrong)
    assert "AutoModel.from_pretrained" in (output / "README.md").read_text()


def test_the_checkpoint_is_the_same_in_stock_transformers(folder, made):
    report, output = made
    tokens = markov_tokens(2, 32, seed=7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = transformers.AutoModel.from_pretrained(output, dtype=torch.float32)
        ours, float_network = (
            quantforge.load(output),
            transformers.AutoModel.from_pretrained(folder),
        )
        expected, found = stock(input_ids=tokens), ours(input_ids=tokens)
        original = states_of(float_network, tokens)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-5)
    assert float((found.last_hidden_state - original).abs().max()) > 1e-3
    assert type(ours.encoder.layer[0].output.dense).__name__ == "QuantLinear"
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["pooler.dense"]
    assert quantforge.check(output, server="transformers").loads
    for layout in ("gptq", "gguf"):
        with pytest.raises(InputError, match=r"BertModel is (an encoder|not written)"):
            quantforge.convert(output, layout=layout, output=output.parent / f"other.{layout}")
    with pytest.raises(InputError, match="is an encoder, which continues no text"):
        next(iter(quantforge.generate(output, "a")))
    measured = quantforge.evaluate(output, windows=4, window_length=32)
    assert measured.quality.loss == pytest.approx(report.quality.loss, rel=2.0)
    assert "[CLS] .. [SEP]" in measured.quality.text


def test_a_quantized_embedding_is_read_by_quantforge(folder, tmp_path):
    report = quantforge.quantize(
        folder, budget="5bit", output=tmp_path / "out", effort="fast",
        settings=QUICK | SHORT | {"embeddings.include": "8bit"},
    )  # fmt: skip
    assert str(report.plan.assignment["embeddings.word_embeddings"]).startswith("8b")
    tokens = markov_tokens(2, 32)
    with torch.no_grad():
        found = states_of(quantforge.load(tmp_path / "out"), tokens)
        original = states_of(transformers.AutoModel.from_pretrained(folder), tokens)
    cosines = cosine_similarity(found.mean(1), original.mean(1))
    assert float(cosines.min()) > 0.99


def test_a_target_is_a_cosine_and_what_is_printed_names_it(folder, made, tmp_path):
    settings = QUICK | SHORT
    loose, tight = (
        quantforge.plan(folder, budget=f"cosine:{least}", settings=settings)
        for least in (0.99, 0.9995)
    )
    assert (loose.measure, loose.targets[0].limit) == ("cosine", pytest.approx(0.01))
    assert loose.targets[0].upper <= 0.01
    assert tight.targets[0].upper <= 0.0005
    assert tight.plan.stored_bits > loose.plan.stored_bits
    frontier = quantforge.pareto(
        folder, points=5, measure=1, output=tmp_path / "frontier", settings=settings
    )
    report, output = made
    evaluated = quantforge.evaluate(output, windows=4, window_length=32, against=output)
    assert evaluated.difference.distance == 0.0
    stream = io.StringIO()
    console = drawing.console(stream)
    render.show_plan(loose, console)
    render.show_frontier(frontier, console)
    render.show_quantized(report, console)
    render.show_evaluation(evaluated, console)
    printed = " ".join(stream.getvalue().split())
    for said in ("predicted 1 - cosine", "1 - cosine to the float model", "MSE difference"):
        assert said in printed
    page = (tmp_path / "frontier" / "pareto.html").read_text()
    assert json.loads((tmp_path / "frontier" / "pareto.json").read_text())["measure"] == "cosine"
    for wrong in ("KL", " nats", "erplexity"):
        assert wrong not in printed
        assert wrong not in page


@pytest.mark.parametrize(
    ("budget", "settings", "said"),
    [
        ("kl:0.1", {}, "BertModel is an encoder, which predicts no tokens; give cosine:0.99"),
        ("ppl:+2%", {}, "BertModel is an encoder"),
        ("vram:1MB@16", {}, "keeps no keys and values; give bytes"),
        ("3bit", {"calibrate.estimator": "empirical-fisher"}, "is about next tokens"),
        ("3bit", {"training.tokens": 64, "training.cross_entropy": 0.5}, "is about next tokens"),
        ("3bit", {"training.tokens": 64, "training.optimizer": "sophia"}, "is about next tokens"),
    ],
)
def test_what_an_encoder_does_not_have_is_refused_before_the_work(folder, budget, settings, said):
    with pytest.raises(UsageError, match=said):
        quantforge.plan(folder, budget=budget, settings=settings)


def test_a_decoder_has_no_pooled_output():
    with pytest.raises(UsageError, match=r"LlamaForCausalLM is no encoder; give kl:0\.05"):
        quantforge.plan(tiny_llama(), budget="cosine:0.9", calibration=markov_tokens(8, LENGTH))


def test_no_labels_follow_in_an_encoder():
    model = from_module(network("bert"))
    gradient = following_tokens(markov_tokens(2, LENGTH))
    with pytest.raises(UsageError, match="predicts no next tokens"):
        gradient(slice(0, 2), torch.zeros(2, LENGTH, 64), model.architecture.output(model.module))


def test_an_encoder_reads_sequences_between_its_special_tokens(folder):
    model = from_module(transformers.AutoModel.from_pretrained(folder))
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    frame = frame_of(model.tokenizer)
    assert (frame.before, frame.after) == ((1,), (2,))
    data = calibration_set(CalibrationConfig(), model, seed=0)
    rows = torch.cat([data.fitting, data.held_out])
    assert rows.shape == (512, 64)  # as many positions as it has, below 128
    assert set(rows[:, 0].tolist()) == {1}
    assert set(rows[:, -1].tolist()) == {2}
    assert not bool(((rows[:, 1:-1] == 1) | (rows[:, 1:-1] == 2)).any())
    windows = evaluation_windows("pydoc", model.tokenizer, windows=3, length=20, framed=True)
    assert windows.shape == (3, 20)
    assert windows[:, 0].tolist() == [1] * 3
    with pytest.raises(InputError, match="no text can be sampled from in-memory, an encoder"):
        calibration_set(CalibrationConfig(source="self"), model, seed=0)
    with pytest.raises(InputError, match="exceed the model's context of 64"):
        calibration_set(CalibrationConfig(sequence_length=65), model, seed=0)


def test_training_lowers_one_minus_cosine(folder):
    module = transformers.AutoModel.from_pretrained(folder)
    report = quantforge.quantize(
        module, budget="2.5bit", calibration=markov_tokens(32, 32),
        settings=QUICK | {"training.tokens": 32 * 32, "quantize.tuning.steps": 0},
    )  # fmt: skip
    points = report.training.points
    assert points[report.training.best].kl <= points[0].kl
    assert points[-1].loss is None or points[-1].loss < 0.5


@pytest.mark.parametrize("name", [one for one in ENCODERS if one != "bert"])
def test_the_others_are_quantized_and_read_again(name, tmp_path):
    module = network(name)
    report = quantforge.quantize(
        module, budget="4bit", calibration=markov_tokens(16, LENGTH), output=tmp_path / "out",
        effort="fast", settings=QUICK,
    )  # fmt: skip
    tokens = markov_tokens(2, LENGTH, seed=7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
        ours = quantforge.load(tmp_path / "out")
        expected, found = states_of(stock, tokens), states_of(ours, tokens)
        memory = states_of(module, tokens)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found, memory, atol=1e-5)
    assert report.plan.stored_bits <= 4.0
