"""Sizes counted from files, against arithmetic on the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantforge.errors import InputError
from quantforge.format.sizes import size_report
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantSpec


@pytest.mark.parametrize("shard_bytes", [10_000, 1 << 30])
def test_sizes_equal_the_plan(tmp_path: Path, shard_bytes: int) -> None:
    q, k, up = (
        f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    )
    plan = {q: QuantSpec(3, 32), k: QuantSpec(8, 32, symmetric=False), up: None}
    module = tiny_llama(blocks=1)  # hidden 64, kv 32, intermediate 128, vocabulary 96, tied
    write_quantized(tmp_path, module, plan, shard_bytes=shard_bytes, stock_readable=False)
    sizes = size_report(tmp_path)
    q_count, k_count, up_count = 64 * 64, 32 * 64, 128 * 64
    planned = q_count + k_count + up_count
    total = sum(p.numel() for p in module.parameters())
    bits = plan[q].stored_bits(64, 64) + plan[k].stored_bits(32, 64) + 16 * up_count
    assert sizes.planned_weights == planned
    assert sizes.stored_bits == bits / planned
    assert sizes.code_bits == (3 * q_count + 8 * k_count + 16 * up_count) / planned
    assert sizes.kept_weights == total - planned
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert sizes.checkpoint_bytes == files
    assert sizes.checkpoint_bits == 8 * files / total
    assert sizes.reference_bytes == 2 * total
    (tmp_path / "quantforge.json").unlink()
    without = size_report(tmp_path)
    assert without.planned_weights == q_count + k_count
    assert without.planned_weights + without.kept_weights == total


def test_nothing_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no quantized layer"):
        write_quantized(tmp_path, tiny_llama(blocks=1), {})
