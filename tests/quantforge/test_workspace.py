"""Outputs are whole or absent."""

import pytest

from quantforge.errors import UsageError
from quantforge.workspace import staging


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
