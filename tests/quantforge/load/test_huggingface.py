import json
import logging as python_logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantforge.errors import InputError
from quantforge.load.huggingface import (
    from_module,
    generation_config,
    load_model,
    model_config,
    save_tokenizer,
)
from quantforge.load.source import resolve_source
from quantforge.testing import save_tiny_checkpoint, tiny_llama

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps(config))


def refused(folder, *words):
    """The one-line error that loading `folder` ends in, which names all of `words`."""
    with pytest.raises(InputError) as caught:
        load_model(resolve_source(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_weights_are_those_of_the_file(trained, model):
    stored = load_file(trained / "model.safetensors")
    for name, tensor in model.module.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(tensor, stored[name]), name
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert not model.module.training
    assert len(model.layers) == 3 * 7
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_dtype_is_honoured(trained):
    loaded = load_model(resolve_source(trained), dtype=torch.bfloat16)
    stored = load_file(trained / "model.safetensors")[WEIGHT]
    weight = loaded.module.get_parameter(WEIGHT)
    assert torch.equal(weight.detach(), stored.to(torch.bfloat16))


def test_shards_equal_one_file(tmp_path, trained, model):
    sharded = save_tiny_checkpoint(tmp_path / "sharded", shards=3)
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    loaded = load_model(resolve_source(sharded))
    expected = model.module.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.module.state_dict().items())


def test_missing_weight_is_named(folder):
    edit_weights(folder, lambda tensors: tensors.pop(WEIGHT))
    refused(folder, "lacks the weights", WEIGHT)


def test_unexpected_weight_is_named(folder):
    extra = torch.zeros(2)
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": extra}))
    refused(folder, "no place for", "model.layers.0.extra.weight")


def test_misshapen_weight_is_named(folder):
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: torch.zeros(5, 64)}))
    refused(folder, str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named_and_counted(folder, value):
    def poison(tensors):
        tensors[WEIGHT][3, 5:7] = value

    edit_weights(folder, poison)
    refused(folder, WEIGHT, "2 NaN or infinite")


def test_unknown_architecture_is_refused_before_loading(folder):
    edit_config(folder, architectures=["XLNetLMHeadModel"])
    refused(folder, "XLNetLMHeadModel", "LlamaForCausalLM")


def test_quantized_folder_names_its_method(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "already quantized with gptq")


def test_malformed_config_values_are_one_line(folder):
    edit_config(folder, num_attention_heads="many")
    refused(folder, "num_attention_heads must be a positive integer, got 'many'")
    edit_config(folder, num_attention_heads=4, hidden_act="martian")
    refused(folder, "cannot be loaded")


def test_damaged_tokenizer_is_refused_and_absent_one_is_none(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer")
    (folder / "tokenizer.json").unlink()
    assert load_model(resolve_source(folder)).tokenizer is None


def test_code_in_a_folder_does_not_run(folder):
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    mapping = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, auto_map=mapping, model_type="evil")
    refused(folder, "cannot be loaded")
    assert not marker.exists()


def test_loading_is_silent_and_restores_settings(trained, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    logging.set_verbosity(python_logging.INFO)
    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    try:
        load_model(resolve_source(trained))
        assert logging.get_verbosity() == python_logging.INFO
    finally:
        logging.set_verbosity_warning()
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_from_module_keeps_the_module_and_fingerprints_its_weights():
    module = tiny_llama().train()
    model = from_module(module, name="mine")
    assert model.module is module
    assert not module.training
    assert model.source.kind == "memory"
    assert from_module(tiny_llama()).source.fingerprint == model.source.fingerprint
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert from_module(module).source.fingerprint != model.source.fingerprint


def test_from_module_refusals():
    with pytest.raises(InputError, match="Linear is not a known architecture"):
        from_module(nn.Linear(2, 2))
    module = tiny_llama()
    module.model.layers[2].self_attn.o_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.o_proj\.weight holds 1 NaN"):
        from_module(module)
    with pytest.raises(InputError, match="meta device"):
        from_module(tiny_llama().to("meta"))
    module = tiny_llama()
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.clone())
    with pytest.raises(InputError, match=r"tie_word_embeddings is set, but lm_head has a weight"):
        from_module(module)
    module.config.tie_word_embeddings = False
    assert from_module(module).module is module
    module = tiny_llama()
    module.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(InputError, match="already quantized"):
        from_module(module)


def test_model_config_has_no_quantization_and_no_path(model):
    model.module.config._name_or_path = "/secret"
    model.module.config.quantization_config = {"quant_method": "gguf"}
    config = model_config(model.module)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == 64
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert "/secret" not in json.dumps(config)
    generation = generation_config(model.module)
    assert generation is not None
    assert not any(key.startswith("_") for key in generation)
    assert generation_config(nn.Linear(1, 1)) is None


def test_tokenizer_is_copied_byte_for_byte(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    save_tokenizer(resolve_source(folder), tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in written:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_tokenizer_of_a_module_in_memory(model, tmp_path):
    source = from_module(tiny_llama()).source
    save_tokenizer(source, tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []
    save_tokenizer(source, tmp_path / "some", tokenizer=model.tokenizer)
    assert (tmp_path / "some" / "tokenizer.json").is_file()
