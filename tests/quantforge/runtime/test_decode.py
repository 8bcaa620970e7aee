"""Decoding in one call a token gives the logits of the transformers module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantforge
from quantforge.errors import InputError
from quantforge.runtime.decode import Decoder, obstacle
from quantforge.runtime.linear import QuantLinear
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantSpec

TOKENS = [5, 17, 3, 88, 41, 2, 60, 7, 7, 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Specs of several widths and groupings inside a fused group, one layer kept."""
    module = tiny_llama(hidden=128, intermediate=192, blocks=2)
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    specs = [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, 64), QuantSpec(5), QuantSpec(6, 32)]
    assignment = {name: specs[i % 5] for i, name in enumerate(names) if i != 3}
    path = tmp_path_factory.mktemp("decode")
    write_quantized(path, module, assignment)
    return path


def all_logits(module: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("prompt", [1, 4])
def test_every_step_equals_the_module(folder: Path, prompt: int) -> None:
    module = quantforge.load(folder)
    decoder = Decoder(module, capacity=len(TOKENS))
    expected = all_logits(module, TOKENS)
    torch.testing.assert_close(
        decoder.logits(TOKENS[:prompt]), expected[prompt - 1], rtol=1e-5, atol=1e-5
    )
    for index in range(prompt, len(TOKENS)):
        step = decoder.logits([TOKENS[index]])
        torch.testing.assert_close(step, expected[index], rtol=1e-5, atol=1e-5)
    assert decoder.length == len(TOKENS)
    with pytest.raises(ValueError, match="a cache for 10 tokens cannot take 11"):
        decoder.logits([1])


def test_several_tokens_at_once_continue_too(folder: Path) -> None:
    module = quantforge.load(folder)
    decoder = Decoder(module, capacity=20)
    decoder.logits(TOKENS[:3])
    last = decoder.logits(TOKENS[3:])
    torch.testing.assert_close(last, all_logits(module, TOKENS)[-1], rtol=1e-5, atol=1e-5)


def test_eight_bit_activations_and_head_are_close_and_not_equal(folder: Path) -> None:
    exact = all_logits(quantforge.load(folder), TOKENS)[-1]
    module: Any = quantforge.load(folder, mode="a8", head_bits=8)
    assert isinstance(module.lm_head, QuantLinear)
    assert module.lm_head.spec == QuantSpec(8)
    assert not isinstance(module.model.embed_tokens, QuantLinear)
    decoder = Decoder(module, capacity=16)
    for count in (1, 9):
        rounded = decoder.logits(TOKENS[decoder.length : decoder.length + count])
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.05
    # the prompt went through the module, token by token it is the same network
    again = Decoder(module, capacity=16)
    for token in TOKENS:
        step = again.logits([token])
    torch.testing.assert_close(step, rounded, rtol=0.02, atol=0.02 * float(rounded.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, "parameters in torch.bfloat16 on cpu, supported: float32, cpu"),
        ({"backend": "reference"}, "packed layers that are not in the order of the 'cpu' backend"),
    ],
)
def test_says_what_is_in_the_way(folder: Path, options: dict[str, Any], message: str) -> None:
    module = quantforge.load(folder, **options)
    assert obstacle(module) == message
    with pytest.raises(InputError, match=f"cannot be decoded in one call: {message}"):
        Decoder(module, capacity=4)


def test_other_networks_are_refused() -> None:
    assert "is not a known architecture" in obstacle(nn.Linear(2, 2))
    module: Any = tiny_llama(hidden=64, intermediate=96, blocks=1)
    assert obstacle(module) == ""
    module.config.hidden_act = "gelu"
    assert obstacle(module) == "activation 'gelu', supported: 'silu'"
