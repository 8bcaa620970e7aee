"""Every registered architecture, and some found by looking: walked, differentiated, quantized."""

import warnings

import pytest
import torch
import transformers

import quantforge
from quantforge.calibrate.backward import backward_blocks
from quantforge.capture import BlockWalk
from quantforge.errors import InputError
from quantforge.load.huggingface import from_module
from quantforge.models import ARCHITECTURES, LogitForm, architecture_of, discovery
from quantforge.models.discovery import discover
from quantforge.models.linears import give_linears
from quantforge.quantize.scale import fold
from quantforge.runtime.decode import obstacle
from quantforge.testing import markov_tokens, train

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=8, layer_types=WINDOWED
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SHAPE,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=8, layer_types=WINDOWED, query_pre_attn_scalar=16
    ),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    # Logits that are capped, divided and multiplied, by so much that nothing works without it.
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE,
        sliding_window=8,
        layer_types=WINDOWED,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=0.25,
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SHAPE,
        logits_scaling=0.5,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.4,
    ),
    "cohere": lambda: transformers.Cohere2Config(
        **SHAPE, sliding_window=8, layer_types=WINDOWED, logit_scale=3.0
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64,
        n_layer=3,
        n_head=4,
        vocab_size=96,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "phi": lambda: transformers.PhiConfig(
        **{key: value for key, value in SHAPE.items() if key != "head_dim"}, qk_layernorm=True
    ),
}
# Networks that nobody described: parallel halves, one matrix for queries, keys and values, biases.
PLAIN = {
    key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "head_dim")
}
FOUND = {
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(**PLAIN),
    "BloomForCausalLM": lambda: transformers.BloomConfig(
        hidden_size=64, n_layer=3, n_head=4, vocab_size=96
    ),
    "Starcoder2ForCausalLM": lambda: transformers.Starcoder2Config(**SHAPE),
    "MptForCausalLM": lambda: transformers.MptConfig(
        d_model=64, n_heads=4, n_layers=3, vocab_size=96, max_seq_len=128
    ),
}
EVERY = pytest.mark.parametrize("name", [*CONFIGS, *FOUND])
MIXTURES = ("qwen3_moe", "mixtral", "qwen2_moe")
LENGTH = 24
QUICK = {
    "search.group_sizes": [16, -1], "search.bits": [2, 3, 4, 8], "quantize.tuning.steps": 4,
    "evaluate.prompts": [],
}  # fmt: skip


def network(name):
    torch.manual_seed(0)
    config = (CONFIGS | FOUND)[name]()
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    bias = module.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return module.eval()


def test_every_registered_architecture_is_here():
    encoders = {one.name for one in ARCHITECTURES.values() if one.encodes}  # in test_encoders
    assert set(ARCHITECTURES) - encoders == set(CONFIGS)


@EVERY
def test_blocks_walked_one_by_one_give_what_the_network_gives(name):
    model = from_module(network(name))
    assert model.architecture.name == name
    assert len(model.layers) == 3 * sum(len(stage) for stage in model.architecture.stages)
    tokens = markov_tokens(5, LENGTH)
    walk = BlockWalk(model.module, model.architecture, tokens, batch_size=2, precision="float32")
    for block in walk.blocks:
        walk.advance(block)
    norm = model.module.get_submodule(model.architecture.final_norm)
    head = model.architecture.output_head(model.module)
    with torch.no_grad():
        found = head.logits(norm(torch.cat(walk.hidden)))
        expected = model.module(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=2e-5)


@EVERY
def test_gradients_taken_block_by_block_are_those_of_the_whole_network(name):
    model = from_module(network(name))
    tokens = markov_tokens(3, LENGTH)
    outputs = {}
    handles = [
        model.module.get_submodule(layer.name).register_forward_hook(
            lambda _, __, output, key=layer.name: outputs.__setitem__(key, output)
        )
        for layer in model.layers
    ]
    logits = model.module(input_ids=tokens).logits
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    names = list(outputs)
    expected = dict(
        zip(
            names, torch.autograd.grad((logits * target).sum(), list(outputs.values())), strict=True
        )
    )
    for handle in handles:
        handle.remove()

    def head_gradient(rows, states, head):
        slope = head.form.slope(head.logits(states))
        return head.input_gradient(target[rows].flatten(0, 1), slope)

    model.module.requires_grad_(False)
    found = {layer.name: [] for layer in model.layers}
    for part in backward_blocks(
        model, tokens, batch_size=2, precision="float32", head_gradient=head_gradient
    ):
        for layer, gradient in part.gradients.items():
            found[layer].append(gradient)
    for layer, parts in found.items():
        scale = expected[layer].abs().max()
        assert torch.allclose(torch.cat(parts) / scale, expected[layer] / scale, atol=1e-5), layer


