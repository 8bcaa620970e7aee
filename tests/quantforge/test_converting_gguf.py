"""A checkpoint as a GGUF file is the same network to every program that reads it."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from torch import nn

import quantforge
from quantforge.errors import CancelledError, InputError, ResourceError, UsageError
from quantforge.export import gguf_network
from quantforge.export.servers import SERVERS, network_problems
from quantforge.format import gguf_blocks
from quantforge.load.gguf_file import unpermute
from quantforge.load.huggingface import load_model
from quantforge.load.source import resolve_source
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantSpec

# Logits of the same weights through other code, in float32, of networks whose logits are about 1.
SAME = 2e-5
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = torch.arange(40).view(2, 20)


def network(kind="llama", *, tied=True, hidden=64, intermediate=128, **options: Any):
    """A tiny random network of an architecture, with biases where it has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    torch.manual_seed(0)
    module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in module.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return module


def written(folder: Path, module, *specs: str, embedding: str = "", head: str = "", kept=()):
    """A checkpoint whose linears have these specs in turn; returns its quantized weights."""
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assignment = {
        name: QuantSpec.parse(specs[index % len(specs)]) for index, name in enumerate(names)
    }
    assignment |= dict.fromkeys((n for n in names if n.endswith(tuple(kept))), None) if kept else {}
    for name, text in (("model.embed_tokens", embedding), ("lm_head", head)):
        if text:
            assignment[name] = QuantSpec.parse(text)
    return write_quantized(
        folder, module, assignment, ignore=[] if head else ["lm_head"], stock_readable=False
    )


def convert(folder: Path, **options):
    return quantforge.convert(folder, output=folder / "out.gguf", layout="gguf", **options)


def expected(folder: Path):
    """Logits of the checkpoint itself."""
    loaded = quantforge.load(folder, dtype=torch.float32)
    with torch.no_grad():
        return loaded(TOKENS).logits


def in_transformers(file: Path):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        return module(TOKENS).logits


def in_quantforge(file: Path):
    with pytest.MonkeyPatch.context() as patch:  # the float copy; kernels stay in their cache
        patch.setenv("QUANTFORGE_CACHE", str(file.parent / "cache"))
        module = load_model(resolve_source(file)).module
    with torch.no_grad():
        return module(TOKENS).logits


def field(file: Path, name: str):
    found = GGUFReader(file).fields.get(name)
    return None if found is None else found.contents()


