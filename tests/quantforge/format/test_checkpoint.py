"""Opening and reading a folder: what is written comes back, and every damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantforge.errors import InputError
from quantforge.format.checkpoint import TensorReader, open_checkpoint, read_quantized
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantizedWeight, QuantSpec

LAYERS = {
    "model.layers.0.self_attn.q_proj": QuantSpec(3, 32),
    "model.layers.0.mlp.down_proj": QuantSpec(5),
    "model.layers.0.mlp.up_proj": None,
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, QuantizedWeight]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    weights = write_quantized(folder, tiny_llama(blocks=1), LAYERS, shard_bytes=20_000)
    return folder, weights


@pytest.fixture
def folder(written: tuple[Path, dict[str, QuantizedWeight]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "copy"))


def test_layers_come_back_exactly(written: tuple[Path, dict[str, QuantizedWeight]]) -> None:
    folder, weights = written
    read = dict(read_quantized(folder))
    assert set(read) == set(weights) == {name for name, spec in LAYERS.items() if spec}
    for name, weight in weights.items():
        assert read[name].spec == weight.spec
        assert torch.equal(read[name].codes, weight.codes)
        assert torch.equal(read[name].scale, weight.scale)


def test_entries_cover_all_shards(written: tuple[Path, dict[str, QuantizedWeight]]) -> None:
    checkpoint = open_checkpoint(written[0])
    assert len({entry.file for entry in checkpoint.entries.values()}) > 2
    assert checkpoint.manifest is not None
    assert set(checkpoint.entries) == set(checkpoint.manifest.tensors)


def test_a_loaded_tensor_owns_its_memory(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    entry = checkpoint.entries["model.embed_tokens.weight"]
    tensor = TensorReader().load(entry)
    before = tensor.clone()
    entry.file.write_bytes(b"")
    assert torch.equal(tensor, before)
    assert tensor.untyped_storage().nbytes() == entry.size_bytes
    with pytest.raises(InputError, match=r"cannot read model.embed_tokens.weight"):
        TensorReader().load(entry)


def edit(folder: Path, name: str, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def map_to(name: str, file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(
            folder,
            "model.safetensors.index.json",
            lambda index: index["weight_map"].update({name: file}),
        )

    return change


def truncate(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-3])


def forget_index_entry(folder: Path) -> None:
    edit(
        folder,
        "model.safetensors.index.json",
        lambda index: index["weight_map"].pop("model.norm.weight"),
    )


def add_target(folder: Path) -> None:
    edit(
        folder,
        "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_5b-pc"][
            "targets"
        ].append("model.layers.7.mlp"),
    )


def drop_group(folder: Path) -> None:
    edit(
        folder,
        "config.json",
        lambda config: config["quantization_config"]["config_groups"].pop("group_5b-pc"),
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated: tensors need"),
        (lambda folder: shard(folder, 2).unlink(), "lacks the shard model-00002-of"),
        (map_to("ghost.weight", "model-00001-of-00005.safetensors"), "names ghost.weight, which"),
        (map_to("model.norm.weight", "model-00001-of-00005.safetensors"), "index.json says"),
        (map_to("model.norm.weight", "../x.safetensors"), "not a file of the folder"),
        (map_to("model.norm.weight", ".."), "not a file of the folder"),
        (forget_index_entry, "holds model.norm.weight, model.safetensors.index.json says no file"),
        (lambda folder: (folder / "config.json").unlink(), "cannot read .*config.json: No such"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "is not JSON"),
        (lambda folder: shutil.copy(shard(folder), folder / "model.safetensors"), "has both"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "has no weight_map",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "has neither model.safetensors nor",
        ),
        (add_target, "model.layers.7.mlp has no packed weight"),
        (drop_group, "model.layers.0.mlp.down_proj has no group in config.json"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_damage_is_one_line_that_names_it(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    assert len(list(folder.glob("model-*-of-00005.safetensors"))) == 5
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        list(read_quantized(folder))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
