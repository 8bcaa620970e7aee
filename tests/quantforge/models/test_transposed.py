"""GPT-2, whose linears are stored transposed: as it is worked on, written, refused and read."""

import json
import threading
import warnings

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import quantforge
from quantforge.errors import CancelledError, InputError, UsageError
from quantforge.load.huggingface import load_model
from quantforge.load.source import resolve_source
from quantforge.models.transposed import StraightLinear, straighten, straightened
from quantforge.pipeline import _borrowed
from quantforge.runtime.transformers_plugin import use_in_transformers
from quantforge.testing import markov_tokens, train, write_quantized
from quantforge.types import QuantSpec

from .test_architectures import LENGTH, QUICK, network

MEMBERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NAMES = [f"transformer.h.{block}.{member}" for block in range(3) for member in MEMBERS]


@torch.no_grad()
def logits(module, tokens=None):
    return module(input_ids=markov_tokens(2, LENGTH, seed=7) if tokens is None else tokens).logits


def stock(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_ordinary_linears_compute_the_same_and_what_they_hold_comes_back():
    module = network("gpt2")
    before, own = logits(module), dict(module.named_parameters())
    values = {name: tensor.clone() for name, tensor in own.items()}
    with straightened(module):
        assert [n for n, one in module.named_modules() if isinstance(one, StraightLinear)] == NAMES
        assert torch.equal(logits(module), before)
        linear = module.get_submodule(NAMES[2])
        assert (linear.in_features, linear.out_features) == (64, 256)
        assert torch.equal(linear.weight, values[f"{NAMES[2]}.weight"].T)
        assert linear.bias is own[f"{NAMES[2]}.bias"]
        linear.weight.data = linear.weight.data * 2  # as those do that move weights elsewhere
        with straightened(module):  # nothing is left to do
            assert module.get_submodule(NAMES[2]) is linear
    assert isinstance(module.get_submodule(NAMES[2]), Conv1D)
    assert {id(one) for one in module.parameters()} == {id(one) for one in own.values()}
    for name, tensor in module.named_parameters():
        factor = 2 if name == f"{NAMES[2]}.weight" else 1
        assert tensor is own[name]
        assert torch.equal(tensor, factor * values[name])


def test_a_borrowed_network_in_half_precision_gets_its_modules_and_values_back():
    module = network("gpt2").bfloat16()
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError), _borrowed(module):
        linear = module.get_submodule(NAMES[0])
        assert linear.weight.dtype == torch.float32
        with torch.no_grad():
            linear.weight.zero_()
        raise RuntimeError
    assert isinstance(module.get_submodule(NAMES[0]), Conv1D)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in values.items())
    assert after.keys() == values.keys()


def test_a_folder_gives_the_original_s_logits(tmp_path):
    module = network("gpt2")
    module.save_pretrained(tmp_path)
    loaded = load_model(resolve_source(str(tmp_path))).module
    assert isinstance(loaded.get_submodule(NAMES[0]), StraightLinear)
    assert torch.equal(logits(loaded), logits(module))


def test_mixed_bits_are_searched_written_read_and_announced(tmp_path):
    module, folder = train(network("gpt2"), steps=30), tmp_path / "out"
    report = quantforge.quantize(
        module,
        budget="4bit",
        calibration=markov_tokens(24, LENGTH),
        output=folder,
        settings=QUICK,
    )
    assert report.plan.stored_bits <= 4.0
    assert list(report.plan.assignment) == NAMES
    assert len({str(spec) for spec in report.plan.assignment.values()}) > 1
    assert 0 < report.quality.kl < 1
    said = "GPT2LMHeadModel: its linears are stored transposed (Conv1D); quantforge.load reads"
    assert any(line.startswith(said) for line in report.warnings)
    assert json.loads((folder / "quantforge.json").read_text())["stock_readable"] is False
    assert "Stock transformers cannot load this checkpoint" in (folder / "README.md").read_text()
    assert isinstance(module.get_submodule(NAMES[0]), Conv1D)
    expected = logits(module)
    assert torch.allclose(logits(quantforge.load(folder)), expected, atol=1e-5)
    for server in ("transformers", "vllm"):
        (problem, *_) = quantforge.check(folder, server=server).problems
        assert "its linears are stored transposed" in problem
    with pytest.raises(InputError, match="GPTQ layout is not written for"):
        quantforge.convert(folder, output=tmp_path / "gptq")


def test_a_folder_with_kept_layers_is_read_by_us_and_not_by_stock_transformers(tmp_path):
    module = network("gpt2")
    straighten(module)
    # The square matrix is kept, whose layout no shape gives away.
    specs = {"attn.c_proj": None, "attn.c_attn": QuantSpec(3, 32), "mlp.c_proj": QuantSpec(8)}
    assignment = {name: specs.get(name.split(".", 3)[3], QuantSpec(4, 16)) for name in NAMES}
    module.bfloat16().float()  # what is kept is stored in 16 bits
    quantized = write_quantized(tmp_path, module, assignment)
    with torch.no_grad():
        for name, weight in quantized.items():
            module.get_submodule(name).weight.copy_(weight.dequantize())
    expected = logits(module)
    assert torch.allclose(logits(quantforge.load(tmp_path)), expected, atol=1e-5)
    use_in_transformers()
    try:
        with pytest.raises(InputError, match=r"use quantforge\.load"):
            stock(tmp_path)
    finally:
        use_in_transformers(False)
    assert not torch.allclose(logits(stock(tmp_path)), expected, atol=1e-2)


@pytest.mark.parametrize("server", ["transformers", "vllm", "llama.cpp"])
def test_a_server_is_refused_before_anything_is_measured(server, tmp_path):
    said = "not written as GGUF" if server == "llama.cpp" else "its linears are stored transposed"
    with pytest.raises(UsageError, match=said):
        quantforge.quantize(
            network("gpt2"), budget="4bit", calibration=markov_tokens(4, 8),
            output=tmp_path / "out", settings={"search.server": server},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_cancelled_run_leaves_the_network_as_it_was():
    module, cancel = network("gpt2"), threading.Event()
    values = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CancelledError):
        quantforge.quantize(
            module, budget="4bit", calibration=markov_tokens(8, 8),
            progress=lambda _: cancel.set(), cancel=cancel,
        )  # fmt: skip
    assert all(torch.equal(values[name], one) for name, one in module.state_dict().items())
    assert isinstance(module.get_submodule(NAMES[0]), Conv1D)