WIDTHS = [f"{bits}b-{group}" for bits in (2, 3, 4, 5, 6, 7, 8) for group in ("g32", "g64", "pc")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("specs", [WIDTHS[i::7] for i in range(7)])
def test_every_width_is_the_same_network_to_both_readers(tied, specs, tmp_path):
    module = network(tied=tied, hidden=128)
    written(tmp_path, module, *specs)
    report = convert(tmp_path)
    assert all(one.difference == 0 for one in report.types)
    assert sum(one.tensors for one in report.types) == len(
        GGUFReader(tmp_path / "out.gguf").tensors
    )
    assert report.size_bytes == (tmp_path / "out.gguf").stat().st_size
    meant = expected(tmp_path)
    assert meant.std() > 0.1
    for read in (in_transformers, in_quantforge):
        assert (read(tmp_path / "out.gguf") - meant).abs().max() < SAME


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_architectures(kind, tmp_path):
    # transformers reads no size of heads for Qwen 3: it takes them to be 128 wide.
    size = 128 if kind == "qwen3" else 16
    module = network(kind, tied=kind == "qwen3", head_dim=size, intermediate=160)
    written(tmp_path, module, "4b-g32", "3b-g32-asym", "5b-pc", "4b-pc-asym")
    convert(tmp_path)
    assert field(tmp_path / "out.gguf", "general.architecture") == (
        "llama" if kind == "mistral" else kind
    )
    meant = expected(tmp_path)
    assert (in_transformers(tmp_path / "out.gguf") - meant).abs().max() < SAME


def test_biases_of_llama_are_interleaved_with_their_rows(tmp_path):
    module = network(attention_bias=True)
    written(tmp_path, module, "4b-g32")
    convert(tmp_path)
    stored = {
        t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(tmp_path / "out.gguf").tensors
    }
    state = module.state_dict()
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        bias = state[f"model.layers.1.self_attn.{ours}.bias"].bfloat16().float()
        found = stored[f"blk.1.{theirs}.bias"]
        assert torch.equal(unpermute(found, heads), bias)
        assert not torch.equal(found, bias)
    bias = state["model.layers.1.self_attn.o_proj.bias"].bfloat16().float()
    assert torch.equal(stored["blk.1.attn_output.bias"], bias)


def test_kept_layers_quantized_heads_and_rows_that_are_no_whole_blocks(tmp_path):
    module = network(tied=False, hidden=64, intermediate=72)
    written(tmp_path, module, "4b-pc", embedding="4b-g32", head="6b-g32", kept=["v_proj"])
    report = convert(tmp_path)
    types = {(one.name, one.held): one for one in report.types}
    # Rows of 72: products of a 4-bit code and a bfloat16 scale have at most eleven bits.
    assert types.keys() == {
        ("Q4_0", "4b-g32"), ("Q4_0", "4b-pc"), ("F16", "4b-pc"), ("Q8_0", "6b-g32"),
        ("BF16", "kept"), ("F32", "kept"),
    }  # fmt: skip
    assert types["F16", "4b-pc"].difference == 0
    assert (types["BF16", "kept"].tensors, types["F16", "4b-pc"].tensors) == (2, 2)
    names = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert (names["token_embd.weight"], names["output.weight"]) == ("Q4_0", "Q8_0")
    assert (in_transformers(tmp_path / "out.gguf") - expected(tmp_path)).abs().max() < SAME
    assert report.source_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_what_no_type_holds_is_rounded_and_the_report_says_by_how_much(tmp_path):
    module = network()
    weights = written(tmp_path, module, "8b-g32-asym", embedding="4b-g32")
    report = convert(tmp_path)
    types = {(one.name, one.held): one for one in report.types}
    lost = max(
        float((w.dequantize().half().float() - w.dequantize()).abs().max())
        for w in weights.values()
    )
    assert types["F16", "8b-g32-asym"].difference == lost > 0
    names = {t.name for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert "output.weight" not in names  # the head is the embedding
    assert (in_transformers(tmp_path / "out.gguf") - expected(tmp_path)).abs().max() < 5e-3


def test_metadata(tmp_path):
    module = network(tied=False, head_dim=32, rope_parameters={
        "rope_type": "default", "rope_theta": 123456.0
    }, rms_norm_eps=3e-6)  # fmt: skip
    written(tmp_path, module, "4b-g32", "2b-pc")
    report = convert(tmp_path)
    file = tmp_path / "out.gguf"
    wanted = {
        "block_count": 2, "context_length": 256, "embedding_length": 64, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32, "rope.freq_base": 123456.0,
        "vocab_size": 96,
    }  # fmt: skip
    assert {name: field(file, f"llama.{name}") for name in wanted} == wanted
    assert field(file, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(3e-6)
    assert field(file, "llama.rope.scaling.type") is None
    assert field(file, "general.file_type") == 2  # mostly Q4_0
    assert field(file, "general.name") == tmp_path.name
    assert field(file, "tokenizer.ggml.model") == "none"
    assert len(report.warnings) == 1
    assert "no tokenizer.json" in report.warnings[0]
    assert report.spec == "2b-pc, 4b-g32"


def test_scaled_rotary_frequencies(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    module = network(rope_parameters=rope)
    written(tmp_path, module, "4b-g32")
    convert(tmp_path)
    stored = {
        t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(tmp_path / "out.gguf").tensors
    }
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    frequencies = module.model.rotary_emb.inv_freq
    assert torch.allclose(plain / stored["rope_freqs.weight"], frequencies, rtol=1e-6, atol=0)
    assert stored["rope_freqs.weight"].max() == 8
    for index, (kind, extra) in enumerate((("linear", {}), ("dynamic", {}))):
        folder = tmp_path / str(index)
        scaled = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **extra}
        written(folder, network(rope_parameters=scaled), "4b-g32")
        if kind == "linear":
            convert(folder)
            assert field(folder / "out.gguf", "llama.rope.scaling.type") == "linear"
            assert field(folder / "out.gguf", "llama.rope.scaling.factor") == 4.0
        else:
            with pytest.raises(InputError, match="of type 'dynamic' are not written as GGUF"):
                convert(folder)
            assert not (folder / "out.gguf").exists()


def test_a_window_is_the_context(tmp_path):
    written(tmp_path, network("mistral", sliding_window=64), "4b-g32")
    file = tmp_path / "config.json"
    valid = file.read_text()
    file.write_text(json.dumps({**json.loads(valid), "sliding_window": -(2**40)}))
    with pytest.raises(InputError, match="sliding_window must be a positive integer"):
        convert(tmp_path)
    file.write_text(valid)
    report = convert(tmp_path)
    assert field(tmp_path / "out.gguf", "llama.context_length") == 64
    assert any("look back 64 tokens" in line for line in report.warnings)


def test_refusals_write_nothing(tmp_path):
    with pytest.raises(InputError, match="holds a float network"):
        network().save_pretrained(tmp_path / "float")
        convert(tmp_path / "float")
    gemma = network("gemma3_text", head_dim=16)
    written(tmp_path / "gemma", gemma, "4b-g32")
    with pytest.raises(InputError, match="Gemma3ForCausalLM is not written as GGUF; known model"):
        convert(tmp_path / "gemma")
    written(tmp_path / "good", network(), "4b-g32")
    for output, message in ((tmp_path / "out", "is no .gguf file"), (tmp_path / "d.gguf", "is no")):
        (tmp_path / "d.gguf").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=message):
            quantforge.convert(tmp_path / "good", output=output, layout="gguf")
    damaged = tmp_path / "good" / "config.json"
    config = json.loads(damaged.read_text())
    damaged.write_text(json.dumps({**config, "model_type": "nothing"}))
    with pytest.raises(InputError, match="describes no network that is known"):
        convert(tmp_path / "good")
    assert not [path for path in tmp_path.rglob("*") if ".gguf" in path.name and path.is_file()]


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# What is edited in config.json, and what is said of it.
ABSURD = [
    ({"hidden_size": 128}, "embed_tokens.weight is 96 x 64, by its configuration 96 x 128"),
    ({"intermediate_size": 999}, r"gate_proj.weight is 128 x 64, by its configuration 999 x 64"),
    ({"num_hidden_layers": 3}, r"lacks model.layers.2.self_attn.q_proj.weight, by its .* 64 x 64"),
    ({"num_hidden_layers": 1}, r"holds model.layers.1\..*weight, .*, which its configuration has"),
    ({"vocab_size": 500}, "embed_tokens.weight is 96 x 64, by its configuration 500 x 64"),
    ({"num_attention_heads": 8}, "q_proj.weight is 64 x 64, by its configuration 128 x 64"),
    ({"tie_word_embeddings": True}, "holds lm_head.weight, 96 x 64, which its configuration has"),
    ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias, by its .* 64"),
    ({"architectures": {"a": 1}}, "architectures must be a list of model classes"),
    ({"architectures": [["x"]]}, "architectures must be a list of model classes"),
    ({"architectures": []}, "architectures must be a list of model classes"),
    ({"architectures": ["MistralForCausalLM"]}, "says MistralForCausalLM, and makes a Llama"),
    ({"num_key_value_heads": 2**32}, "num_key_value_heads is 4294967296, but"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads of 16 channels do not share 3"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776, but"),
    ({"vocab_size": 2**30}, "vocab_size is 1073741824, but"),
    ({"rms_norm_eps": 1e300}, "rms_norm_eps must be a positive number, got 1e[+]300"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e300}}, "rope_theta must be a po"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "type 'yarn'"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "must be below high_freq_factor"),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 10**30}}, "rope_parameters give no frequencies"),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 1e38, "factor": 3e38}}, "scale a frequency"),
    ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "turn a part of a head"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"hidden_act": "gelu"}, "activation 'gelu' is not written"),
]  # fmt: skip


