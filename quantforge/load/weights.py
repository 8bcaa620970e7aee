"""The weight files of a Hugging Face folder: which there are, and whether they are whole.

Only headers are read here. A folder that is quantized, incomplete, truncated or that holds pickled
weights is refused before any tensor is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantforge.errors import InputError
from quantforge.files import is_plain_name, parse_json
from quantforge.foreign import one_line
from quantforge.load.wording import some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        InputError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({one_line(error)}): get the file again"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a float model.

    Raises:
        InputError: it is missing or malformed, or says that the weights are quantized already.
    """
    config = read_json_object(folder / "config.json")
    method = quantization_method(config)
    if method is not None:
        raise InputError(
            f"{folder} is already quantized with {method}: give the float checkpoint it was made "
            "from"
        )
    return config


def quantization_method(config: dict[str, Any]) -> str | None:
    """Name of the method a config says its weights are quantized with, or None."""
    block = config.get("quantization_config", config.get("compression_config"))
    if block is None:
        return None
    return str(block.get("quant_method", "an unnamed method")) if isinstance(block, dict) else "?"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make the model, sorted, after checking their headers.

    Raises:
        InputError: missing or pickled weights, a quantized model, an index that disagrees with its
            shards, a truncated or malformed file, weights that are no floats.
    """
    read_config(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(folder, index)
    single = folder / SINGLE_FILE
    if single.is_file():
        _check_header(single)
        return [single]
    raise InputError(_nothing_found(folder))


def stored(files: Iterable[Path]) -> dict[str, int]:
    """How many `tensors` safetensors files hold, and their `stored_bytes`."""
    paths = list(files)
    return {
        "tensors": sum(len(_check_header(path)) for path in paths),
        "stored_bytes": sum(path.stat().st_size for path in paths),
    }


def _nothing_found(folder: Path) -> str:
    if list(folder.glob("model-*-of-*.safetensors")):
        return f"{folder} has shards but no {INDEX_FILE}: get the index file as well"
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when opened: "
            "convert them to safetensors first"
        )
    return f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}: the weights are missing"


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    mapping = read_json_object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{index} has no weight_map: get the index file again")
    shards: dict[str, set[str]] = {}
    for tensor, shard in mapping.items():
        if not is_plain_name(shard):
            raise InputError(f"{index} places {tensor} outside the folder ({shard!r})")
        shards.setdefault(shard, set()).add(tensor)
    for shard, expected in sorted(shards.items()):
        path = folder / shard
        if not path.is_file():
            raise InputError(
                f"{path} is missing, and the index says it holds {len(expected)} weights"
            )
        absent = expected - _check_header(path)
        if absent:
            raise InputError(f"{path} lacks {some(absent)}, which the index says it holds")
    return [folder / shard for shard in sorted(shards)]


def _check_header(path: Path) -> set[str]:
    """Names in a safetensors file; opening it checks offsets, overlaps and the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:  # "pt" would count it as memory
            types = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({one_line(error)}): get the file again"
        ) from None
    for name, kind in sorted(types.items()):
        if name.endswith("weight") and kind not in FLOAT_TYPES:
            raise InputError(
                f"{path} stores {name} as {kind}: the weights are quantized already, give the "
                "float checkpoint"
            )
    return set(types)
