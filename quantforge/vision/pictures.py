"""Pictures as a network's input, from folders, archives, tables, arrays and data sets.

What is a picture is prepared as the network's own configuration says (`Preprocessing`): of the
largest centred part that has the input's shape the configured share, resized with a filter that
averages over all pixels it skips, then normalised. One step of Pillow does what resizing the whole
and cutting out the middle would, without rounding between them. Arrays of floats are taken as they
are: somebody prepared them.

Labels are taken where there are any: a label column, an array beside the pictures, one folder a
class, or file names that end in two numbers, the picture's and the label's ("imagenet_00_243.jpg").
What names tell is a guess: where it is no class of the network ("IMG_20240101_123404.jpg") there
are no labels.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from quantforge.errors import InputError
from quantforge.foreign import MALFORMED, one_line
from quantforge.load.documents import hub_rows, parquet_rows
from quantforge.load.source import HUB_ID
from quantforge.vision.network import Preprocessing

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ARCHIVES = {".zip", ".whl"}
ARRAYS = {".npy", ".npz"}
PICTURE_COLUMNS = ("image", "img", "picture", "pixels")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
PICTURE_ARRAYS = ("images", "pictures", "x", "arr_0")
LABEL_ARRAYS = ("labels", "targets", "y", "arr_1")
NUMBERED = re.compile(r".*_\d+_(\d+)")
MODES: Mapping[int, str] = {1: "L", 3: "RGB"}
DEEP_MODES = ("I", "F")  # more than 8 bits a pixel, which Pillow would clamp
INSTEAD = "a folder or archive of pictures, a .parquet, .npy or .npz file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Prepared pictures.

    Attributes:
        inputs: [count, channels, height, width] float32.
        labels: [count] int64, or None where there are none.
        description: where they come from, for people.
        guessed: whether labels are what names seem to tell.
    """

    inputs: Tensor
    labels: Tensor | None
    description: str
    guessed: bool = False

    def of_classes(self, count: int) -> Pictures:
        """These, with labels among so many classes.

        Raises:
            InputError: somebody gave labels that are not.
        """
        labels = self.labels
        if labels is None or bool(((labels >= 0) & (labels < count)).all()):
            return self
        if self.guessed:
            return replace(self, labels=None, guessed=False)
        raise InputError(
            f"{self.description}: labels are {int(labels.min())} to {int(labels.max())}, the "
            f"network has {count} classes, 0 to {count - 1}: correct them or leave them out"
        )

    def __len__(self) -> int:
        """How many."""
        return len(self.inputs)


@dataclass(frozen=True, slots=True)
class _Item:
    """A picture that is not opened yet."""

    where: str
    read: Callable[[], Image.Image]
    label: int | None
    guessed: bool = False


def load_pictures(
    source: str | Path | Tensor | NDArray[Any],
    preprocessing: Preprocessing,
    *,
    labels: NDArray[Any] | None = None,
    channels: int = 3,
    count: int | None = None,
    seed: int = 0,
    match: str = "*",
    split: str = "train",
) -> Pictures:
    """At most `count` pictures of a source, ready for the network.

    Of a folder, an archive, a table or an array they are drawn at random without repetition; of a
    data set of the hub they are the first.

    Args:
        source: a folder with pictures at any depth; a .zip or .whl archive of such; a .parquet file
            with a column of encoded pictures; a hub data set; a .npy or .npz file, or an array:
            bytes [n, h, w], [n, h, w, c] or [n, c, h, w] are pixels, floats [n, c, h, w] of the
            input's size are prepared already.
        preprocessing: the network's own.
        labels: [n] of an array's pictures.
        channels: of the network's input, 1 or 3.
        count: how many; None takes all.
        seed: of the draw.
        match: pattern of names below the folder or in the archive.
        split: of a hub data set.

    Raises:
        InputError: there are no pictures, or one cannot be read or has another form.
    """
    if channels not in MODES:
        raise InputError(
            f"pictures have 1 or 3 channels, the network wants {channels}: give arrays"
        )
    if isinstance(source, Tensor | np.ndarray):
        array = source.numpy(force=True) if isinstance(source, Tensor) else source
        return _of_array(array, labels, "an array", preprocessing, channels, _Draw(count, seed))
    path = Path(source).expanduser()
    draw = _Draw(count, seed)
    if path.suffix in ARRAYS and path.is_file():
        pixels, labels = _arrays_of(path)
        return _of_array(pixels, labels, str(path), preprocessing, channels, draw)
    items = _items_of(str(source), path, match=match, split=split, draw=draw)
    if not items:
        raise InputError(f"{source} holds no pictures: give {INSTEAD}")
    return _prepared(items, str(source), preprocessing, channels)


