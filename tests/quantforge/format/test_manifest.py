"""quantforge.json: there and back, without anything that changes from run to run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantforge.errors import InputError
from quantforge.format.manifest import (
    Manifest,
    StoredTensor,
    plan_from_dict,
    plan_to_dict,
    read_manifest,
    tool_versions,
    write_manifest,
)
from quantforge.testing import plan_of
from quantforge.types import QuantSpec

PLAN = plan_of({"b": QuantSpec(3, 64), "a": None, "c": QuantSpec(8, symmetric=False)})
MANIFEST = Manifest(
    plan=PLAN,
    seed=7,
    versions={"torch": "2"},
    stock_readable=False,
    tensors={"x": StoredTensor(dtype="BF16", shape=(2, 3), sha256="00")},
)


def test_there_and_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    fields = json.loads((tmp_path / "quantforge.json").read_text())
    assert (fields["format_version"], fields["layout_version"], fields["seed"]) == (1, 1, 7)
    assert fields["plan"]["assignment"] == {"a": "kept", "b": "3b-g64", "c": "8b-pc-asym"}
    assert set(fields) == {
        "format_version", "layout_version", "plan", "seed", "stock_readable", "tensors", "versions"
    }  # fmt: skip


def test_absent_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_plans_there_and_back() -> None:
    assert plan_from_dict(plan_to_dict(PLAN)) == PLAN
    for change in ({"assignment": {"a": "9x"}}, {"extra": 1}, {"assignment": [1]}):
        with pytest.raises(InputError, match="the plan is not readable"):
            plan_from_dict({**plan_to_dict(PLAN), **change})


def test_tool_versions_are_versions() -> None:
    versions = tool_versions()
    assert {"torch", "safetensors"} <= set(versions)
    assert all(text[0].isdigit() for text in versions.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a manifest"),
        ("[]", "is not a manifest"),
        ("{}", "is not a manifest"),
        ('{"format_version": 1, "layout_version": 1}', "is damaged"),
    ],
)
def test_damage_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "quantforge.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(MANIFEST, layout_version=2))
    with pytest.raises(InputError, match="has format 1 and layout 2; this release reads"):
        read_manifest(tmp_path)
