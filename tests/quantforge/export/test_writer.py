"""Writing a checkpoint: its bytes, its shards, what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantforge.errors import ResourceError, UsageError
from quantforge.export.writer import CheckpointWriter
from quantforge.format.container import ContainerWriter
from quantforge.testing import plan_of, random_weight, tiny_llama, write_quantized
from quantforge.types import QuantSpec

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SPEC = QuantSpec(3, 32)
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(folder: Path, **options: Any) -> CheckpointWriter:
    options = {"model_config": CONFIG, "ignore": ["lm_head"], **options}
    options.setdefault("plan", plan_of({"a": SPEC, "b": None}))
    return CheckpointWriter(folder, **options)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        module = tiny_llama(blocks=1)
        write_quantized(tmp_path / name, module, {Q_PROJ: SPEC, UP_PROJ: None}, shard_bytes=20_000)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    names = set(hashes(tmp_path / "a"))
    assert names >= {
        "config.json", "generation_config.json", "quantforge.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert not [name for name in names if "partial" in name]
    text = (tmp_path / "a" / "quantforge.json").read_text()
    assert str(tmp_path) not in text


def test_kept_tensors_and_config(tmp_path: Path) -> None:
    module = tiny_llama(blocks=1)
    module.config._name_or_path = "/somewhere/on/this/machine"
    write_quantized(tmp_path, module, {Q_PROJ: SPEC, UP_PROJ: None}, seed=3)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied: stored once
    for name, tensor in module.state_dict().items():
        if name in ("lm_head.weight", f"{Q_PROJ}.weight"):
            continue
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], tensor.to(torch.bfloat16))
    assert stored[f"{Q_PROJ}.weight_scale"].dtype == torch.bfloat16
    assert not [name for name in stored if name.endswith("g_idx")]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["hidden_size"] == 64
    assert "_name_or_path" not in config
    assert config["quantization_config"]["ignore"] == ["lm_head", UP_PROJ]


def test_shards_are_full_and_indexed(tmp_path: Path) -> None:
    write_quantized(tmp_path, tiny_llama(blocks=2), {Q_PROJ: SPEC}, shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]
    tensors = {file: load_file(tmp_path / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in tensors[file]}
    sizes = {file: sum(t.nbytes for t in tensors[file].values()) for file in files}
    assert max(sizes.values()) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_memory_is_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is on disk before the next one arrives."""
    spooled: list[int] = []
    original = ContainerWriter.add

    def add(self: ContainerWriter, name: str, tensor: torch.Tensor) -> str:
        digest = original(self, name, tensor)
        for spool in self._spools.values():
            spool.flush()
        spooled.append(sum(path.stat().st_size for path in tmp_path.glob(".*.partial")))
        return digest

    monkeypatch.setattr(ContainerWriter, "add", add)
    with start(tmp_path, plan=plan_of({"a": SPEC})) as writer:
        for index in range(4):
            writer.add_tensor(f"t{index}", torch.ones(1000))
        assert len(list(tmp_path.iterdir())) == 1
    assert spooled == [2000, 4000, 6000, 8000]
    assert list(tmp_path.iterdir()) == []  # never finished: nothing is left


def test_a_bias_and_a_head_are_written(tmp_path: Path) -> None:
    plan = plan_of({"a": SPEC, "lm_head": QuantSpec(4)})
    with start(tmp_path, plan=plan, ignore=[]) as writer:
        writer.add_layer("a", random_weight(4, 64, SPEC), torch.tensor([1.0, 2.0, 3.0, 1 / 3]))
        writer.add_layer("lm_head", random_weight(6, 64, QuantSpec(4)))
        sizes = writer.finish()
    assert sizes.kept_weights == 4
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["a.bias"].tolist() == [1.0, 2.0, 3.0, 0.333984375]
    assert stored["lm_head.weight_packed"].shape == (6, 8)


def test_asymmetric_and_embeddings_need_permission(tmp_path: Path) -> None:
    asymmetric = plan_of({"a": QuantSpec(3, 32, symmetric=False)})
    with pytest.raises(UsageError, match=r"a is asymmetric, which transformers .* cannot load"):
        start(tmp_path, plan=asymmetric)
    with (
        start(tmp_path, plan=plan_of({"a": SPEC})) as writer,
        pytest.raises(UsageError, match="a is a quantized embedding"),
    ):
        writer.add_layer("a", random_weight(4, 64, SPEC), kind="embedding")
    with start(tmp_path / "own", plan=asymmetric, stock_readable=False) as writer:
        writer.add_layer("a", random_weight(4, 64, QuantSpec(3, 32, symmetric=False)))
        writer.finish()
    assert json.loads((tmp_path / "own" / "quantforge.json").read_text())["stock_readable"] is False


def test_a_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    embedding = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    for name, head in (("same", embedding), ("other", embedding + 1)):
        with start(tmp_path / name, plan=plan_of({"a": SPEC}), model_config=config) as writer:
            writer.add_layer("a", random_weight(4, 64, SPEC))
            writer.add_tensor("lm_head.weight", head)
            writer.add_tensor("model.embed_tokens.weight", embedding)
            if name == "other":
                with pytest.raises(ValueError, match="no stored tensor equals it"):
                    writer.finish()
            else:
                assert writer.finish().kept_weights == 6 * 64


def test_refuses_what_the_plan_does_not_say(tmp_path: Path) -> None:
    with start(tmp_path) as writer:
        with pytest.raises(ValueError, match="a is 4b-g32, the plan says 3b-g32"):
            writer.add_layer("a", random_weight(4, 64, QuantSpec(4, 32)))
        with pytest.raises(ValueError, match="b is 3b-g32, the plan says kept"):
            writer.add_layer("b", random_weight(4, 64, SPEC))
        with pytest.raises(ValueError, match=r"a.weight belongs to a layer that the plan quant"):
            writer.add_tensor("a.weight", torch.zeros(3))
        with pytest.raises(ValueError, match=r"n has values that are not finite in torch.bfloat16"):
            writer.add_tensor("n", torch.tensor([1.0, float("nan")]))
        with pytest.raises(ValueError, match="2 planned layers never arrived, first a"):
            writer.finish()
        writer.add_layer("a", random_weight(4, 64, SPEC))
        with pytest.raises(ValueError, match="1 planned layers never arrived, first b"):
            writer.finish()
        with pytest.raises(ValueError, match=r"'a.weight_packed' was already stored"):
            writer.add_layer("a", random_weight(4, 64, SPEC))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["a"]}, "a is both quantized and ignored"),
        ({"dtype": torch.float32}, "written in bfloat16 or float16"),
        ({"model_config": {"model_type": "llama"}}, "names no architectures"),
    ],
)
def test_refuses_contradictions(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **options)


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    write_quantized(tmp_path, tiny_llama(blocks=1), {Q_PROJ: SPEC})
    with pytest.raises(ValueError, match=r"already holds config.json"):
        start(tmp_path)


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ContainerWriter, name: str, tensor: torch.Tensor) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ContainerWriter, "add", full)
    with start(tmp_path) as writer, pytest.raises(ResourceError, match="no space left to write"):
        writer.add_tensor("x", torch.zeros(3))
    assert list(tmp_path.iterdir()) == []