def preprocessed(
    picture: Image.Image, preprocessing: Preprocessing, *, channels: int = 3
) -> Tensor:
    """[channels, height, width] float32 of one picture of any size and mode."""
    height, width = preprocessing.size
    scale = min(picture.width / width, picture.height / height) * preprocessing.crop
    middle, half = (picture.width / 2, picture.height / 2), (width * scale / 2, height * scale / 2)
    box = (middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1])
    resampling = Image.Resampling[preprocessing.interpolation.upper()]
    plain = picture.convert(MODES[channels]).resize((width, height), resampling, box)
    pixels = torch.from_numpy(np.array(plain)).view(height, width, channels).permute(2, 0, 1)
    mean, deviation = (
        torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)
        for numbers in (preprocessing.mean, preprocessing.deviation)
    )
    return (pixels.float() / 255 - mean) / deviation


@dataclass(frozen=True, slots=True)
class _Draw:
    """Which of several pictures are taken."""

    count: int | None
    seed: int

    def of(self, total: int) -> list[int]:
        """Numbers of the chosen ones: all in order, or `count` at random."""
        if self.count is None:
            return list(range(total))
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(total, generator=generator)[: self.count].tolist()


def _prepared(
    items: Sequence[_Item], source: str, preprocessing: Preprocessing, channels: int
) -> Pictures:
    inputs = []
    for item in items:
        try:
            picture = item.read()
            if picture.mode.split(";")[0] in DEEP_MODES:
                raise InputError(f"{item.where} has more than 8 bits a pixel: convert it to 8")
            inputs.append(preprocessed(picture, preprocessing, channels=channels))
        except (*MALFORMED, Image.DecompressionBombError) as error:
            raise InputError(
                f"{item.where} is no picture that can be read ({one_line(error)}): get it again or "
                "take it out"
            ) from None
    known = [item.label for item in items if item.label is not None]
    labels = torch.tensor(known, dtype=torch.int64) if len(known) == len(items) else None
    guessed = any(item.guessed for item in items)
    return Pictures(inputs=torch.stack(inputs), labels=labels, description=source, guessed=guessed)


def _items_of(source: str, path: Path, *, match: str, split: str, draw: _Draw) -> list[_Item]:
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        return _named_items(names, lambda name: (path / name).read_bytes(), source, match, draw)
    if path.is_file() and path.suffix in ARCHIVES:
        return _archive_items(path, match, draw)
    if path.is_file() and path.suffix == ".parquet":
        return _table_items(path, draw)
    if path.is_file():
        raise InputError(f"{path} has an unknown format: give {INSTEAD}")
    if HUB_ID.fullmatch(source) and path.suffix not in {".parquet", *ARCHIVES, *ARRAYS}:
        rows = islice(hub_rows(source, split, instead=INSTEAD), draw.count)
        return list(_row_items(source, rows))
    raise InputError(f"no pictures at {source}: give {INSTEAD}, or a hub data set")


def _archive_items(path: Path, match: str, draw: _Draw) -> list[_Item]:
    def read(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, *MALFORMED) as error:
        raise InputError(f"{path} is no whole archive ({one_line(error)}): get it again") from None
    return _named_items(names, read, str(path), match, draw)


def _named_items(
    names: Sequence[str], read: Callable[[str], bytes], source: str, match: str, draw: _Draw
) -> list[_Item]:
    """Pictures that have names; those of hidden files and folders are left out."""
    found = sorted(
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and fnmatch(name, match)
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    )
    labels = _labels_of(found)

    def opened(name: str) -> Callable[[], Image.Image]:
        return lambda: _decoded(read(name))

    return [
        _Item(f"{source}/{found[i]}", opened(found[i]), labels[i], guessed=True)
        for i in draw.of(len(found))
    ]


def _labels_of(names: Sequence[str]) -> list[int] | list[None]:
    """Labels that the names tell: numbers at their ends, or the places of sorted folders."""
    numbered = [NUMBERED.fullmatch(PurePosixPath(name).stem) for name in names]
    if all(numbered):
        return [int(found[1]) for found in numbered if found]
    folders = [PurePosixPath(name).parent.as_posix() for name in names]
    classes = sorted(set(folders))
    if "." in classes or len(classes) < 2:
        return [None] * len(names)
    if all(folder.isdecimal() for folder in classes):
        return [int(folder) for folder in folders]
    place = {folder: number for number, folder in enumerate(classes)}
    return [place[folder] for folder in folders]


