"""The strict re-open: passes on what was written, names the first difference on anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantforge.errors import InputError
from quantforge.export.verify import verify_checkpoint
from quantforge.testing import random_weight, tiny_llama, write_quantized
from quantforge.types import QuantizedWeight, QuantSpec

Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
PLAN = {Q_PROJ: QuantSpec(3, 32), K_PROJ: QuantSpec(5, 32, symmetric=False)}

Written = tuple[Path, dict[str, QuantizedWeight], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("verify")
    module = tiny_llama(blocks=1)
    weights = write_quantized(folder, module, PLAN, stock_readable=False)
    return folder, weights, {"model.norm.weight": module.model.norm.weight.to(torch.bfloat16)}


@pytest.fixture
def written(original: Written, tmp_path: Path) -> Written:
    return Path(shutil.copytree(original[0], tmp_path / "copy")), dict(original[1]), original[2]


def test_accepts_what_was_meant(written: Written) -> None:
    folder, weights, kept = written
    # q: words, scale, shape; k: these and the zero-point; 5 other linears, 3 norms, the embedding
    assert verify_checkpoint(folder, weights, kept=kept) == 3 + 4 + 5 + 3 + 1


def one_code(weights: dict[str, QuantizedWeight]) -> None:
    codes = weights[Q_PROJ].codes.clone()
    codes[7, 63] ^= 1
    weights[Q_PROJ] = replace(weights[Q_PROJ], codes=codes)


def one_scale(weights: dict[str, QuantizedWeight]) -> None:
    scale = weights[Q_PROJ].scale.clone()
    scale[0, 0] = -scale[0, 0]
    weights[Q_PROJ] = replace(weights[Q_PROJ], scale=scale)


def one_zero(weights: dict[str, QuantizedWeight]) -> None:
    zero = weights[K_PROJ].zero
    assert zero is not None
    weights[K_PROJ] = replace(weights[K_PROJ], zero=zero ^ (torch.arange(64).view(32, 2) == 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_code, "q_proj codes differ from what was meant in 1 bytes"),
        (one_scale, "q_proj scales differ from what was meant in 1 bytes"),
        (one_zero, "k_proj zero-points differ from what was meant in 1 bytes"),
        (lambda w: w.pop(Q_PROJ), "q_proj is stored but was not expected"),
        (lambda w: w.update(x=w[Q_PROJ]), "x is expected but was not stored"),
        (
            lambda w: w.update({Q_PROJ: random_weight(64, 64, QuantSpec(4, 32))}),
            "q_proj is 3b-g32, expected 4b-g32",
        ),
    ],
)
def test_names_a_difference_of_intent(
    written: Written, change: Callable[[dict[str, QuantizedWeight]], None], message: str
) -> None:
    folder, weights, _ = written
    change(weights)
    with pytest.raises(InputError, match=message):
        verify_checkpoint(folder, weights)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q_PROJ}.weight_packed"])
def test_names_a_tensor_changed_on_disk(written: Written, name: str) -> None:
    folder, weights, _ = written
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].roll(1, -1) + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} has other bytes"):
        verify_checkpoint(folder, weights)


def test_names_a_tensor_that_came_or_went(written: Written) -> None:
    folder, weights, kept = written
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.norm.weight is missing, recorded in"):
        verify_checkpoint(folder, weights)
    tensors |= {"model.norm.weight": norm, "stranger": norm.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"stranger is not recorded in quantforge.json"):
        verify_checkpoint(folder, weights)
    tensors = {**tensors, "model.norm.weight": norm.float()}
    del tensors["stranger"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.norm.weight is F32 \(64,\), quantforge.json says"):
        verify_checkpoint(folder, weights, kept=kept)


def test_names_a_kept_tensor_that_differs(written: Written) -> None:
    folder, weights, kept = written
    other = {"model.norm.weight": kept["model.norm.weight"] + 1}
    with pytest.raises(InputError, match=r"model.norm.weight differ from what was meant"):
        verify_checkpoint(folder, weights, kept=other)
    with pytest.raises(InputError, match="kept tensor absent is not stored"):
        verify_checkpoint(folder, weights, kept={"absent": kept["model.norm.weight"]})


def test_needs_the_manifest(written: Written) -> None:
    folder, weights, _ = written
    (folder / "quantforge.json").unlink()
    with pytest.raises(InputError, match=r"no quantforge.json to verify against"):
        verify_checkpoint(folder, weights)


def test_a_changed_config_is_found(written: Written) -> None:
    folder, weights, _ = written
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_3b-g32"]["weights"]["num_bits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="q_proj is 4b-g32, expected 3b-g32"):
        verify_checkpoint(folder, weights)
