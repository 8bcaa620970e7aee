"""Outputs are whole or absent, and a discarded measurement is never found again."""

import os
import shutil

import pytest

from quantforge import workspace
from quantforge.errors import UsageError
from quantforge.workspace import measurement_folder, staging


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(text)


def test_an_error_keeps_what_was_there_and_leaves_nothing_else(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    with pytest.raises(KeyboardInterrupt), staging(output, force=True) as folder:
        write(folder, "new")
        raise KeyboardInterrupt
    assert (output / "plan.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_force_replaces_the_whole_folder(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    (output / "stale").touch()
    with pytest.raises(UsageError), staging(output, force=False):
        pass
    with staging(output, force=True) as folder:
        write(folder, "new")
    assert (output / "plan.json").read_text() == "new"
    assert not (output / "stale").exists()
    assert list(tmp_path.iterdir()) == [output]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(output, "old")
    rename = type(output).replace

    def fails(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(output), "replace", fails)
    with pytest.raises(OSError, match="no"), staging(output, force=True) as folder:
        write(folder, "new")
    assert (output / "plan.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_a_removal_that_is_interrupted_leaves_no_measurement_to_trust(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    folder = measurement_folder("k" * 64, fresh=False)
    (folder / "sensitivity.json").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removed any
    assert measurement_folder("k" * 64, fresh=True) == folder
    assert not (folder / "sensitivity.json").exists()


def test_only_the_latest_measurements_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    for number in range(workspace.KEPT_MEASUREMENTS + 2):
        folder = measurement_folder(f"{number}" * 64, fresh=False)
        os.utime(folder, (number, number))
    left = sorted(path.name[0] for path in (tmp_path / "measurements").iterdir())
    assert left == ["2", "3", "4", "5"]
