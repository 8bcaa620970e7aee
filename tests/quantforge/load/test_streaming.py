"""Networks that are read into scratch files: the same as transformers makes of the folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantforge import scratch
from quantforge.errors import InputError
from quantforge.load import streaming
from quantforge.load.huggingface import described, generation_config, load_model, model_config
from quantforge.load.source import resolve_source
from quantforge.load.streaming import float_bytes, read_tensors, stored_tensors
from quantforge.load.weights import weight_files
from quantforge.scratch import Scratch
from quantforge.testing import save_tiny_checkpoint


def stored_as(folder, dtype):
    """Give the folder's floating tensors another dtype."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def both(folder, monkeypatch, tmp_path):
    """The folder's network in memory and in scratch files."""
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    source = resolve_source(str(folder))
    held = load_model(source)
    monkeypatch.setattr(scratch, "SMALL_BYTES", 0)
    mapped = load_model(source)
    assert not held.scratch.on_disk
    assert mapped.scratch.on_disk
    return held, mapped


def assert_same(held, mapped):
    """Weights, ties, what asks for gradients, configurations, places and outputs are equal."""
    first, second = held.module.state_dict(), mapped.module.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    needs = [(n, p.requires_grad) for n, p in held.module.named_parameters()]
    assert needs == [(n, p.requires_grad) for n, p in mapped.module.named_parameters()]
    buffers = dict(held.module.named_buffers())
    for name, buffer in mapped.module.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert described(held.module) == described(mapped.module)
    assert model_config(held.module) == model_config(mapped.module)
    assert generation_config(held.module) == generation_config(mapped.module)
    assert held.layers == mapped.layers
    assert not mapped.module.training
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = [one.module(input_ids=tokens, use_cache=False).logits for one in (held, mapped)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_read_as_transformers_reads_it(tmp_path, monkeypatch, dtype):
    folder = save_tiny_checkpoint(tmp_path / "net", steps=0, blocks=2)
    stored_as(folder, dtype)
    if dtype == torch.float16:  # else transformers makes one of the network's configuration
        (folder / "generation_config.json").unlink()
    if dtype == torch.bfloat16:
        options = {"temperature": 0.7, "do_sample": True, "max_length": 99}
        (folder / "generation_config.json").write_text(json.dumps(options))
    held, mapped = both(folder, monkeypatch, tmp_path)
    assert_same(held, mapped)
    head, embedding = mapped.module.lm_head.weight, mapped.module.model.embed_tokens.weight
    assert head is embedding
    assert held.module.generation_config.temperature == mapped.module.generation_config.temperature


def test_shards_and_an_own_head(tmp_path, monkeypatch):
    folder = save_tiny_checkpoint(tmp_path / "net", steps=0, blocks=3, shards=3, tied=False)
    assert len(weight_files(folder)) > 2
    assert_same(*both(folder, monkeypatch, tmp_path))


@pytest.mark.parametrize("kind", ["GPT2", "Qwen3Moe"])
def test_linears_that_are_made_on_loading_are_in_files_too(tmp_path, monkeypatch, kind):
    import transformers

    shared = {"vocab_size": 96, "bos_token_id": None, "eos_token_id": None}
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **shared)
    else:
        config = transformers.Qwen3MoeConfig(
            hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, **shared,
        )  # fmt: skip
    torch.manual_seed(0)
    module = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    module(config).save_pretrained(tmp_path / "net")
    held, mapped = both(tmp_path / "net", monkeypatch, tmp_path)
    assert_same(held, mapped)
    made = {}
    for layer in mapped.layers:
        weight = mapped.module.get_submodule(layer.name).weight
        made[weight.untyped_storage().data_ptr()] = layer.name
        assert weight.is_contiguous()
    assert len(made) == len(mapped.layers)


def test_tensors_are_read_in_pieces_and_their_bytes_are_known_before(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(37, 11, generator=generator).bfloat16(),
        "b": torch.randint(-5, 5, (101,), generator=generator),
        "c": torch.zeros(0, 3),
        "d": torch.tensor(1.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(streaming, "PIECE_BYTES", 64)
    places = stored_tensors([tmp_path / "x.safetensors"])
    assert float_bytes(places) == 1664 + 832 + 0 + 64  # in steps of 64
    files = Scratch(tmp_path / "s", float_bytes(places))
    found = read_tensors(places, files)
    assert files._used == float_bytes(places)
    assert {name: one.dtype for name, one in found.items()} == {
        "a.weight": torch.float32, "b": torch.int64, "c": torch.float32, "d": torch.float32
    }  # fmt: skip
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype))


def test_a_file_that_was_cut_since_it_was_checked_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.randn(64, 64)}, path)
    places = stored_tensors([path])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"cannot read a\.weight from .*x\.safetensors: it ends"):
        read_tensors(places, Scratch(tmp_path / "s"))


def test_other_dtypes_are_left_to_transformers(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, path)
    assert stored_tensors([path]) is None