@pytest.mark.parametrize(
    "name",
    [
        *(one for one in CONFIGS if one not in ("gpt2", *MIXTURES)),
        "GPTNeoXForCausalLM",
        "MptForCausalLM",
    ],
)
def test_a_quantized_network_is_the_same_in_stock_transformers(name, tmp_path):
    module = train(network(name), steps=30)
    report = quantforge.quantize(
        module,
        budget="4bit",
        calibration=markov_tokens(24, LENGTH),
        output=tmp_path / "out",
        settings=QUICK,
    )
    assert report.plan.stored_bits <= 4.0
    assert len({str(spec) for spec in report.plan.assignment.values()}) > 1
    tokens = markov_tokens(2, LENGTH, seed=7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        )
        ours = quantforge.load(tmp_path / "out")
        expected, found = stock(input_ids=tokens).logits, ours(input_ids=tokens).logits
        float_logits = module(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((found - float_logits).abs().max()) > 0


@pytest.mark.parametrize(
    ("name", "stages", "final"),
    [
        ("GPTNeoXForCausalLM", "attention.query_key_value | attention.dense | mlp.dense_h_to_4h | "
         "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
        ("Starcoder2ForCausalLM", "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj | "
         "self_attn.o_proj | mlp.c_fc | mlp.c_proj", "model.norm"),
    ],
)  # fmt: skip
def test_what_is_found_by_looking_and_said(name, stages, final, caplog):
    model = from_module(network(name))
    found = model.architecture
    assert " | ".join(" + ".join(members) for members in found.stages) == stages
    assert found.final_norm == final
    assert found.fused == tuple(members for members in found.stages if len(members) > 1)
    (said,) = caplog.messages
    assert said.startswith(f"{name} is not a known architecture: 3 blocks were found at ")
    assert len({one.fused_group for one in model.layers}) == 3 * len(found.stages)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_looking_finds_what_was_described(name):
    module = network(name)
    give_linears(module)
    known = architecture_of(module)
    found = discover(module)
    shape = found.architecture
    assert (shape.blocks, shape.stages) == (known.blocks, known.stages)
    if name not in ("cohere", "phi", *MIXTURES):  # servers fuse others than read one tensor
        assert shape.fused == known.fused
    assert (shape.embedding, shape.final_norm, shape.head) == (
        known.embedding, known.final_norm, known.head,
    )  # fmt: skip
    assert shape.logit_form(module) == known.logit_form(module)
    # What weighs a shared expert is one row, read by tokens.
    assert found.left_out == (("mlp.shared_expert_gate",) if name == "qwen2_moe" else ())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_folding_a_scale_changes_nothing(name):
    module, tokens = network(name), markov_tokens(2, LENGTH)
    give_linears(module)
    shape = architecture_of(module)
    with torch.no_grad():
        expected = module(input_ids=tokens).logits
        for block in shape.block_list(module):
            for path, stage in shape.folds:
                source = block.get_submodule(path)
                readers = [block.get_submodule(one) for one in shape.stages[stage]]
                generator = torch.Generator().manual_seed(stage)
                scale = 0.5 + torch.rand(len(source.weight), generator=generator)
                if len(scale) == readers[0].in_features:
                    fold(source, readers, scale)
        found = module(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("entry", "made", "form"),
    [
        ("logit_scale", lambda x: x * 3.0, LogitForm(scale=3.0)),
        ("logits_scaling", lambda x: x / 3.0, LogitForm(scale=1 / 3)),
        ("logits_scaling", lambda x: x * 3.0, LogitForm(scale=3.0)),
        ("final_logit_softcapping", lambda x: torch.tanh(x / 3.0) * 3.0, LogitForm(cap=3.0)),
        ("logit_scale", lambda x: x, LogitForm()),  # an entry that nothing reads
        ("final_logit_softcapping", lambda x: x, LogitForm()),
        ("logit_scale", lambda x: x * 2.0, None),
        ("other", lambda x: x * 3.0, None),
        ("other", lambda x: torch.tanh(x / 500) * 500, None),
    ],
)
def test_what_becomes_of_the_logits_is_found_or_refused(entry, made, form):
    module = network("llama")
    setattr(module.config, entry, 3.0)

    def changed(_module, _args, output):
        output.logits = made(output.logits)
        return output

    module.register_forward_hook(changed)
    if form is None:
        with pytest.raises(InputError, match="scaled, capped or made of more"):
            discover(module)
        return
    assert discover(module).architecture.logit_form(module) == form


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: transformers.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
         "only 1.% of the weights of a block"),
        (lambda: transformers.BertConfig(**PLAIN), "takes no token ids"),
        (lambda: transformers.FalconConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=96
        ), "no list of equal blocks"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(config, said):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    with pytest.raises(InputError, match=f"is not a known architecture, and .*{said}"):
        from_module(module)


def test_a_linear_that_runs_twice_and_one_that_does_not_run_are_left_alone(caplog, monkeypatch):
    monkeypatch.setattr(discovery, "LEAST_COVERED", 0.7)
    module = network("GPTNeoXForCausalLM")
    for block in module.gpt_neox.layers:
        block.mlp.register_module("spare", torch.nn.Linear(64, 64))
        twice = block.attention.dense
        block.attention.register_forward_hook(lambda _, args, output, layer=twice: (
            layer(output[0]) * 0 + output[0], *output[1:]))  # fmt: skip
    model = from_module(module)
    names = {layer.name.partition(".layers.")[2][2:] for layer in model.layers}
    assert names == {"attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
    monkeypatch.setattr(discovery, "LEAST_COVERED", 0.9)
    with pytest.raises(InputError, match=r"only 7.% of the weights"):
        from_module(module)
    assert caplog.messages[0].endswith("left in 16 bits: attention.dense, mlp.spare")


def test_only_a_block_like_llama_s_is_decoded_by_one_call():
    found = {name: obstacle(network(name)) for name in CONFIGS}
    assert found["llama"] == ""
    assert found["mistral"] == found["qwen2"] == "attention over a window of 8 tokens"
    for name in set(CONFIGS) - {"llama", "mistral", "qwen2"}:
        assert found[name] == f"the block of {name} is not Llama's"


def test_an_embedding_that_multiplies_is_kept_and_asking_for_more_is_refused(tmp_path):
    module = network("gemma3")
    assert ARCHITECTURES["gemma3"].vocabulary(module) == ()
    asked = {"calibration": markov_tokens(24, LENGTH), "output": tmp_path / "out"}
    with pytest.raises(InputError, match="more than look up rows"):
        quantforge.quantize(
            module, budget="4bit", settings={"embeddings.include": "8b-g32"}, **asked
        )
    assert not (tmp_path / "out").exists()