def test_a_configuration_of_another_network_is_refused_by_convert_and_check(tmp_path):
    written(tmp_path, network(tied=False, head_dim=16), "4b-g32")
    file = tmp_path / "config.json"
    valid = json.loads(file.read_text())
    assert quantforge.check(tmp_path, server="llama.cpp").loads
    for change, says in ABSURD:
        file.write_text(json.dumps({**valid, **change}))
        with pytest.raises(InputError, match=says) as caught:
            convert(tmp_path)
        assert "\n" not in str(caught.value)
        problems = quantforge.check(tmp_path, server="llama.cpp").problems
        assert problems == (str(caught.value),)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_that_is_missing_is_named(lost, tmp_path):
    module = network()
    parent = module.get_submodule(lost.removesuffix(".weight"))
    parent.weight = None
    written(tmp_path, module, "4b-g32")
    with pytest.raises(InputError, match=f"lacks {lost}, by its configuration 64$"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("qwen3", {"attention_bias": True}, "no name for o_proj.bias of a qwen3 network"),
        ("qwen2", {"head_dim": 32}, "heads of 128 channels together and a hidden size of 64"),
    ],
)
def test_networks_that_llama_cpp_has_not(kind, options, says, tmp_path):
    module = network(kind, **{"head_dim": 16, **options})
    written(tmp_path, module, "4b-g32")
    with pytest.raises(InputError, match=says):
        convert(tmp_path)
    problems = network_problems(SERVERS["llama.cpp"], _described(module).to_dict(), 1)
    assert len(problems) == 1
    assert says in problems[0]


