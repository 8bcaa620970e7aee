"""`from_pretrained` gives packed linears, and the network of the stock one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import quantforge
from quantforge.runtime.decode import Decoder
from quantforge.runtime.linear import QuantLinear
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantSpec

IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 60]])


@pytest.fixture
def plugin() -> Iterator[None]:
    quantforge.use_in_transformers()
    yield
    quantforge.use_in_transformers(False)


def written(path: Path) -> Path:
    module = tiny_llama(hidden=128, intermediate=192, blocks=2)
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    specs = [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(8)]
    write_quantized(path, module, {name: specs[i % 3] for i, name in enumerate(names)})
    return path


def packed_layers(module: Any) -> list[QuantLinear]:
    return [child for child in module.modules() if isinstance(child, QuantLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("plugin")
def test_packed_and_equal_to_the_stock_network(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = written(tmp_path)
    packed: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layers = packed_layers(packed)
    assert len(layers) == 14
    assert {layer.order for layer in layers} == {"cpu"}
    assert {layer.weight_scale.dtype for layer in layers} == {torch.bfloat16}
    quantforge.use_in_transformers(False)
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert packed_layers(stock) == []
    with torch.no_grad():
        ours, theirs = packed(IDS).logits, stock(IDS).logits
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * unit * float(theirs.abs().max()))


@pytest.mark.usefixtures("plugin")
def test_generates_and_decodes_in_one_call(tmp_path: Path) -> None:
    packed: Any = AutoModelForCausalLM.from_pretrained(written(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        new = packed.generate(IDS, max_new_tokens=4, do_sample=False)[0, IDS.shape[1] :]
    decoder = Decoder(packed, capacity=16)
    logits = decoder.logits(IDS[0].tolist())
    for token in new.tolist():
        assert int(logits.argmax()) == token
        logits = decoder.logits([token])


@pytest.mark.usefixtures("plugin")
def test_what_our_reader_refuses_stays_stock(tmp_path: Path) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = "0.16.0"  # 3 bits lay otherwise then
    (folder / "config.json").write_text(json.dumps(config))
    module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert packed_layers(module) == []
