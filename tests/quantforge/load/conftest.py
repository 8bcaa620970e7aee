"""One tiny checkpoint for the whole package, and a cache of its own for every test."""

from __future__ import annotations

import shutil

import pytest

from quantforge.load.huggingface import load_model
from quantforge.load.source import resolve_source
from quantforge.testing import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def folder(trained, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(trained, tmp_path / "model")


@pytest.fixture
def model(trained):
    return load_model(resolve_source(trained))


@pytest.fixture
def chat_tokenizer(model):
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    )
    return model.tokenizer