def test_an_output_is_replaced_by_force_only(tmp_path):
    written(tmp_path, network(), "4b-g32")
    (tmp_path / "out.gguf").write_bytes(b"old")
    with pytest.raises(UsageError, match="exists; give another file, or --force"):
        convert(tmp_path)
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    convert(tmp_path, force=True)
    first = (tmp_path / "out.gguf").read_bytes()
    left = tmp_path / f".out.gguf.{2**22 + 1}.partial"  # of a run that was killed
    left.write_bytes(b"half")
    convert(tmp_path, force=True)
    assert (tmp_path / "out.gguf").read_bytes() == first
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


class Later:
    """Is set when it has been asked so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("times", [0, 25, 45])  # while it finds types, writes, reads back
def test_an_interrupt_leaves_nothing(times, tmp_path):
    written(tmp_path, network(), "4b-g32")
    before = sorted(tmp_path.iterdir())
    stage = ("find types", "convert", "verify")[(0, 25, 45).index(times)]
    with pytest.raises(CancelledError, match=f"cancelled during {stage}"):
        convert(tmp_path, cancel=Later(times))
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    written(tmp_path, network(), "4b-g32")
    before = sorted(tmp_path.iterdir())
    original = GGUFWriter.write_tensor_data
    calls = []

    def fails(error):
        def write(writer, tensor, *rest):
            calls.append(tensor)
            if len(calls) > 5:
                raise error
            original(writer, tensor, *rest)

        calls.clear()
        monkeypatch.setattr(GGUFWriter, "write_tensor_data", write)

    for error in (OSError(errno.ENOSPC, "no space"), OSError("96 requested and 0 written")):
        fails(error)
        with pytest.raises(ResourceError, match="no space left to write"):
            convert(tmp_path)
        assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="GB left: free some"):
        convert(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_reads_back_otherwise_is_removed(tmp_path, monkeypatch):
    written(tmp_path, network(), "4b-g32")
    before = sorted(tmp_path.iterdir())
    original = gguf_network.row_order
    calls = []

    def wrong(*arguments):
        calls.append(arguments)
        order = original(*arguments)
        # The second pass, which writes.
        return order.flip(0) if order is not None and 20 < len(calls) <= 40 else order

    monkeypatch.setattr(gguf_network, "row_order", wrong)
    with pytest.raises(InputError, match=r"q_proj.weight reads back otherwise"):
        convert(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_rows_are_compared_one_by_one(tmp_path, monkeypatch):
    """A small row may be wrong altogether without being far from what is large elsewhere."""
    weights = written(tmp_path, network(), "8b-g32-asym")
    before = sorted(tmp_path.iterdir())
    original = gguf_blocks.encode_rounded

    def wrong(weight):
        kind, array, change = original(weight)
        quietest = weight.dequantize().abs().amax(1).argmin()
        array = array.copy()
        array[quietest, 0] += 2 * change[quietest] + 2.0**-10 * abs(array[quietest, 0])
        return kind, array, change

    monkeypatch.setattr(gguf_blocks, "encode_rounded", wrong)
    assert len(weights) == 14
    with pytest.raises(InputError, match=r"proj.weight reads back otherwise"):
        convert(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_the_planner_and_the_layer_names_agree():
    module = tiny_llama()
    architecture = gguf_network.gguf_architecture(_described(module))
    names = gguf_network.tensor_names(architecture, module.config, module.state_dict())
    assert len(set(names.values())) == len(names)
    assert "lm_head.weight" not in names
    assert {part for part in PARTS if any(part in name for name in names)} == set(PARTS)


def _described(module):
    module.config.architectures = [type(module).__name__]
    return module.config