def _decoded(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def _table_items(path: Path, draw: _Draw) -> list[_Item]:
    """Pictures of a table, of which only the drawn ones are kept while it is read."""
    total = sum(1 for _ in parquet_rows(path)) if draw.count is not None else 0
    order = draw.of(total)
    wanted = set(order)
    rows = ((n, row) for n, row in parquet_rows(path) if draw.count is None or n - 1 in wanted)
    items = list(_row_items(str(path), rows))
    if draw.count is None:
        return items
    place = {number: index for index, number in enumerate(sorted(wanted))}
    return [items[place[number]] for number in order]


def _row_items(source: str, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[_Item]:
    """Pictures of rows: encoded bytes, or decoded already by `datasets`."""
    for number, row in rows:
        where = f"{source} row {number}"
        column = next((name for name in PICTURE_COLUMNS if row.get(name) is not None), None)
        if column is None:
            raise InputError(
                f"{where} has no picture in a column {', '.join(PICTURE_COLUMNS)}; "
                f"its columns: {', '.join(row)}"
            )
        value = row[column]
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes | Image.Image):
            raise InputError(f"{where} has no encoded picture in its column {column!r}")
        label = next((row[name] for name in LABEL_COLUMNS if isinstance(row.get(name), int)), None)
        yield _Item(where, _reader(data), label)


def _reader(data: bytes | Image.Image) -> Callable[[], Image.Image]:
    return lambda: _decoded(data) if isinstance(data, bytes) else data


def _arrays_of(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Pictures and labels of a .npy or .npz file."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            names = list(loaded.files)
            pixels = next((name for name in PICTURE_ARRAYS if name in names), None)
            labels = next((name for name in LABEL_ARRAYS if name in names), None)
            if pixels is None:
                raise InputError(
                    f"{path} has no array {', '.join(PICTURE_ARRAYS)}; it has {', '.join(names)}"
                )
            return loaded[pixels], loaded[labels] if labels is not None else None
    except (zipfile.BadZipFile, EOFError, *MALFORMED) as error:
        raise InputError(
            f"{path} cannot be read as numbers ({one_line(error)}): save it again with numpy"
        ) from None


def _of_array(
    array: NDArray[Any], labels: NDArray[Any] | None, where: str, preprocessing: Preprocessing,
    channels: int, draw: _Draw,
) -> Pictures:  # fmt: skip
    if labels is not None and (labels.shape != array.shape[:1] or labels.dtype.kind not in "iu"):
        raise InputError(f"{where} has no whole label for each of its pictures")
    if not array.size or array.ndim == 0:
        raise InputError(f"{where} holds no pictures: give {INSTEAD}")
    chosen = draw.of(len(array))
    picked = None if labels is None else labels[chosen]
    if array.dtype == np.uint8:
        pixels = _channels_last(array, where)
        items = [
            _Item(
                f"{where}, picture {i}",
                lambda pixel=pixels[i]: Image.fromarray(pixel),  # type: ignore[misc]
                None if labels is None else int(labels[i]),
            )
            for i in chosen
        ]
        return _prepared(items, where, preprocessing, channels)
    shape = (channels, *preprocessing.size)
    if array.dtype.kind != "f" or array.shape[1:] != shape:
        raise InputError(
            f"{where} is {list(array.shape)} {array.dtype}: give pixels as uint8, or prepared "
            f"pictures as floats [count, {', '.join(map(str, shape))}]"
        )
    inputs = torch.from_numpy(np.ascontiguousarray(array[chosen], dtype=np.float32))
    if not torch.isfinite(inputs).all():
        raise InputError(f"{where} holds numbers that are not finite: correct it")
    known = None if picked is None else torch.from_numpy(picked.astype(np.int64))
    return Pictures(inputs=inputs, labels=known, description=where)


def _channels_last(array: NDArray[Any], where: str) -> NDArray[Any]:
    """Bytes as [n, h, w] or [n, h, w, 3]."""
    if array.ndim == 4 and array.shape[3] not in MODES and array.shape[1] in MODES:
        array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3):
        return array
    raise InputError(
        f"{where} is {list(array.shape)}: pixels are [n, h, w], [n, h, w, c] or [n, c, h, w] with "
        "1 or 3 channels"
    )
