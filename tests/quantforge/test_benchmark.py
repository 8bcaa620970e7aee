"""What `bench` reports: every contender, bytes that are right, speeds that fit them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantforge
from quantforge.errors import InputError, UsageError
from quantforge.runtime import speed
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = tiny_llama(hidden=128, intermediate=192, blocks=2)
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    path = tmp_path_factory.mktemp("bench")
    write_quantized(path, module, dict.fromkeys(names, QuantSpec(4, 64)))
    return path


WEIGHTS = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 192)  # q, o; k, v; gate, up, down
PACKED = WEIGHTS // 2 + WEIGHTS // 64 * 2  # four bits and a 16-bit scale for 64
NORMS = 5 * 128 * 4
HEAD = 96 * 128 * 4  # tied to the embedding
ROTARY = 2 * 16 * 4  # the frequencies, twice


def test_rows_bytes_and_shares(folder: Path) -> None:
    report = quantforge.bench(folder, prompt_tokens=4, new_tokens=3, rounds=1, threads=1)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [
        "packed, exact",
        "packed, transformers' loop",
        "packed, a8",
        "float32, transformers' loop",
    ]
    assert report.threads == 1
    assert report.instructions in ("AVX-512 VNNI, BF16", "AVX-512 VNNI", "AVX2", "portable")
    eager = rows["packed, transformers' loop"]
    assert eager.bytes_a_token == PACKED + NORMS + HEAD + ROTARY
    assert rows["float32, transformers' loop"].bytes_a_token == 4 * WEIGHTS + NORMS + HEAD + ROTARY
    for row in report.rows:
        assert row.share_of_bandwidth == pytest.approx(
            row.bytes_a_token * row.decode_tokens_a_second / report.read_bandwidth
        )
        assert row.prefill_tokens_a_second > 0


def test_a_packed_head_is_read_and_an_embedding_is_not(folder: Path) -> None:
    module = quantforge.load(folder, head_bits=8)
    head = 96 * 128 + 96 * 2  # eight bits, one scale a row
    assert speed.bytes_a_token(module) == PACKED + NORMS + head + ROTARY


def test_dequantized_linears_compute_the_same(folder: Path) -> None:
    packed, dense = quantforge.load(folder), speed.dequantize_linears(quantforge.load(folder))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        difference = (packed(ids).logits - dense(ids).logits).abs().max()
    assert difference < 1e-5


def test_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompt tokens must be 1 to 16384"):
        quantforge.bench(folder, prompt_tokens=0)
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"):
        quantforge.bench(folder, threads=0)
    with pytest.raises(UsageError, match="head_bits must be 8 or None, got 4"):
        quantforge.bench(folder, head_bits=4)
    with pytest.raises(InputError, match=r"nothing\.gguf is no file"):
        quantforge.bench(folder, gguf=tmp_path / "nothing.gguf", prompt_tokens=2, new_tokens=1)
    limit = tiny_llama().config.max_position_embeddings
    with pytest.raises(InputError, match=f"are {limit + 1}, the context of .* is {limit}: lower"):
        quantforge.bench(folder, prompt_tokens=limit, new_tokens=1)
